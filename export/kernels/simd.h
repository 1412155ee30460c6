// Vectors of 16 floats that the compiler maps to what a function's target has: one AVX-512 register, two of AVX2, four of
// SSE or NEON. Everything here is inlined into functions compiled once per instruction set (see attention.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define LIGER_INLINE inline __attribute__((always_inline))
#ifdef __clang__
#define LIGER_WIDE ""
#else
#define LIGER_WIDE ",prefer-vector-width=512"
#endif

namespace liger {

using Vec = float __attribute__((vector_size(64)));
using VecInt = int32_t __attribute__((vector_size(64)));
constexpr int kLanes = 16;

template <class V>
LIGER_INLINE V load(const float* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <class V>
LIGER_INLINE void store(float* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

LIGER_INLINE Vec select(VecInt condition, Vec yes, Vec no) {
  return reinterpret_cast<Vec>((condition & reinterpret_cast<VecInt>(yes)) | (~condition & reinterpret_cast<VecInt>(no)));
}

LIGER_INLINE Vec min(Vec x, float limit) { return select(x < limit, x, Vec{} + limit); }
LIGER_INLINE Vec max(Vec x, float limit) { return select(x > limit, x, Vec{} + limit); }

// e^x to 2 units in the last place, for x in [-87, 88]; below, 0 (to 1e-38), above, the largest.
LIGER_INLINE Vec exp(Vec x) {
  x = max(min(x, 88.0f), -87.0f);
  const Vec shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  const Vec n = shifted - 12582912.0f;
  const Vec r = x - n * 0.693145752f - n * 1.42860677e-6f;  // ln 2 in two parts
  Vec p = Vec{} + 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const VecInt exponent = (__builtin_convertvector(n, VecInt) + 127) << 23;
  return p * reinterpret_cast<Vec>(exponent);
}

// log(1 + e) for e in [0, 1]: 2 atanh(z), z = e / (2 + e).
LIGER_INLINE Vec log1p(Vec e) {
  const Vec z = e / (2.0f + e), zz = z * z;
  Vec p = Vec{} + 1.0f / 15;
  for (int odd = 13; odd >= 1; odd -= 2) p = p * zz + 1.0f / odd;
  return 2.0f * z * p;
}

LIGER_INLINE Vec log_sigmoid(Vec x) {
  const Vec negative = min(x, 0.0f);
  return negative - log1p(exp(negative - max(x, 0.0f)));
}

LIGER_INLINE float sum(Vec x) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

LIGER_INLINE float largest(Vec x) {
  float found = x[0];
  for (int i = 1; i < kLanes; ++i) found = x[i] > found ? x[i] : found;
  return found;
}

}  // namespace liger
