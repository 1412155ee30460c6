// Registers liger::fused_attention.out with ExecuTorch: thin, the work is in kernels/attention.h.
//
// Whoever loads this library can run programs that were lowered with `--backend liger`.
#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <cstdlib>
#include <string>

#include "../kernels/attention.h"

namespace {

namespace et = executorch::runtime;
using Tensor = executorch::aten::Tensor;

// As liger_deploy/export/executorch_ops.py declares it; the runtime appends the outputs once more, as results.
enum Argument : size_t {
  kQ, kK, kV, kGateKey, kLength, kValid, kRecurrent, kWindowK, kWindowV, kCos, kSin,
  kStructure, kSoftmax, kNormalizer, kLowerBound, kRecurrentWeight, kWindowWeight, kScale,
  kOut, kNewRecurrent, kNewWindowK, kNewWindowV, kCount
};

bool has_shape(const Tensor& tensor, std::initializer_list<ssize_t> shape) {
  return tensor.dim() == static_cast<ssize_t>(shape.size()) &&
         std::equal(shape.begin(), shape.end(), tensor.sizes().begin());
}

void fused_attention(et::KernelRuntimeContext& context, et::Span<et::EValue*> stack) {
  const auto refuse = [&](const char* why) {
    ET_LOG(Error, "liger::fused_attention: %s", why);
    context.fail(et::Error::InvalidArgument);
  };
  if (stack.size() < kCount) return refuse("too few arguments: this library is of another version than the program");
  const auto tensor = [&](Argument at) -> const Tensor& { return stack[at]->toTensor(); };
  const auto number = [&](Argument at) { return static_cast<float>(stack[at]->toDouble()); };
  liger::AttentionOptions options;
  options.structure = liger::find_structure(stack[kStructure]->toString());
  if (!options.structure) return refuse("unknown structure: this library is older than the program");
  options.softmax_features = stack[kSoftmax]->toBool();
  options.gate_normalizer = number(kNormalizer), options.lower_bound = number(kLowerBound);
  options.recurrent_weight = number(kRecurrentWeight), options.window_weight = number(kWindowWeight);
  options.scale = number(kScale);

  if (tensor(kQ).dim() != 5 || tensor(kWindowK).dim() != 4 || tensor(kCos).dim() != 2)
    return refuse("q, window_k and cos must have rank 5, 4 and 2");
  const auto q = tensor(kQ).sizes();
  const liger::AttentionSizes z{q[0], q[1], q[2], q[3], q[4], tensor(kWindowK).size(2), tensor(kCos).size(1)};
  const ssize_t b = q[0], t = q[1], g = q[2], d = q[4], w = tensor(kWindowK).size(2);
  bool fits = z.rotary <= z.dim && z.rotary % 2 == 0 && tensor(kCos).size(0) >= z.window + z.tokens &&
              has_shape(tensor(kSin), {tensor(kCos).size(0), tensor(kCos).size(1)}) &&
              has_shape(tensor(kOut), {q[0], q[1], q[2], q[3], q[4]});
  for (const auto at : {kK, kV, kGateKey}) fits = fits && has_shape(tensor(at), {b, t, g, d});
  for (const auto at : {kLength, kValid}) fits = fits && has_shape(tensor(at), {b});
  for (const auto at : {kRecurrent, kNewRecurrent}) fits = fits && has_shape(tensor(at), {b, g, d, d});
  for (const auto at : {kWindowK, kWindowV, kNewWindowK, kNewWindowV}) fits = fits && has_shape(tensor(at), {b, g, w, d});
  for (size_t at = kQ; at < kCount; ++at)
    if ((at < kStructure && at != kLength && at != kValid) || at >= kOut)
      fits = fits && tensor(static_cast<Argument>(at)).scalar_type() == executorch::aten::ScalarType::Float;
  if (!fits) return refuse("the inputs' shapes or types do not fit each other");

  const auto read = [&](Argument at) { return tensor(at).const_data_ptr<float>(); };
  const auto write = [&](Argument at) { return tensor(at).mutable_data_ptr<float>(); };
  const liger::AttentionTensors x{
      read(kQ), read(kK), read(kV), read(kGateKey),
      tensor(kLength).const_data_ptr<int64_t>(), tensor(kValid).const_data_ptr<int64_t>(),
      read(kRecurrent), read(kWindowK), read(kWindowV), read(kCos), read(kSin),
      write(kOut), write(kNewRecurrent), write(kNewWindowK), write(kNewWindowV)};
  static const char* limit = std::getenv("LIGER_SIMD");
  static const liger::AttentionHead head = liger::attention_head(limit ? limit : "");
  executorch::extension::parallel_for(0, z.rows * z.kv_heads, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) head(options, z, x, task / z.kv_heads, task % z.kv_heads);
  });
}

const et::Kernel kernel{"liger::fused_attention.out", fused_attention};
const auto registered = et::register_kernels({&kernel, 1});

}  // namespace
