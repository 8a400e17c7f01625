// The row kernels for AVX2 with FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#include "rows.h"
#include "rows_generic.h"

#define HIF4_TARGET __attribute__((target("avx2,fma")))

namespace hif4 {
namespace {

HIF4_TARGET void quantize(const float* x, int64_t units, uint8_t* codes, uint8_t* scales) {
  quantize_generic(x, units, codes, scales);
}

HIF4_TARGET void load_bf16(const uint16_t* x, const float* mask, int64_t count, float* out) {
  load_bf16_generic(x, mask, count, out);
}

HIF4_TARGET void load_f32(const float* x, const float* mask, int64_t count, float* out) {
  load_f32_generic(x, mask, count, out);
}

HIF4_TARGET void rotate(float* x, int64_t count, int width, float factor) { rotate_generic(x, count, width, factor); }

}  // namespace

const RowKernels kRowsAvx2 = {quantize, load_bf16, load_f32, rotate};

}  // namespace hif4
#endif
