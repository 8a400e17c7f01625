// The row kernels for AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#include "rows.h"
#include "rows_generic.h"

#define HIF4_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2")))
#define HIF4_LANES 16

namespace hif4 {
namespace {

#include "rows_avx512.inl"
#include "rows_norm.inl"

}  // namespace

const RowKernels kRowsAvx512 = {quantize, dequantize, arrange_mask, norm, rms_rotary};

}  // namespace hif4
#endif
