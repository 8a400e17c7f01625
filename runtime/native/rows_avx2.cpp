// The row kernels for AVX2 with FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#include "rows.h"
#include "rows_generic.h"

#define HIF4_TARGET __attribute__((target("avx2,fma")))
#define HIF4_LANES 8

namespace hif4 {
namespace {

#include "rows_norm.inl"

HIF4_TARGET void quantize(const void* x, Dtype dtype, const float* mask, Rotation rotation, int64_t k, uint8_t* codes,
                          uint8_t* scales) {
  quantize_generic(x, dtype, mask, rotation, k, codes, scales);
}

HIF4_TARGET void dequantize(const uint8_t* codes, const uint8_t* scales, int64_t k, void* out, Dtype dtype) {
  dequantize_generic(codes, scales, k, out, dtype);
}

HIF4_TARGET void arrange_mask(const float* mask, Dtype, int64_t k, float* out) { arrange_mask_generic(mask, k, out); }

}  // namespace

const RowKernels kRowsAvx2 = {quantize, dequantize, arrange_mask, norm, rms_rotary};

}  // namespace hif4
#endif
