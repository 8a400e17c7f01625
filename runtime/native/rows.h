// What the kernels of one instruction set that work on whole rows offer to the driver.
#pragma once

#include "format.h"
#include "library.h"

namespace hif4 {

constexpr int64_t kChunk = 1024;  // channels quantized at once: the largest rotation width

struct Rotation {
  int width;     // 0 or 1: none
  float factor;  // what a rotation of this width ends with
};

// Modulated layer norm of a row; each pointer may be null.
struct Affine {
  const float* weight;
  const float* bias;
  const float* scale;  // the row is multiplied by scale + 1,
  const float* shift;  // and this is added
};

struct RowKernels {
  // One row x [k] of `dtype` to planes. `mask` is null or what arrange_mask made for that dtype.
  void (*quantize)(const void* x, Dtype dtype, const float* mask, Rotation rotation, int64_t k, uint8_t* codes,
                   uint8_t* scales);
  // The k values of one row's planes, to `out` of fp32 or bf16, which both hold them exactly.
  void (*dequantize)(const uint8_t* codes, const uint8_t* scales, int64_t k, void* out, Dtype dtype);
  // mask [k] in the order in which `quantize` multiplies rows of `dtype`, to `out` of whole units.
  void (*arrange_mask)(const float* mask, Dtype dtype, int64_t k, float* out);
  // Layer norm of a row, of `from`, to `out` of `to`; both fp32 or bf16. The same bits on every instruction set.
  void (*norm)(const void* x, Dtype from, const Affine& affine, double eps, int64_t c, void* out, Dtype to);
  // RMS norm of a row of `dtype` and the rotary embedding of each run of `width` channels: the pair (x0, x1) becomes
  // (x0 * cos + x1 * sin, x1 * cos + x0 * sin) with the entries of cos and sin [width] at its places, so the first of
  // each two in `sin` is negated. cos and sin null: no embedding. The same bits on every instruction set.
  void (*rms_rotary)(const void* x, Dtype dtype, const float* weight, double eps, int64_t c, int64_t width,
                     const float* cos, const float* sin, void* out);
};

extern const RowKernels kRowsPortable;
#if defined(__x86_64__)
extern const RowKernels kRowsAvx2;
extern const RowKernels kRowsAvx512;
#endif

}  // namespace hif4
