// The row kernels in plain C++, for any processor.
#include "rows.h"
#include "rows_generic.h"

namespace hif4 {
namespace {

void quantize(const float* x, int64_t units, uint8_t* codes, uint8_t* scales) {
  quantize_generic(x, units, codes, scales);
}

void load_bf16(const uint16_t* x, const float* mask, int64_t count, float* out) {
  load_bf16_generic(x, mask, count, out);
}

void load_f32(const float* x, const float* mask, int64_t count, float* out) { load_f32_generic(x, mask, count, out); }

void rotate(float* x, int64_t count, int width, float factor) { rotate_generic(x, count, width, factor); }

}  // namespace

const RowKernels kRowsPortable = {quantize, load_bf16, load_f32, rotate};

}  // namespace hif4
