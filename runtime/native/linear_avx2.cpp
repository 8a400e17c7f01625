// The kernels for AVX2 with FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#include "linear_epilogue.h"
#include "linear_generic.h"

#define HIF4_TARGET __attribute__((target("avx2,fma")))

namespace hif4 {
namespace {

HIF4_TARGET void expand_rows(const Packed& rows, int64_t row, int64_t first, int64_t count, const Group& group) {
  expand_rows_generic(rows, row, first, count, group);
}

HIF4_TARGET uint32_t expand_tile(const Packed& weight, int64_t column, int64_t first, int64_t count, uint8_t* values,
                                 float* scales) {
  return expand_tile_generic(weight, column, first, count, values, scales);
}

// ROWS rows from `row` on, by 16 columns. A byte product is at most 56 * 28, two of them 3136, so eight additions in
// int16 cannot overflow; only then are neighbours added into int32.
template <int ROWS>
HIF4_TARGET void multiply_rows(const Group& group, int row, int64_t count, const uint8_t* values,
                               const float* scales, float* acc) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t u = 0; u < count; u++) {
    const int64_t at = u * kRows + row;
    const int8_t* a = group.values + u * kUnit * kRows + row * 4;
    for (int tile = 0; tile < kCols / kTile; tile++) {
      const uint8_t* w = values + (u * kCols + tile * kTile) * kUnit;
      __m256i dot[ROWS][2];
      for (int i = 0; i < ROWS; i++) dot[i][0] = dot[i][1] = _mm256_set1_epi32(group.offsets[at + i]);
      for (int half = 0; half < kQuads; half += 8) {
        __m256i sum[ROWS][2];
        for (int i = 0; i < ROWS; i++) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
        for (int q = half; q < half + 8; q++) {
          const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + q * kTile * 4));
          const __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + q * kTile * 4 + 32));
          for (int i = 0; i < ROWS; i++) {
            int32_t quad;
            memcpy(&quad, a + q * kRows * 4 + i * 4, 4);
            const __m256i x = _mm256_set1_epi32(quad);
            sum[i][0] = _mm256_add_epi16(sum[i][0], _mm256_maddubs_epi16(w0, x));
            sum[i][1] = _mm256_add_epi16(sum[i][1], _mm256_maddubs_epi16(w1, x));
          }
        }
        for (int i = 0; i < ROWS; i++)
          for (int c = 0; c < 2; c++)
            dot[i][c] = _mm256_add_epi32(dot[i][c], _mm256_madd_epi16(sum[i][c], ones));
      }
      for (int i = 0; i < ROWS; i++)
        for (int c = 0; c < 2; c++) {
          const float* w_scale = scales + (u * kCols + tile * kTile) * kTables + 8 * c;
          float* out = acc + (row + i) * kCols + tile * kTile + 8 * c;
          const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(group.scales[at + i]), _mm256_loadu_ps(w_scale));
          // The product is exact, so the fused addition rounds as a separate one.
          _mm256_storeu_ps(out, _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[i][c]), scale, _mm256_loadu_ps(out)));
        }
    }
  }
}

HIF4_TARGET void multiply(const Group& group, int rows, int64_t count, const uint8_t* values,
                          const float* scales, float* acc) {
  int row = 0;
  for (; row + 4 <= rows; row += 4) multiply_rows<4>(group, row, count, values, scales, acc);
  for (; row < rows; row++) multiply_rows<1>(group, row, count, values, scales, acc);
}

template <int ROWS>
HIF4_TARGET void add_side_rows(const float* side, int64_t width, const float* weight, int tiles, float* acc) {
  for (int tile = 0; tile < tiles; tile++, weight += width * kTile, acc += kTile) {
    __m256 sum[ROWS][2];
    for (int i = 0; i < ROWS; i++)
      for (int c = 0; c < 2; c++) sum[i][c] = _mm256_loadu_ps(acc + i * tiles * kTile + 8 * c);
    for (int64_t j = 0; j < width; j++) {
      const __m256 w0 = _mm256_loadu_ps(weight + j * kTile), w1 = _mm256_loadu_ps(weight + j * kTile + 8);
      for (int i = 0; i < ROWS; i++) {
        const __m256 x = _mm256_set1_ps(side[i * width + j]);
        sum[i][0] = _mm256_add_ps(sum[i][0], _mm256_mul_ps(x, w0));
        sum[i][1] = _mm256_add_ps(sum[i][1], _mm256_mul_ps(x, w1));
      }
    }
    for (int i = 0; i < ROWS; i++)
      for (int c = 0; c < 2; c++) _mm256_storeu_ps(acc + i * tiles * kTile + 8 * c, sum[i][c]);
  }
}

HIF4_TARGET void add_side(const float* side, int64_t width, int64_t rows, const float* weight, int tiles, float* acc) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4)
    add_side_rows<4>(side + row * width, width, weight, tiles, acc + row * tiles * kTile);
  for (; row < rows; row++) add_side_rows<1>(side + row * width, width, weight, tiles, acc + row * tiles * kTile);
}

HIF4_TARGET void finish(const Epilogue& epilogue, int64_t row, int64_t column, int64_t count, float* sums) {
  finish_row(epilogue, row, column, count, sums);
}

}  // namespace

const LinearKernels kLinearAvx2 = {expand_rows, expand_tile, multiply, nullptr, add_side, finish};

}  // namespace hif4
#endif
