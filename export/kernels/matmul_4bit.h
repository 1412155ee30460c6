// liger::MatMulNBits: y = x W^T with W in 4 bits, or silu(y_gate) * y_up where W holds a gate and an up half (SwiGLU).
//
// W [N,K] lies in memory as com.microsoft.MatMulNBits has it: groups of 32, 64 or 128 columns of a row share a scale (here
// float16) and a zero point (two in a byte), w = scale (number - zero), numbers from 0 to 15; byte i of a group holds
// columns 2i (its low half) and 2i + 1. Tokens are rounded to 8 bits, a scale for each group, so that a group's product is
// a sum of small integers; MatMulNBits does the same at accuracy level 4.
//
// One token is a stream of W; more tokens share what is unpacked. Raw pointers, no framework. Shapes: T tokens, N rows of W,
// K columns, G groups of a row.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string_view>
#include <vector>

#include "simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace liger {

struct Matrix4Bit {
  const uint8_t* numbers;  // [N, G, group / 2]
  const uint16_t* scales;  // [N, G], float16
  const uint8_t* zeros;    // [N, (G + 1) / 2]
  int64_t rows, columns, group;

  int64_t groups() const { return (columns + group - 1) / group; }
  int64_t row_bytes() const { return groups() * group / 2; }
};

// Tokens in 8 bits. A chunk is 128 columns: first its even columns, then the odd ones, as the halves of W's bytes meet them.
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
      const Bytes even = __builtin_shufflevector(half[0], half[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      const Bytes odd = __builtin_shufflevector(half[0], half[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
      std::memcpy(to, &even, 16);
      std::memcpy(to + 64, &odd, 16);
      for (int64_t i4 = 0; i4 < 4; ++i4) scales[block * 4 + i4] = scale;
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

// Sixteen rows of W as they lie, for several tokens.
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

#if defined(__x86_64__)
#define LIGER_UNROLL _Pragma("GCC unroll 8")
#define LIGER_AVX2 __attribute__((target("avx2,fma,f16c")))
#define LIGER_VNNI \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")))

constexpr int64_t kAhead = 8192;  // bytes; the processor's own prefetching does not follow several rows at once

struct Avx512Vnni {
  // 16 groups of each row from group g on; fewer at a row's end, where loads are masked. (Masked loads are not prefetched.)
  template <int R, bool whole>
  static LIGER_VNNI LIGER_INLINE void panel(const Matrix4Bit& w, const int64_t (&rows)[R], Tokens8Bit& x, int64_t t,
                                            int64_t g, __m512i index, __m512 (&sums)[R]) {
    const int64_t groups = w.groups(), row_bytes = w.row_bytes(), chunk_groups = 128 / w.group;
    const int64_t count = whole ? 16 : groups - g;
    const __mmask16 scales_in = static_cast<__mmask16>((1u << count) - 1);
    const __mmask16 zeros_in = static_cast<__mmask16>((1u << (count + 1) / 2) - 1);
    const __m128i low = _mm_set1_epi8(15);
    const __m512i low_512 = _mm512_set1_epi8(15);
    __m512 scale[R];
    LIGER_UNROLL for (int r = 0; r < R; ++r) {
      const uint16_t* scales = w.scales + rows[r] * groups + g;
      const uint8_t* zeros = w.zeros + rows[r] * ((groups + 1) / 2) + g / 2;
      const __m256i halves = whole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales))
                                   : _mm256_maskz_loadu_epi16(scales_in, scales);
      const __m128i pairs = whole ? _mm_loadu_si64(zeros) : _mm_maskz_loadu_epi8(zeros_in, zeros);
      const __m128i single = _mm_unpacklo_epi8(_mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
      scale[r] = _mm512_cvtph_ps(halves);
      _mm_prefetch(reinterpret_cast<const char*>(scales) + kAhead / 4, _MM_HINT_T0);
      const __m512 zero = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(single)), scale[r]);
      sums[r] = _mm512_fnmadd_ps(zero, _mm512_loadu_ps(x.sums(t) + g), sums[r]);
    }
    const int64_t first = g / chunk_groups, last = std::min(first + 16 / chunk_groups, x.chunks());
    for (int64_t c = first; c < last; ++c) {
      const int64_t left = row_bytes - c * 64;
      const int8_t* tokens = x.numbers(t) + c * 128;
      const __m512i x_even = _mm512_loadu_si512(tokens), x_odd = _mm512_loadu_si512(tokens + 64);
      const __m512 x_scale = _mm512_loadu_ps(x.scales(t) + c * 16);
      LIGER_UNROLL for (int r = 0; r < R; ++r) {
        const uint8_t* numbers = w.numbers + rows[r] * row_bytes + c * 64;
        const __m512i pairs = whole || left >= 64 ? _mm512_loadu_si512(numbers)
                                                  : _mm512_maskz_loadu_epi8((1ull << left) - 1, numbers);
        _mm_prefetch(reinterpret_cast<const char*>(numbers) + kAhead, _MM_HINT_T0);
        const __m512i even = _mm512_and_si512(pairs, low_512), odd = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), low_512);
        const __m512i total = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), even, x_even), odd, x_odd);
        const __m512 factor = _mm512_mul_ps(_mm512_permutexvar_ps(index, scale[r]), x_scale);
        sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), factor, sums[r]);
      }
      index = _mm512_add_epi32(index, _mm512_set1_epi32(static_cast<int>(chunk_groups)));
    }
  }

  template <int R, int T>
  LIGER_VNNI static void products(const Matrix4Bit& w, int64_t row, Tokens8Bit& x, int64_t t, float* out) {
    static_assert(T == 1);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i index = _mm512_srlv_epi32(lanes, _mm512_set1_epi32(w.group == 32 ? 2 : w.group == 64 ? 3 : 4));
    int64_t rows[R], g = 0;
    __m512 sums[R];
    LIGER_UNROLL for (int r = 0; r < R; ++r) rows[r] = std::min(row + r, w.rows - 1), sums[r] = _mm512_setzero_ps();
    for (; g + 16 <= w.groups(); g += 16) panel<R, true>(w, rows, x, t, g, index, sums);
    if (g < w.groups()) panel<R, false>(w, rows, x, t, g, index, sums);
    LIGER_UNROLL for (int r = 0; r < R; ++r) out[r] = _mm512_reduce_add_ps(sums[r]);
  }

  // For several tokens rows are turned once, so that each lies in a lane and a token's columns are what is spread.
  class Several {
   public:
    static constexpr int kTokens = 8;

    LIGER_VNNI void take(const Matrix4Bit& w, int64_t row) {
      groups_ = w.groups(), group_ = w.group;
      numbers_.resize(w.row_bytes() * 32), scales_.resize(groups_ * 16), zeros_.resize(groups_ * 16);
      int32_t offsets[16];
      for (int64_t r = 0; r < 16; ++r) {
        const int64_t n = std::min(row + r, w.rows - 1);
        offsets[r] = static_cast<int32_t>((n - row) * w.row_bytes());
        const uint8_t* zeros = w.zeros + n * ((groups_ + 1) / 2);
        for (int64_t g = 0; g < groups_; ++g) {
          scales_[g * 16 + r] = _cvtsh_ss(w.scales[n * groups_ + g]);
          zeros_[g * 16 + r] = scales_[g * 16 + r] * static_cast<float>(zero_point(zeros, g));
        }
      }
      const __m512i at = _mm512_loadu_si512(offsets), low = _mm512_set1_epi8(15);
      const uint8_t* from = w.numbers + row * w.row_bytes();
      for (int64_t byte = 0; byte < w.row_bytes(); byte += 4) {  // eight columns of each row
        const __m512i pairs = _mm512_i32gather_epi32(at, from + byte, 1);
        uint8_t* to = numbers_.data() + byte * 32;
        _mm512_storeu_si512(to, _mm512_and_si512(pairs, low));
        _mm512_storeu_si512(to + 64, _mm512_and_si512(_mm512_srli_epi16(pairs, 4), low));
      }
    }

    template <int T>
    LIGER_VNNI void products(Tokens8Bit& x, int64_t t, float* out) const {
      __m512 sums[T];
      LIGER_UNROLL for (int i = 0; i < T; ++i) sums[i] = _mm512_setzero_ps();
      for (int64_t g = 0; g < groups_; ++g) {
        __m512i totals[T];
        LIGER_UNROLL for (int i = 0; i < T; ++i) totals[i] = _mm512_setzero_si512();
        for (int64_t byte = g * group_ / 2; byte < (g + 1) * group_ / 2; byte += 4) {
          const uint8_t* numbers = numbers_.data() + byte * 32;
          const __m512i even = _mm512_loadu_si512(numbers), odd = _mm512_loadu_si512(numbers + 64);
          LIGER_UNROLL for (int i = 0; i < T; ++i) {
            const int8_t* tokens = x.numbers(t + i) + byte / 64 * 128 + byte % 64;
            int32_t four[2];
            std::memcpy(four, tokens, 4), std::memcpy(four + 1, tokens + 64, 4);
            totals[i] = _mm512_dpbusd_epi32(totals[i], even, _mm512_set1_epi32(four[0]));
            totals[i] = _mm512_dpbusd_epi32(totals[i], odd, _mm512_set1_epi32(four[1]));
          }
        }
        const __m512 scale = _mm512_loadu_ps(scales_.data() + g * 16), zero = _mm512_loadu_ps(zeros_.data() + g * 16);
        LIGER_UNROLL for (int i = 0; i < T; ++i) {
          const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales(t + i)[g * group_ / 8]));
          sums[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(totals[i]), factor, sums[i]);
          sums[i] = _mm512_fnmadd_ps(zero, _mm512_set1_ps(x.sums(t + i)[g]), sums[i]);
        }
      }
      LIGER_UNROLL for (int i = 0; i < T; ++i) _mm512_storeu_ps(out + i * 16, sums[i]);
    }

   private:
    int64_t groups_ = 0, group_ = 0;
    std::vector<uint8_t> numbers_;        // [K / 8, even and odd columns, 16 rows, 4]
    std::vector<float> scales_, zeros_;  // [G, 16]: the zero points times their scales
  };
};

struct Avx2 {
  using Several = AsTheyLie<Avx2>;

  // 8 groups of each row from group g on, or the fewer that are left. 32 bytes of numbers are 64 columns.
  template <int R, int T, bool whole>
  static LIGER_AVX2 LIGER_INLINE void panel(const Matrix4Bit& w, const int64_t (&rows)[R], Tokens8Bit& x, int64_t t,
                                            int64_t g, __m256i spread, __m256 (&sums)[R][T]) {
    const int64_t groups = w.groups(), row_bytes = w.row_bytes(), count = std::min<int64_t>(groups - g, 8);
    const __m128i low = _mm_set1_epi8(15);
    const __m256i low_256 = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256 scale[R];
    LIGER_UNROLL for (int r = 0; r < R; ++r) {
      const uint16_t* scales = w.scales + rows[r] * groups + g;
      const uint8_t* zeros = w.zeros + rows[r] * ((groups + 1) / 2) + g / 2;
      uint16_t last_scales[8] = {};
      uint8_t last_zeros[4] = {};
      if (!whole) {
        for (int64_t k = 0; k < count; ++k) last_scales[k] = scales[k], last_zeros[k / 2] = zeros[k / 2];
        scales = last_scales, zeros = last_zeros;
      }
      const __m128i pairs = _mm_loadu_si32(zeros);
      const __m128i single = _mm_unpacklo_epi8(_mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
      scale[r] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
      if (T == 1 && whole) _mm_prefetch(reinterpret_cast<const char*>(scales) + kAhead / 4, _MM_HINT_T0);
      const __m256 zero = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(single)), scale[r]);
      LIGER_UNROLL for (int i = 0; i < T; ++i)
        sums[r][i] = _mm256_fnmadd_ps(zero, _mm256_loadu_ps(x.sums(t + i) + g), sums[r][i]);
    }
    const int64_t last = std::min((g + 8) * w.group / 2, row_bytes);
    int group = 0;
    for (int64_t at = g * w.group / 2; at < last; at += 32, group += 2) {
      const __m256i index = _mm256_add_epi32(spread, _mm256_set1_epi32(w.group == 32 ? group : w.group == 64 ? group / 2 : group / 4));
      __m256i even[R], odd[R];
      __m256 factor[R];
      LIGER_UNROLL for (int r = 0; r < R; ++r) {
        const auto* numbers = reinterpret_cast<const __m128i*>(w.numbers + rows[r] * row_bytes + at);
        const __m256i pairs = last - at >= 32 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers))
                                              : _mm256_zextsi128_si256(_mm_loadu_si128(numbers));
        if (T == 1) _mm_prefetch(reinterpret_cast<const char*>(numbers) + kAhead, _MM_HINT_T0);
        even[r] = _mm256_and_si256(pairs, low_256);
        odd[r] = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), low_256);
        factor[r] = _mm256_permutevar8x32_ps(scale[r], index);
      }
      LIGER_UNROLL for (int i = 0; i < T; ++i) {
        const auto* tokens = reinterpret_cast<const __m256i*>(x.numbers(t + i) + at / 64 * 128 + at % 64);
        const __m256i x_even = _mm256_loadu_si256(tokens), x_odd = _mm256_loadu_si256(tokens + 2);
        const __m256 x_scale = _mm256_loadu_ps(x.scales(t + i) + at / 4);
        LIGER_UNROLL for (int r = 0; r < R; ++r) {  // sums of four products of at most 15 * 127 fit 16 bits
          const __m256i total = _mm256_add_epi16(_mm256_maddubs_epi16(even[r], x_even), _mm256_maddubs_epi16(odd[r], x_odd));
          const __m256 product = _mm256_cvtepi32_ps(_mm256_madd_epi16(total, ones));
          sums[r][i] = _mm256_fmadd_ps(product, _mm256_mul_ps(factor[r], x_scale), sums[r][i]);
        }
      }
    }
  }

  template <int R, int T>
  LIGER_AVX2 static void products(const Matrix4Bit& w, int64_t row, Tokens8Bit& x, int64_t t, float* out) {
    constexpr int kRows = T == 1 ? 2 : 1;  // 16 registers
    const __m256i spread = w.group == 32 ? _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1) : _mm256_setzero_si256();
    for (int part = 0; part < R; part += kRows) {
      int64_t rows[kRows];
      __m256 sums[kRows][T];
      LIGER_UNROLL for (int r = 0; r < kRows; ++r) {
        rows[r] = std::min(row + part + r, w.rows - 1);
        LIGER_UNROLL for (int i = 0; i < T; ++i) sums[r][i] = _mm256_setzero_ps();
      }
      int64_t g = 0;
      for (; g + 8 <= w.groups(); g += 8) panel<kRows, T, true>(w, rows, x, t, g, spread, sums);
      if (g < w.groups()) panel<kRows, T, false>(w, rows, x, t, g, spread, sums);
      LIGER_UNROLL for (int r = 0; r < kRows; ++r)
        LIGER_UNROLL for (int i = 0; i < T; ++i) {
          __m128 sum = _mm_add_ps(_mm256_castps256_ps128(sums[r][i]), _mm256_extractf128_ps(sums[r][i], 1));
          sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
          out[i * 16 + part + r] = _mm_cvtss_f32(sum) + _mm_cvtss_f32(_mm_movehdup_ps(sum));
        }
    }
  }
};
#elif defined(__aarch64__)
struct Neon {
  using Several = AsTheyLie<Neon>;

  template <int R, int T>
  static void products(const Matrix4Bit& w, int64_t row, Tokens8Bit& x, int64_t t, float* out) {
    const int64_t groups = w.groups(), row_bytes = w.row_bytes();
    for (int r = 0; r < R; ++r) {
      const int64_t n = std::min(row + r, w.rows - 1);
      const uint8_t *numbers = w.numbers + n * row_bytes, *zeros = w.zeros + n * ((groups + 1) / 2);
      float32x4_t sums[T];
      float zero_sums[T] = {};
      for (int i = 0; i < T; ++i) sums[i] = vdupq_n_f32(0);
      for (int64_t at = 0; at < row_bytes; at += 16) {  // 32 columns
        const int64_t g = at * 2 / w.group;
        const float scale = from_half(w.scales[n * groups + g]);
        if (at * 2 % w.group == 0)
          for (int i = 0; i < T; ++i) zero_sums[i] += scale * static_cast<float>(zero_point(zeros, g)) * x.sums(t + i)[g];
        const uint8x16_t pairs = vld1q_u8(numbers + at);
        const int8x16_t even = vreinterpretq_s8_u8(vandq_u8(pairs, vdupq_n_u8(15)));
        const int8x16_t odd = vreinterpretq_s8_u8(vshrq_n_u8(pairs, 4));
        for (int i = 0; i < T; ++i) {
          const int8_t* tokens = x.numbers(t + i) + at / 64 * 128 + at % 64;
          const int8x16_t x_even = vld1q_s8(tokens), x_odd = vld1q_s8(tokens + 64);
          // Four products of at most 15 * 127 fit 16 bits.
          int16x8_t low = vmull_s8(vget_low_s8(even), vget_low_s8(x_even)), high = vmull_high_s8(even, x_even);
          low = vmlal_s8(low, vget_low_s8(odd), vget_low_s8(x_odd)), high = vmlal_high_s8(high, odd, x_odd);
          const int32x4_t total = vpaddlq_s16(vaddq_s16(low, high));
          sums[i] = vfmaq_n_f32(sums[i], vcvtq_f32_s32(total), scale * x.scales(t + i)[at / 4]);
        }
      }
      for (int i = 0; i < T; ++i) out[i * 16 + r] = vaddvq_f32(sums[i]) - zero_sums[i];
    }
  }
};
#endif

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
  if (limit != "plain" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return {detail::round_token_avx2, detail::matmul_rows_avx2};
#elif defined(__aarch64__)
  if (limit != "plain") return {detail::round_token, detail::matmul_rows<detail::Neon>};
#endif
  (void)limit;
  return {detail::round_token, detail::matmul_rows<detail::Plain>};
}

}  // namespace liger
