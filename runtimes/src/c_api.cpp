// liger.h over liger/liger.h: arguments checked, errors kept for the thread, nothing thrown.
#include "liger.h"

#include <cstring>

#include "backend.h"

struct liger_bundle {
  liger::Bundle bundle;
};
struct liger_session {
  std::unique_ptr<liger::Session> session;
  std::vector<std::int64_t> tokens, valid;
};
struct liger_text {
  liger::Text text;
};

namespace {

thread_local std::string last_error;

liger_status fail(const liger::Error& error) {
  last_error = error.message;
  return static_cast<liger_status>(error.code);
}

// The status of what `body` returns (a Result), with every exception turned into one.
template <class Body>
liger_status answer(bool arguments_given, Body body) {
  if (!arguments_given) return fail({liger::Code::argument, "an argument is NULL that must not be"});
  auto done = liger::guarded<liger::Done>(liger::Code::runtime, "liger", [&]() -> liger::Status { return body(); });
  return done ? LIGER_OK : fail(done.error());
}

// The caller's struct, as far as it knows it; the rest zero.
template <class T>
T sized(const T* given) {
  T whole{};
  if (given) std::memcpy(&whole, given, std::min(given->size, sizeof(T)));
  return whole;
}

std::string string(const char* text) { return text ? text : ""; }

template <class T>
std::unique_ptr<T> held(T value) {
  return std::make_unique<T>(std::move(value));
}

}  // namespace

extern "C" {

int32_t liger_abi(void) { return LIGER_ABI; }
const char* liger_last_error(void) { return last_error.c_str(); }

liger_status liger_bundle_open(const char* directory, int32_t checksums, liger_bundle** out) {
  return answer(directory && out, [&]() -> liger::Status {
    auto bundle = liger::Bundle::open(directory, checksums != 0);
    if (!bundle) return bundle.error();
    *out = held(liger_bundle{std::move(*bundle)}).release();
    return liger::Done{};
  });
}

liger_status liger_bundle_describe(const liger_bundle* handle, liger_bundle_info* out) {
  return answer(handle && out && out->size >= sizeof(size_t), [&]() -> liger::Status {
    const auto& bundle = handle->bundle;
    liger_bundle_info info{};
    info.size = out->size;
    info.target = bundle.target.c_str(), info.model = bundle.model.c_str();
    info.vocab = bundle.vocab, info.chunk = bundle.chunk, info.batch = bundle.batch, info.bos = bundle.bos;
    for (const auto& tensor : bundle.state)
      info.state_bytes += static_cast<std::size_t>(liger::count(tensor.shape)) * (tensor.name == "length" ? 8 : 4);
    info.has_tokenizer = !bundle.tokenizer.empty(), info.has_chat = static_cast<bool>(bundle.chat);
    std::memcpy(out, &info, std::min(out->size, sizeof(info)));
    return liger::Done{};
  });
}

void liger_bundle_close(liger_bundle* bundle) { delete bundle; }

liger_status liger_session_open(const liger_bundle* bundle, const liger_options* given, liger_session** out) {
  return answer(bundle && out, [&]() -> liger::Status {
    const auto options = sized(given);
    auto session =
        liger::open_session(bundle->bundle, {string(options.runtime), string(options.ops), options.threads});
    if (!session) return session.error();
    *out = held(liger_session{std::move(*session), {}, {}}).release();
    return liger::Done{};
  });
}

liger_status liger_session_fork(liger_session* session, liger_session** out) {
  return answer(session && out, [&]() -> liger::Status {
    auto twin = session->session->fork();
    if (!twin) return twin.error();
    *out = held(liger_session{std::move(*twin), {}, {}}).release();
    return liger::Done{};
  });
}

void liger_session_close(liger_session* session) { delete session; }

void liger_session_reset(liger_session* session) {
  if (session) session->session->reset();
}

liger_status liger_session_prefill(liger_session* session, const int64_t* tokens, size_t count, size_t rows,
                                   const int64_t* valid, const float** logits) {
  return answer(session && tokens && logits, [&]() -> liger::Status {
    session->tokens.assign(tokens, tokens + count);
    session->valid.assign(valid, valid + (valid ? rows : 0));
    auto found = session->session->prefill(session->tokens, static_cast<std::int64_t>(rows), session->valid);
    if (!found) return found.error();
    *logits = found->data;
    return liger::Done{};
  });
}

liger_status liger_session_step(liger_session* session, const int64_t* tokens, size_t rows, const float** logits) {
  return answer(session && tokens && logits, [&]() -> liger::Status {
    session->tokens.assign(tokens, tokens + rows);
    auto found = session->session->step(session->tokens);
    if (!found) return found.error();
    *logits = found->data;
    return liger::Done{};
  });
}

liger_status liger_session_save(liger_session* session, const char* path) {
  return answer(session && path, [&]() -> liger::Status {
    auto state = session->session->state();
    return state ? state->save(path) : liger::Status(state.error());
  });
}

liger_status liger_session_load(liger_session* session, const char* path) {
  return answer(session && path, [&]() -> liger::Status {
    auto state = liger::State::load(path);
    return state ? session->session->load_state(*state) : liger::Status(state.error());
  });
}

liger_status liger_text_open(const liger_bundle* bundle, liger_text** out) {
  return answer(bundle && out, [&]() -> liger::Status {
    auto text = liger::Text::open(bundle->bundle);
    if (!text) return text.error();
    *out = held(liger_text{std::move(*text)}).release();
    return liger::Done{};
  });
}

void liger_text_close(liger_text* text) { delete text; }

liger_status liger_text_encode(const liger_text* text, const char* prompt, int32_t flags, int64_t* ids, size_t capacity,
                               size_t* count) {
  return answer(text && prompt && count && (ids || !capacity), [&]() -> liger::Status {
    liger::Result<std::string> whole = std::string(prompt);
    const bool begins = !(flags & LIGER_CONTINUES);
    if (flags & LIGER_CHAT) whole = text->text.chat(*whole, begins);
    if (!whole) return whole.error();
    auto found = text->text.encode(*whole, begins);
    if (!found) return found.error();
    *count = found->size();
    std::copy_n(found->begin(), std::min(capacity, found->size()), ids);
    return liger::Done{};
  });
}

liger_status liger_generate(liger_session* session, const liger_text* text, const int64_t* prompt, size_t count,
                            const liger_generation* given, liger_on_token on_token, void* user, size_t* made) {
  return answer(session && prompt && on_token, [&]() -> liger::Status {
    const auto wanted = sized(given);
    const liger::SamplingOptions sampling{wanted.temperature, wanted.top_p ? wanted.top_p : 1, wanted.top_k,
                                          wanted.seed};
    liger::Characters characters;
    session->tokens.assign(prompt, prompt + count);
    auto found = liger::generate(*session->session, session->tokens,
                                 wanted.max_new_tokens ? wanted.max_new_tokens : 256, sampling,
                                 session->session->bundle().eos, [&](std::int64_t id) {
                                   auto bytes = text ? text->text.bytes(id) : std::string();
                                   const auto piece = bytes ? characters.feed(*bytes) : std::string();
                                   return on_token(id, piece.c_str(), piece.size(), user) != 0;
                                 });
    if (!found) return found.error();
    if (made) *made = static_cast<std::size_t>(*found);
    return liger::Done{};
  });
}

}  // extern "C"
