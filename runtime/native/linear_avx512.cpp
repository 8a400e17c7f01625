// The kernels for AVX-512 with VNNI, once without and once with VBMI (its byte permutation decodes a code in one step).
#if defined(__x86_64__)
#include <immintrin.h>

#include "linear_epilogue.h"

#define HIF4_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,bmi,bmi2"
#define HIF4_VBMI 0
#define HIF4_TARGET __attribute__((target(HIF4_AVX512)))
namespace hif4 {
namespace {
#include "linear_avx512_multiply.inl"

HIF4_TARGET void finish(const Epilogue& epilogue, int64_t row, int64_t column, int64_t count, float* sums) {
  finish_row(epilogue, row, column, count, sums);
}

namespace avx512 {
#include "linear_avx512.inl"
}  // namespace avx512
}  // namespace
const LinearKernels kLinearAvx512 = {avx512::expand_rows, avx512::expand_tile, multiply, avx512::few_rows,
                                     avx512::add_side, finish};
}  // namespace hif4

#undef HIF4_VBMI
#undef HIF4_TARGET
#define HIF4_VBMI 1
#define HIF4_TARGET __attribute__((target(HIF4_AVX512 ",avx512vbmi")))
namespace hif4 {
namespace {
namespace vbmi {
#include "linear_avx512.inl"
}  // namespace vbmi
}  // namespace
const LinearKernels kLinearAvx512Vbmi = {vbmi::expand_rows, vbmi::expand_tile, multiply, vbmi::few_rows,
                                         vbmi::add_side, finish};
}  // namespace hif4
#endif
