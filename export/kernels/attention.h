// liger::attention: everything one layer does between its projections and o_proj, for T tokens after a state.
//
//   S_t = diag(a_t) S_{t-1} + w_t^T v_t        long_t = phi(q_t) S_t             (arXiv 2503.01496, Eq. 7)
//   near_t = softmax(scale q_t K^T) V over the last W tokens, RoPE by distance    (Eq. 10)
//   out_t = recurrent_weight long_t + window_weight near_t                        (Eq. 9)
//
// Raw float pointers, no allocation once a thread is warm, no framework. One (row, KV head) pair is one task; its R
// query heads share the state and the window. Shapes: B rows, T tokens, G KV heads, R query heads per KV head, K head
// dim (= V), W window, S = W + T keys read in a call.
//
// The recurrence runs token after token over a state that stays in the first-level cache, updating and reading each
// block of 16 columns while it is in registers. The chunked form that a GPU wants needs no fewer multiplications here.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string_view>
#include <vector>

#include "simd.h"

namespace liger {

enum class Gate { kSigmoid, kBoundedSigmoid, kDoubleExponential, kSoftplus, kNone, kFixed };

// One row of liger_deploy/gates.py.
struct Structure {
  std::string_view name;
  Gate gate;
  bool scalar;         // the gate logit is the mean over the key's channels
  bool key_from_gate;  // the written key is 1 - alpha (HGRN2)
};

constexpr Structure kStructures[] = {
    {"gla", Gate::kSigmoid, false, false},           {"hgrn2", Gate::kBoundedSigmoid, false, true},
    {"rwkv6", Gate::kDoubleExponential, false, false}, {"mamba2", Gate::kSoftplus, true, false},
    {"mlstm", Gate::kSigmoid, true, false},          {"gated_retention", Gate::kSigmoid, true, false},
    {"linear", Gate::kNone, true, false},            {"fixed_decay", Gate::kFixed, true, false},
};

inline const Structure* find_structure(std::string_view name) {
  for (const Structure& row : kStructures)
    if (row.name == name) return &row;
  return nullptr;
}

struct AttentionOptions {
  const Structure* structure = nullptr;  // null: the window alone
  bool softmax_features = true;          // phi of Eq. 7: softmax over the head's channels, or identity
  float scale = 1, recurrent_weight = 0.5f, window_weight = 0.5f, gate_normalizer = 1, lower_bound = 0;
};

struct AttentionSizes {
  int64_t rows, tokens, kv_heads, queries, dim, window, rotary;
};

// Where everything lies. q [B,T,G*R*K], k, v and gate_key [B,T,G*K], row by row; length and valid [B]; recurrent
// [B,G,K,K], window_k and window_v [B,G,W,K], oldest first; cos and sin [>= S, rotary]; out [B,T,G*R*K].
// The new state may not overlap the old one.
struct AttentionTensors {
  const float *q, *k, *v, *gate_key;
  const int64_t *length, *valid;
  const float *recurrent, *window_k, *window_v, *cos, *sin;
  float *out, *new_recurrent, *new_window_k, *new_window_v;
};

namespace detail {

constexpr int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// A thread's scratch, grown to the largest call seen.
inline float* scratch(size_t floats) {
  thread_local std::vector<float> memory;
  if (memory.size() < floats) memory.resize(floats);
  return memory.data();
}

// acc[r] += sum_i x[r][i] M[i][0 .. lanes), for R vectors x of `length` values each, `step` floats apart.
template <class V, int R>
LIGER_INLINE void read_block(const float* x, int64_t step, const float* m, int64_t stride, int64_t length, V* acc) {
  V sums[R];
  for (int r = 0; r < R; ++r) sums[r] = acc[r];
  for (int64_t i = 0; i < length; ++i) {
    const V row = load<V>(m + i * stride);
    for (int r = 0; r < R; ++r) sums[r] += x[r * step + i] * row;
  }
  for (int r = 0; r < R; ++r) acc[r] = sums[r];
}

template <class V, int R>
LIGER_INLINE void read_columns(const float* x, int64_t step, const float* m, int64_t stride, int64_t length, float* out,
                               int64_t out_step) {
  V acc[R] = {};
  read_block<V, R>(x, step, m, stride, length, acc);
  for (int r = 0; r < R; ++r) store(out + r * out_step, acc[r]);
}

// out[r] = x[r] M: [queries, length] x [length, columns].
template <int R>
LIGER_INLINE void read_some(const float* x, int64_t step, const float* m, int64_t stride, int64_t length,
                            int64_t columns, float* out, int64_t out_step) {
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) read_columns<Vec, R>(x, step, m + c, stride, length, out + c, out_step);
  for (; c < columns; ++c) read_columns<float, R>(x, step, m + c, stride, length, out + c, out_step);
}

LIGER_INLINE void read(const float* x, int64_t step, int64_t queries, const float* m, int64_t stride, int64_t length,
                       int64_t columns, float* out, int64_t out_step) {
  for (; queries >= 4; queries -= 4, x += 4 * step, out += 4 * out_step)
    read_some<4>(x, step, m, stride, length, columns, out, out_step);
  if (queries == 3) read_some<3>(x, step, m, stride, length, columns, out, out_step);
  if (queries == 2) read_some<2>(x, step, m, stride, length, columns, out, out_step);
  if (queries == 1) read_some<1>(x, step, m, stride, length, columns, out, out_step);
}

// S = diag(a) S + w^T v, and out[r] = q[r] S, on one block of columns.
template <class V, int R>
LIGER_INLINE void update_columns(const float* a, const float* w, const float* v, const float* q, int64_t step,
                                 int64_t dim, float* s, float* out, int64_t out_step) {
  const V value = load<V>(v);
  V acc[R] = {};
  for (int64_t i = 0; i < dim; ++i) {
    const V row = load<V>(s + i * dim) * a[i] + value * w[i];
    store(s + i * dim, row);
    for (int r = 0; r < R; ++r) acc[r] += q[r * step + i] * row;
  }
  for (int r = 0; r < R; ++r) store(out + r * out_step, acc[r]);
}

template <int R>
LIGER_INLINE void update_some(const float* a, const float* w, const float* v, const float* q, int64_t step, int64_t dim,
                              float* s, float* out, int64_t out_step) {
  int64_t c = 0;
  for (; c + kLanes <= dim; c += kLanes) update_columns<Vec, R>(a, w, v + c, q, step, dim, s + c, out + c, out_step);
  for (; c < dim; ++c) update_columns<float, R>(a, w, v + c, q, step, dim, s + c, out + c, out_step);
}

LIGER_INLINE void update_and_read(const float* a, const float* w, const float* v, const float* q, int64_t step,
                                  int64_t queries, int64_t dim, float* s, float* out, int64_t out_step) {
  const int64_t first = std::min<int64_t>(queries, 4);
  if (first == 4) update_some<4>(a, w, v, q, step, dim, s, out, out_step);
  if (first == 3) update_some<3>(a, w, v, q, step, dim, s, out, out_step);
  if (first == 2) update_some<2>(a, w, v, q, step, dim, s, out, out_step);
  if (first == 1) update_some<1>(a, w, v, q, step, dim, s, out, out_step);
  if (queries > 4) read(q + 4 * step, step, queries - 4, s, dim, dim, dim, out + 4 * out_step, out_step);
}

// x becomes exp(x - max) over its first n values, zeros up to `padded(n)`; returns the sum.
LIGER_INLINE float exponentials(float* x, int64_t n) {
  for (int64_t i = n; i < padded(n); ++i) x[i] = -INFINITY;
  Vec top = Vec{} - INFINITY;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec value = load<Vec>(x + i);
    top = select(value > top, value, top);
  }
  const float peak = largest(top);
  Vec total = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec value = load<Vec>(x + i);
    value = select(value == -INFINITY, Vec{}, exp(value - peak));
    store(x + i, value);
    total += value;
  }
  return sum(total);
}

LIGER_INLINE void feature_map(const float* x, int64_t dim, bool softmax, float* out) {
  std::memcpy(out, x, sizeof(float) * dim);
  if (!softmax) return;
  const float total = exponentials(out, dim);
  for (int64_t i = 0; i < dim; ++i) out[i] /= total;
}

// Rotary embedding of one vector: out[i * step], times `factor`.
LIGER_INLINE void rotate(const float* x, const float* cos, const float* sin, int64_t dim, int64_t rotary, float factor,
                         float* out, int64_t step) {
  const int64_t half = rotary / 2;
  for (int64_t i = 0; i < half; ++i) {
    out[i * step] = factor * (x[i] * cos[i] - x[i + half] * sin[i]);
    out[(i + half) * step] = factor * (x[i + half] * cos[i + half] + x[i] * sin[i + half]);
  }
  for (int64_t i = rotary; i < dim; ++i) out[i * step] = factor * x[i];
}

// Retentions of one token, padded(dim) of them, from the gate's key.
LIGER_INLINE void retentions(const AttentionOptions& o, const float* key, int64_t dim, int64_t head, float* a) {
  const int64_t n = padded(dim);
  for (int64_t i = 0; i < n; ++i) a[i] = i < dim ? key[i] : 0;
  if (o.structure->scalar) {
    float mean = 0;
    for (int64_t i = 0; i < dim; ++i) mean += key[i];
    mean /= static_cast<float>(dim);
    for (int64_t i = 0; i < n; ++i) a[i] = mean;
  }
  const float inverse = 1 / o.gate_normalizer, fixed = std::log1p(-std::exp2(-5.0f - static_cast<float>(head)));
  const float shift = std::log(o.gate_normalizer);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec p = load<Vec>(a + i);
    Vec g = {};
    switch (o.structure->gate) {
      case Gate::kSigmoid: g = log_sigmoid(p) * inverse; break;
      case Gate::kBoundedSigmoid: g = log_sigmoid(p) * inverse; break;
      case Gate::kDoubleExponential: g = -exp(min(p - shift, 3.0f)); break;
      case Gate::kSoftplus: g = log_sigmoid(-p) * inverse; break;
      case Gate::kNone: break;
      case Gate::kFixed: g = Vec{} + fixed * inverse; break;
    }
    Vec alpha = exp(g);
    if (o.structure->gate == Gate::kBoundedSigmoid && o.lower_bound > 0) {
      alpha = o.lower_bound + (1 - o.lower_bound) * exp(log_sigmoid(p));
      for (int lane = 0; lane < kLanes; ++lane) alpha[lane] = std::pow(alpha[lane], inverse);
    }
    store(a + i, alpha);
  }
}

// scores[r][w] = turned[r] . key w after its rotary embedding, for one token's queries and `count` keys, row by row. Queries
// are padded to a multiple of four with zeros. Meanwhile `next`, which is read after the keys, is asked for.
LIGER_INLINE void step_scores(const float* turned, int64_t step, int64_t queries, const float* keys, const float* cos,
                              const float* sin, int64_t dim, int64_t rotary, int64_t count, const float* next,
                              float* scores, int64_t stride) {
  const int64_t half = rotary / 2;
  for (int64_t w = 0; w < count; ++w, keys += dim, cos += rotary, sin += rotary, next += dim) {
    for (int64_t i = 0; i < dim; i += kLanes) __builtin_prefetch(next + i);
    for (int64_t r = 0; r < queries; r += 4) {
      const float* q = turned + r * step;
      Vec acc[4] = {};
      for (int64_t i = 0; i < half; i += kLanes) {
        const Vec a = load<Vec>(keys + i), b = load<Vec>(keys + half + i);
        const Vec first = a * load<Vec>(cos + i) - b * load<Vec>(sin + i);
        const Vec second = b * load<Vec>(cos + half + i) + a * load<Vec>(sin + half + i);
        for (int j = 0; j < 4; ++j)
          acc[j] += first * load<Vec>(q + j * step + i) + second * load<Vec>(q + j * step + half + i);
      }
      for (int64_t i = rotary; i < dim; i += kLanes)
        for (int j = 0; j < 4; ++j) acc[j] += load<Vec>(keys + i) * load<Vec>(q + j * step + i);
      const Vec4 total = sums(acc);
      for (int64_t j = 0; j < std::min<int64_t>(queries - r, 4); ++j) scores[(r + j) * stride + w] = total[j];
    }
  }
}

// One task: row b, KV head g, all its tokens.
LIGER_INLINE void attention_head(const AttentionOptions& o, const AttentionSizes& z, const AttentionTensors& x,
                                 int64_t b, int64_t g) {
  const int64_t dim = z.dim, R = z.queries, W = z.window, S = W + z.tokens, P = padded(dim), stride = padded(S);
  const int64_t valid = std::clamp<int64_t>(x.valid[b], 0, z.tokens), seen = std::max<int64_t>(x.length[b], 0);
  const int64_t kv_width = z.kv_heads * dim, head = b * z.kv_heads + g;
  const float *old_k = x.window_k + head * W * dim, *old_v = x.window_v + head * W * dim;
  const auto token = [&](const float* base, int64_t t) { return base + (b * z.tokens + t) * kv_width + g * dim; };

  // A step reads the window where the call leaves it; several tokens read a copy, with their own keys and values behind.
  const bool step = z.tokens == 1 && valid == 1 && dim % kLanes == 0 && z.rotary % (2 * kLanes) == 0;
  const int64_t copied = step ? 0 : dim * stride + S * dim, R4 = (R + 3) / 4 * 4;
  float* keys = scratch(copied + R * (stride + 2 * P) + R4 * P + 2 * P);  // rotated, transposed: [K, S]
  float* values = keys + dim * stride;                                    // [S, K]
  float* scores = keys + copied;                                          // [R, S]
  float* turned = scores + R * stride;                                    // [R4, K] rotated queries
  float* features = turned + R4 * P;                                      // [R, K] phi(q)
  float* near = features + R * P;                                         // [R, K]
  float *alpha = near + R * P, *write = alpha + P;                        // [K]

  const int64_t first = std::max<int64_t>(W - std::min(seen, W), 0), last = W + valid;  // slots that hold a token
  for (int64_t s = first; s < last && !step; ++s) {
    const float* key = s < W ? old_k + s * dim : token(x.k, s - W);
    rotate(key, x.cos + s * z.rotary, x.sin + s * z.rotary, dim, z.rotary, 1, keys + s, stride);
    std::memcpy(values + s * dim, s < W ? old_v + s * dim : token(x.v, s - W), sizeof(float) * dim);
  }
  const int64_t kept = W - std::min(valid, W);  // the window after the call: slots valid .. valid + W
  float *new_k = x.new_window_k + head * W * dim, *new_v = x.new_window_v + head * W * dim;
  std::memcpy(new_k, old_k + (W - kept) * dim, sizeof(float) * kept * dim);
  std::memcpy(new_v, old_v + (W - kept) * dim, sizeof(float) * kept * dim);
  for (int64_t w = kept; w < W; ++w) {
    std::memcpy(new_k + w * dim, token(x.k, w + valid - W), sizeof(float) * dim);
    std::memcpy(new_v + w * dim, token(x.v, w + valid - W), sizeof(float) * dim);
  }
  float* state = nullptr;
  if (o.structure) {
    state = x.new_recurrent + head * dim * dim;
    if (!step) std::memcpy(state, x.recurrent + head * dim * dim, sizeof(float) * dim * dim);
  }
  if (step) std::memset(turned + R * P, 0, sizeof(float) * (R4 - R) * P);

  for (int64_t t = 0; t < z.tokens; ++t) {
    float* out = x.out + ((b * z.tokens + t) * z.kv_heads + g) * R * dim;
    if (t >= valid) {
      std::memset(out, 0, sizeof(float) * R * dim);
      continue;
    }
    const float* q = x.q + ((b * z.tokens + t) * z.kv_heads + g) * R * dim;
    const int64_t s = W + t, from = std::max(t + 1, first), count = s + 1 - from;
    for (int64_t r = 0; r < R; ++r)
      rotate(q + r * dim, x.cos + s * z.rotary, x.sin + s * z.rotary, dim, z.rotary, o.scale, turned + r * P, 1);
    const float* seen_values = step ? new_v + (from - 1) * dim : values + from * dim;
    if (step) {
      const float* next = state ? x.recurrent + head * dim * dim : seen_values;
      step_scores(turned, P, R, new_k + (from - 1) * dim, x.cos + from * z.rotary, x.sin + from * z.rotary, dim, z.rotary,
                  count, next, scores, stride);
      if (state) std::memcpy(state, x.recurrent + head * dim * dim, sizeof(float) * dim * dim);
    } else {
      read(turned, P, R, keys + from, stride, dim, count, scores, stride);
    }
    for (int64_t r = 0; r < R; ++r) {
      const float factor = o.window_weight / exponentials(scores + r * stride, count);
      for (int64_t i = 0; i < count; ++i) scores[r * stride + i] *= factor;
    }
    if (!state) {
      read(scores, stride, R, seen_values, dim, count, dim, out, dim);
      continue;
    }
    read(scores, stride, R, seen_values, dim, count, dim, near, P);
    retentions(o, token(x.gate_key, t), dim, g, alpha);
    if (o.structure->key_from_gate)
      for (int64_t i = 0; i < dim; ++i) write[i] = 1 - alpha[i];
    else
      feature_map(token(x.k, t), dim, o.softmax_features, write);
    for (int64_t r = 0; r < R; ++r) feature_map(q + r * dim, dim, o.softmax_features, features + r * P);
    update_and_read(alpha, write, token(x.v, t), features, P, R, dim, state, out, dim);
    for (int64_t r = 0; r < R; ++r)
      for (int64_t i = 0; i < dim; ++i) out[r * dim + i] = o.recurrent_weight * out[r * dim + i] + near[r * P + i];
  }
}

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma" LIGER_WIDE))) inline void
attention_head_avx512(const AttentionOptions& o, const AttentionSizes& z, const AttentionTensors& x, int64_t b,
                      int64_t g) {
  attention_head(o, z, x, b, g);
}

__attribute__((target("avx2,fma"))) inline void attention_head_avx2(const AttentionOptions& o, const AttentionSizes& z,
                                                                    const AttentionTensors& x, int64_t b, int64_t g) {
  attention_head(o, z, x, b, g);
}
#endif

// What every machine of the architecture has: SSE2 on x86-64, NEON on aarch64.
inline void attention_head_plain(const AttentionOptions& o, const AttentionSizes& z, const AttentionTensors& x,
                                 int64_t b, int64_t g) {
  attention_head(o, z, x, b, g);
}

}  // namespace detail

using AttentionHead = void (*)(const AttentionOptions&, const AttentionSizes&, const AttentionTensors&, int64_t row,
                               int64_t kv_head);

// The fastest form that this processor runs; `limit` ("avx2", "plain") asks for a lesser one.
inline AttentionHead attention_head(std::string_view limit = "") {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (limit.empty() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return detail::attention_head_avx512;
  if (limit != "plain" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return detail::attention_head_avx2;
#endif
  (void)limit;
  return detail::attention_head_plain;
}

}  // namespace liger
