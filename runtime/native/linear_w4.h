// What the weight-only linear's kernels of one instruction set offer to the driver, and the layouts they share.
//
// Decoded weights are bf16, which holds them exactly. Input rows stay as they are in bf16, for instructions that multiply
// pairs of those, or are widened to fp32.
#pragma once

#include "linear.h"
#include "rows.h"

namespace hif4 {

constexpr int kPairs = kUnit / 2;  // of neighbouring channels in a unit

struct WeightOnlyKernels {
  // Bytes of an element of a group: kRows input rows, [channels / 2][kRows][2] for 2 bytes, [channels][kRows] for 4.
  int64_t element;
  // One row x [k] of `dtype`, times mask [k] or null, rotated and rounded to its dtype, into slot `row` of a group.
  void (*expand_row)(const void* x, Dtype dtype, const float* mask, Rotation rotation, int64_t k, void* group, int row);
  // Weight rows [column, column + kTile), units [first, first + count), into values [count * kPairs][kCols][2]; the
  // pointer is at the tile's place. Rows past n repeat the last one.
  void (*expand_tile)(const Packed& weight, int64_t column, int64_t first, int64_t count, uint16_t* values);
  // acc [kRows][kCols] += `count` units of the group, from its pointer on, times the expanded columns.
  void (*multiply)(const void* group, int64_t count, const uint16_t* values, float* acc);
  // acc [kRows][kTile] = the whole product for one tile straight from the packed weight; null where there is none.
  void (*few_rows)(const void* group, int rows, const Packed& weight, int64_t column, float* acc);
};

extern const WeightOnlyKernels kWeightOnlyPortable;
#if defined(__x86_64__)
extern const WeightOnlyKernels kWeightOnlyAvx2;
extern const WeightOnlyKernels kWeightOnlyAvx512;
// Compilers before GCC 11 do not know these instructions, or not how to ask for them.
#if defined(__clang__) || __GNUC__ >= 11
#define HIF4_BF16 1
extern const WeightOnlyKernels kWeightOnlyBf16;  // for input in bf16; AVX512-VBMI and BF16
#endif
#endif

}  // namespace hif4
