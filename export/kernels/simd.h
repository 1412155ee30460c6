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
using Vec8 = float __attribute__((vector_size(32)));
using Vec4 = float __attribute__((vector_size(16)));
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

// The first and the last eight lanes; the first and the last four of eight.
LIGER_INLINE Vec8 low(Vec x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7); }
LIGER_INLINE Vec8 high(Vec x) { return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15); }
LIGER_INLINE Vec4 low(Vec8 x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3); }
LIGER_INLINE Vec4 high(Vec8 x) { return __builtin_shufflevector(x, x, 4, 5, 6, 7); }

// Four sums of a fourth of the lanes each.
LIGER_INLINE Vec4 fourths(Vec x) {
  const Vec8 half = low(x) + high(x);
  return low(half) + high(half);
}

LIGER_INLINE float sum(Vec x) {
  const Vec4 part = fourths(x);
  return (part[0] + part[2]) + (part[1] + part[3]);
}

// The sums of four vectors.
LIGER_INLINE Vec4 sums(const Vec (&x)[4]) {
  const Vec4 a = fourths(x[0]), b = fourths(x[1]), c = fourths(x[2]), d = fourths(x[3]);
  const Vec4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Vec4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

LIGER_INLINE float largest(Vec x) {
  const Vec8 first = low(x), last = high(x), half = first > last ? first : last;
  const Vec4 one = low(half), other = high(half), part = one > other ? one : other;
  const float a = part[0] > part[2] ? part[0] : part[2], b = part[1] > part[3] ? part[1] : part[3];
  return a > b ? a : b;
}

}  // namespace liger
