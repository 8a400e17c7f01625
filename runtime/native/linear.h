// What the linear kernels of one instruction set offer to the driver, and the layouts they share.
//
// A linear multiplies in-unit integers n in [-28, 28]: signed input bytes by weight bytes stored as n + 28, because the
// x86 instructions multiply signed by unsigned. What the +28 adds, 28 * sum(input of the unit), is known before the
// weights are seen, so the int32 sums start at minus that and are exact: |sum| <= 64 * 28 * 56.
#pragma once

#include "format.h"
#include "library.h"

namespace hif4 {

constexpr int kQuads = 16;      // runs of 4 channels: one int32 lane of a byte dot product, one micro-exponent
constexpr int kRows = 8;        // input rows multiplied together: a group
constexpr int kTile = 16;       // weight rows (output columns) decoded together
constexpr int kFewTiles = 2;    // tiles that few rows are multiplied with together
constexpr int kCols = 48;       // output columns multiplied together
constexpr int kShift = 28;      // added to the weight's integers
constexpr int kTables = 4;      // floats for each scale of an expanded column: room for what a set derives from it

// A packed input or weight: codes [n, units * 32], scales [n, units, 4].
struct Packed {
  const uint8_t* codes;
  const uint8_t* scales;
  int64_t n;
  int64_t units;
};

// Units of kRows input rows, expanded.
struct Group {
  int8_t* values;    // [units][kQuads][kRows][4]
  float* scales;     // [units][kRows], E6M2 / 4
  int32_t* offsets;  // [units][kRows], -28 * sum of the unit's integers
};

// out [m, n] = residual + gate * gelu(y + bias), what is null or false left out.
struct Epilogue {
  const float* bias;  // [n]
  bool gelu;
  const float* gate;  // row r of it, [n], is for rows [r * gate_rows, (r + 1) * gate_rows) of the output
  int64_t gate_rows;
  const void* residual;  // [m, n]
  Dtype residual_dtype;
  void* out;
  Dtype dtype;
  int64_t n;
};

// Which 4 channels a quad holds is between expand_row and the functions that read weights of the same set.
struct LinearKernels {
  // Input rows [row, row + kRows), units [first, first + count), into a group that starts there. Rows past n are zeros.
  void (*expand_rows)(const Packed& input, int64_t row, int64_t first, int64_t count, const Group& group);
  // Weight rows [column, column + kTile), units [first, first + count), into values [count][kCols / kTile][kQuads]
  // [kTile][4] and scales [count][kCols / kTile][kTables * kTile]; the pointers are at the tile's place. Rows past n
  // repeat the last one. Returns a bit for each row with a scale that is NaN among these.
  uint32_t (*expand_tile)(const Packed& weight, int64_t column, int64_t first, int64_t count, uint8_t* values,
                      float* scales);
  // acc [kRows][kCols] += `count` units of the group times the expanded columns, unit by unit. What it makes of a row
  // or column with a scale that is NaN is overwritten.
  void (*multiply)(const Group& group, int rows, int64_t count, const uint8_t* values,
                   const float* scales, float* acc);
  // acc [kRows][kFewTiles][kTile] = the whole product for some tiles straight from the packed weight, which may end
  // before them; null where there is none.
  void (*few_rows)(const Group& group, int rows, const Packed& weight, int64_t column, float* acc);
  // acc [rows][tiles][kTile] += side [rows][width] times weight [tiles][width][kTile], one j of width after the other;
  // product and sum are rounded each by itself, so that products beyond fp32's range too are those of other sets.
  void (*add_side)(const float* side, int64_t width, int64_t rows, const float* weight, int tiles, float* acc);
  // Columns [column, column + count) of one output row from their sums, which it changes.
  void (*finish)(const Epilogue& epilogue, int64_t row, int64_t column, int64_t count, float* sums);
};

extern const LinearKernels kLinearPortable;
#if defined(__x86_64__)
extern const LinearKernels kLinearAvx2;
extern const LinearKernels kLinearAvx512;
extern const LinearKernels kLinearAvx512Vbmi;
#endif

}  // namespace hif4
