// Quantization and rotation in plain C++, for the instruction sets that have nothing better.
#pragma once

#include "rows.h"

namespace hif4 {

// E6M2 and bf16_rne(1 / E6M2) of a unit whose largest magnitude is `vmax`, finite.
struct Level1 {
  uint32_t stored;
  float inverse;
};

HIF4_INLINE Level1 level1(float vmax) {
  uint32_t sf = bf16_rne(vmax * 0.142578125f);          // bf16_rne(1/7)
  sf = sf < 0x2780 ? 0x2780 : sf > 0x4740 ? 0x4740 : sf;  // 2^-48, 1.5 * 2^15 as bf16
  const uint32_t bits = (sf + 15 + ((sf >> 5) & 1)) >> 5;  // two fraction bits, half to even, carry into the exponent
  const float inverse = 1.0f / float_of(bits << 21);
  return {bits - ((127 - 48) << 2), float_of(bf16_rne(inverse) << 16)};
}

// Whole units of fp32 to planes.
HIF4_INLINE void quantize_units(const float* x, int64_t units, uint8_t* codes, uint8_t* scales) {
  for (int64_t u = 0; u < units; u++, x += kUnit, codes += kUnitBytes, scales += kScaleBytes) {
    uint32_t v16[16], v8[8], vmax = 0;
    // Magnitudes are compared as integers: the same order, and NaN and Inf are above everything finite.
    for (int j = 0; j < 16; j++) {
      uint32_t m = 0;
      for (int i = 0; i < 4; i++) {
        const uint32_t a = bits_of(x[4 * j + i]) & 0x7FFFFFFF;
        m = a > m ? a : m;
      }
      v16[j] = m;
    }
    for (int j = 0; j < 8; j++) {
      v8[j] = v16[2 * j] > v16[2 * j + 1] ? v16[2 * j] : v16[2 * j + 1];
      vmax = v8[j] > vmax ? v8[j] : vmax;
    }
    if (vmax >= 0x7F800000) {
      memset(codes, 0, kUnitBytes);
      memset(scales, 0, kScaleBytes);
      scales[0] = 0xFF;
      continue;
    }
    const Level1 top = level1(float_of(vmax));
    float factor[16];
    uint32_t meta = 0;
    for (int j = 0; j < 16; j++) {
      const uint32_t e8 = float_of(v8[j / 2]) * top.inverse >= 4.0f;
      const float half8 = e8 ? 0.5f : 1.0f;
      const uint32_t e16 = float_of(v16[j]) * top.inverse * half8 >= 2.0f;
      factor[j] = 4.0f * half8 * (e16 ? 0.5f : 1.0f);
      meta |= e8 << (7 - j / 2) | e16 << (8 + (j & 8) + 7 - (j & 7));
    }
    int32_t nibble[64];
    for (int j = 0; j < 16; j++)
      for (int i = 4 * j; i < 4 * j + 4; i++) {
        const float t = float_of(bits_of(x[i]) & 0x7FFFFFFF) * top.inverse * factor[j] + 0.5f;
        nibble[i] = static_cast<int32_t>(t < 7.0f ? t : 7.0f) | (x[i] < 0.0f ? 8 : 0);
      }
    for (int i = 0; i < kUnitBytes; i++) codes[i] = static_cast<uint8_t>(nibble[2 * i] | nibble[2 * i + 1] << 4);
    scales[0] = static_cast<uint8_t>(top.stored);
    scales[1] = static_cast<uint8_t>(meta);
    scales[2] = static_cast<uint8_t>(meta >> 8);
    scales[3] = static_cast<uint8_t>(meta >> 16);
  }
}

// One stage of butterflies; the order of the stages and of the operands is the contract of block_hadamard.
HIF4_INLINE void butterflies(float* x, int64_t count, int stride) {
  for (int64_t start = 0; start < count; start += 2 * stride)
    for (int64_t i = start; i < start + stride; i++) {
      const float a = x[i], b = x[i + stride];
      x[i] = a + b;
      x[i + stride] = a - b;
    }
}

HIF4_INLINE void rotate(float* x, int64_t count, Rotation rotation) {
  for (int stride = 1; stride < rotation.width; stride *= 2) butterflies(x, count, stride);
  for (int64_t i = 0; i < count; i++) x[i] *= rotation.factor;
}

HIF4_INLINE void load(const uint16_t* x, const float* mask, int64_t count, float* out) {
  if (mask) {
    for (int64_t i = 0; i < count; i++) out[i] = float_of(static_cast<uint32_t>(x[i]) << 16) * mask[i];
  } else {
    for (int64_t i = 0; i < count; i++) out[i] = float_of(static_cast<uint32_t>(x[i]) << 16);
  }
}

HIF4_INLINE void load(const float* x, const float* mask, int64_t count, float* out) {
  if (mask) {
    for (int64_t i = 0; i < count; i++) out[i] = x[i] * mask[i];
  } else {
    memcpy(out, x, count * sizeof(float));
  }
}

HIF4_INLINE void quantize_generic(const void* x, Dtype dtype, const float* mask, Rotation rotation, int64_t k,
                                  uint8_t* codes, uint8_t* scales) {
  alignas(64) float chunk[kChunk];
  for (int64_t start = 0; start < k; start += kChunk) {
    const int64_t count = k - start < kChunk ? k - start : kChunk, padded = (count + kUnit - 1) / kUnit * kUnit;
    const float* factors = mask ? mask + start : nullptr;
    if (dtype == kBfloat16)
      load(static_cast<const uint16_t*>(x) + start, factors, count, chunk);
    else
      load(static_cast<const float*>(x) + start, factors, count, chunk);
    if (rotation.width > 1) rotate(chunk, count, rotation);
    memset(chunk + count, 0, (padded - count) * sizeof(float));
    quantize_units(chunk, padded / kUnit, codes + start / 2, scales + start / kUnit * kScaleBytes);
  }
}

// A sign and a magnitude of 3 bits; -0.0 for 8.
HIF4_INLINE float signed_magnitude(int nibble) {
  const float magnitude = static_cast<float>(nibble & 7);
  return float_of(bits_of(magnitude) | static_cast<uint32_t>(nibble & 8) << 28);
}

HIF4_INLINE void dequantize_generic(const uint8_t* codes, const uint8_t* scales, int64_t k, void* out, Dtype dtype) {
  for (int64_t start = 0; start < k; start += kUnit, codes += kUnitBytes, scales += kScaleBytes) {
    const int64_t count = k - start < kUnit ? k - start : kUnit;
    const float scale = unit_scale(scales[0]);
    float values[kUnit];
    for (int i = 0; i < kUnit; i++) {
      const int e8 = scales[1] >> (7 - i / 8) & 1, e16 = scales[2 + i / 32] >> (7 - i / 4 % 8) & 1;
      values[i] = signed_magnitude(codes[i / 2] >> (4 * (i & 1)) & 15) * (scale * static_cast<float>(1 << (e8 + e16)));
    }
    if (dtype == kFloat32)
      memcpy(static_cast<float*>(out) + start, values, count * sizeof(float));
    else
      for (int64_t i = 0; i < count; i++)
        static_cast<uint16_t*>(out)[start + i] = static_cast<uint16_t>(bits_of(values[i]) >> 16);
  }
}

HIF4_INLINE void arrange_mask_generic(const float* mask, int64_t k, float* out) {
  memcpy(out, mask, k * sizeof(float));
}

}  // namespace hif4
