// The product of matmul_4bit.h on AVX-512 with VNNI, and on AVX2.
#pragma once

#include <immintrin.h>

#include "matmul_4bit_base.h"

#define LIGER_UNROLL _Pragma("GCC unroll 8")
#define LIGER_AVX2 __attribute__((target("avx2,fma,f16c")))
#define LIGER_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c" LIGER_WIDE)))

namespace liger::detail {

constexpr int64_t kAhead = 6144;  // bytes that are asked for before they are needed

struct Avx512Vnni {
  // 16 groups of a row from group g on; fewer at its end, where loads are masked: such loads were not prefetched.
  template <bool whole>
  static LIGER_VNNI LIGER_INLINE void panel(const Matrix4Bit& w, int64_t row, Tokens8Bit& x, int64_t t, int64_t g,
                                            __m512i index, __m512* sum) {
    const int64_t groups = w.groups(), row_bytes = w.row_bytes(), chunk_groups = 128 / w.group;
    const int64_t count = whole ? 16 : groups - g;
    const __mmask16 scales_in = static_cast<__mmask16>((1u << count) - 1);
    const __mmask16 zeros_in = static_cast<__mmask16>((1u << (count + 1) / 2) - 1);
    const __m128i low = _mm_set1_epi8(15);
    const __m512i low_512 = _mm512_set1_epi8(15);
    const uint16_t* scales = w.scales + row * groups + g;
    const uint8_t* zeros = w.zeros + row * ((groups + 1) / 2) + g / 2;
    const __m256i halves = whole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales))
                                 : _mm256_maskz_loadu_epi16(scales_in, scales);
    const __m128i eight = whole ? _mm_loadu_si64(zeros) : _mm_maskz_loadu_epi8(zeros_in, zeros);
    const __m128i single = _mm_unpacklo_epi8(_mm_and_si128(eight, low), _mm_and_si128(_mm_srli_epi16(eight, 4), low));
    const __m512 scale = _mm512_cvtph_ps(halves);
    _mm_prefetch(reinterpret_cast<const char*>(scales) + kAhead / 4, _MM_HINT_T0);
    const __m512 zero = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(single)), scale);
    *sum = _mm512_fnmadd_ps(zero, _mm512_loadu_ps(x.sums(t) + g), *sum);
    const int64_t first = g / chunk_groups, last = std::min(first + 16 / chunk_groups, x.chunks());
    for (int64_t c = first; c < last; ++c) {
      const int64_t left = row_bytes - c * 64;
      const int8_t* tokens = x.numbers(t) + c * 128;
      const uint8_t* numbers = w.numbers + row * row_bytes + c * 64;
      const __m512i pairs = whole || left >= 64 ? _mm512_loadu_si512(numbers)
                                                : _mm512_maskz_loadu_epi8((1ull << left) - 1, numbers);
      _mm_prefetch(reinterpret_cast<const char*>(numbers) + kAhead, _MM_HINT_T0);
      const __m512i even = _mm512_and_si512(pairs, low_512), odd = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), low_512);
      const __m512i evens = _mm512_dpbusd_epi32(_mm512_setzero_si512(), even, _mm512_loadu_si512(tokens));
      const __m512i total = _mm512_dpbusd_epi32(evens, odd, _mm512_loadu_si512(tokens + 64));
      const __m512 factor = _mm512_mul_ps(_mm512_permutexvar_ps(index, scale), _mm512_loadu_ps(x.scales(t) + c * 16));
      *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), factor, *sum);
      index = _mm512_add_epi32(index, _mm512_set1_epi32(static_cast<int>(chunk_groups)));
    }
  }

  // Row after row: with four at once, two cores got 32 GB/s from memory that gave them 48.
  template <int R, int T>
  LIGER_VNNI static void products(const Matrix4Bit& w, int64_t row, Tokens8Bit& x, int64_t t, float* out) {
    static_assert(T == 1);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i index = _mm512_srlv_epi32(lanes, _mm512_set1_epi32(w.group == 32 ? 2 : w.group == 64 ? 3 : 4));
    for (int r = 0; r < R; ++r) {
      const int64_t n = std::min(row + r, w.rows - 1);
      __m512 sum = _mm512_setzero_ps();
      int64_t g = 0;
      for (; g + 16 <= w.groups(); g += 16) panel<true>(w, n, x, t, g, index, &sum);
      if (g < w.groups()) panel<false>(w, n, x, t, g, index, &sum);
      out[r] = _mm512_reduce_add_ps(sum);
    }
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
      const int first = w.group == 32 ? group : w.group == 64 ? group / 2 : group / 4;
      const __m256i index = _mm256_add_epi32(spread, _mm256_set1_epi32(first));
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

}  // namespace liger::detail
