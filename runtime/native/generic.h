// Plain C++ that every instruction set can take: the functions are inlined into callers whose target attribute decides
// which instructions the compiler may vectorize them with.
#pragma once

#include <string.h>

#include "hif4_cpu.h"

#define HIF4_INLINE static inline __attribute__((always_inline))

namespace hif4 {

HIF4_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

HIF4_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

HIF4_INLINE uint32_t bf16_rne(float x) {
  const uint32_t bits = bits_of(x);
  return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

// E6M2 / 4, NaN for the byte 0xFF. fp32 keeps exponent and two fraction bits above bit 21.
HIF4_INLINE float unit_scale(uint8_t stored) {
  return stored == 0xFF ? float_of(0x7FC00000) : float_of((stored + ((127 - 48) << 2) - 8u) << 21);
}

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

HIF4_INLINE void quantize_generic(const float* x, int64_t units, uint8_t* codes, uint8_t* scales) {
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

HIF4_INLINE void load_bf16_generic(const uint16_t* x, const float* mask, int64_t count, float* out) {
  if (mask) {
    for (int64_t i = 0; i < count; i++) out[i] = float_of(static_cast<uint32_t>(x[i]) << 16) * mask[i];
  } else {
    for (int64_t i = 0; i < count; i++) out[i] = float_of(static_cast<uint32_t>(x[i]) << 16);
  }
}

HIF4_INLINE void load_f32_generic(const float* x, const float* mask, int64_t count, float* out) {
  if (mask) {
    for (int64_t i = 0; i < count; i++) out[i] = x[i] * mask[i];
  } else {
    memcpy(out, x, count * sizeof(float));
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

HIF4_INLINE void rotate_generic(float* x, int64_t count, int width, float factor) {
  for (int stride = 1; stride < width; stride *= 2) butterflies(x, count, stride);
  for (int64_t i = 0; i < count; i++) x[i] *= factor;
}

// Two decoded channels for each code byte and exponent, the even channel in the low byte.
struct PairTable {
  uint16_t pair[3][256];
  constexpr explicit PairTable(int shift) : pair{} {
    for (int e = 0; e < 3; e++)
      for (int byte = 0; byte < 256; byte++) {
        const int low = ((byte & 7) << e) * (byte & 8 ? -1 : 1) + shift;
        const int high = (((byte >> 4) & 7) << e) * (byte & 128 ? -1 : 1) + shift;
        pair[e][byte] = static_cast<uint16_t>((low & 0xFF) | (high & 0xFF) << 8);
      }
  }
};

constexpr PairTable kInputPairs(0);
constexpr PairTable kWeightPairs(kShift);

// The 4 channels of run j of a unit, as bytes in channel order.
HIF4_INLINE uint32_t decode_run(const PairTable& table, const uint8_t* codes, const uint8_t* scales, int j) {
  const int e = ((scales[1] >> (7 - j / 2)) & 1) + ((scales[2 + j / 8] >> (7 - j % 8)) & 1);
  return table.pair[e][codes[2 * j]] | static_cast<uint32_t>(table.pair[e][codes[2 * j + 1]]) << 16;
}

HIF4_INLINE void expand_row_generic(const uint8_t* codes, const uint8_t* scales, int64_t units, const Group& group,
                                    int row) {
  for (int64_t u = 0; u < units; u++, codes += kUnitBytes, scales += kScaleBytes) {
    int8_t* out = group.values + u * kUnit * kRows + row * 4;
    int32_t sum = 0;
    for (int j = 0; j < kQuads; j++) {
      const uint32_t quad = decode_run(kInputPairs, codes, scales, j);
      memcpy(out + j * kRows * 4, &quad, 4);
      for (int i = 0; i < 4; i++) sum += static_cast<int8_t>(quad >> (8 * i));
    }
    group.scales[u * kRows + row] = unit_scale(scales[0]);
    group.offsets[u * kRows + row] = -kShift * sum;
  }
}

HIF4_INLINE void expand_tile_generic(const Weight& weight, int64_t column, int64_t first, int64_t count,
                                     uint8_t* values, float* scales) {
  for (int c = 0; c < kTile; c++) {
    const int64_t row = column + c < weight.n ? column + c : weight.n - 1;
    const uint8_t* w = weight.codes + (row * weight.units + first) * kUnitBytes;
    const uint8_t* s = weight.scales + (row * weight.units + first) * kScaleBytes;
    for (int64_t u = 0; u < count; u++, w += kUnitBytes, s += kScaleBytes) {
      uint8_t* out = values + u * kUnit * kCols + c * 4;
      for (int j = 0; j < kQuads; j++) {
        const uint32_t quad = decode_run(kWeightPairs, w, s, j);
        memcpy(out + j * kTile * 4, &quad, 4);
      }
      scales[u * kCols + c] = unit_scale(s[0]);
    }
  }
}

}  // namespace hif4
