// The entry points that work on whole rows: argument layout in row_bindings.py, threads here, arithmetic in the kernels.
#include "rows.h"

#include <algorithm>

namespace {

using namespace hif4;

constexpr int64_t kShare = 1 << 15;  // elements that a thread takes at once, so that short inputs wake no thread

// The kernels of a set, -1 for the best; null for one that this processor cannot run.
const RowKernels* kernels_of(int set) {
  set = usable_set(set);
#if defined(__x86_64__)
  if (set == 1) return &kRowsAvx2;
  if (set >= 2) return &kRowsAvx512;
#endif
  return set == 0 ? &kRowsPortable : nullptr;
}

int64_t bytes_of(Dtype dtype) { return dtype == kBfloat16 ? 2 : 4; }

// work(row, worker) for each of `rows` rows of `k` channels.
template <typename Work>
void run_rows(const Team& team, int64_t rows, int64_t k, const Work& work) {
  const int64_t step = std::max<int64_t>(1, kShare / k);
  run(team, ceil_div(rows, step), [&](int64_t task, int worker) {
    for (int64_t row = task * step; row < std::min(rows, (task + 1) * step); row++) work(row, worker);
  });
}

// Rows of one dtype to planes.
class Quantizer {
 public:
  Quantizer(const RowKernels& kernels, Dtype dtype, const float* mask, Rotation rotation, int64_t k)
      : kernels_(kernels), dtype_(dtype), rotation_(rotation), k_(k), units_(ceil_div(k, kUnit)),
        mask_(mask ? units_ * kUnit : 0), masked_(mask != nullptr) {
    if (mask && mask_.ok()) kernels.arrange_mask(mask, dtype, k, mask_.get());
  }
  bool ok() const { return mask_.ok(); }

  void row(const void* x, int64_t i, uint8_t* codes, uint8_t* scales) const {
    kernels_.quantize(x, dtype_, masked_ ? mask_.get() : nullptr, rotation_, k_, codes + i * units_ * kUnitBytes,
                      scales + i * units_ * kScaleBytes);
  }

 private:
  const RowKernels& kernels_;
  const Dtype dtype_;
  const Rotation rotation_;
  const int64_t k_, units_;
  Scratch<float> mask_;
  const bool masked_;
};

// Layer norm with a modulation that may differ from row to row: rows are samples times tokens.
struct Norm {
  const RowKernels& kernels;
  const char* x;
  Dtype from;
  const float *weight, *bias, *scale, *shift;  // or null
  int64_t scale_strides[2], shift_strides[2];  // from sample to sample, from token to token
  double eps;
  int64_t tokens, c;

  void row(int64_t i, void* out, Dtype to) const {
    const int64_t b = i / tokens, t = i % tokens;
    const Affine affine = {weight, bias, scale ? scale + b * scale_strides[0] + t * scale_strides[1] : nullptr,
                           shift ? shift + b * shift_strides[0] + t * shift_strides[1] : nullptr};
    kernels.norm(x + i * c * bytes_of(from), from, affine, eps, c, out, to);
  }
};

}  // namespace

// Planes of x [rows, k], contiguous; `factor` is what a rotation of width `hadamard` ends with.
HIF4_EXPORT int hif4_quantize(const void* x, int dtype, const float* mask, int hadamard, float factor, int64_t rows,
                              int64_t k, uint8_t* codes, uint8_t* scales, int threads, void* parallel, int set) {
  const RowKernels* kernels = kernels_of(set);
  if (!kernels) return kNoSuchSet;
  const Quantizer quantizer(*kernels, static_cast<Dtype>(dtype), mask, {hadamard, factor}, k);
  if (!quantizer.ok()) return kNoMemory;
  const char* data = static_cast<const char*>(x);
  const int64_t bytes = k * bytes_of(static_cast<Dtype>(dtype));
  run_rows({threads, reinterpret_cast<Parallel>(parallel)}, rows, k,
           [&](int64_t row, int) { quantizer.row(data + row * bytes, row, codes, scales); });
  return kDone;
}

// The values [rows, k] of planes, in fp32 or bf16.
HIF4_EXPORT int hif4_dequantize(const uint8_t* codes, const uint8_t* scales, int64_t rows, int64_t k, void* out,
                                int dtype, int threads, void* parallel, int set) {
  const RowKernels* kernels = kernels_of(set);
  if (!kernels) return kNoSuchSet;
  const int64_t units = ceil_div(k, kUnit), bytes = k * bytes_of(static_cast<Dtype>(dtype));
  run_rows({threads, reinterpret_cast<Parallel>(parallel)}, rows, k, [&](int64_t row, int) {
    kernels->dequantize(codes + row * units * kUnitBytes, scales + row * units * kScaleBytes, k,
                        static_cast<char*>(out) + row * bytes, static_cast<Dtype>(dtype));
  });
  return kDone;
}

// Layer norm of x [samples, tokens, c], contiguous, to `out` of dtype `to`; or, where `codes` is not null, to planes of
// that result, which is not stored then. scale and shift [samples, tokens, c] by their strides, c contiguous.
HIF4_EXPORT int hif4_norm(const void* x, int from, const float* weight, const float* bias, const float* scale,
                          int64_t scale_sample, int64_t scale_token, const float* shift, int64_t shift_sample,
                          int64_t shift_token, double eps, int64_t samples, int64_t tokens, int64_t c, void* out, int to,
                          const float* mask, int hadamard, float factor, uint8_t* codes, uint8_t* scales, int threads,
                          void* parallel, int set) {
  const RowKernels* kernels = kernels_of(set);
  if (!kernels) return kNoSuchSet;
  const Norm norm = {*kernels,
                     static_cast<const char*>(x),
                     static_cast<Dtype>(from),
                     weight, bias, scale, shift,
                     {scale_sample, scale_token},
                     {shift_sample, shift_token},
                     eps, tokens, c};
  const Dtype dtype = static_cast<Dtype>(to);
  const Team team = {std::max(1, threads), reinterpret_cast<Parallel>(parallel)};
  const int64_t bytes = c * bytes_of(dtype);
  if (!codes) {
    run_rows(team, samples * tokens, c,
             [&](int64_t row, int) { norm.row(row, static_cast<char*>(out) + row * bytes, dtype); });
    return kDone;
  }
  const Quantizer quantizer(*kernels, dtype, mask, {hadamard, factor}, c);
  const int64_t spread = ceil_div(bytes, 64) * 64;
  Scratch<char> buffers(team.threads * spread);
  if (!quantizer.ok() || !buffers.ok()) return kNoMemory;
  run_rows(team, samples * tokens, c, [&](int64_t row, int worker) {
    char* buffer = buffers.get() + worker * spread;
    norm.row(row, buffer, dtype);
    quantizer.row(buffer, row, codes, scales);
  });
  return kDone;
}

// RMS norm of x [samples, tokens, heads * width], contiguous, and rotary embedding; cos and sin [tokens, width / 2] by
// their strides, or null.
HIF4_EXPORT int hif4_rms_rotary(const void* x, int dtype, const float* weight, double eps, int64_t samples,
                                int64_t tokens, int64_t heads, int64_t width, const float* cos, int64_t cos_token,
                                int64_t cos_pair, const float* sin, int64_t sin_token, int64_t sin_pair, void* out,
                                int threads, void* parallel, int set) {
  const RowKernels* kernels = kernels_of(set);
  if (!kernels) return kNoSuchSet;
  const int64_t c = heads * width, bytes = c * bytes_of(static_cast<Dtype>(dtype));
  const Team team = {std::max(1, threads), reinterpret_cast<Parallel>(parallel)};
  Scratch<float> tables(cos ? team.threads * 2 * width : 0);
  if (!tables.ok()) return kNoMemory;
  run_rows(team, samples * tokens, c, [&](int64_t row, int worker) {
    float* cosines = nullptr;
    float* sines = nullptr;
    if (cos) {
      cosines = tables.get() + worker * 2 * width;
      sines = cosines + width;
      const int64_t token = row % tokens;
      for (int64_t i = 0; i < width / 2; i++) {
        cosines[2 * i] = cosines[2 * i + 1] = cos[token * cos_token + i * cos_pair];
        sines[2 * i + 1] = sin[token * sin_token + i * sin_pair];
        sines[2 * i] = -sines[2 * i + 1];
      }
    }
    kernels->rms_rotary(static_cast<const char*>(x) + row * bytes, static_cast<Dtype>(dtype), weight, eps, c, width,
                        cosines, sines, static_cast<char*>(out) + row * bytes);
  });
  return kDone;
}
