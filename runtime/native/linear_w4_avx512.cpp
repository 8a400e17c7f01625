// The weight-only linear's kernels for AVX-512, once with fp32 products and once with those of bf16 pairs. The latter
// take numbers below 2^-126 for zeros, and round after each of the two products of a pair.
#if defined(__x86_64__)
#include <immintrin.h>

#include "linear_w4_generic.h"

#define HIF4_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,bmi,bmi2"
#define HIF4_VBMI 0
#define HIF4_PAIRS 0
#define HIF4_TARGET __attribute__((target(HIF4_AVX512)))
namespace hif4 {
namespace {
namespace fp32 {
#include "linear_avx512.inl"
#include "linear_w4_avx512.inl"

HIF4_TARGET void expand_input(const void* x, Dtype dtype, const float* mask, Rotation rotation, int64_t k, void* group,
                              int row) {
  expand_row_f32(x, dtype, mask, rotation, k, group, row);
}
}  // namespace fp32
}  // namespace
const WeightOnlyKernels kWeightOnlyAvx512 = {4, fp32::expand_input, fp32::expand_tile_pairs, fp32::multiply_pairs,
                                             fp32::few_rows_pairs};
}  // namespace hif4

#if HIF4_BF16
#undef HIF4_PAIRS
#undef HIF4_TARGET
#define HIF4_PAIRS 1
#define HIF4_TARGET __attribute__((target(HIF4_AVX512 ",avx512vbmi,avx512bf16")))
namespace hif4 {
namespace {
namespace bf16 {
#include "linear_avx512.inl"
#include "linear_w4_avx512.inl"

HIF4_TARGET void expand_input(const void* x, Dtype, const float* mask, Rotation rotation, int64_t k, void* group,
                              int row) {
  expand_row_bf16(x, mask, rotation, k, group, row);
}
}  // namespace bf16
}  // namespace
const WeightOnlyKernels kWeightOnlyBf16 = {2, bf16::expand_input, bf16::expand_tile_pairs, bf16::multiply_pairs,
                                           bf16::few_rows_pairs};
}  // namespace hif4
#endif
#endif
