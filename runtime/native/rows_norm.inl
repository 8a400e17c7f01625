// Norms and rotary embedding, written once for all instruction sets. Included inside a namespace with HIF4_TARGET
// defined, and HIF4_LANES as the fp32 lanes of a register.
//
// All sets give the same bits: a sum over a row is always 64 partial sums in fp32, of the channels that are equal modulo
// 64, joined in fp64 by one tree; no product and sum are fused; divisions and roots are IEEE's.

constexpr int kLanes = HIF4_LANES;
constexpr int kPartial = 64;              // partial sums
constexpr int kStep = kPartial / kLanes;  // and the registers that hold them

typedef float Floats __attribute__((vector_size(4 * HIF4_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * HIF4_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * HIF4_LANES)));

// What follows works on a register of channels and, at the end of a row, on single ones.
HIF4_TARGET HIF4_INLINE void get(const float* x, Floats* out) { memcpy(out, x, sizeof(*out)); }
HIF4_TARGET HIF4_INLINE void get(const float* x, float* out) { *out = *x; }
HIF4_TARGET HIF4_INLINE void get(const uint16_t* x, float* out) { *out = float_of(static_cast<uint32_t>(*x) << 16); }
HIF4_TARGET HIF4_INLINE void get(const uint16_t* x, Floats* out) {
  Halves halves;
  memcpy(&halves, x, sizeof(halves));
  *out = reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
}

HIF4_TARGET HIF4_INLINE uint32_t to_bf16(float x) { return x != x ? 0x7FC0 : bf16_rne(x); }
HIF4_TARGET HIF4_INLINE Words to_bf16(Floats x) {
  const Words bits = reinterpret_cast<Words>(x), nan = reinterpret_cast<Words>(x != x);
  return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & ~nan) | (nan & 0x7FC0);
}

HIF4_TARGET HIF4_INLINE void put(float* out, Floats x) { memcpy(out, &x, sizeof(x)); }
HIF4_TARGET HIF4_INLINE void put(float* out, float x) { *out = x; }
HIF4_TARGET HIF4_INLINE void put(uint16_t* out, float x) { *out = static_cast<uint16_t>(to_bf16(x)); }
HIF4_TARGET HIF4_INLINE void put(uint16_t* out, Floats x) {
  const Halves halves = __builtin_convertvector(to_bf16(x), Halves);
  memcpy(out, &halves, sizeof(halves));
}

// x rounded to the type pointed to.
HIF4_TARGET HIF4_INLINE float rounded(const float*, float x) { return x; }
HIF4_TARGET HIF4_INLINE Floats rounded(const float*, Floats x) { return x; }
HIF4_TARGET HIF4_INLINE float rounded(const uint16_t*, float x) { return float_of(to_bf16(x) << 16); }
HIF4_TARGET HIF4_INLINE Floats rounded(const uint16_t*, Floats x) {
  return reinterpret_cast<Floats>(to_bf16(x) << 16);
}

HIF4_TARGET HIF4_INLINE double joined(const float (&partial)[kPartial]) {
  double sum[kPartial / 2];
  for (int i = 0; i < 32; i++) sum[i] = static_cast<double>(partial[i]) + static_cast<double>(partial[i + 32]);
  for (int i = 0; i < 16; i++) sum[i] += sum[i + 16];
  for (int i = 0; i < 8; i++) sum[i] += sum[i + 8];
  for (int i = 0; i < 4; i++) sum[i] += sum[i + 4];
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

template <typename T>
HIF4_TARGET double sum_of(const T* x, int64_t c) {
  Floats sum[kStep] = {}, value;
  float partial[kPartial], last;
  int64_t i = 0;
  for (; i + kPartial <= c; i += kPartial)
    for (int s = 0; s < kStep; s++) {
      get(x + i + s * kLanes, &value);
      sum[s] += value;
    }
  memcpy(partial, sum, sizeof(sum));
  for (int64_t j = i; j < c; j++) {
    get(x + j, &last);
    partial[j - i] += last;
  }
  return joined(partial);
}

// The sums of x - center and of its square.
struct Moments {
  double first, second;
};

template <typename T>
HIF4_TARGET Moments moments_about(const T* x, int64_t c, float center) {
  Floats first[kStep] = {}, second[kStep] = {}, value;
  float firsts[kPartial], seconds[kPartial], last;
  int64_t i = 0;
  for (; i + kPartial <= c; i += kPartial)
    for (int s = 0; s < kStep; s++) {
      get(x + i + s * kLanes, &value);
      value -= center;
      first[s] += value;
      second[s] += value * value;
    }
  memcpy(firsts, first, sizeof(first));
  memcpy(seconds, second, sizeof(second));
  for (int64_t j = i; j < c; j++) {
    get(x + j, &last);
    last -= center;
    firsts[j - i] += last;
    seconds[j - i] += last * last;
  }
  return {joined(firsts), joined(seconds)};
}

struct Normal {
  float center, rest, inverse;  // normalized: (x - center - rest) * inverse
};

template <typename V, typename X, typename Y>
HIF4_TARGET HIF4_INLINE void normalize(const X* x, const Normal& normal, const Affine& affine, int64_t i, Y* out) {
  V y, factor;
  get(x + i, &y);
  y = (y - normal.center - normal.rest) * normal.inverse;
  if (affine.weight) {
    get(affine.weight + i, &factor);
    y = y * factor;
  }
  if (affine.bias) {
    get(affine.bias + i, &factor);
    y = y + factor;
  }
  if (affine.scale) {
    get(affine.scale + i, &factor);
    y = y * (factor + 1.0f);
    get(affine.shift + i, &factor);
    y = y + factor;
  }
  put(out + i, y);
}

template <typename X, typename Y>
HIF4_TARGET void norm_row(const X* x, const Affine& affine, double eps, int64_t c, Y* out) {
  // The mean as fp32 is off by a rounding, which matters where it is much larger than the deviations: the second pass
  // finds the rest.
  const float center = static_cast<float>(sum_of(x, c) / static_cast<double>(c));
  const Moments moments = moments_about(x, c, center);
  const double rest = moments.first / static_cast<double>(c);
  const double variance = moments.second / static_cast<double>(c) - rest * rest;
  const double inverse = 1.0 / __builtin_sqrt((variance > 0.0 || variance != variance ? variance : 0.0) + eps);
  const Normal normal = {center, static_cast<float>(rest), static_cast<float>(inverse)};
  int64_t i = 0;
  for (; i + kLanes <= c; i += kLanes) normalize<Floats>(x, normal, affine, i, out);
  for (; i < c; i++) normalize<float>(x, normal, affine, i, out);
}

HIF4_TARGET void norm(const void* x, Dtype from, const Affine& affine, double eps, int64_t c, void* out, Dtype to) {
  const auto* low = static_cast<const uint16_t*>(x);
  const auto* high = static_cast<const float*>(x);
  if (from == kBfloat16 && to == kBfloat16) return norm_row(low, affine, eps, c, static_cast<uint16_t*>(out));
  if (from == kBfloat16) return norm_row(low, affine, eps, c, static_cast<float*>(out));
  if (to == kBfloat16) return norm_row(high, affine, eps, c, static_cast<uint16_t*>(out));
  norm_row(high, affine, eps, c, static_cast<float*>(out));
}

HIF4_TARGET HIF4_INLINE Floats neighbours(Floats x) {  // lanes 2i and 2i + 1 exchanged
#if HIF4_LANES == 16
  return _mm512_permute_ps(x, 0xB1);
#elif HIF4_LANES == 8
  return _mm256_permute_ps(x, 0xB1);
#else
  return Floats{x[1], x[0], x[3], x[2]};
#endif
}

template <typename T>
HIF4_TARGET void rms_rotary_row(const T* x, const float* weight, double eps, int64_t c, int64_t width,
                                const float* cos, const float* sin, T* out) {
  Floats sum[kStep] = {}, value, factor, other;
  float partial[kPartial], last;
  int64_t i = 0;
  for (; i + kPartial <= c; i += kPartial)
    for (int s = 0; s < kStep; s++) {
      get(x + i + s * kLanes, &value);
      sum[s] += value * value;
    }
  memcpy(partial, sum, sizeof(sum));
  for (int64_t j = i; j < c; j++) {
    get(x + j, &last);
    partial[j - i] += last * last;
  }
  const float inverse = static_cast<float>(1.0 / __builtin_sqrt(joined(partial) / static_cast<double>(c) + eps));
  if (!cos) {
    for (i = 0; i + kLanes <= c; i += kLanes) {
      get(x + i, &value);
      get(weight + i, &factor);
      put(out + i, value * inverse * factor);
    }
    for (; i < c; i++) {
      get(x + i, &last);
      put(out + i, last * inverse * weight[i]);
    }
    return;
  }
  for (int64_t head = 0; head < c; head += width) {
    for (i = 0; i + kLanes <= width; i += kLanes) {
      get(x + head + i, &value);
      get(weight + head + i, &factor);
      value = rounded(out, value * inverse * factor);
      get(cos + i, &factor);
      get(sin + i, &other);
      put(out + head + i, value * factor + neighbours(value) * other);
    }
    for (; i < width; i += 2) {  // a pair
      float first, second;
      get(x + head + i, &first);
      get(x + head + i + 1, &second);
      first = rounded(out, first * inverse * weight[head + i]);
      second = rounded(out, second * inverse * weight[head + i + 1]);
      put(out + head + i, first * cos[i] + second * sin[i]);
      put(out + head + i + 1, second * cos[i + 1] + first * sin[i + 1]);
    }
  }
}

HIF4_TARGET void rms_rotary(const void* x, Dtype dtype, const float* weight, double eps, int64_t c, int64_t width,
                            const float* cos, const float* sin, void* out) {
  if (dtype == kBfloat16)
    return rms_rotary_row(static_cast<const uint16_t*>(x), weight, eps, c, width, cos, sin,
                          static_cast<uint16_t*>(out));
  rms_rotary_row(static_cast<const float*>(x), weight, eps, c, width, cos, sin, static_cast<float*>(out));
}
