// hif4_linear_w4: argument layout in linear_w4_bindings.py, blocking and threads here, arithmetic in the kernels.
#include "linear_w4.h"

#include <string.h>

#include <algorithm>

#include "library.h"

namespace {

using namespace hif4;

constexpr int64_t kRowBlock = 512;       // input rows expanded at once
constexpr int64_t kInputBytes = 8 << 20;  // and at most about as many bytes
constexpr int64_t kUnitBlock = 24;       // units of 48 columns decoded at once: 144 KiB, for the second cache

#if HIF4_BF16
bool has_bf16_products() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
}
#endif

struct Kernels {
  const WeightOnlyKernels* product;
  const LinearKernels* rest;  // the side branch and what follows the sums
};

// The kernels of a set, -1 for the best; nulls for one that this processor cannot run.
Kernels kernels_of(int set, bool bf16) {
  set = usable_set(set);
#if defined(__x86_64__)
  const LinearKernels* rest = set == 3 ? &kLinearAvx512Vbmi : &kLinearAvx512;
#if HIF4_BF16
  static const bool pairs = has_bf16_products();
  if (set == 3 && bf16 && pairs) return {&kWeightOnlyBf16, rest};
#endif
  if (set >= 2) return {&kWeightOnlyAvx512, rest};
  if (set == 1) return {&kWeightOnlyAvx2, &kLinearAvx2};
#endif
  if (set == 0) return {&kWeightOnlyPortable, &kLinearPortable};
  return {nullptr, nullptr};
}

// A branch added to the product: values [m][width] times weight [width][n]; width 0 for none.
struct Side {
  const float* values;
  const float* weight;
  int64_t width;
};

struct Input {
  const void* x;  // [m, k]
  Dtype dtype;
  const float* mask;  // [k] or null
  Rotation rotation;
  int64_t k;
};

int linear(const Kernels& kernels, const Input& input, const Packed& weight, const Side& side,
           const Epilogue& epilogue, int64_t m, const Team& team) {
  const WeightOnlyKernels& product = *kernels.product;
  const int64_t units = weight.units, kp = units * kUnit, row_bytes = kp * product.element;
  const int64_t bytes = input.k * (input.dtype == kBfloat16 ? 2 : 4);
  const int64_t fitting = std::max<int64_t>(kInputBytes / row_bytes / kRows, 8) * kRows;
  const int64_t block = std::min(std::min(kRowBlock, fitting), ceil_div(m, kRows) * kRows);
  Scratch<uint8_t> values(block * row_bytes);
  // The branch's weight by tiles, [tiles][width][kTile], with zeros from column n to a multiple of kCols.
  const int64_t padded = ceil_div(weight.n, kCols) * kCols;
  Scratch<float> side_weight(padded * side.width);
  if (!values.ok() || !side_weight.ok()) return kNoMemory;
  for (int64_t column = 0; column < padded; column += kTile)
    for (int64_t j = 0; j < side.width; j++)
      for (int64_t c = 0; c < kTile; c++)
        side_weight.get()[column * side.width + j * kTile + c] =
            column + c < weight.n ? side.weight[j * weight.n + column + c] : 0.0f;
  const auto add_side = [&](int64_t row, int64_t count, int64_t column, int tiles, float* acc) {
    if (side.width)
      kernels.rest->add_side(side.values + row * side.width, side.width, count,
                             side_weight.get() + column * side.width, tiles, acc);
  };
  // Rows [row, row + kRows) of the block that starts at `first`; what is not there is zeros.
  const auto expand = [&](int64_t first, int64_t count, int64_t row) {
    uint8_t* group = values.get() + row * row_bytes;
    if (count - row < kRows || kp != input.k) memset(group, 0, kRows * row_bytes);
    for (int64_t i = row; i < std::min(row + kRows, count); i++)
      product.expand_row(static_cast<const uint8_t*>(input.x) + (first + i) * bytes, input.dtype, input.mask,
                         input.rotation, input.k, group, static_cast<int>(i - row));
  };

  if (product.few_rows && m <= kRows) {
    expand(0, m, 0);
    run(team, ceil_div(weight.n, kTile), [&](int64_t tile, int) {
      float acc[kRows * kTile];
      const int64_t column = tile * kTile;
      product.few_rows(values.get(), static_cast<int>(m), weight, column, acc);
      add_side(0, m, column, 1, acc);
      for (int64_t i = 0; i < m; i++)
        kernels.rest->finish(epilogue, i, column, std::min<int64_t>(kTile, weight.n - column), acc + i * kTile);
    });
    return kDone;
  }

  // A task is a range of rows by 48 columns; fewer rows where there would be less than two tasks a thread.
  const int64_t tiles = ceil_div(weight.n, kCols);
  int64_t share = block;
  while (share >= 128 && tiles * ceil_div(block, share) < 2 * team.threads) share = ceil_div(share / 2, kRows) * kRows;
  const int64_t tile_size = kUnitBlock * kUnit * kCols, acc_size = share * kCols;
  Scratch<uint16_t> columns(team.threads * tile_size);
  Scratch<float> accs(team.threads * acc_size);
  if (!columns.ok() || !accs.ok()) return kNoMemory;

  for (int64_t first = 0; first < m; first += block) {
    const int64_t count = std::min(block, m - first);
    run(team, ceil_div(count, kRows), [&](int64_t group, int) { expand(first, count, group * kRows); });
    run(team, tiles * ceil_div(count, share), [&](int64_t task, int worker) {
      const int64_t column = task % tiles * kCols, begin = task / tiles * share;
      const int64_t end = std::min(begin + share, count), width = std::min<int64_t>(kCols, weight.n - column);
      uint16_t* w = columns.get() + worker * tile_size;
      float* acc = accs.get() + worker * acc_size;
      const int64_t fetched = ceil_div(kCols * kRows, end - begin);  // columns of weights with each group
      memset(acc, 0, acc_size * sizeof(float));
      for (int64_t u = 0; u < units; u += kUnitBlock) {
        const int64_t some = std::min(kUnitBlock, units - u);
        for (int64_t c = 0; c < kCols; c += kTile) product.expand_tile(weight, column + c, u, some, w + c * 2);
        // The packed weights that come next are in as many places as there are columns, too many for the processor to
        // foresee: those of the next block, or of the next columns' first, are fetched while this one is multiplied.
        const bool last = u + some == units;
        int64_t ahead = (last ? column + kCols : column) * units + (last ? 0 : u + some);
        int64_t left = last ? std::min<int64_t>(kCols, weight.n - column - kCols) : width;
        for (int64_t row = begin; row < end; row += kRows) {
          for (int64_t i = 0; i < fetched && left > 0; i++, left--, ahead += units) {
            for (int64_t byte = 0; byte < kUnitBlock * kUnitBytes; byte += 64)
              __builtin_prefetch(weight.codes + ahead * kUnitBytes + byte, 0, 2);
            __builtin_prefetch(weight.scales + ahead * kScaleBytes, 0, 2);
          }
          product.multiply(values.get() + row * row_bytes + u * kUnit * kRows * product.element, some, w,
                           acc + (row - begin) * kCols);
        }
      }
      add_side(first + begin, end - begin, column, kCols / kTile, acc);
      for (int64_t row = begin; row < end; row++)
        kernels.rest->finish(epilogue, first + row, column, width, acc + (row - begin) * kCols);
    });
  }
  return kDone;
}

}  // namespace

// out [m, n] = residual + gate * activation(x [m, k], masked, rotated and rounded, times the decoded weight [n, units]
// transposed, plus side [m, width] times side_weight [width, n] where the width is not 0, plus bias [n]). Null: left out.
// Row r of the gate is for gate_rows rows of the output. bf16 0: products are those of fp32 also for input in bf16.
HIF4_EXPORT int hif4_linear_w4(const void* x, int x_dtype, const float* mask, int hadamard, float factor, int64_t k,
                               const uint8_t* w_codes, const uint8_t* w_scales, const float* bias, int gelu,
                               const float* side, const float* side_weight, int64_t width, const float* gate,
                               int64_t gate_rows, const void* residual, int residual_dtype, void* out, int dtype,
                               int64_t m, int64_t n, int bf16, int threads, void* parallel, int set) {
  const Dtype from = static_cast<Dtype>(x_dtype);
  const Kernels kernels = kernels_of(set, bf16 && from == kBfloat16);
  if (!kernels.product) return kNoSuchSet;
  const Team team = {std::max(1, threads), reinterpret_cast<Parallel>(parallel)};
  const Epilogue epilogue = {bias, gelu != 0, gate, gate_rows, residual, static_cast<Dtype>(residual_dtype),
                             out,  static_cast<Dtype>(dtype), n};
  return linear(kernels, {x, from, mask, {hadamard, factor}, k}, {w_codes, w_scales, n, ceil_div(k, kUnit)},
                {side, side_weight, width}, epilogue, m, team);
}
