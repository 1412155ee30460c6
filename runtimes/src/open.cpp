// A bundle's runtime, by its target: linked into the program, or loaded from beside this library.
#include <dlfcn.h>

#include <filesystem>

#include "backend.h"

namespace liger {
namespace {

// Where the library (or program) that holds this code lies.
std::filesystem::path here() {
  Dl_info info{};
  if (!dladdr(reinterpret_cast<const void*>(&open_session), &info) || !info.dli_fname) return {};
  std::error_code ignored;
  return std::filesystem::canonical(info.dli_fname, ignored).parent_path();
}

}  // namespace

Result<std::unique_ptr<Session>> open_session(const Bundle& bundle, const Options& options) {
  if (bundle.target != "onnx" && bundle.target != "executorch" && bundle.target != "inductor")
    return Error{Code::bundle, bundle.path + ": no runtime for target '" + bundle.target +
                                   "'; known are onnx, executorch, inductor"};
  const std::string symbol = "liger_backend_" + bundle.target, name = "libliger_" + bundle.target + ".so";
  void* found = dlsym(RTLD_DEFAULT, symbol.c_str());
  if (!found) {
    void* library = dlopen((here() / name).c_str(), RTLD_NOW | RTLD_LOCAL);
    std::string reason = library ? "" : dlerror();
    if (!library) library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);  // where the system looks, as on Android
    if (!library)
      return Error{Code::runtime, "a bundle for '" + bundle.target + "' needs " + name + " beside liger's library (" +
                                      reason + "): build it with make native, or link it"};
    found = dlsym(library, symbol.c_str());
    if (!found) return Error{Code::runtime, name + " is not this library's: it has no " + symbol};
  }
  Result<std::unique_ptr<Session>> opened = Error{Code::runtime, "not opened"};
  reinterpret_cast<OpenBackend*>(found)(bundle, options, opened);
  return opened;
}

}  // namespace liger
