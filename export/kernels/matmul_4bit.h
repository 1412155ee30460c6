// liger::MatMulNBits: y = x W^T with W in 4 bits, or silu(y_gate) * y_up where W holds a gate and an up half (SwiGLU).
//
// W [N,K] lies in memory as com.microsoft.MatMulNBits has it: groups of 32, 64 or 128 columns of a row share a scale
// (here float16) and a zero point (two in a byte), w = scale (number - zero), numbers from 0 to 15; byte i of a group
// holds columns 2i (its low half) and 2i + 1. Tokens are rounded to 8 bits, a scale for each group, so that a group's
// product is a sum of small integers; MatMulNBits does the same at accuracy level 4.
//
// One token is a stream of W; several share what is unpacked. Raw pointers, no framework. Shapes: T tokens, N rows of W,
// K columns, G groups of a row.
#pragma once

#include <string_view>

#include "matmul_4bit_base.h"

#if defined(__x86_64__)
#include "matmul_4bit_x86.h"
#elif defined(__aarch64__)
#include "matmul_4bit_arm.h"
#endif

namespace liger {

namespace detail {

// Where results go: y [T, N], or [T, N/2] with SwiGLU.
struct Result {
  float* y;
  int64_t width;
  bool swiglu;
};

// T tokens of sixteen rows, of which `count` are there.
template <class Rows, int T>
LIGER_INLINE void some_tokens(const Rows& gate, const Rows& up, Tokens8Bit& x, int64_t t, const Result& out, int64_t row,
                              int64_t count) {
  float first[T * 16], second[T * 16];
  gate.template products<T>(x, t, first);
  if (out.swiglu) up.template products<T>(x, t, second);
  for (int i = 0; i < T; ++i) {
    Vec value = load<Vec>(first + i * 16);
    if (out.swiglu) value = value / (1 + exp(-value)) * load<Vec>(second + i * 16);
    std::memcpy(out.y + (t + i) * out.width + row, &value, count * sizeof(float));
  }
}

template <class Rows, int most>
LIGER_INLINE void all_tokens(Rows& gate, Rows& up, const Matrix4Bit& w, int64_t tokens, Tokens8Bit& x, int64_t from,
                             int64_t to, const Result& out) {
  for (int64_t row = from; row < to; row += 16) {
    const int64_t count = std::min<int64_t>(to - row, 16);
    gate.take(w, row);
    if (out.swiglu) up.take(w, row + out.width);
    int64_t t = 0;
    for (; t + most <= tokens; t += most) some_tokens<Rows, most>(gate, up, x, t, out, row, count);
    for (; t < tokens; ++t) some_tokens<Rows, 1>(gate, up, x, t, out, row, count);
  }
}

// One task: columns [from, to) of the result, `from` a multiple of 16, for all tokens.
template <class Form>
LIGER_INLINE void matmul_rows(const Matrix4Bit& w, bool swiglu, int64_t tokens, Tokens8Bit& x, int64_t from, int64_t to,
                              float* y) {
  const Result out{y, swiglu ? w.rows / 2 : w.rows, swiglu};
  if (tokens == 1) {
    AsTheyLie<Form> gate, up;
    all_tokens<AsTheyLie<Form>, 1>(gate, up, w, tokens, x, from, to, out);
  } else {
    using Several = typename Form::Several;
    thread_local Several gate, up;
    all_tokens<Several, Several::kTokens>(gate, up, w, tokens, x, from, to, out);
  }
}

#if defined(__x86_64__)
LIGER_VNNI inline void round_token_vnni(const float* x, const Matrix4Bit& w, int64_t t, Tokens8Bit* out) {
  round_token(x, w, t, out);
}
LIGER_AVX2 inline void round_token_avx2(const float* x, const Matrix4Bit& w, int64_t t, Tokens8Bit* out) {
  round_token(x, w, t, out);
}
LIGER_VNNI inline void matmul_rows_vnni(const Matrix4Bit& w, bool swiglu, int64_t tokens, Tokens8Bit& x, int64_t from,
                                        int64_t to, float* y) {
  matmul_rows<Avx512Vnni>(w, swiglu, tokens, x, from, to, y);
}
LIGER_AVX2 inline void matmul_rows_avx2(const Matrix4Bit& w, bool swiglu, int64_t tokens, Tokens8Bit& x, int64_t from,
                                        int64_t to, float* y) {
  matmul_rows<Avx2>(w, swiglu, tokens, x, from, to, y);
}
#endif

}  // namespace detail

// One processor's form of the two steps: `round` for each token, then `rows` for each part of W's rows.
struct MatMul4Bit {
  void (*round)(const float* x, const Matrix4Bit& w, int64_t t, Tokens8Bit* out);
  void (*rows)(const Matrix4Bit& w, bool swiglu, int64_t tokens, Tokens8Bit& x, int64_t from, int64_t to, float* y);
};

// The fastest form that this processor runs; `limit` ("avx2", "plain") asks for a lesser one.
inline MatMul4Bit matmul_4bit(std::string_view limit = "") {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (limit.empty() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return {detail::round_token_vnni, detail::matmul_rows_vnni};
  if (limit != "plain" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))  // F16C is older than AVX2
    return {detail::round_token_avx2, detail::matmul_rows_avx2};
#elif defined(__aarch64__)
  if (limit != "plain") return {detail::round_token, detail::matmul_rows<detail::Neon>};
#endif
  (void)limit;
  return {detail::round_token, detail::matmul_rows<detail::Plain>};
}

}  // namespace liger
