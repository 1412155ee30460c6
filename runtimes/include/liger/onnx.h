// The ONNX Runtime backend. The runtime is loaded when a session is opened, so one program works with any version of it.
#pragma once

#include "liger/liger.h"

namespace liger {

struct OnnxOptions {
  std::string runtime = "libonnxruntime.so.1";  // a path, or a name that the loader finds
  std::string ops;                              // this project's kernels (libliger_ort_ops.so), or "": without them
  int threads = 0;                              // 0: ONNX Runtime's choice
};

Result<std::unique_ptr<Session>> open_onnx(const Bundle& bundle, const OnnxOptions& options = {});

}  // namespace liger
