// hif4_linear: argument layout in linear_bindings.py, blocking and threads here, arithmetic in the kernels.
#include "linear.h"

#include <math.h>
#include <string.h>

#include <algorithm>

#include "library.h"

namespace {

using namespace hif4;

constexpr int64_t kRowBlock = 512;             // input rows expanded at once
constexpr int64_t kInputBytes = 8 << 20;       // and at most about as many bytes
constexpr int64_t kFewRun = 2;                 // calls for few rows that one thread makes for columns side by side
constexpr int64_t kUnitBlock = 4;              // units of 48 columns expanded at once: 15 KiB, for the first cache

// The kernels of a set, -1 for the best; null for one that this processor cannot run.
const LinearKernels* kernels_of(int set) {
  set = usable_set(set);
#if defined(__x86_64__)
  if (set == 1) return &kLinearAvx2;
  if (set == 2) return &kLinearAvx512;
  if (set == 3) return &kLinearAvx512Vbmi;
#endif
  return set == 0 ? &kLinearPortable : nullptr;
}

// A branch added to the product: values [m][width] times weight [width][n]; width 0 for none.
struct Side {
  const float* values;
  const float* weight;
  int64_t width;
};

int linear(const LinearKernels& kernels, const Packed& input, const Packed& weight, const Side& side,
           const Epilogue& epilogue, const Team& team) {
  const int64_t m = input.n, units = weight.units, kp = ceil_div(units, kUnitBlock) * kUnitBlock * kUnit;
  const int64_t most = std::min(kRowBlock, std::max<int64_t>(kInputBytes / kp, 64));
  const int64_t block = ceil_div(ceil_div(m, ceil_div(m, most)), kRows) * kRows;  // about equal blocks
  Scratch<int8_t> values(block * kp);
  Scratch<float> scales(block * kp / kUnit);
  Scratch<int32_t> offsets(block * kp / kUnit);
  Scratch<bool> row_nan(block);
  if (!values.ok() || !scales.ok() || !offsets.ok() || !row_nan.ok()) return kNoMemory;
  // The branch's weight by tiles, [tiles][width][kTile], with zeros from column n to a multiple of what is multiplied.
  const int64_t padded = ceil_div(weight.n, kCols * kFewTiles) * kCols * kFewTiles;
  Scratch<float> side_weight(padded * side.width);
  if (!side_weight.ok()) return kNoMemory;
  for (int64_t column = 0; column < padded; column += kTile)
    for (int64_t j = 0; j < side.width; j++)
      for (int64_t c = 0; c < kTile; c++)
        side_weight.get()[column * side.width + j * kTile + c] =
            column + c < weight.n ? side.weight[j * weight.n + column + c] : 0.0f;
  const auto add_side = [&](int64_t row, int64_t count, int64_t column, int tiles, float* acc) {
    if (side.width)
      kernels.add_side(side.values + row * side.width, side.width, count, side_weight.get() + column * side.width,
                       tiles, acc);
  };
  // Expanded rows are laid out [block of units][group of rows][unit of the block], as they are multiplied.
  const int64_t groups = block / kRows;
  const auto group_at = [&](int64_t unit, int64_t row) {
    const int64_t at = (unit / kUnitBlock * groups + row / kRows) * kUnitBlock * kRows;
    return Group{values.get() + at * kUnit, scales.get() + at, offsets.get() + at};
  };
  const auto expand = [&](int64_t first, int64_t count, int64_t row) {
    const int64_t there = std::min<int64_t>(count - row, kRows);
    const Packed rows = {input.codes, input.scales, first + row + there, units};
    for (int64_t u = 0; u < units; u += kUnitBlock)
      kernels.expand_rows(rows, first + row, u, std::min(kUnitBlock, units - u), group_at(u, row));
    for (int64_t i = row; i < row + there; i++) {
      const uint8_t* stored = input.scales + (first + i) * units * kScaleBytes;
      bool nan = false;
      for (int64_t u = 0; u < units; u++) nan |= stored[u * kScaleBytes] == 0xFF;
      row_nan.get()[i] = nan;
    }
  };

  if (kernels.few_rows && m <= kRows) {
    expand(0, m, 0);
    const Group group = group_at(0, 0);
    constexpr int64_t kWidth = kFewTiles * kTile;
    const int64_t steps = ceil_div(weight.n, kWidth);
    run(team, ceil_div(steps, kFewRun), [&](int64_t task, int) {
      for (int64_t step = task * kFewRun; step < std::min((task + 1) * kFewRun, steps); step++) {
        alignas(64) float acc[kRows * kWidth];
        const int64_t column = step * kWidth;
        kernels.few_rows(group, static_cast<int>(m), weight, column, acc);
        add_side(0, m, column, kFewTiles, acc);
        for (int64_t i = 0; i < m; i++)
          kernels.finish(epilogue, i, column, std::min(kWidth, weight.n - column), acc + i * kWidth);
      }
    });
    return kDone;
  }

  const int64_t size = epilogue.dtype == kFloat32 ? 4 : 2;
  const auto fetch_output = [&](int64_t row, int64_t column) {
    const uint8_t* out = static_cast<const uint8_t*>(epilogue.out) + (row * weight.n + column) * size;
    for (int64_t byte = 0; byte < kCols * size; byte += 64) __builtin_prefetch(out + byte, 1, 2);
  };

  // A task is a range of rows by 48 columns; fewer rows where there would be less than two tasks a thread.
  const int64_t tiles = ceil_div(weight.n, kCols);
  int64_t share = block;
  while (share >= 128 && tiles * ceil_div(block, share) < 2 * team.threads) share = ceil_div(share / 2, kRows) * kRows;
  const int64_t acc_size = share * kCols;
  Scratch<uint8_t> columns(team.threads * kUnitBlock * kCols * kUnit);
  Scratch<float> column_scales(team.threads * kUnitBlock * kCols * kTables);
  Scratch<float> accs(team.threads * acc_size);
  if (!columns.ok() || !column_scales.ok() || !accs.ok()) return kNoMemory;

  for (int64_t first = 0; first < m; first += block) {
    const int64_t count = std::min(block, m - first);
    run(team, ceil_div(count, kRows), [&](int64_t group, int) { expand(first, count, group * kRows); });
    run(team, tiles * ceil_div(count, share), [&](int64_t task, int worker) {
      const int64_t column = task % tiles * kCols, begin = task / tiles * share;
      const int64_t end = std::min(begin + share, count), width = std::min<int64_t>(kCols, weight.n - column);
      uint8_t* w = columns.get() + worker * kUnitBlock * kCols * kUnit;
      float* w_scales = column_scales.get() + worker * kUnitBlock * kCols * kTables;
      float* acc = accs.get() + worker * acc_size;
      const int64_t fetched = ceil_div(kCols * kRows, end - begin);  // columns of weights with each group
      memset(acc, 0, acc_size * sizeof(float));
      uint64_t column_nan = 0;
      for (int64_t u = 0; u < units; u += kUnitBlock) {
        const int64_t some = std::min(kUnitBlock, units - u);
        for (int64_t c = 0; c < kCols; c += kTile)
          column_nan |= static_cast<uint64_t>(kernels.expand_tile(weight, column + c, u, some, w + c * kUnit,
                                                                  w_scales + c * kTables))
                        << c;
        // What comes next is in as many places as there are columns or rows, too many for the processor to foresee: a
        // few at a time, the codes and scales of the next block or of the next columns' first, and the output's rows.
        const bool last = u + some == units;
        int64_t ahead = (last ? column + kCols : column) * units + (last ? 0 : u + some);
        int64_t left = last ? std::min<int64_t>(kCols, weight.n - column - kCols) : width;
        for (int64_t row = begin; row < end; row += kRows) {
          for (int64_t i = 0; i < fetched && left > 0; i++, left--, ahead += units) {
            for (int64_t byte = 0; byte < kUnitBlock * kUnitBytes; byte += 64)
              __builtin_prefetch(weight.codes + ahead * kUnitBytes + byte, 0, 2);
            __builtin_prefetch(weight.scales + ahead * kScaleBytes, 0, 2);
          }
          if (last)
            for (int64_t i = row; i < std::min(row + kRows, end); i++) fetch_output(first + i, column);
          kernels.multiply(group_at(u, row), static_cast<int>(std::min<int64_t>(kRows, end - row)), some, w, w_scales,
                           acc + (row - begin) * kCols);
        }
      }
      add_side(first + begin, end - begin, column, kCols / kTile, acc);
      for (int64_t row = begin; row < end; row++) {
        float* sums = acc + (row - begin) * kCols;
        if (column_nan || row_nan.get()[row])
          for (int64_t c = 0; c < width; c++)
            if (row_nan.get()[row] || (column_nan >> c & 1)) sums[c] = NAN;
        kernels.finish(epilogue, first + row, column, width, sums);
      }
    });
  }
  return kDone;
}

}  // namespace

// out [m, n] = residual + gate * activation(input [m, units] times weight [n, units] transposed, plus side [m, width]
// times side_weight [width, n] where the width is not 0, plus bias [n]); what is null is left out. Row r of the gate is
// for gate_rows rows of the output.
HIF4_EXPORT int hif4_linear(const uint8_t* codes, const uint8_t* scales, const uint8_t* w_codes,
                            const uint8_t* w_scales, const float* bias, int gelu, const float* side,
                            const float* side_weight, int64_t width, const float* gate, int64_t gate_rows,
                            const void* residual, int residual_dtype, void* out, int dtype, int64_t m, int64_t n,
                            int64_t units, int threads, void* parallel, int set) {
  const LinearKernels* kernels = kernels_of(set);
  if (!kernels) return kNoSuchSet;
  const Team team = {std::max(1, threads), reinterpret_cast<Parallel>(parallel)};
  const Epilogue epilogue = {bias, gelu != 0, gate, gate_rows, residual, static_cast<Dtype>(residual_dtype),
                             out,  static_cast<Dtype>(dtype), n};
  const Packed input = {codes, scales, m, units}, weight = {w_codes, w_scales, n, units};
  return linear(*kernels, input, weight, {side, side_weight, width}, epilogue, team);
}
