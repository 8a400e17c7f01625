// The entry points that work on whole rows: argument layout in bindings.py, threads here, arithmetic in the kernels.
#include "rows.h"

#include <string.h>

#include <algorithm>

#include "library.h"

namespace {

using namespace hif4;

constexpr int64_t kChunk = 1024;               // channels quantized at once: the largest rotation width
constexpr int64_t kQuantizeElements = 1 << 15;  // a thread's share, so that short inputs wake no thread

// The kernels of a set, -1 for the best; null for one that this processor cannot run.
const RowKernels* kernels_of(int set) {
  set = usable_set(set);
#if defined(__x86_64__)
  if (set == 1) return &kRowsAvx2;
  if (set >= 2) return &kRowsAvx512;
#endif
  return set == 0 ? &kRowsPortable : nullptr;
}

struct Quantizer {
  const RowKernels& kernels;
  const void* x;
  Dtype dtype;
  const float* mask;  // or null
  int hadamard;       // 0 or 1: none
  float factor;
  int64_t k;

  void row(int64_t i, uint8_t* codes, uint8_t* scales) const {
    alignas(64) float chunk[kChunk];
    for (int64_t start = 0; start < k; start += kChunk) {
      const int64_t count = std::min(kChunk, k - start), padded = ceil_div(count, kUnit) * kUnit;
      const float* factors = mask ? mask + start : nullptr;
      if (dtype == kBfloat16)
        kernels.load_bf16(static_cast<const uint16_t*>(x) + i * k + start, factors, count, chunk);
      else
        kernels.load_f32(static_cast<const float*>(x) + i * k + start, factors, count, chunk);
      if (hadamard > 1) kernels.rotate(chunk, count, hadamard, factor);
      memset(chunk + count, 0, (padded - count) * sizeof(float));
      kernels.quantize(chunk, padded / kUnit, codes + start / 2, scales + start / kUnit * kScaleBytes);
    }
  }
};

}  // namespace

// Planes of x [rows, k], contiguous; `factor` is what a rotation of width `hadamard` ends with.
HIF4_EXPORT int hif4_quantize(const void* x, int dtype, const float* mask, int hadamard, float factor, int64_t rows,
                              int64_t k, uint8_t* codes, uint8_t* scales, int threads, void* parallel, int set) {
  const RowKernels* kernels = kernels_of(set);
  if (!kernels) return kNoSuchSet;
  const Quantizer quantizer = {*kernels, x, static_cast<Dtype>(dtype), mask, hadamard, factor, k};
  const int64_t units = ceil_div(k, kUnit), step = std::max<int64_t>(1, kQuantizeElements / k);
  const Team team = {threads, reinterpret_cast<Parallel>(parallel)};
  run(team, ceil_div(rows, step), [&](int64_t task, int) {
    for (int64_t i = task * step; i < std::min(rows, (task + 1) * step); i++)
      quantizer.row(i, codes + i * units * kUnitBytes, scales + i * units * kScaleBytes);
  });
  return kDone;
}
