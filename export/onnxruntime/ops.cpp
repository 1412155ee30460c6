// Registers liger::Attention, WindowAttention, MatMulNBits and SwiGLUNBits with ONNX Runtime: the work is in kernels/.
//
// Needs no libonnxruntime at link time and runs in any ONNX Runtime from the headers' version on.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <tuple>

#include "../kernels/attention.h"
#include "../kernels/matmul_4bit.h"

namespace {

std::string simd_limit() {
  const char* value = std::getenv("LIGER_SIMD");
  return value ? value : "";
}

// What CreateKernelV2 and ComputeV2 do: an exception becomes a status.
template <class Call>
OrtStatusPtr status_of(const OrtApi& api, const Call& call) noexcept {
  try {
    call();
    return nullptr;
  } catch (const std::exception& error) {
    return api.CreateStatus(ORT_INVALID_ARGUMENT, error.what());
  }
}

// Inputs: q, k, v, gate_key, length, valid, [recurrent,] window_k, window_v, cos, sin.
// Outputs: out, [recurrent,] window_k, window_v.
constexpr size_t kStateInput = 6;

class AttentionKernel {
 public:
  AttentionKernel(const OrtApi& api, const OrtKernelInfo* raw, bool recurrent)
      : api_(api), head_(liger::attention_head(simd_limit())) {
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
    return status_of(api_, [&] { compute(context); });
  }

 private:
  [[noreturn]] static void fail(const std::string& what) { throw Ort::Exception("liger attention: " + what, ORT_INVALID_ARGUMENT); }

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
    const AttentionKernel* kernel;
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

// Inputs: x [..., K], numbers [N, G, group / 2], scales [N, G], zeros [N, (G + 1) / 2]. Output: y [..., N], or half as wide
// with SwiGLU. All but x are the model's weights.
class MatMulKernel {
 public:
  MatMulKernel(const OrtApi& api, const OrtKernelInfo* raw, bool swiglu)
      : api_(api), swiglu_(swiglu), form_(liger::matmul_4bit(simd_limit())) {
    const Ort::ConstKernelInfo info{raw};
    matrix_.rows = info.GetAttribute<int64_t>("N"), matrix_.columns = info.GetAttribute<int64_t>("K");
    matrix_.group = info.GetAttribute<int64_t>("block_size");
    const auto &[rows, columns, group] = std::tie(matrix_.rows, matrix_.columns, matrix_.group);
    if (group != 32 && group != 64 && group != 128) fail("block_size must be 32, 64 or 128");
    if (rows < 1 || columns < 1 || rows > kMost || columns > kMost || (swiglu && rows % 2)) fail("N and K do not fit");
    const int64_t groups = matrix_.groups();
    const int64_t counts[] = {rows * matrix_.row_bytes(), rows * groups, rows * ((groups + 1) / 2)};
    for (size_t index = 1; index < kInputs; ++index) {
      int constant = 0;
      const auto weights = info.GetTensorConstantInput(index, &constant);
      if (!constant) fail("all inputs but the first must be initializers");
      if (static_cast<int64_t>(weights.GetTensorTypeAndShapeInfo().GetElementCount()) != counts[index - 1])
        fail("the weights' shapes do not fit N, K and block_size");
    }
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept {
    return status_of(api_, [&] { compute(context); });
  }

  static constexpr size_t kInputs = 4;

 private:
  static constexpr int64_t kMost = 1 << 30, kPart = 1 << 16;  // of rows and columns; bytes of W that a task reads at least

  [[noreturn]] static void fail(const std::string& what) { throw Ort::Exception("liger product: " + what, ORT_INVALID_ARGUMENT); }

  void compute(OrtKernelContext* raw) const {
    const Ort::KernelContext context{raw};
    auto shape = context.GetInput(0).GetTensorTypeAndShapeInfo().GetShape();
    if (shape.empty() || shape.back() != matrix_.columns) fail("x must be K wide");
    const int64_t width = swiglu_ ? matrix_.rows / 2 : matrix_.rows;
    shape.back() = width;
    Call call{this, matrix_, context.GetInput(0).GetTensorData<float>(),
              context.GetOutput(0, shape).GetTensorMutableData<float>()};
    for (size_t axis = 0; axis + 1 < shape.size(); ++axis) call.tokens *= shape[axis];
    call.w.numbers = context.GetInput(1).GetTensorData<uint8_t>();
    call.w.scales = static_cast<const uint16_t*>(context.GetInput(2).GetTensorRawData());
    call.w.zeros = context.GetInput(3).GetTensorData<uint8_t>();
    thread_local liger::Tokens8Bit rounded;
    call.rounded = &rounded;
    rounded.resize(call.tokens, matrix_);
    if (call.tokens == 1)
      Call::round(&call, 0);
    else
      context.ParallelFor(Call::round, static_cast<size_t>(call.tokens), 0, &call);
    call.part = std::max<int64_t>(kPart / matrix_.row_bytes() / 16, 1) * 16;
    context.ParallelFor(Call::rows, static_cast<size_t>((width + call.part - 1) / call.part), 0, &call);
  }

  struct Call {
    const MatMulKernel* kernel;
    liger::Matrix4Bit w;
    const float* x;
    float* y;
    int64_t tokens = 1, part = 0;
    liger::Tokens8Bit* rounded = nullptr;

    static void round(void* raw, size_t token) {
      const Call& call = *static_cast<const Call*>(raw);
      const auto t = static_cast<int64_t>(token);
      call.kernel->form_.round(call.x + t * call.w.columns, call.w, t, call.rounded);
    }
    static void rows(void* raw, size_t task) {
      const Call& call = *static_cast<const Call*>(raw);
      const bool swiglu = call.kernel->swiglu_;
      const int64_t width = swiglu ? call.w.rows / 2 : call.w.rows, from = static_cast<int64_t>(task) * call.part;
      call.kernel->form_.rows(call.w, swiglu, call.tokens, *call.rounded, from, std::min(from + call.part, width), call.y);
    }
  };

  const OrtApi& api_;
  bool swiglu_;
  liger::MatMul4Bit form_;
  liger::Matrix4Bit matrix_{};
};

template <class Kernel, class Op>
struct CustomOp : Ort::CustomOpBase<Op, Kernel, true> {
  OrtStatusPtr CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info, void** kernel) const noexcept {
    return status_of(api, [&] { *kernel = std::make_unique<Kernel>(api, info, Op::kVariant).release(); });
  }
};

template <bool recurrent>
struct AttentionOp : CustomOp<AttentionKernel, AttentionOp<recurrent>> {
  static constexpr bool kVariant = recurrent;
  const char* GetName() const { return recurrent ? "Attention" : "WindowAttention"; }
  size_t GetInputTypeCount() const { return kStateInput + 4 + recurrent; }
  size_t GetOutputTypeCount() const { return 3 + recurrent; }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    return index == 4 || index == 5 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
};

template <bool swiglu>
struct MatMulOp : CustomOp<MatMulKernel, MatMulOp<swiglu>> {
  static constexpr bool kVariant = swiglu;
  const char* GetName() const { return swiglu ? "SwiGLUNBits" : "MatMulNBits"; }
  size_t GetInputTypeCount() const { return MatMulKernel::kInputs; }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    return index == 0   ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
           : index == 2 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16
                        : ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
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
  static const AttentionOp<true> attention;
  static const AttentionOp<false> window_attention;
  static const MatMulOp<false> product;
  static const MatMulOp<true> swiglu;
  static const auto domain = [] {
    Ort::CustomOpDomain made{"liger"};
    for (const OrtCustomOp* op : std::initializer_list<const OrtCustomOp*>{&attention, &window_attention, &product, &swiglu})
      made.Add(op);
    return made;
  }();
  return api->AddCustomOpDomain(options, domain);
}
