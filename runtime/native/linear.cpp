// hif4_linear: argument layout in bindings.py, blocking and threads here, arithmetic in the kernels.
#include "linear.h"

#include <string.h>

#include <algorithm>

#include "library.h"

namespace {

using namespace hif4;

constexpr int64_t kRowBlock = 512;             // input rows expanded at once
constexpr int64_t kInputBytes = 4 << 20;       // and at most about as many bytes
constexpr int64_t kUnitBlock = 6;              // units of 48 columns expanded at once: 18 KiB, for the first cache
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

// Output rows: bias added and the one cast made.
struct Output {
  const float* bias;  // or null
  void* data;
  Dtype dtype;
  int64_t n;

  void store(int64_t row, int64_t column, int64_t count, const float* acc) const {
    float y[kCols];
    for (int64_t c = 0; c < count; c++) y[c] = bias ? acc[c] + bias[column + c] : acc[c];
    if (dtype == kFloat32) {
      memcpy(static_cast<float*>(data) + row * n + column, y, count * sizeof(float));
      return;
    }
    uint16_t* out = static_cast<uint16_t*>(data) + row * n + column;
    for (int64_t c = 0; c < count; c++) {
      uint32_t bits;
      memcpy(&bits, &y[c], 4);
      const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
      out[c] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
    }
  }
};

struct Planes {
  const uint8_t* codes;
  const uint8_t* scales;
};

// A branch added to the product: values [m][width] times weight [width][n]; width 0 for none.
struct Side {
  const float* values;
  const float* weight;
  int64_t width;
};

int linear(const LinearKernels& kernels, const Planes& input, const Weight& weight, const Side& side, const Output& output,
           int64_t m, const Team& team) {
  const int64_t units = weight.units, kp = units * kUnit;
  const int64_t fitting = std::max<int64_t>(kInputBytes / kp / kRows, 8) * kRows;
  const int64_t block = std::min(std::min(kRowBlock, fitting), ceil_div(m, kRows) * kRows);
  Scratch<int8_t> values(block * kp);
  Scratch<float> scales(block * units);
  Scratch<int32_t> offsets(block * units);
  if (!values.ok() || !scales.ok() || !offsets.ok()) return kNoMemory;
  // The branch's weight by tiles, [tiles][width][kTile], with zeros from column n to a multiple of kCols.
  const int64_t padded = ceil_div(weight.n, kCols) * kCols;
  Scratch<float> side_weight(padded * side.width);
  if (!side_weight.ok()) return kNoMemory;
  for (int64_t column = 0; column < padded; column += kTile)
    for (int64_t j = 0; j < side.width; j++)
      for (int64_t c = 0; c < kTile; c++)
        side_weight.get()[column * side.width + j * kTile + c] =
            column + c < weight.n ? side.weight[j * weight.n + column + c] : 0.0f;
  const auto add_side = [&](int64_t row, int64_t count, int64_t column, int tiles, float* acc) {
    if (side.width)
      kernels.add_side(side.values + row * side.width, side.width, count, side_weight.get() + column * side.width, tiles,
                       acc);
  };
  const auto group_at = [&](int64_t row) {
    return Group{values.get() + row * kp, scales.get() + row * units, offsets.get() + row * units};
  };
  const auto expand = [&](int64_t first, int64_t count, int64_t group) {
    const int64_t row = group * kRows;
    const Group out = group_at(row);
    if (count - row < kRows) {  // the rows that are missing are zeros
      memset(out.values, 0, kRows * kp);
      memset(out.scales, 0, kRows * units * sizeof(float));
      memset(out.offsets, 0, kRows * units * sizeof(int32_t));
    }
    for (int64_t i = row; i < std::min(row + kRows, count); i++)
      kernels.expand_row(input.codes + (first + i) * units * kUnitBytes,
                         input.scales + (first + i) * units * kScaleBytes, units, out, static_cast<int>(i - row));
  };

  if (kernels.few_rows && m <= kRows) {
    expand(0, m, 0);
    const Group group = group_at(0);
    run(team, ceil_div(weight.n, kTile), [&](int64_t tile, int) {
      float acc[kRows * kTile];
      const int64_t column = tile * kTile;
      kernels.few_rows(group, static_cast<int>(m), weight, column, acc);
      add_side(0, m, column, 1, acc);
      for (int64_t i = 0; i < m; i++)
        output.store(i, column, std::min<int64_t>(kTile, weight.n - column), acc + i * kTile);
    });
    return kDone;
  }

  // A task is a range of rows by 48 columns; fewer rows where there would be less than two tasks a thread.
  const int64_t tiles = ceil_div(weight.n, kCols);
  int64_t share = block;
  while (share >= 128 && tiles * ceil_div(block, share) < 2 * team.threads) share = ceil_div(share / 2, kRows) * kRows;
  const int64_t acc_size = share * kCols;
  Scratch<uint8_t> columns(team.threads * kUnitBlock * kCols * kUnit);
  Scratch<float> column_scales(team.threads * kUnitBlock * kCols);
  Scratch<float> accs(team.threads * acc_size);
  if (!columns.ok() || !column_scales.ok() || !accs.ok()) return kNoMemory;

  for (int64_t first = 0; first < m; first += block) {
    const int64_t count = std::min(block, m - first);
    run(team, ceil_div(count, kRows), [&](int64_t group, int) { expand(first, count, group); });
    run(team, tiles * ceil_div(count, share), [&](int64_t task, int worker) {
      const int64_t column = task % tiles * kCols, begin = task / tiles * share;
      const int64_t end = std::min(begin + share, count), width = std::min<int64_t>(kCols, weight.n - column);
      uint8_t* w = columns.get() + worker * kUnitBlock * kCols * kUnit;
      float* w_scales = column_scales.get() + worker * kUnitBlock * kCols;
      float* acc = accs.get() + worker * acc_size;
      memset(acc, 0, acc_size * sizeof(float));
      for (int64_t u = 0; u < units; u += kUnitBlock) {
        const int64_t some = std::min(kUnitBlock, units - u);
        for (int64_t c = 0; c < kCols; c += kTile)
          kernels.expand_tile(weight, column + c, u, some, w + c * kUnit, w_scales + c);
        for (int64_t row = begin; row < end; row += kRows)
          kernels.multiply(group_at(row), static_cast<int>(std::min<int64_t>(kRows, end - row)), u, some, w, w_scales,
                           acc + (row - begin) * kCols);
      }
      add_side(first + begin, end - begin, column, kCols / kTile, acc);
      for (int64_t row = begin; row < end; row++) output.store(first + row, column, width, acc + (row - begin) * kCols);
    });
  }
  return kDone;
}

}  // namespace

// out [m, n] = input [m, units] times weight [n, units] transposed, plus side [m, width] times side_weight [width, n]
// where the width is not 0, plus bias [n] or null.
HIF4_EXPORT int hif4_linear(const uint8_t* codes, const uint8_t* scales, const uint8_t* w_codes,
                            const uint8_t* w_scales, const float* bias, const float* side, const float* side_weight,
                            int64_t width, void* out, int dtype, int64_t m, int64_t n, int64_t units, int threads,
                            void* parallel, int set) {
  const LinearKernels* kernels = kernels_of(set);
  if (!kernels) return kNoSuchSet;
  const Team team = {std::max(1, threads), reinterpret_cast<Parallel>(parallel)};
  return linear(*kernels, {codes, scales}, {w_codes, w_scales, n, units}, {side, side_weight, width},
                {bias, out, static_cast<Dtype>(dtype), n}, m, team);
}
