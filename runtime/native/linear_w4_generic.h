// The weight-only linear's kernels in plain C++, for the instruction sets that have nothing better.
#pragma once

#include "linear_w4.h"
#include "rows_generic.h"

namespace hif4 {

// bf16 of the in-unit integers of the two nibbles of a byte, for each exponent; the even channel in the low half.
struct Bf16Pairs {
  uint32_t pair[3][256];
  static constexpr uint32_t of(int nibble, int e) {
    int magnitude = nibble & 7;
    if (!magnitude) return 0;
    int exponent = 127 + e;  // of magnitude / 4 * 2^e, the significand's first bit brought to 4
    while (magnitude < 4) magnitude *= 2, exponent--;
    return static_cast<uint32_t>((nibble & 8) << 12 | (exponent + 2) << 7 | (magnitude & 3) << 5);
  }
  constexpr Bf16Pairs() : pair{} {
    for (int e = 0; e < 3; e++)
      for (int byte = 0; byte < 256; byte++) pair[e][byte] = of(byte & 15, e) | of(byte >> 4, e) << 16;
  }
};
constexpr Bf16Pairs kBf16Pairs;

HIF4_INLINE void expand_tile_bf16(const Packed& weight, int64_t column, int64_t first, int64_t count,
                                  uint16_t* values) {
  for (int c = 0; c < kTile; c++) {
    const int64_t row = column + c < weight.n ? column + c : weight.n - 1;
    const uint8_t* w = weight.codes + (row * weight.units + first) * kUnitBytes;
    const uint8_t* s = weight.scales + (row * weight.units + first) * kScaleBytes;
    for (int64_t u = 0; u < count; u++, w += kUnitBytes, s += kScaleBytes) {
      uint32_t pairs[kPairs];
      for (int j = 0; j < 16; j++) {
        const uint32_t* table = kBf16Pairs.pair[((s[1] >> (7 - j / 2)) & 1) + ((s[2 + j / 8] >> (7 - j % 8)) & 1)];
        pairs[2 * j] = table[w[2 * j]];
        pairs[2 * j + 1] = table[w[2 * j + 1]];
      }
      const float scale = unit_scale(s[0]);
      for (int p = 0; p < kPairs; p++) {  // exact: 3 bits times 3
        const uint32_t even = bits_of(float_of(pairs[p] << 16) * scale);
        const uint32_t odd = bits_of(float_of(pairs[p] & 0xFFFF0000) * scale);
        pairs[p] = even >> 16 | (odd & 0xFFFF0000);
      }
      uint16_t* out = values + (u * kPairs * kCols + c) * 2;
      for (int p = 0; p < kPairs; p++) memcpy(out + p * kCols * 2, pairs + p, 4);
    }
  }
}

// What the matrix product takes of one row, chunk by chunk: `give(start, count, values)` with fp32 values that were
// rounded to `dtype` where anything was done to them.
template <typename Give>
HIF4_INLINE void masked_and_rotated(const void* x, Dtype dtype, const float* mask, Rotation rotation, int64_t k,
                                    const Give& give) {
  alignas(64) float chunk[kChunk];
  for (int64_t start = 0; start < k; start += kChunk) {
    const int64_t count = k - start < kChunk ? k - start : kChunk;
    const float* factors = mask ? mask + start : nullptr;
    if (dtype == kBfloat16)
      load(static_cast<const uint16_t*>(x) + start, factors, count, chunk);
    else
      load(static_cast<const float*>(x) + start, factors, count, chunk);
    if (rotation.width > 1) rotate(chunk, count, rotation);
    if (dtype == kBfloat16 && (mask || rotation.width > 1))
      for (int64_t i = 0; i < count; i++) chunk[i] = float_of(static_cast<uint32_t>(bf16_of(chunk[i])) << 16);
    give(start, count, chunk);
  }
}

HIF4_INLINE void expand_row_f32(const void* x, Dtype dtype, const float* mask, Rotation rotation, int64_t k,
                                void* group, int row) {
  float* out = static_cast<float*>(group) + row;
  masked_and_rotated(x, dtype, mask, rotation, k, [=](int64_t start, int64_t count, const float* values) {
    for (int64_t i = 0; i < count; i++) out[(start + i) * kRows] = values[i];
  });
}

HIF4_INLINE void expand_row_bf16(const void* x, const float* mask, Rotation rotation, int64_t k, void* group,
                                 int row) {
  uint16_t* out = static_cast<uint16_t*>(group) + row * 2;
  if (!mask && rotation.width <= 1) {
    const uint16_t* values = static_cast<const uint16_t*>(x);
    for (int64_t i = 0; i + 2 <= k; i += 2) memcpy(out + i * kRows, values + i, 4);
    if (k % 2) out[(k - 1) * kRows] = values[k - 1];
    return;
  }
  masked_and_rotated(x, kBfloat16, mask, rotation, k, [=](int64_t start, int64_t count, const float* values) {
    for (int64_t i = start; i < start + count; i++)
      out[i / 2 * 2 * kRows + i % 2] = static_cast<uint16_t>(bits_of(values[i - start]) >> 16);
  });
}

}  // namespace hif4
