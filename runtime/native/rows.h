// What the kernels of one instruction set that work on whole rows offer to the driver.
#pragma once

#include "format.h"

namespace hif4 {

struct RowKernels {
  // Whole units of fp32 to planes.
  void (*quantize)(const float* x, int64_t units, uint8_t* codes, uint8_t* scales);
  // out[i] = x[i], widened, times mask[i] where there is a mask.
  void (*load_bf16)(const uint16_t* x, const float* mask, int64_t count, float* out);
  void (*load_f32)(const float* x, const float* mask, int64_t count, float* out);
  // The Walsh-Hadamard rotation of each run of `width`, without the final factor and with it.
  void (*rotate)(float* x, int64_t count, int width, float factor);
};

extern const RowKernels kRowsPortable;
#if defined(__x86_64__)
extern const RowKernels kRowsAvx2;
extern const RowKernels kRowsAvx512;
#endif

}  // namespace hif4
