/* Two continuations of one prompt, from C: c_embed BUNDLE PROMPT [libonnxruntime.so] */
#include <liger.h>
#include <stdio.h>

static int print(int64_t id, const char *text, size_t bytes, void *user) {
  (void)id, (void)user;
  fwrite(text, 1, bytes, stdout);
  return 1;
}

int main(int argc, char **argv) {
  liger_bundle *bundle = NULL;
  liger_session *session = NULL, *twin = NULL;
  liger_text *text = NULL;
  liger_options options = {sizeof options, argc > 3 ? argv[3] : NULL, NULL, 1};
  liger_generation greedy = {sizeof greedy, 40, 0, 1, 0, 0}, warm = {sizeof warm, 40, 0.8, 0.95, 0, 7};
  int64_t ids[512];
  const float *logits;
  size_t count;
  int failed = argc < 3 || liger_bundle_open(argv[1], 1, &bundle) || liger_text_open(bundle, &text) ||
               liger_text_encode(text, argv[2], 0, ids, 512, &count) || count > 512 ||
               liger_session_open(bundle, &options, &session) ||
               (count > 1 && liger_session_prefill(session, ids, count - 1, 1, NULL, &logits)) ||
               liger_session_fork(session, &twin) || /* the prompt is read once */
               liger_generate(session, text, ids + count - 1, 1, &greedy, print, NULL, NULL) || !puts("\n--") ||
               liger_generate(twin, text, ids + count - 1, 1, &warm, print, NULL, NULL);
  if (failed) fprintf(stderr, "error: %s\n", argc < 3 ? "usage: c_embed BUNDLE PROMPT" : liger_last_error());
  liger_session_close(twin);
  liger_session_close(session);
  liger_text_close(text);
  liger_bundle_close(bundle);
  return failed ? 2 : 0;
}
