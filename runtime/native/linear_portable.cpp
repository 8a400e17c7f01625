// The kernels in plain C++, for any processor.
#include "linear_epilogue.h"
#include "linear_generic.h"

namespace hif4 {
namespace {

void expand_rows(const Packed& rows, int64_t row, int64_t first, int64_t count, const Group& group) {
  expand_rows_generic(rows, row, first, count, group);
}

uint32_t expand_tile(const Packed& weight, int64_t column, int64_t first, int64_t count, uint8_t* values,
                     float* scales) {
  return expand_tile_generic(weight, column, first, count, values, scales);
}

void multiply(const Group& group, int rows, int64_t count, const uint8_t* values, const float* scales,
              float* acc) {
  for (int64_t u = 0; u < count; u++)
    for (int tile = 0; tile < kCols / kTile; tile++) {
      const uint8_t* w = values + (u * kCols + tile * kTile) * kUnit;
      const float* w_scale = scales + (u * kCols + tile * kTile) * kTables;
      for (int row = 0; row < rows; row++) {
        const int64_t at = u * kRows + row;
        int32_t dot[kTile];
        for (int c = 0; c < kTile; c++) dot[c] = group.offsets[at];
        for (int q = 0; q < kQuads; q++) {
          const int8_t* a = group.values + (u * kQuads + q) * kRows * 4 + row * 4;
          const uint8_t* b = w + q * kTile * 4;
          for (int c = 0; c < kTile; c++)
            dot[c] += a[0] * b[4 * c] + a[1] * b[4 * c + 1] + a[2] * b[4 * c + 2] + a[3] * b[4 * c + 3];
        }
        float* out = acc + row * kCols + tile * kTile;
        // Both products are exact, so it is the addition alone that rounds.
        for (int c = 0; c < kTile; c++) out[c] += static_cast<float>(dot[c]) * (group.scales[at] * w_scale[c]);
      }
    }
}

void add_side(const float* side, int64_t width, int64_t rows, const float* weight, int tiles, float* acc) {
  for (int64_t row = 0; row < rows; row++)
    for (int tile = 0; tile < tiles; tile++) {
      float* out = acc + (row * tiles + tile) * kTile;
      for (int64_t j = 0; j < width; j++)
        for (int c = 0; c < kTile; c++) out[c] += side[row * width + j] * weight[(tile * width + j) * kTile + c];
    }
}

void finish(const Epilogue& epilogue, int64_t row, int64_t column, int64_t count, float* sums) {
  finish_row(epilogue, row, column, count, sums);
}

}  // namespace

const LinearKernels kLinearPortable = {expand_rows, expand_tile, multiply, nullptr, add_side, finish};

}  // namespace hif4
