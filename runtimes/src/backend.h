// What a runtime adds to a Session.
#pragma once

#include <algorithm>

#include "liger/liger.h"

namespace liger {

// What a runtime's library exports as liger_backend_<target>.
using OpenBackend = void(const Bundle& bundle, const Options& options, Result<std::unique_ptr<Session>>& out);
#define LIGER_BACKEND(target)                                                                       \
  extern "C" __attribute__((visibility("default"))) void liger_backend_##target(                    \
      const liger::Bundle& bundle, const liger::Options& options,                                   \
      liger::Result<std::unique_ptr<liger::Session>>& out)

class Backend {
 public:
  virtual ~Backend() = default;
  // Of the state; the session turns what these three throw into errors. Before any token, for this many rows:
  virtual void clear(std::int64_t rows) = 0;
  // After clear(): so many tokens a row, and tensors as the manifest orders them, in its shapes.
  virtual void write(const std::vector<const State::Tensor*>& tensors, const std::vector<std::int64_t>& length) = 0;
  virtual State read() = 0;
  // Advance the state, and throw nothing; tokens [rows, width], valid [rows]. Logits [rows, vocab] of the backend's own memory.
  virtual Result<const float*> run(const std::int64_t* tokens, std::int64_t width, const std::int64_t* valid) = 0;
  virtual Result<std::unique_ptr<Backend>> twin() = 0;  // same weights, no state
};

inline std::int64_t count(const std::vector<std::int64_t>& shape) {
  std::int64_t product = 1;
  for (auto size : shape) product *= size;
  return product;
}

inline std::vector<std::int64_t> shape_of(const TensorInfo& info, std::int64_t rows) {
  auto shape = info.shape;
  shape.insert(shape.begin(), rows);
  return shape;
}

// `body` with every exception turned into an Error.
template <class T, class Body>
Result<T> guarded(Code code, const std::string& where, Body body) {
  try {
    return body();
  } catch (const std::exception& error) {
    std::string line = error.what();
    return Error{code, where + ": " + line.substr(0, line.find('\n'))};
  }
}

}  // namespace liger
