// What follows the sums: bias, GELU, gate, residual and the one cast, in plain C++ that compilers vectorize. No product
// is fused with a sum, so every instruction set gives the same bits.
#pragma once

#include "format.h"
#include "linear.h"

namespace hif4 {

// 2^z within 2 units of the last place where that is a normal number; 0 below -126.5, infinity above 127.5.
HIF4_INLINE float exp2_of(float z) {
  z = z > -127.0f ? z : -127.0f;
  z = z < 128.0f ? z : 128.0f;
  const float shifted = z + 12582912.0f;  // 1.5 * 2^23: the nearest integer in the last bits
  const float r = z - (shifted - 12582912.0f);
  float p = 1.5353362e-4f;  // minimax of 2^r on [-1/2, 1/2], relative error 2e-9
  p = p * r + 1.3398875e-3f;
  p = p * r + 9.61843692e-3f;
  p = p * r + 5.55033237e-2f;
  p = p * r + 2.40226477e-1f;
  p = p * r + 6.93147182e-1f;
  p = p * r + 1.0f;
  return p * float_of((bits_of(shifted) - 0x4B400000u + 127u) << 23);
}

// GELU with tanh as x * sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 * x^3): without the cancellation of 1 + tanh(u).
HIF4_INLINE float gelu_of(float x) {
  const float power = x * (-2.30220819f + -0.102943242f * (x * x));  // -2u / log(2)
  return x / (1.0f + exp2_of(power));
}

HIF4_INLINE uint16_t half_of(float x) {
  const uint32_t bits = bits_of(x), sign = bits & 0x80000000, rest = bits ^ sign;
  const uint32_t special = rest > 0x7F800000 ? 0x7E00 : 0x7C00;
  // Below 2^-14, adding 0.5 rounds to multiples of 2^-24, half's smallest number.
  const uint32_t small = bits_of(float_of(rest) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (rest - (112u << 23) + 0xFFF + ((rest >> 13) & 1)) >> 13;
  const uint32_t found = rest >= 0x47800000 ? special : rest < 0x38800000 ? small : normal;
  return static_cast<uint16_t>(found | sign >> 16);
}

HIF4_INLINE float float_of_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, rest = half & 0x7FFFu;
  const uint32_t small = bits_of(static_cast<float>(static_cast<int32_t>(rest)) * 5.9604644775390625e-8f);  // 2^-24
  const uint32_t normal = (rest << 13) + (112u << 23) + ((exponent + 1) >> 5) * (112u << 23);  // more for Inf and NaN
  const uint32_t is_small = static_cast<uint32_t>(static_cast<int32_t>(exponent - 1) >> 31);
  return float_of(sign | (small & is_small) | (normal & ~is_small));
}

// y [count] = the sums of one row from `column` on; changed in place, then stored.
HIF4_INLINE void finish_columns(const Epilogue& e, int64_t row, int64_t column, int64_t count, float* __restrict y) {
  if (e.bias) {
    const float* __restrict bias = e.bias + column;
    for (int64_t c = 0; c < count; c++) y[c] = y[c] + bias[c];
  }
  if (e.gelu)
    for (int64_t c = 0; c < count; c++) y[c] = gelu_of(y[c]);
  if (e.gate) {
    const float* __restrict gate = e.gate + row / e.gate_rows * e.n + column;
    for (int64_t c = 0; c < count; c++) y[c] = y[c] * gate[c];
  }
  const int64_t at = row * e.n + column;
  if (e.residual && e.residual_dtype == kFloat32) {
    const float* __restrict residual = static_cast<const float*>(e.residual) + at;
    for (int64_t c = 0; c < count; c++) y[c] = residual[c] + y[c];
  } else if (e.residual) {
    const uint16_t* __restrict residual = static_cast<const uint16_t*>(e.residual) + at;
    if (e.residual_dtype == kBfloat16)
      for (int64_t c = 0; c < count; c++) y[c] = float_of(static_cast<uint32_t>(residual[c]) << 16) + y[c];
    else
      for (int64_t c = 0; c < count; c++) y[c] = float_of_half(residual[c]) + y[c];
  }
  if (e.dtype == kFloat32) {
    memcpy(static_cast<float*>(e.out) + at, y, count * sizeof(float));
    return;
  }
  uint16_t* __restrict out = static_cast<uint16_t*>(e.out) + at;
  if (e.dtype == kBfloat16)
    for (int64_t c = 0; c < count; c++) out[c] = bf16_of(y[c]);
  else
    for (int64_t c = 0; c < count; c++) out[c] = half_of(y[c]);
}

HIF4_INLINE void finish_row(const Epilogue& e, int64_t row, int64_t column, int64_t count, float* y) {
  if (count == kCols) return finish_columns(e, row, column, kCols, y);  // whole vectors
  if (count == kFewTiles * kTile) return finish_columns(e, row, column, kFewTiles * kTile, y);
  finish_columns(e, row, column, count, y);
}

}  // namespace hif4
