// The weight-only linear's kernels for AVX2 with FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#include "linear_w4_generic.h"

#define HIF4_TARGET __attribute__((target("avx2,fma")))

namespace hif4 {
namespace {

HIF4_TARGET void expand_row(const void* x, Dtype dtype, const float* mask, Rotation rotation, int64_t k, void* group,
                            int row) {
  expand_row_f32(x, dtype, mask, rotation, k, group, row);
}

HIF4_TARGET void expand_tile(const Packed& weight, int64_t column, int64_t first, int64_t count, uint16_t* values) {
  expand_tile_bf16(weight, column, first, count, values);
}

// 4 rows by 24 columns: 12 sums, 3 weights and an input fill the registers.
HIF4_TARGET void multiply_part(const float* x, int64_t count, const uint16_t* values, float* acc) {
  __m256 sum[4][3];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
#pragma GCC unroll 3
    for (int c = 0; c < 3; c++) sum[i][c] = _mm256_loadu_ps(acc + i * kCols + 8 * c);
  for (int64_t p = 0; p < count * kPairs; p++, x += 2 * kRows, values += 2 * kCols) {
#pragma GCC unroll 2
    for (int part = 0; part < 2; part++) {
      __m256 w[3];
#pragma GCC unroll 3
      for (int c = 0; c < 3; c++) {
        const __m256i pair = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 16 * c));
        w[c] = _mm256_castsi256_ps(part ? _mm256_and_si256(pair, _mm256_set1_epi32(static_cast<int>(0xFFFF0000)))
                                        : _mm256_slli_epi32(pair, 16));
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const __m256 value = _mm256_broadcast_ss(x + part * kRows + i);
#pragma GCC unroll 3
        for (int c = 0; c < 3; c++) sum[i][c] = _mm256_fmadd_ps(value, w[c], sum[i][c]);
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
#pragma GCC unroll 3
    for (int c = 0; c < 3; c++) _mm256_storeu_ps(acc + i * kCols + 8 * c, sum[i][c]);
}

HIF4_TARGET void multiply(const void* group, int64_t count, const uint16_t* values, float* acc) {
  static_assert(kRows == 8 && kCols == 48, "the parts are made for these");
  for (int i = 0; i < kRows; i += 4)
    for (int c = 0; c < kCols; c += 24)
      multiply_part(static_cast<const float*>(group) + i, count, values + 2 * c, acc + i * kCols + c);
}

}  // namespace

const WeightOnlyKernels kWeightOnlyAvx2 = {4, expand_row, expand_tile, multiply, nullptr};

}  // namespace hif4
#endif
