// The state lives in two sets of buffers that are bound as input and output in turn: a step copies none of it.
#include <dlfcn.h>

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <optional>
#include <set>

#include "backend.h"

namespace liger {
namespace {

// One for the process, never let go: sessions may outlive any other static.
Status load_runtime(const std::string& name) {
  static const OrtApi* loaded = nullptr;
  if (loaded) return Done{};
  void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library)
    return Error{Code::runtime, std::string("ONNX Runtime is not found (") + dlerror() +
                                    "): give the path of libonnxruntime.so"};
  auto base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(library, "OrtGetApiBase"));
  if (!base) return Error{Code::runtime, name + " is not ONNX Runtime: it has no OrtGetApiBase"};
  loaded = base()->GetApi(ORT_API_VERSION);
  if (!loaded)
    return Error{Code::runtime, name + " is ONNX Runtime " + base()->GetVersionString() + ": 1." +
                                    std::to_string(ORT_API_VERSION) + " or newer is needed"};
  Ort::InitApi(loaded);
  return Done{};
}

class OnnxBackend final : public Backend {
 public:
  OnnxBackend(const Bundle& bundle, std::shared_ptr<Ort::Session> session)
      : bundle_(bundle), session_(std::move(session)) {}

  void clear(std::int64_t rows) override {
    rows_ = rows, turn_ = 0;
    steps_ = {};
    const auto n = static_cast<std::size_t>(rows);
    for (auto& set : sets_) {
      set.clear();
      for (const auto& info : bundle_.state) set.emplace_back(static_cast<std::size_t>(rows * count(info.shape)), 0.0f);
    }
    for (auto& length : lengths_) length.assign(n, 0);
    tokens_.assign(n, 0);
    ones_.assign(n, 1);
    logits_.assign(static_cast<std::size_t>(rows * bundle_.vocab), 0.0f);
  }

  Result<const float*> run(const std::int64_t* tokens, std::int64_t width, const std::int64_t* valid) override {
    return guarded<const float*>(Code::runtime, "onnxruntime", [&]() -> Result<const float*> {
      const bool step = width == 1 && std::all_of(valid, valid + rows_, [](auto n) { return n == 1; });
      if (!step) {
        Ort::IoBinding binding{*session_};
        bind(binding, const_cast<std::int64_t*>(tokens), width, const_cast<std::int64_t*>(valid));
        session_->Run(Ort::RunOptions{nullptr}, binding);
      } else {
        std::copy_n(tokens, rows_, tokens_.begin());
        auto& binding = steps_[turn_];
        if (!binding) bind(binding.emplace(*session_), tokens_.data(), 1, ones_.data());
        session_->Run(Ort::RunOptions{nullptr}, *binding);
      }
      turn_ = 1 - turn_;
      return logits_.data();
    });
  }

  State read() override {
    State state;
    for (std::size_t i = 0; i + 1 < bundle_.state.size(); ++i)
      state.tensors.push_back({bundle_.state[i].name, shape_of(bundle_.state[i], rows_), sets_[turn_][i]});
    state.length = lengths_[turn_];
    return state;
  }

  void write(const std::vector<const State::Tensor*>& tensors, const std::vector<std::int64_t>& length) override {
    for (std::size_t i = 0; i < tensors.size(); ++i)
      std::copy(tensors[i]->values.begin(), tensors[i]->values.end(), sets_[0][i].begin());
    lengths_[0] = length;
  }

  Result<std::unique_ptr<Backend>> twin() override {
    return std::unique_ptr<Backend>(std::make_unique<OnnxBackend>(bundle_, session_));
  }

 private:
  template <class T>
  Ort::Value view(T* data, std::vector<std::int64_t> shape) {
    return Ort::Value::CreateTensor<T>(memory_, data, static_cast<std::size_t>(count(shape)), shape.data(),
                                       shape.size());
  }

  void bind(Ort::IoBinding& binding, std::int64_t* tokens, std::int64_t width, std::int64_t* valid) {
    binding.BindInput("tokens", view(tokens, {rows_, width}));
    binding.BindInput("valid", view(valid, {rows_}));
    binding.BindOutput("logits", view(logits_.data(), {rows_, bundle_.vocab}));
    for (std::size_t i = 0; i < bundle_.state.size(); ++i) {
      const auto& info = bundle_.state[i];
      const auto shape = shape_of(info, rows_);
      for (const bool input : {true, false}) {
        const auto set = input ? turn_ : 1 - turn_;
        auto value = info.dtype == "int64" ? view(lengths_[set].data(), shape) : view(sets_[set][i].data(), shape);
        input ? binding.BindInput(info.input.c_str(), value) : binding.BindOutput(info.output.c_str(), value);
      }
    }
  }

  Bundle bundle_;
  std::shared_ptr<Ort::Session> session_;
  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
  std::int64_t rows_ = 0;
  std::size_t turn_ = 0;
  std::array<std::vector<std::vector<float>>, 2> sets_;
  std::array<std::vector<std::int64_t>, 2> lengths_;
  std::vector<std::int64_t> tokens_, ones_;
  std::vector<float> logits_;
  std::array<std::optional<Ort::IoBinding>, 2> steps_;  // a step's bindings are made once for each set
};

Status check_names(const Bundle& bundle, Ort::Session& session) {
  Ort::AllocatorWithDefaultOptions allocator;
  std::set<std::string> inputs, outputs, wanted{"tokens", "valid"}, given{"logits"};
  for (std::size_t i = 0; i < session.GetInputCount(); ++i)
    inputs.insert(session.GetInputNameAllocated(i, allocator).get());
  for (std::size_t i = 0; i < session.GetOutputCount(); ++i)
    outputs.insert(session.GetOutputNameAllocated(i, allocator).get());
  for (const auto& info : bundle.state) {
    wanted.insert(info.input), given.insert(info.output);
    if (info.dtype != "float32" && info.name != "length")
      return Error{Code::bundle, bundle.path + ": state of " + info.dtype + " is not supported by this runtime"};
  }
  if (inputs == wanted && outputs == given) return Done{};
  return Error{Code::bundle, bundle.path + ": the graph's inputs and outputs are not those of its manifest"};
}

using Opened = std::unique_ptr<Session>;

Result<Opened> open_onnx(const Bundle& bundle, const Options& options) {
  if (bundle.target != "onnx")
    return Error{Code::bundle, bundle.path + " is a bundle for '" + bundle.target + "', not for onnx"};
  if (bundle.requires_of("device") == "cuda")
    return Error{Code::bundle, bundle.path + " was exported for a GPU: this library runs it on CPUs; export with "
                                             "--device cpu"};
  auto model = bundle.file("model");
  if (!model) return model.error();
  return guarded<Opened>(Code::bundle, bundle.path + " does not load in ONNX Runtime", [&]() -> Result<Opened> {
    if (auto ok = load_runtime(options.runtime.empty() ? "libonnxruntime.so.1" : options.runtime); !ok)
      return ok.error();
    static Ort::Env environment{ORT_LOGGING_LEVEL_ERROR, "liger"};
    Ort::SessionOptions settings;
    settings.SetIntraOpNumThreads(options.threads);
    settings.AddConfigEntry("session.use_device_allocator_for_initializers", "1");
    if (!options.ops.empty()) settings.RegisterCustomOpsLibrary(options.ops.c_str());
    auto session = std::make_shared<Ort::Session>(environment, model->c_str(), settings);
    if (auto ok = check_names(bundle, *session); !ok) return ok.error();
    return std::make_unique<Session>(bundle, std::make_unique<OnnxBackend>(bundle, std::move(session)));
  });
}

}  // namespace
}  // namespace liger

LIGER_BACKEND(onnx) { out = liger::open_onnx(bundle, options); }
