// ExecuTorch: the program's methods are shared by all forks, one run at a time; each session has its own state, which a
// run reads where it lies and which its outputs are copied to.
#include <executorch/extension/data_loader/mmap_data_loader.h>
#include <executorch/extension/flat_tensor/flat_tensor_data_map.h>
#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/extension/threadpool/threadpool_guard.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/platform.h>
#include <executorch/runtime/platform/runtime.h>

#include <cstring>
#include <mutex>
#include <optional>

#include "backend.h"

namespace liger {
namespace {

namespace et = executorch::runtime;
using executorch::aten::ScalarType;
using executorch::aten::TensorImpl;
using executorch::extension::FlatTensorDataMap;
using executorch::extension::MallocMemoryAllocator;
using executorch::extension::MmapDataLoader;
using executorch::extension::threadpool::NoThreadPoolGuard;

thread_local std::string logged;  // the first error that the runtime logged since `failed` was last asked

// ExecuTorch's log goes here instead of to the program's stderr: its errors are the reasons that ours give.
void log(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, std::size_t, const char* text,
         std::size_t size) {
  if ((level == et_pal_log_level_t::kError || level == et_pal_log_level_t::kFatal) && logged.empty())
    logged.assign(text, size);
}

Error failed(const std::string& what, et::Error error) {
  const char* reason = et::to_string(error);
  std::string line = logged.empty() ? (reason ? reason : "unknown error") : logged;
  logged.clear();
  return Error{Code::runtime, what + ": " + line.substr(0, line.find('\n'))};
}

// A method of the program with the memory that it runs in.
struct Method {
  MallocMemoryAllocator allocator, temporary;
  std::vector<std::vector<std::uint8_t>> buffers;
  std::vector<et::Span<std::uint8_t>> spans;
  std::optional<et::HierarchicalAllocator> planned;
  std::optional<et::MemoryManager> memory;
  std::optional<et::Method> method;

  Status load(et::Program& program, const char* name, const FlatTensorDataMap* weights) {
    auto meta = program.method_meta(name);
    if (!meta.ok()) return failed(std::string("it has no method '") + name + "'", meta.error());
    for (std::size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
      auto size = meta->memory_planned_buffer_size(i);
      if (!size.ok()) return failed("its memory plan", size.error());
      buffers.emplace_back(static_cast<std::size_t>(*size));
      spans.emplace_back(buffers.back().data(), buffers.back().size());
    }
    planned.emplace(et::Span<et::Span<std::uint8_t>>(spans.data(), spans.size()));
    memory.emplace(&allocator, &*planned, &temporary);
    auto loaded = program.load_method(name, &*memory, nullptr, weights);
    if (!loaded.ok())
      return failed(std::string("method '") + name + "' needs a backend or an operator that this runtime lacks",
                    loaded.error());
    method.emplace(std::move(*loaded));
    return Done{};
  }
};

struct Program {
  std::optional<MmapDataLoader> file, weights_file;
  std::optional<FlatTensorDataMap> weights;  // those that are not inside the program
  std::optional<et::Program> program;
  Method decode, prefill;
  std::mutex running;
  bool one_thread = false;
};

// Memory of ours as a tensor that a method takes.
class View {
 public:
  View(ScalarType type, std::vector<std::int64_t> shape, void* data)
      : sizes_(shape.begin(), shape.end()), order_(sizes_.size()), strides_(sizes_.size(), 1) {
    for (std::size_t i = 0; i < sizes_.size(); ++i) order_[i] = static_cast<std::uint8_t>(i);
    for (std::size_t i = sizes_.size(); i-- > 1;) strides_[i - 1] = strides_[i] * sizes_[i];
    impl_.emplace(type, static_cast<ssize_t>(sizes_.size()), sizes_.data(), data, order_.data(), strides_.data());
  }
  View(View&& other) = delete;
  et::EValue value() { return et::EValue(executorch::aten::Tensor(&*impl_)); }

 private:
  std::vector<TensorImpl::SizesType> sizes_;
  std::vector<TensorImpl::DimOrderType> order_;
  std::vector<TensorImpl::StridesType> strides_;
  std::optional<TensorImpl> impl_;
};

class ExecuTorchBackend final : public Backend {
 public:
  ExecuTorchBackend(const Bundle& bundle, std::shared_ptr<Program> program)
      : bundle_(bundle), program_(std::move(program)) {}

  void clear(std::int64_t rows) override {
    if (rows_ != rows) {
      const auto n = static_cast<std::size_t>(rows);
      state_.clear(), decode_.clear(), prefill_.clear();
      tokens_.resize(n * static_cast<std::size_t>(bundle_.chunk));
      valid_.resize(n), length_.resize(n);
      logits_.resize(n * static_cast<std::size_t>(bundle_.vocab));
      for (std::size_t i = 0; i + 1 < bundle_.state.size(); ++i)
        state_.emplace_back(n * static_cast<std::size_t>(count(bundle_.state[i].shape)));
      add(decode_, ScalarType::Long, {rows}, tokens_.data());
      add(prefill_, ScalarType::Long, {rows, bundle_.chunk}, tokens_.data());
      add(prefill_, ScalarType::Long, {rows}, valid_.data());
      for (auto* inputs : {&decode_, &prefill_}) {
        for (std::size_t i = 0; i < state_.size(); ++i)
          add(*inputs, ScalarType::Float, shape_of(bundle_.state[i], rows), state_[i].data());
        add(*inputs, ScalarType::Long, {rows}, length_.data());
      }
      rows_ = rows;
    }
    for (auto& values : state_) std::fill(values.begin(), values.end(), 0.0f);
    std::fill(length_.begin(), length_.end(), 0);
  }

  Result<const float*> run(const std::int64_t* tokens, std::int64_t width, const std::int64_t* valid) override {
    const bool step = width == 1 && std::all_of(valid, valid + rows_, [](auto n) { return n == 1; });
    std::fill(tokens_.begin(), tokens_.end(), 0);
    for (std::int64_t row = 0; row < rows_; ++row)
      std::copy_n(tokens + row * width, width, tokens_.begin() + row * (step ? 1 : bundle_.chunk));
    std::copy_n(valid, rows_, valid_.begin());
    return execute(step ? *program_->decode.method : *program_->prefill.method, step ? decode_ : prefill_);
  }

  State read() override {
    State state;
    for (std::size_t i = 0; i < state_.size(); ++i)
      state.tensors.push_back({bundle_.state[i].name, shape_of(bundle_.state[i], rows_), state_[i]});
    state.length = length_;
    return state;
  }

  void write(const std::vector<const State::Tensor*>& tensors, const std::vector<std::int64_t>& length) override {
    for (std::size_t i = 0; i < tensors.size(); ++i)
      std::copy(tensors[i]->values.begin(), tensors[i]->values.end(), state_[i].begin());
    std::copy(length.begin(), length.end(), length_.begin());
  }

  Result<std::unique_ptr<Backend>> twin() override {
    return std::unique_ptr<Backend>(std::make_unique<ExecuTorchBackend>(bundle_, program_));
  }

 private:
  using Views = std::vector<std::unique_ptr<View>>;

  Result<const float*> execute(et::Method& method, const Views& inputs) {
    std::lock_guard<std::mutex> alone(program_->running);
    std::optional<NoThreadPoolGuard> no_pool;
    if (program_->one_thread) no_pool.emplace();
    for (std::size_t i = 0; i < inputs.size(); ++i)
      if (auto error = method.set_input(inputs[i]->value(), i); error != et::Error::Ok)
        return failed("ExecuTorch refuses input " + std::to_string(i), error);
    if (auto error = method.execute(); error != et::Error::Ok) return failed("ExecuTorch failed", error);
    auto copy = [&](std::size_t output, void* to, std::size_t bytes) {
      const auto& tensor = method.get_output(output).toTensor();
      if (tensor.nbytes() != bytes) throw std::runtime_error("output " + std::to_string(output) + " has another size");
      std::memmove(to, tensor.const_data_ptr(), bytes);
    };
    return guarded<const float*>(Code::runtime, "ExecuTorch", [&]() -> Result<const float*> {
      copy(0, logits_.data(), logits_.size() * sizeof(float));
      for (std::size_t i = 0; i < state_.size(); ++i) copy(1 + i, state_[i].data(), state_[i].size() * sizeof(float));
      copy(1 + state_.size(), length_.data(), length_.size() * sizeof(std::int64_t));
      return logits_.data();
    });
  }

  static void add(Views& views, ScalarType type, std::vector<std::int64_t> shape, void* data) {
    views.push_back(std::make_unique<View>(type, std::move(shape), data));
  }

  Bundle bundle_;
  std::shared_ptr<Program> program_;
  std::int64_t rows_ = 0;
  std::vector<std::vector<float>> state_;
  std::vector<std::int64_t> tokens_, valid_, length_;
  std::vector<float> logits_;
  Views decode_, prefill_;
};

// A method's inputs and outputs are those of the manifest.
Status check_method(const Bundle& bundle, const et::Program& program, const char* name, bool decode) {
  struct Wanted {
    ScalarType type;
    std::vector<std::int64_t> shape;
  };
  std::vector<Wanted> state, inputs, outputs{{ScalarType::Float, {bundle.batch, bundle.vocab}}};
  for (const auto& tensor : bundle.state)
    state.push_back({tensor.name == "length" ? ScalarType::Long : ScalarType::Float, shape_of(tensor, bundle.batch)});
  inputs.push_back({ScalarType::Long, {bundle.batch}});
  if (!decode) inputs = {{ScalarType::Long, {bundle.batch, bundle.chunk}}, {ScalarType::Long, {bundle.batch}}};
  inputs.insert(inputs.end(), state.begin(), state.end());
  outputs.insert(outputs.end(), state.begin(), state.end());
  const auto meta = program.method_meta(name);
  auto same = [](const auto& found, const Wanted& wanted) {
    if (!found.ok() || found->scalar_type() != wanted.type) return false;
    const auto sizes = found->sizes();
    return std::equal(sizes.begin(), sizes.end(), wanted.shape.begin(), wanted.shape.end());
  };
  bool fits = meta.ok() && meta->num_inputs() == inputs.size() && meta->num_outputs() == outputs.size();
  for (std::size_t i = 0; fits && i < inputs.size(); ++i) fits = same(meta->input_tensor_meta(i), inputs[i]);
  for (std::size_t i = 0; fits && i < outputs.size(); ++i) fits = same(meta->output_tensor_meta(i), outputs[i]);
  if (fits) return Done{};
  return Error{Code::bundle, std::string("the inputs or outputs of '") + name + "' are not those of the manifest"};
}

using Opened = std::unique_ptr<Session>;

Result<Opened> open_executorch(const Bundle& bundle, const Options& options) {
  if (bundle.target != "executorch")
    return Error{Code::bundle, bundle.path + " is a bundle for '" + bundle.target + "', not for executorch"};
  if (options.threads > 1)
    return Error{Code::argument, "ExecuTorch has one pool of threads, which it sizes itself: threads must be 1 or 0"};
  auto model = bundle.file("model");
  if (!model) return model.error();
  const std::string where = *model + " does not load in ExecuTorch: ";
  return guarded<Opened>(Code::bundle, *model, [&]() -> Result<Opened> {
    static const bool ours = et::register_pal(et::PalImpl::create(log, __FILE__));
    if (!ours) logged.clear();
    et::runtime_init();
    auto held = std::make_shared<Program>();
    held->one_thread = options.threads == 1;
    std::optional<NoThreadPoolGuard> no_pool;
    if (held->one_thread) no_pool.emplace();
    auto map = [](const std::string& path) {
      return MmapDataLoader::from(path.c_str(), MmapDataLoader::MlockConfig::NoMlock);
    };
    auto file = map(*model);
    if (!file.ok()) return Error{Code::bundle, where + failed("it cannot be mapped", file.error()).message};
    held->file.emplace(std::move(*file));
    auto program = et::Program::load(&*held->file, et::Program::Verification::InternalConsistency);
    if (!program.ok())
      return Error{Code::bundle, where + failed("it is damaged, or for another version", program.error()).message};
    held->program.emplace(std::move(*program));
    if (auto path = bundle.file("weights")) {
      const std::string unusable = *path + " is no weight file of ExecuTorch: ";
      auto weights_file = map(*path);
      if (!weights_file.ok()) return Error{Code::bundle, unusable + failed("it", weights_file.error()).message};
      held->weights_file.emplace(std::move(*weights_file));
      auto weights = FlatTensorDataMap::load(&*held->weights_file);
      if (!weights.ok()) return Error{Code::bundle, unusable + failed("it is damaged", weights.error()).message};
      held->weights.emplace(std::move(*weights));
    }
    for (const bool decode : {true, false}) {
      const char* name = decode ? "decode" : "prefill";
      const auto* weights = held->weights ? &*held->weights : nullptr;
      if (auto ok = (decode ? held->decode : held->prefill).load(*held->program, name, weights); !ok)
        return Error{Code::bundle, where + ok.error().message};
      if (auto ok = check_method(bundle, *held->program, name, decode); !ok)
        return Error{Code::bundle, *model + ": " + ok.error().message};
    }
    return std::make_unique<Session>(bundle, std::make_unique<ExecuTorchBackend>(bundle, std::move(held)));
  });
}

}  // namespace
}  // namespace liger

LIGER_BACKEND(executorch) { out = liger::open_executorch(bundle, options); }
