// Registers liger::Attention and liger::WindowAttention with ONNX Runtime: thin, the work is in kernels/attention.h.
//
// Needs no libonnxruntime at link time and runs in any ONNX Runtime from the headers' version on.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <cstdlib>
#include <memory>
#include <string>

#include "../kernels/attention.h"

namespace {

// Inputs: q, k, v, gate_key, length, valid, [recurrent,] window_k, window_v, cos, sin.
// Outputs: out, [recurrent,] window_k, window_v.
constexpr size_t kStateInput = 6;

class Kernel {
 public:
  Kernel(const OrtApi& api, const OrtKernelInfo* raw, bool recurrent) : api_(api), head_(liger::attention_head(limit())) {
    const Ort::ConstKernelInfo info{raw};
    query_heads_ = info.GetAttribute<int64_t>("q_num_heads");
    kv_heads_ = info.GetAttribute<int64_t>("kv_num_heads");
    options_.scale = info.GetAttribute<float>("scale");
    options_.window_weight = info.GetAttribute<float>("window_weight");
    if (kv_heads_ < 1 || query_heads_ < 1 || query_heads_ % kv_heads_) fail("q_num_heads must be a multiple of kv_num_heads");
    if (!recurrent) return;
    const std::string name = info.GetAttribute<std::string>("structure");
    options_.structure = liger::find_structure(name);
    if (!options_.structure) fail("unknown structure '" + name + "': this library is older than the model");
    options_.softmax_features = info.GetAttribute<std::string>("feature_map") == "softmax";
    options_.recurrent_weight = info.GetAttribute<float>("recurrent_weight");
    options_.gate_normalizer = info.GetAttribute<float>("gate_normalizer");
    options_.lower_bound = info.GetAttribute<float>("lower_bound");
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept {
    try {
      compute(context);
      return nullptr;
    } catch (const std::exception& error) {
      return api_.CreateStatus(ORT_INVALID_ARGUMENT, error.what());
    }
  }

 private:
  [[noreturn]] static void fail(const std::string& what) { throw Ort::Exception("liger attention: " + what, ORT_INVALID_ARGUMENT); }

  static std::string limit() {
    const char* value = std::getenv("LIGER_SIMD");
    return value ? value : "";
  }

  void compute(OrtKernelContext* raw) const {
    const Ort::KernelContext context{raw};
    const size_t recurrent = options_.structure ? 1 : 0;
    const auto shape = [&](size_t index) { return context.GetInput(index).GetTensorTypeAndShapeInfo().GetShape(); };
    const auto data = [&](size_t index) { return context.GetInput(index).GetTensorData<float>(); };
    const auto q = shape(0), window = shape(kStateInput + recurrent), table = shape(kStateInput + recurrent + 2);
    if (q.size() != 3 || window.size() != 4 || table.size() != 2) fail("q, window and cos must have rank 3, 4 and 2");
    const liger::AttentionSizes z{q[0], q[1], kv_heads_, query_heads_ / kv_heads_, window[3], window[2], table[1]};
    const std::vector<int64_t> kv = {z.rows, z.tokens, kv_heads_ * z.dim}, count = {z.rows};
    const std::vector<int64_t> windows = {z.rows, kv_heads_, z.window, z.dim}, state = {z.rows, kv_heads_, z.dim, z.dim};
    bool fits = q[2] == query_heads_ * z.dim && shape(1) == kv && shape(2) == kv && shape(3) == kv &&
                shape(4) == count && shape(5) == count && window == windows &&
                shape(kStateInput + recurrent + 1) == windows && table == shape(kStateInput + recurrent + 3) &&
                table[0] >= z.window + z.tokens && z.rotary <= z.dim && z.rotary % 2 == 0;
    if (recurrent) fits = fits && shape(kStateInput) == state;
    if (!fits) fail("the inputs' shapes do not fit each other");

    const auto output = [&](size_t index, const std::vector<int64_t>& dims) {
      return context.GetOutput(index, dims).GetTensorMutableData<float>();
    };
    const liger::AttentionTensors x{
        data(0), data(1), data(2), data(3),
        context.GetInput(4).GetTensorData<int64_t>(), context.GetInput(5).GetTensorData<int64_t>(),
        recurrent ? data(kStateInput) : nullptr, data(kStateInput + recurrent), data(kStateInput + recurrent + 1),
        data(kStateInput + recurrent + 2), data(kStateInput + recurrent + 3),
        output(0, q), recurrent ? output(1, state) : nullptr, output(1 + recurrent, windows), output(2 + recurrent, windows)};
    const Call call{this, &z, &x};
    context.ParallelFor(Call::run, static_cast<size_t>(z.rows * z.kv_heads), 0, const_cast<Call*>(&call));
  }

  struct Call {
    const Kernel* kernel;
    const liger::AttentionSizes* z;
    const liger::AttentionTensors* x;

    static void run(void* raw, size_t task) {
      const Call& call = *static_cast<const Call*>(raw);
      const int64_t heads = call.z->kv_heads, index = static_cast<int64_t>(task);
      call.kernel->head_(call.kernel->options_, *call.z, *call.x, index / heads, index % heads);
    }
  };

  const OrtApi& api_;
  liger::AttentionHead head_;
  liger::AttentionOptions options_;
  int64_t query_heads_ = 0, kv_heads_ = 0;
};

template <bool recurrent>
struct Op : Ort::CustomOpBase<Op<recurrent>, Kernel, true> {
  OrtStatusPtr CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info, void** kernel) const noexcept {
    try {
      *kernel = std::make_unique<Kernel>(api, info, recurrent).release();
      return nullptr;
    } catch (const std::exception& error) {
      return api.CreateStatus(ORT_INVALID_ARGUMENT, error.what());
    }
  }
  const char* GetName() const { return recurrent ? "Attention" : "WindowAttention"; }
  size_t GetInputTypeCount() const { return kStateInput + 4 + recurrent; }
  size_t GetOutputTypeCount() const { return 3 + recurrent; }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    return index == 4 || index == 5 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (!api) {
    const OrtApi* old = base->GetApi(1);
    return old->CreateStatus(ORT_FAIL, "liger_ort_ops was built for a newer ONNX Runtime: update onnxruntime");
  }
  Ort::InitApi(api);
  static const Op<true> attention;
  static const Op<false> window_attention;
  static const auto domain = [] {
    Ort::CustomOpDomain made{"liger"};
    made.Add(&attention);
    made.Add(&window_attention);
    return made;
  }();
  return api->AddCustomOpDomain(options, domain);
}
