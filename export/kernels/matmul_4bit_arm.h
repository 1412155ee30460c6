// The product of matmul_4bit.h on NEON, as every 64-bit ARM processor has it.
#pragma once

#include <arm_neon.h>

#include "matmul_4bit_base.h"

namespace liger::detail {

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

}  // namespace liger::detail
