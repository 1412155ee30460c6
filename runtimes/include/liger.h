/* liger: the C interface of the library, for C, Swift, Kotlin (JNI), Rust, Go and whatever else calls C.
 *
 *     liger_bundle *bundle;  liger_session *session;  const float *logits;
 *     if (liger_bundle_open("bundle-onnx", 1, &bundle) || liger_session_open(bundle, NULL, &session))
 *       return fail(liger_last_error());
 *     liger_session_prefill(session, prompt, count, 1, NULL, &logits);
 *     liger_session_step(session, &next, 1, &logits);
 *
 * A call returns LIGER_OK or says in liger_last_error() what is wrong, where, and what to do. Handles belong to one
 * thread at a time; a bundle and a text may be shared. Strings are UTF-8. Nothing is thrown across this boundary.
 */
#ifndef LIGER_H
#define LIGER_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define LIGER_API __declspec(dllexport)
#else
#define LIGER_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define LIGER_ABI 1 /* grows when a function or a struct changes in a way that breaks callers */

typedef enum liger_status {
  LIGER_OK = 0,
  LIGER_BUNDLE = 1,   /* a bundle is missing, damaged, newer than this library, or for another machine */
  LIGER_STATE = 2,    /* a state is missing, damaged, or of another model */
  LIGER_TOKEN = 3,    /* token ids out of range, or of another number of rows */
  LIGER_ARGUMENT = 4, /* another bad argument */
  LIGER_RUNTIME = 5,  /* the runtime is not there, or failed */
  LIGER_POISONED = 6  /* this session failed earlier: liger_session_reset() or liger_session_load() first */
} liger_status;

typedef struct liger_bundle liger_bundle;
typedef struct liger_session liger_session;
typedef struct liger_text liger_text;

/* Structs begin with their size, so that they can grow: set it to sizeof. Zero elsewhere means the default. */
typedef struct liger_options {
  size_t size;
  const char *runtime; /* ONNX Runtime: path of libonnxruntime */
  const char *ops;     /* ONNX Runtime: path of libliger_ort_ops */
  int32_t threads;     /* 0: the runtime's choice */
} liger_options;

typedef struct liger_bundle_info {
  size_t size;
  const char *target, *model; /* live as long as the bundle; `model` ties states to it */
  int64_t vocab, chunk, batch, bos;
  size_t state_bytes; /* of one row */
  int32_t has_tokenizer, has_chat;
} liger_bundle_info;

typedef struct liger_generation {
  size_t size;
  int64_t max_new_tokens;    /* 0: 256 */
  double temperature, top_p; /* temperature 0 is greedy; top_p 0 or 1 keeps everything */
  int64_t top_k;             /* 0 keeps everything */
  uint64_t seed;
} liger_generation;

/* One new token: its id and the characters that it completes (none, or several). Return 0 to stop. */
typedef int (*liger_on_token)(int64_t id, const char *text, size_t bytes, void *user);

LIGER_API int32_t liger_abi(void);            /* of the library that is loaded: compare with LIGER_ABI */
LIGER_API const char *liger_last_error(void); /* one line; of this thread's last call that failed */

LIGER_API liger_status liger_bundle_open(const char *directory, int32_t checksums, liger_bundle **out);
LIGER_API liger_status liger_bundle_describe(const liger_bundle *bundle, liger_bundle_info *out);
LIGER_API void liger_bundle_close(liger_bundle *bundle); /* sessions and texts stay */

LIGER_API liger_status liger_session_open(const liger_bundle *bundle, const liger_options *options,
                                          liger_session **out);
/* Same weights, a copy of the state. */
LIGER_API liger_status liger_session_fork(liger_session *session, liger_session **out);
LIGER_API void liger_session_close(liger_session *session);
LIGER_API void liger_session_reset(liger_session *session);

/* `count` ids of `rows` rows, one row after the other; valid: how many of each row are real, or NULL for all. Logits
 * [rows, vocab] of each row's last token stay as they are until the session's next call. */
LIGER_API liger_status liger_session_prefill(liger_session *session, const int64_t *tokens, size_t count, size_t rows,
                                             const int64_t *valid, const float **logits);
LIGER_API liger_status liger_session_step(liger_session *session, const int64_t *tokens, size_t rows,
                                          const float **logits);
/* The state as a file that every runtime and language continues. */
LIGER_API liger_status liger_session_save(liger_session *session, const char *path);
LIGER_API liger_status liger_session_load(liger_session *session, const char *path);

LIGER_API liger_status liger_text_open(const liger_bundle *bundle, liger_text **out);
LIGER_API void liger_text_close(liger_text *text);
/* Ids of a prompt, begun as the model was trained to begin; LIGER_CONTINUES: going on with what the session has seen;
 * LIGER_CHAT: as a user's message in the model's chat template. `count` is set to how many there are; as many as
 * `capacity` are written. */
#define LIGER_CONTINUES 1
#define LIGER_CHAT 2
LIGER_API liger_status liger_text_encode(const liger_text *text, const char *prompt, int32_t flags, int64_t *ids,
                                         size_t capacity, size_t *count);

/* Feed the prompt, then hand over each new token until the end of text (not handed over), a 0, or max_new_tokens. Text
 * may be NULL: then no characters come. The session has then seen all but the last token. */
LIGER_API liger_status liger_generate(liger_session *session, const liger_text *text, const int64_t *prompt,
                                      size_t count, const liger_generation *generation, liger_on_token on_token,
                                      void *user, size_t *made);

#ifdef __cplusplus
}
#endif
#endif
