// Decoding in plain C++, for the instruction sets that have nothing better.
#pragma once

#include "format.h"
#include "linear.h"

namespace hif4 {

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

HIF4_INLINE void expand_rows_generic(const Packed& rows, int64_t row, int64_t first, int64_t count,
                                     const Group& group) {
  for (int i = 0; i < kRows; i++)
    for (int64_t u = 0; u < count; u++) {
      const int64_t at = (row + i) * rows.units + first + u;
      const bool there = row + i < rows.n;
      int8_t* out = group.values + u * kUnit * kRows + i * 4;
      int32_t sum = 0;
      for (int j = 0; j < kQuads; j++) {
        const uint32_t quad =
            there ? decode_run(kInputPairs, rows.codes + at * kUnitBytes, rows.scales + at * kScaleBytes, j) : 0;
        memcpy(out + j * kRows * 4, &quad, 4);
        for (int b = 0; b < 4; b++) sum += static_cast<int8_t>(quad >> (8 * b));
      }
      group.scales[u * kRows + i] = there ? unit_scale(rows.scales[at * kScaleBytes]) : 1.0f;
      group.offsets[u * kRows + i] = -kShift * sum;
    }
}

HIF4_INLINE uint32_t expand_tile_generic(const Packed& weight, int64_t column, int64_t first, int64_t count,
                                         uint8_t* values, float* scales) {
  uint32_t nan = 0;
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
      scales[u * kTables * kCols + c] = unit_scale(s[0]);
      nan |= static_cast<uint32_t>(s[0] == 0xFF) << c;
    }
  }
  return nan;
}

}  // namespace hif4
