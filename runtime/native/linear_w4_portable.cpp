// The weight-only linear's kernels in plain C++, for any processor.
#include "linear_w4_generic.h"

namespace hif4 {
namespace {

void expand_row(const void* x, Dtype dtype, const float* mask, Rotation rotation, int64_t k, void* group, int row) {
  expand_row_f32(x, dtype, mask, rotation, k, group, row);
}

void expand_tile(const Packed& weight, int64_t column, int64_t first, int64_t count, uint16_t* values) {
  expand_tile_bf16(weight, column, first, count, values);
}

void multiply(const void* group, int64_t count, const uint16_t* values, float* acc) {
  const float* x = static_cast<const float*>(group);
  for (int64_t p = 0; p < count * kPairs; p++, x += 2 * kRows, values += 2 * kCols) {
    float even[kCols], odd[kCols];
    for (int c = 0; c < kCols; c++) {
      even[c] = float_of(static_cast<uint32_t>(values[2 * c]) << 16);
      odd[c] = float_of(static_cast<uint32_t>(values[2 * c + 1]) << 16);
    }
    for (int i = 0; i < kRows; i++)
      for (int c = 0; c < kCols; c++) acc[i * kCols + c] += x[i] * even[c] + x[kRows + i] * odd[c];
  }
}

}  // namespace

const WeightOnlyKernels kWeightOnlyPortable = {4, expand_row, expand_tile, multiply, nullptr};

}  // namespace hif4
