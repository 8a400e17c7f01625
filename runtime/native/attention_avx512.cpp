// Attention for AVX-512 with BF16: vdpbf16ps adds the products of 16 pairs to 16 fp32 sums.
#include "attention.h"

#if HIF4_ATTENTION_AVX512
#include <immintrin.h>
#include <math.h>
#include <string.h>

#define HIF4_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))
#define HIF4_INLINE static inline __attribute__((always_inline))

namespace hif4 {
namespace {

constexpr int64_t kStride = kMaxWidth;  // of the rows of queries and probabilities
static_assert(kMaxWidth == kMaxKeyBlock, "the two products share their left operand's stride");

using Sums = __m512[kQueryTile][2];

HIF4_TARGET HIF4_INLINE __m512bh pair_of(const uint16_t* x) {
  int32_t pair;
  memcpy(&pair, x, 4);
  return (__m512bh)_mm512_set1_epi32(pair);
}

HIF4_TARGET HIF4_INLINE __m512bh load_pairs(const uint16_t* x) { return (__m512bh)_mm512_load_si512(x); }

// sums [12][32] += a [12][2 * pairs] times a packed panel: 24 sums, so that each waits for its own product only.
HIF4_TARGET HIF4_INLINE void multiply(const uint16_t* a, const uint16_t* panel, int64_t pairs, Sums& sums) {
  for (const uint16_t* end = a + 2 * pairs; a < end; a += 2, panel += 2 * kKeyPanel) {
    const __m512bh left = load_pairs(panel), right = load_pairs(panel + kKeyPanel);
#pragma GCC unroll 12
    for (int i = 0; i < kQueryTile; i++) {
      const __m512bh pair = pair_of(a + i * kStride);
      sums[i][0] = _mm512_dpbf16_ps(sums[i][0], pair, left);
      sums[i][1] = _mm512_dpbf16_ps(sums[i][1], pair, right);
    }
  }
}

// 2^t for t <= 0 or NaN, 1 exactly for 0 and 0 for -inf: 2^floor(t) times a polynomial of the rest, fitted for the
// least maximum relative error that keeps 2^0. With its roundings that is below 3e-6 down to t = -126, a thousandth of
// what bf16 rounds away.
HIF4_TARGET HIF4_INLINE __m512 exp2(__m512 t) {
  const __m512 rest = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 y = _mm512_fmadd_ps(_mm512_set1_ps(0x1.b7f730p-7f), rest, _mm512_set1_ps(0x1.abf868p-5f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0x1.ee2450p-3f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0x1.62d6c6p-1f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1));
  return _mm512_scalef_ps(y, t);
}

// The products of the queries with a block's keys, -inf beyond the last, and each lane's largest.
HIF4_TARGET void multiply_keys(const QueryTile& tile, const KeyBlock& block, int64_t width, Probabilities& scratch,
                               __m512 (&largest)[kQueryTile]) {
  const __m512 lowest = _mm512_set1_ps(-INFINITY);
  for (int i = 0; i < kQueryTile; i++) largest[i] = lowest;
  const uint16_t* panel = block.keys;
  for (int64_t key = 0; key < block.count; key += kKeyPanel, panel += kKeyPanel * width) {
    Sums sums;
#pragma GCC unroll 12
    for (int i = 0; i < kQueryTile; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    multiply(tile.queries[0], panel, width / 2, sums);
    const int64_t left = block.count - key;
    if (left < kKeyPanel) {  // no key there: probability 0, whatever the query holds
      const uint32_t some = (1u << left) - 1;
#pragma GCC unroll 12
      for (int i = 0; i < kQueryTile; i++) {
        sums[i][0] = _mm512_mask_blend_ps(static_cast<__mmask16>(some), lowest, sums[i][0]);
        sums[i][1] = _mm512_mask_blend_ps(static_cast<__mmask16>(some >> 16), lowest, sums[i][1]);
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < kQueryTile; i++) {
      _mm512_store_ps(scratch.products[i] + key, sums[i][0]);
      _mm512_store_ps(scratch.products[i] + key + 16, sums[i][1]);
      largest[i] = _mm512_max_ps(largest[i], _mm512_max_ps(sums[i][0], sums[i][1]));
    }
  }
}

// out = out * decay + probabilities times values; what is in `out` before the first block does not count.
HIF4_TARGET void multiply_values(QueryTile& tile, const KeyBlock& block, int64_t padded, int64_t width,
                                 const float* decay, bool first, const Probabilities& scratch) {
  const uint16_t* panel = block.values;
  for (int64_t channel = 0; channel < width; channel += kKeyPanel, panel += kKeyPanel * padded) {
    Sums sums;
    if (first) {
#pragma GCC unroll 12
      for (int i = 0; i < kQueryTile; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    } else {
#pragma GCC unroll 12
      for (int i = 0; i < kQueryTile; i++) {
        const __m512 factor = _mm512_set1_ps(decay[i]);
        sums[i][0] = _mm512_mul_ps(_mm512_load_ps(tile.out[i] + channel), factor);
        sums[i][1] = _mm512_mul_ps(_mm512_load_ps(tile.out[i] + channel + 16), factor);
      }
    }
    multiply(scratch.rounded[0], panel, padded / 2, sums);
#pragma GCC unroll 12
    for (int i = 0; i < kQueryTile; i++) {
      _mm512_store_ps(tile.out[i] + channel, sums[i][0]);
      _mm512_store_ps(tile.out[i] + channel + 16, sums[i][1]);
    }
  }
}

HIF4_TARGET void attend(QueryTile& tile, const KeyBlock& block, int64_t width, float factor, bool first,
                        Probabilities& scratch) {
  const int64_t padded = (block.count + kKeyPanel - 1) / kKeyPanel * kKeyPanel;
  __m512 maxima[kQueryTile];
  multiply_keys(tile, block, width, scratch, maxima);

  // One lane a query, and four to spare.
  alignas(64) float reduced[16] = {}, sums[16] = {}, decay[16], shift[16];
  for (int i = 0; i < kQueryTile; i++) reduced[i] = _mm512_reduce_max_ps(maxima[i]);
  const __m512 lowest = _mm512_set1_ps(-INFINITY), factors = _mm512_set1_ps(factor);
  const __m512 before = first ? lowest : _mm512_load_ps(tile.largest);
  const __m512 largest = _mm512_max_ps(before, _mm512_load_ps(reduced));
  // A query whose logits are all -inf so far has probabilities 0, not inf - inf.
  const __mmask16 none = _mm512_cmp_ps_mask(largest, lowest, _CMP_EQ_OQ);
  const __m512 subtracted = _mm512_maskz_mov_ps(static_cast<__mmask16>(~none), largest);
  _mm512_store_ps(tile.largest, largest);
  _mm512_store_ps(shift, subtracted);
  const __m512 decays = exp2(_mm512_mul_ps(_mm512_sub_ps(before, subtracted), factors));
  _mm512_store_ps(decay, decays);

  const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3F803F80);
  for (int i = 0; i < kQueryTile; i++) {
    const __m512 row_shift = _mm512_set1_ps(shift[i]);
    const float* products = scratch.products[i];
    __m512 sum = _mm512_setzero_ps();
    for (int64_t key = 0; key < padded; key += kKeyPanel) {
      // Subtracted before multiplied: exact for the largest, however large it is.
      const __m512 low = exp2(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(products + key), row_shift), factors));
      const __m512 high = exp2(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(products + key + 16), row_shift), factors));
      const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
      // The sum of what will multiply the values: weights that add up to 1, so that a rounding moves the result by
      // its share of (value - result) and not of the value.
      sum = _mm512_dpbf16_ps(sum, rounded, ones);
      _mm512_store_si512(scratch.rounded[i] + key, (__m512i)rounded);
    }
    sums[i] = _mm512_reduce_add_ps(sum);
  }
  const __m512 earlier = first ? _mm512_setzero_ps() : _mm512_mul_ps(_mm512_load_ps(tile.sum), decays);
  _mm512_store_ps(tile.sum, _mm512_add_ps(earlier, _mm512_load_ps(sums)));
  multiply_values(tile, block, padded, width, decay, first, scratch);
}

HIF4_TARGET void finish(const QueryTile& tile, int64_t count, int64_t width, uint16_t* out, int64_t stride) {
  for (int64_t i = 0; i < count; i++, out += stride) {
    const __m512 sum = _mm512_set1_ps(tile.sum[i]);
    // A sum of 0 is a query without a logit above -inf: 0, as torch has it.
    const __mmask16 any = _mm512_cmp_ps_mask(sum, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    for (int64_t channel = 0; channel < width; channel += 16) {
      const __m512 y = _mm512_maskz_div_ps(any, _mm512_load_ps(tile.out[i] + channel), sum);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + channel), (__m256i)_mm512_cvtneps_pbh(y));
    }
  }
}

// Transposes 16 rows of 16 pairs.
HIF4_TARGET HIF4_INLINE void transpose(__m512i (&x)[16]) {
  __m512i y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
  }
  // x[4 r + c]: of the rows 4 r to 4 r + 3, the columns c, c + 4, c + 8, c + 12, each in a quarter of the vector.
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    const __m512i a = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x88), b = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xDD), e = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xDD);
    y[c] = _mm512_shuffle_i32x4(a, b, 0x88);
    y[c + 8] = _mm512_shuffle_i32x4(a, b, 0xDD);
    y[c + 4] = _mm512_shuffle_i32x4(d, e, 0x88);
    y[c + 12] = _mm512_shuffle_i32x4(d, e, 0xDD);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) x[i] = y[i];
}

HIF4_TARGET void pack_keys(const uint16_t* k, int64_t stride, int64_t count, int64_t width, uint16_t* out) {
  for (int64_t first = 0; first < kKeyPanel; first += 16) {
    for (int64_t channel = 0; channel < width; channel += 32) {
      __m512i x[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++)
        x[i] = first + i < count ? _mm512_loadu_si512(k + (first + i) * stride + channel) : _mm512_setzero_si512();
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) _mm512_store_si512(out + (channel / 2 + i) * 2 * kKeyPanel + first * 2, x[i]);
    }
  }
}

HIF4_TARGET void pack_values(const uint16_t* v, int64_t stride, int64_t count, int64_t width, int64_t padded,
                             uint16_t* out) {
  // Words 0 to 15 of two vectors taken in turn, and words 16 to 31.
  alignas(64) uint16_t order[2][32];
  for (int i = 0; i < 32; i++) {
    order[0][i] = static_cast<uint16_t>(i / 2 + (i % 2) * 32);
    order[1][i] = static_cast<uint16_t>(i / 2 + 16 + (i % 2) * 32);
  }
  const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]), zero = _mm512_setzero_si512();
  for (int64_t channel = 0; channel < width; channel += kKeyPanel, out += kKeyPanel * padded) {
    for (int64_t key = 0; key < kKeyPanel; key += 2) {
      const uint16_t* row = v + key * stride + channel;
      const __m512i a = key < count ? _mm512_loadu_si512(row) : zero;
      const __m512i b = key + 1 < count ? _mm512_loadu_si512(row + stride) : zero;
      _mm512_store_si512(out + key * kKeyPanel, _mm512_permutex2var_epi16(a, low, b));
      _mm512_store_si512(out + key * kKeyPanel + kKeyPanel, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}

HIF4_TARGET void exp2_all(const float* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t left = count - i;
    const __mmask16 some = static_cast<__mmask16>(left < 16 ? (1u << left) - 1 : 0xFFFFu);
    _mm512_mask_storeu_ps(out + i, some, exp2(_mm512_maskz_loadu_ps(some, x + i)));
  }
}

}  // namespace

const AttentionKernels kAttentionAvx512 = {pack_keys, pack_values, attend, finish, exp2_all};

}  // namespace hif4
#endif
