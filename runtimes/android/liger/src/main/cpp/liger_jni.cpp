// dev.liger.Native over liger.h. Text crosses as UTF-8 bytes: JNI's own strings are another encoding.
#include <jni.h>
#include <liger.h>

#include <memory>
#include <string>
#include <vector>

namespace {

struct Handle {
  liger_bundle* bundle = nullptr;
  liger_text* text = nullptr;
  liger_session* session = nullptr;

  ~Handle() {
    liger_session_close(session);
    liger_text_close(text);
    liger_bundle_close(bundle);
  }
};

Handle* at(jlong handle) { return reinterpret_cast<Handle*>(handle); }

// Throws dev.liger.LigerException with the last error's text; false, so that callers can return.
bool check(JNIEnv* env, liger_status status) {
  if (status == LIGER_OK) return true;
  jclass type = env->FindClass("dev/liger/LigerException");
  if (type) env->ThrowNew(type, liger_last_error());
  return false;
}

std::string bytes(JNIEnv* env, jbyteArray array) {
  std::string out(static_cast<std::size_t>(env->GetArrayLength(array)), '\0');
  env->GetByteArrayRegion(array, 0, static_cast<jsize>(out.size()), reinterpret_cast<jbyte*>(out.data()));
  return out;
}

std::vector<std::int64_t> ids(JNIEnv* env, jlongArray array) {
  static_assert(sizeof(jlong) == sizeof(std::int64_t));
  std::vector<std::int64_t> out(static_cast<std::size_t>(env->GetArrayLength(array)));
  env->GetLongArrayRegion(array, 0, static_cast<jsize>(out.size()), reinterpret_cast<jlong*>(out.data()));
  return out;
}

struct Callback {
  JNIEnv* env;
  jobject target;
  jmethodID method;
};

int on_token(int64_t id, const char* text, size_t size, void* user) {
  auto& callback = *static_cast<Callback*>(user);
  JNIEnv* env = callback.env;
  jbyteArray piece = env->NewByteArray(static_cast<jsize>(size));
  if (!piece) return 0;
  env->SetByteArrayRegion(piece, 0, static_cast<jsize>(size), reinterpret_cast<const jbyte*>(text));
  const jboolean go = env->CallBooleanMethod(callback.target, callback.method, static_cast<jlong>(id), piece);
  env->DeleteLocalRef(piece);
  return !env->ExceptionCheck() && go;
}

}  // namespace

extern "C" {

JNIEXPORT jlong JNICALL Java_dev_liger_Native_open(JNIEnv* env, jobject, jbyteArray bundle, jbyteArray runtime,
                                                   jint threads) {
  auto handle = std::make_unique<Handle>();
  if (!check(env, liger_bundle_open(bytes(env, bundle).c_str(), 1, &handle->bundle))) return 0;
  liger_bundle_info info{};
  info.size = sizeof info;
  if (!check(env, liger_bundle_describe(handle->bundle, &info))) return 0;
  if (info.has_tokenizer && !check(env, liger_text_open(handle->bundle, &handle->text))) return 0;
  const std::string library = bytes(env, runtime);
  const liger_options options{sizeof options, library.empty() ? nullptr : library.c_str(), nullptr, threads};
  if (!check(env, liger_session_open(handle->bundle, &options, &handle->session))) return 0;
  return reinterpret_cast<jlong>(handle.release());
}

JNIEXPORT void JNICALL Java_dev_liger_Native_close(JNIEnv*, jobject, jlong handle) { delete at(handle); }

JNIEXPORT void JNICALL Java_dev_liger_Native_reset(JNIEnv*, jobject, jlong handle) {
  liger_session_reset(at(handle)->session);
}

JNIEXPORT void JNICALL Java_dev_liger_Native_save(JNIEnv* env, jobject, jlong handle, jbyteArray path) {
  check(env, liger_session_save(at(handle)->session, bytes(env, path).c_str()));
}

JNIEXPORT void JNICALL Java_dev_liger_Native_load(JNIEnv* env, jobject, jlong handle, jbyteArray path) {
  check(env, liger_session_load(at(handle)->session, bytes(env, path).c_str()));
}

JNIEXPORT jlongArray JNICALL Java_dev_liger_Native_encode(JNIEnv* env, jobject, jlong handle, jbyteArray prompt,
                                                          jint flags) {
  const std::string text = bytes(env, prompt);
  std::vector<std::int64_t> found(text.size() + 1024);
  size_t count = 0;
  for (int tries = 0; tries < 2; ++tries) {
    if (!check(env, liger_text_encode(at(handle)->text, text.c_str(), flags, found.data(), found.size(), &count)))
      return nullptr;
    if (count <= found.size()) break;
    found.resize(count);
  }
  jlongArray out = env->NewLongArray(static_cast<jsize>(count));
  if (out) env->SetLongArrayRegion(out, 0, static_cast<jsize>(count), reinterpret_cast<const jlong*>(found.data()));
  return out;
}

JNIEXPORT void JNICALL Java_dev_liger_Native_generate(JNIEnv* env, jobject, jlong handle, jlongArray prompt,
                                                      jlong most, jdouble temperature, jlong top_k, jdouble top_p,
                                                      jlong seed, jobject target) {
  Callback callback{env, target, env->GetMethodID(env->GetObjectClass(target), "onToken", "(J[B)Z")};
  if (!callback.method) return;
  const auto tokens = ids(env, prompt);
  const liger_generation options{sizeof options, most, temperature, top_p, top_k, static_cast<std::uint64_t>(seed)};
  const auto status = liger_generate(at(handle)->session, at(handle)->text, tokens.data(), tokens.size(), &options,
                                     on_token, &callback, nullptr);
  if (!env->ExceptionCheck()) check(env, status);
}

}  // extern "C"
