// AOTInductor on a CPU: both graphs and every fork read one copy of the weights, where the file is mapped. The graphs
// update the state in place.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/version.h>
#include <unistd.h>

#include <cstring>
#include <map>

#include "backend.h"
#include "json.h"

namespace liger {
namespace {

using Loader = torch::inductor::AOTIModelPackageLoader;
using Weights = std::unordered_map<std::string, at::Tensor>;

const std::map<std::string, at::ScalarType> kTypes{
    {"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf},  {"BF16", at::kBFloat16}, {"I64", at::kLong},
    {"I32", at::kInt},    {"I16", at::kShort}, {"I8", at::kChar},   {"U8", at::kByte},       {"BOOL", at::kBool},
};
const std::map<std::string, at::ScalarType> kStateTypes{
    {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}, {"int64", at::kLong}};

// A file's bytes, mapped for as long as this lives.
class Mapping {
 public:
  explicit Mapping(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY);
    struct stat info {};
    if (file < 0 || fstat(file, &info) || info.st_size < 8) {
      if (file >= 0) close(file);
      throw Malformed("cannot be read");
    }
    size = static_cast<std::int64_t>(info.st_size);
    void* mapped = mmap(nullptr, static_cast<std::size_t>(size), PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (mapped == MAP_FAILED) throw Malformed("cannot be mapped");
    data = static_cast<char*>(mapped);
  }
  ~Mapping() { munmap(data, static_cast<std::size_t>(size)); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  char* data;
  std::int64_t size;
};

struct Package {
  Package(const std::string& path, const std::string& weights_path)
      : file(weights_path), decode(path, "decode"), prefill(path, "prefill") {}
  Mapping file;
  Weights weights;
  Loader decode, prefill;
};

// Every tensor of a safetensors file; its metadata gives some of them a second name.
Weights read_weights(const Mapping& file) {
  std::uint64_t header = 0;
  std::memcpy(&header, file.data, 8);
  if (header > static_cast<std::uint64_t>(file.size) - 8) throw Malformed("is no weight file");
  const Json entries = Json::parse(file.data + 8, file.data + 8 + header, nullptr, false);
  if (!entries.is_object()) throw Malformed("is no weight file");
  const std::int64_t start = 8 + static_cast<std::int64_t>(header), available = file.size - start;
  Weights weights;
  for (const auto& [name, info] : entries.items()) {
    if (name == "__metadata__") continue;
    const auto type = kTypes.find(text(info, "dtype"));
    if (type == kTypes.end()) throw Malformed("weight '" + name + "' has an unknown dtype");
    std::vector<std::int64_t> shape;
    std::int64_t bytes = static_cast<std::int64_t>(c10::elementSize(type->second));
    for (const auto& size : member(info, "shape")) {
      shape.push_back(integer(size, "a size of " + name, 0, std::int64_t{1} << 40));
      if (shape.back() && bytes > available / shape.back()) throw Malformed("weight '" + name + "' is too large");
      bytes *= shape.back();
    }
    const Json& offsets = member(info, "data_offsets");
    if (!offsets.is_array() || offsets.size() != 2) throw Malformed("weight '" + name + "' has no place");
    const auto begin = integer(offsets[0], "an offset of " + name, 0, available);
    if (integer(offsets[1], "an offset of " + name, 0, available) - begin != bytes)
      throw Malformed("weight '" + name + "' does not fill its place");
    weights[name] = at::from_blob(file.data + start + begin, shape, at::TensorOptions(type->second));
  }
  if (entries.contains("__metadata__"))
    for (const auto& [name, first] : entries["__metadata__"].items())
      if (first.is_string() && weights.count(first.get<std::string>()))
        weights[name] = weights[first.get<std::string>()];
  return weights;
}

// Running a graph with an unbound constant would crash the process.
Status bind_weights(Loader& graph, const Weights& weights, const std::string& name, const std::string& where) {
  Weights wanted;
  for (const auto& constant : graph.get_constant_fqns()) {
    auto found = weights.find(constant);
    if (found == weights.end())
      return Error{Code::bundle, where + " lacks weight '" + constant + "' of graph '" + name + "'"};
    wanted.insert(*found);
  }
  graph.load_constants(wanted, false, true, true);
  return Done{};
}

class InductorBackend final : public Backend {
 public:
  InductorBackend(const Bundle& bundle, std::shared_ptr<Package> package)
      : bundle_(bundle), package_(std::move(package)) {}

  void clear(std::int64_t rows) override {
    rows_ = rows;
    state_.clear();
    for (const auto& tensor : bundle_.state)
      state_.push_back(at::zeros(shape_of(tensor, rows), at::TensorOptions(kStateTypes.at(tensor.dtype))));
  }

  Result<const float*> run(const std::int64_t* tokens, std::int64_t width, const std::int64_t* valid) override {
    return guarded<const float*>(Code::runtime, "AOTInductor", [&]() -> Result<const float*> {
      c10::InferenceMode inference;
      const bool step = width == 1 && std::all_of(valid, valid + rows_, [](auto n) { return n == 1; });
      std::vector<at::Tensor> inputs;
      if (step) {
        inputs.push_back(at::from_blob(const_cast<std::int64_t*>(tokens), {rows_}, at::kLong));
      } else {
        padded_.assign(static_cast<std::size_t>(rows_ * bundle_.chunk), 0);
        for (std::int64_t row = 0; row < rows_; ++row)
          std::copy_n(tokens + row * width, width, padded_.begin() + row * bundle_.chunk);
        inputs.push_back(at::from_blob(padded_.data(), {rows_, bundle_.chunk}, at::kLong));
        inputs.push_back(at::from_blob(const_cast<std::int64_t*>(valid), {rows_}, at::kLong));
      }
      inputs.insert(inputs.end(), state_.begin(), state_.end());
      logits_ = (step ? package_->decode : package_->prefill).boxed_run(std::move(inputs)).at(0).contiguous();
      return logits_.const_data_ptr<float>();
    });
  }

  State read() override {
    State state;
    for (std::size_t i = 0; i + 1 < state_.size(); ++i) {
      const auto values = state_[i].to(at::kFloat).contiguous();
      const auto* data = values.const_data_ptr<float>();
      state.tensors.push_back({bundle_.state[i].name, values.sizes().vec(), {data, data + values.numel()}});
    }
    const auto* length = state_.back().const_data_ptr<std::int64_t>();
    state.length.assign(length, length + rows_);
    return state;
  }

  void write(const std::vector<const State::Tensor*>& tensors, const std::vector<std::int64_t>& length) override {
    for (std::size_t i = 0; i < tensors.size(); ++i)
      state_[i].copy_(at::from_blob(const_cast<float*>(tensors[i]->values.data()), tensors[i]->shape, at::kFloat));
    std::copy(length.begin(), length.end(), state_.back().mutable_data_ptr<std::int64_t>());
  }

  Result<std::unique_ptr<Backend>> twin() override {
    return std::unique_ptr<Backend>(std::make_unique<InductorBackend>(bundle_, package_));
  }

 private:
  Bundle bundle_;
  std::shared_ptr<Package> package_;
  std::int64_t rows_ = 0;
  std::vector<at::Tensor> state_;
  std::vector<std::int64_t> padded_;
  at::Tensor logits_;
};

// The package runs here: a CPU package, the torch it was compiled for, a processor that is not older.
Status check_machine(const Bundle& bundle) {
  const bool rings = std::any_of(bundle.state.begin(), bundle.state.end(), [](auto& tensor) { return tensor.ring; });
  if (bundle.requires_of("device") != "cpu" || rings)
    return Error{Code::bundle, bundle.path + " was exported for a GPU: this library runs CPU packages; export with "
                                             "--device cpu"};
  const std::string torch = std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR);
  if (bundle.requires_of("torch") != torch)
    return Error{Code::bundle, bundle.path + " was compiled for torch " + bundle.requires_of("torch") +
                                   ", here it is " + torch + ": export again with that version"};
  const std::vector<std::string> known{"DEFAULT", "AVX2", "AVX512"};
  const auto needs = std::find(known.begin(), known.end(), bundle.requires_of("cpu")),
             has = std::find(known.begin(), known.end(), at::get_cpu_capability());
  const bool newer = needs != known.end() && has != known.end() && needs <= has;
  if (bundle.requires_of("cpu") != at::get_cpu_capability() && !newer)
    return Error{Code::bundle, bundle.path + " was compiled for a processor with " + bundle.requires_of("cpu") +
                                   ", this one has " + at::get_cpu_capability() + ": export again on such a machine"};
  for (const auto& tensor : bundle.state)
    if (!kStateTypes.count(tensor.dtype))
      return Error{Code::bundle, bundle.path + ": state of " + tensor.dtype + " is not supported by this runtime"};
  return Done{};
}

using Opened = std::unique_ptr<Session>;

Result<Opened> open_inductor(const Bundle& bundle, const Options& options) {
  if (bundle.target != "inductor")
    return Error{Code::bundle, bundle.path + " is a bundle for '" + bundle.target + "', not for inductor"};
  if (auto ok = check_machine(bundle); !ok) return ok.error();
  auto model = bundle.file("model"), weights = bundle.file("weights");
  if (!model) return model.error();
  if (!weights) return weights.error();
  if (options.threads) at::set_num_threads(options.threads);
  return guarded<Opened>(Code::bundle, bundle.path + " does not load in AOTInductor", [&]() -> Result<Opened> {
    auto package = std::make_shared<Package>(*model, *weights);
    package->weights = read_weights(package->file);
    if (auto ok = bind_weights(package->decode, package->weights, "decode", *weights); !ok) return ok.error();
    if (auto ok = bind_weights(package->prefill, package->weights, "prefill", *weights); !ok) return ok.error();
    return std::make_unique<Session>(bundle, std::make_unique<InductorBackend>(bundle, std::move(package)));
  });
}

}  // namespace
}  // namespace liger

LIGER_BACKEND(inductor) { out = liger::open_inductor(bundle, options); }
