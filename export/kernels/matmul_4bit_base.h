// What the forms of the product in matmul_4bit.h share: the matrix, the tokens in 8 bits, and the plain form.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "simd.h"

namespace liger {

struct Matrix4Bit {
  const uint8_t* numbers;  // [N, G, group / 2]
  const uint16_t* scales;  // [N, G], float16
  const uint8_t* zeros;    // [N, (G + 1) / 2]
  int64_t rows, columns, group;

  int64_t groups() const { return (columns + group - 1) / group; }
  int64_t row_bytes() const { return groups() * group / 2; }
};

// Tokens in 8 bits. A chunk is 128 columns: first its even ones, then the odd ones, as the halves of W's bytes meet them.
class Tokens8Bit {
 public:
  static constexpr int64_t kChunk = 128, kScales = 16;

  // Room for `tokens`; memory grows to the largest call seen.
  void resize(int64_t tokens, const Matrix4Bit& w) {
    chunks_ = (w.groups() * w.group + kChunk - 1) / kChunk;
    groups_ = (w.groups() + 15) / 16 * 16;
    numbers_.resize(std::max<size_t>(numbers_.size(), tokens * chunks_ * kChunk));
    scales_.resize(std::max<size_t>(scales_.size(), tokens * chunks_ * kScales));
    sums_.resize(std::max<size_t>(sums_.size(), tokens * groups_));
  }
  int8_t* numbers(int64_t t) { return numbers_.data() + t * chunks_ * kChunk; }    // [chunks, 2, 64]
  float* scales(int64_t t) { return scales_.data() + t * chunks_ * kScales; }      // [chunks, 16]: four for 32 columns
  float* sums(int64_t t) { return sums_.data() + t * groups_; }                    // [G]: scale times the numbers' sum
  int64_t chunks() const { return chunks_; }
  int64_t groups() const { return groups_; }  // rounded up to 16; what is beyond W's holds zeros

 private:
  int64_t chunks_ = 0, groups_ = 0;
  std::vector<int8_t> numbers_;
  std::vector<float> scales_, sums_;
};

namespace detail {

using Bytes = int8_t __attribute__((vector_size(16)));

// One token of K floats.
LIGER_INLINE void round_token(const float* x, const Matrix4Bit& w, int64_t t, Tokens8Bit* out) {
  int8_t* numbers = out->numbers(t);
  float *scales = out->scales(t), *sums = out->sums(t);
  std::memset(numbers, 0, out->chunks() * Tokens8Bit::kChunk);
  std::memset(scales, 0, out->chunks() * Tokens8Bit::kScales * sizeof(float));
  std::memset(sums, 0, out->groups() * sizeof(float));
  float padded[128] = {};
  for (int64_t g = 0; g < w.groups(); ++g) {
    const float* from = x + g * w.group;
    if ((g + 1) * w.group > w.columns) {
      std::memcpy(padded, from, (w.columns - g * w.group) * sizeof(float));
      from = padded;
    }
    Vec top = {}, poison = {};  // poison: zeros, or NaN where x is not finite
    for (int64_t i = 0; i < w.group; i += kLanes) {
      const Vec value = load<Vec>(from + i), size = select(value < 0.0f, -value, value);
      top = select(size > top, size, top);
      poison += value * 0.0f;
    }
    const float scale = largest(top) / 127 + sum(poison), inverse = scale > 0 ? 1 / scale : 0;
    VecInt total = {};
    for (int64_t i = 0; i < w.group; i += 32) {
      Bytes half[2];
      for (int64_t h = 0; h < 2; ++h) {
        const Vec rounded = load<Vec>(from + i + kLanes * h) * inverse + 12582912.0f;  // adding 1.5 * 2^23 rounds
        const VecInt whole = __builtin_convertvector(rounded - 12582912.0f, VecInt);
        total += whole;
        half[h] = __builtin_convertvector(whole, Bytes);
      }
      const int64_t block = (g * w.group + i) / 32;
      int8_t* to = numbers + block / 4 * Tokens8Bit::kChunk + block % 4 * 16;
      const Bytes even =
          __builtin_shufflevector(half[0], half[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      const Bytes odd =
          __builtin_shufflevector(half[0], half[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
      std::memcpy(to, &even, 16);
      std::memcpy(to + 64, &odd, 16);
      std::fill_n(scales + block * 4, 4, scale);
    }
    int32_t whole_sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) whole_sum += total[lane];
    sums[g] = scale * static_cast<float>(whole_sum);
  }
}

LIGER_INLINE float from_half(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  value *= 5.192296858534828e33f;  // 2^112: the exponents' difference
  return half & 0x8000 ? -value : value;
}

LIGER_INLINE int zero_point(const uint8_t* zeros, int64_t g) { return zeros[g / 2] >> (g % 2 * 4) & 15; }

// Sixteen rows of W as they lie, for one token or several.
template <class Form>
class AsTheyLie {
 public:
  static constexpr int kTokens = 4;
  void take(const Matrix4Bit& w, int64_t row) { w_ = &w, row_ = row; }
  template <int T>
  LIGER_INLINE void products(Tokens8Bit& x, int64_t t, float* out) const {
    for (int r = 0; r < 16; r += 4) Form::template products<4, T>(*w_, row_ + r, x, t, out + r);
  }

 private:
  const Matrix4Bit* w_ = nullptr;
  int64_t row_ = 0;
};

// What every form below computes: out[t * 16 + r] for R rows of W from `row` on and T tokens from `t` on. Rows beyond the
// last are computed as the last.
struct Plain {
  using Several = AsTheyLie<Plain>;

  template <int R, int T>
  static void products(const Matrix4Bit& w, int64_t row, Tokens8Bit& x, int64_t t, float* out) {
    for (int r = 0; r < R; ++r) {
      const int64_t n = std::min(row + r, w.rows - 1), groups = w.groups();
      const uint8_t *numbers = w.numbers + n * w.row_bytes(), *zeros = w.zeros + n * ((groups + 1) / 2);
      for (int i = 0; i < T; ++i) {
        float total = 0;
        for (int64_t g = 0; g < groups; ++g) {
          int32_t sum = 0;
          for (int64_t at = g * w.group; at < (g + 1) * w.group; at += 32) {
            const int8_t* even = x.numbers(t + i) + at / 128 * 128 + at % 128 / 2;
            for (int64_t b = 0; b < 16; ++b) {
              const uint8_t byte = numbers[at / 2 + b];
              sum += (byte & 15) * even[b] + (byte >> 4) * even[b + 64];
            }
          }
          const float scale = x.scales(t + i)[g * w.group / 8];
          total += from_half(w.scales[n * groups + g]) *
                   (scale * static_cast<float>(sum) - static_cast<float>(zero_point(zeros, g)) * x.sums(t + i)[g]);
        }
        out[i * 16 + r] = total;
      }
    }
  }
};

}  // namespace detail

}  // namespace liger
