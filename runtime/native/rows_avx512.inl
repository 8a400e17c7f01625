// Included by rows_avx512.cpp inside a namespace, with HIF4_TARGET defined.
//
// A unit is held in four registers: register i has channel i of every run of 4, and each lane is one of the 16 runs. So
// the maximum of a run is one of registers, and what a run shares needs no broadcast. Which lane is which run is what
// loading costs least: a layout says which bit of the lane's number each bit of the run's number is.

struct Bfloat16Layout {
  static constexpr int64_t kBytes = 2;
  static constexpr int kBit[4] = {0, 2, 3, 1};
};
struct Float32Layout {
  static constexpr int64_t kBytes = 4;
  static constexpr int kBit[4] = {2, 3, 0, 1};
};

template <typename Layout>
constexpr int lane_of(int run) {
  int lane = 0;
  for (int bit = 0; bit < 4; bit++) lane |= (run >> bit & 1) << Layout::kBit[bit];
  return lane;
}

struct Unit {
  __m512 x[4];
};

HIF4_TARGET HIF4_INLINE void load_unit(Bfloat16Layout, const void* x, Unit* unit) {
  const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(static_cast<const uint16_t*>(x) + 32);
  const __m512i low = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88));   // channels 0 and 1 of each run
  const __m512i high = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xDD));  // channels 2 and 3
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
  unit->x[0] = _mm512_castsi512_ps(_mm512_slli_epi32(low, 16));
  unit->x[1] = _mm512_castsi512_ps(_mm512_and_si512(low, upper));
  unit->x[2] = _mm512_castsi512_ps(_mm512_slli_epi32(high, 16));
  unit->x[3] = _mm512_castsi512_ps(_mm512_and_si512(high, upper));
}

HIF4_TARGET HIF4_INLINE void load_unit(Float32Layout, const void* x, Unit* unit) {  // 4 x 4 transposed in each lane
  const float* z = static_cast<const float*>(x);
  const __m512 a = _mm512_loadu_ps(z), b = _mm512_loadu_ps(z + 16), c = _mm512_loadu_ps(z + 32),
               d = _mm512_loadu_ps(z + 48);
  const __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b)), cd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
  const __m512d ef = _mm512_castps_pd(_mm512_unpackhi_ps(a, b)), gh = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
  unit->x[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
  unit->x[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
  unit->x[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(ef, gh));
  unit->x[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(ef, gh));
}

// Each lane's partner: the lane whose number differs in one bit.
template <int BIT>
HIF4_TARGET HIF4_INLINE __m512 partner(__m512 x) {
  if (BIT == 0) return _mm512_permute_ps(x, 0xB1);
  if (BIT == 1) return _mm512_permute_ps(x, 0x4E);
  if (BIT == 2) return _mm512_shuffle_f32x4(x, x, 0xB1);
  return _mm512_shuffle_f32x4(x, x, 0x4E);
}

// A butterfly of runs: the product with 1 or -1 is exact, so the fused sum rounds as the one of block_hadamard.
template <int BIT>
HIF4_TARGET HIF4_INLINE void butterfly(Unit* unit) {
  constexpr __mmask16 upper = BIT == 0 ? 0xAAAA : BIT == 1 ? 0xCCCC : BIT == 2 ? 0xF0F0 : 0xFF00;
  const __m512 sign = _mm512_mask_blend_ps(upper, _mm512_set1_ps(1), _mm512_set1_ps(-1));
  for (__m512& x : unit->x) x = _mm512_fmadd_ps(x, sign, partner<BIT>(x));
}

HIF4_TARGET HIF4_INLINE void butterfly(__m512* a, __m512* b) {
  const __m512 sum = _mm512_add_ps(*a, *b), difference = _mm512_sub_ps(*a, *b);
  *a = sum;
  *b = difference;
}

HIF4_TARGET HIF4_INLINE void scale_unit(Unit* unit, float factor) {
  for (__m512& x : unit->x) x = _mm512_mul_ps(x, _mm512_set1_ps(factor));
}

template <typename Layout>
HIF4_TARGET HIF4_INLINE void rotate_unit(Unit* unit, int width) {
  butterfly(&unit->x[0], &unit->x[1]);
  butterfly(&unit->x[2], &unit->x[3]);
  if (width < 4) return;
  butterfly(&unit->x[0], &unit->x[2]);
  butterfly(&unit->x[1], &unit->x[3]);
  if (width < 8) return;
  butterfly<Layout::kBit[0]>(unit);
  if (width < 16) return;
  butterfly<Layout::kBit[1]>(unit);
  if (width < 32) return;
  butterfly<Layout::kBit[2]>(unit);
  if (width < 64) return;
  butterfly<Layout::kBit[3]>(unit);
}

// Up to 16 units on their way: their level-1 scales depend on a long chain of operations, which one register goes
// through once.
struct Units {
  __m512 x[16][4];
  __m512i run_max[16];   // of the magnitudes, as integers: NaN and Inf are above everything finite
  __m512i pair_max[16];  // of two neighbouring runs
  float inverse[16];     // bf16_rne(1 / E6M2)
  uint32_t exponents[16];  // E1_16 of each lane, E1_8 of each lane << 16
};

HIF4_TARGET HIF4_INLINE __m512i magnitude(__m512 x) {
  return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF));
}

template <typename Layout>
HIF4_TARGET HIF4_INLINE void keep_unit(const Unit& unit, int u, Units* units) {
  for (int i = 0; i < 4; i++) units->x[u][i] = unit.x[i];
  const __m512i run = _mm512_max_epi32(_mm512_max_epi32(magnitude(unit.x[0]), magnitude(unit.x[1])),
                                       _mm512_max_epi32(magnitude(unit.x[2]), magnitude(unit.x[3])));
  units->run_max[u] = run;
  units->pair_max[u] =
      _mm512_max_epi32(run, _mm512_castps_si512(partner<Layout::kBit[0]>(_mm512_castsi512_ps(run))));
}

HIF4_TARGET HIF4_INLINE __m512i max_of_lanes(const __m512i (&x)[16]) {  // lane u: the largest of x[u]
  __m512i a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++)
    a[i] = _mm512_max_epi32(_mm512_unpacklo_epi32(x[i], x[i + 8]), _mm512_unpackhi_epi32(x[i], x[i + 8]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    b[i] = _mm512_max_epi32(_mm512_unpacklo_epi32(a[i], a[i + 4]), _mm512_unpackhi_epi32(a[i], a[i + 4]));
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++)
    c[i] = _mm512_max_epi32(_mm512_shuffle_i32x4(b[i], b[i + 2], 0x88), _mm512_shuffle_i32x4(b[i], b[i + 2], 0xDD));
  const __m512i d = _mm512_max_epi32(_mm512_shuffle_i32x4(c[0], c[1], 0x88), _mm512_shuffle_i32x4(c[0], c[1], 0xDD));
  // A group of four lanes is of x[i], x[i + 4], x[i + 8], x[i + 12]; the groups are those of i = 0, 2, 1, 3.
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15), d);
}

HIF4_TARGET HIF4_INLINE __m512i bf16_rne16(__m512 x) {  // as bf16_rne
  const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  return _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF)), 16);
}

// Exchanges the bits of each half word whose numbers have bit I set and J clear with those that have J set and I clear.
template <int I, int J>
HIF4_TARGET HIF4_INLINE __m512i exchange_bits(__m512i x) {
  constexpr int distance = (1 << J) - (1 << I);
  uint32_t mask = 0;
  for (int bit = 0; bit < 32; bit++)
    if ((bit >> I & 1) && !(bit >> J & 1)) mask |= 1u << bit;
  const __m512i moved = _mm512_and_si512(_mm512_xor_si512(_mm512_srli_epi32(x, distance), x),
                                         _mm512_set1_epi32(static_cast<int>(mask)));
  return _mm512_xor_si512(x, _mm512_xor_si512(moved, _mm512_slli_epi32(moved, distance)));
}

template <int BY>
HIF4_TARGET HIF4_INLINE __m512i exchange_neighbours(__m512i x, uint32_t mask) {
  const __m512i low = _mm512_set1_epi32(static_cast<int>(mask));
  return _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(x, BY), low),
                         _mm512_slli_epi32(_mm512_and_si512(x, low), BY));
}

HIF4_TARGET HIF4_INLINE __m512i order_runs(Bfloat16Layout, __m512i x) {
  return exchange_bits<2, 3>(exchange_bits<1, 2>(x));
}
HIF4_TARGET HIF4_INLINE __m512i order_runs(Float32Layout, __m512i x) {
  return exchange_bits<1, 3>(exchange_bits<0, 2>(x));
}

// `exponents` by lanes to E1_8 and E1_16 as the three bytes after E6M2.
template <typename Layout>
HIF4_TARGET HIF4_INLINE __m512i metadata(__m512i exponents) {
  __m512i x = order_runs(Layout(), exponents);
  x = exchange_neighbours<4>(x, 0x0F0F0F0F);  // the first run belongs in a byte's most significant bit
  x = exchange_neighbours<2>(x, 0x33333333);
  x = exchange_neighbours<1>(x, 0x55555555);
  const __m512i e16 = _mm512_slli_epi32(x, 16);
  // Each E1_8 stands there twice; of 16 bits every second stays.
  __m512i e8 = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(0x5555));
  e8 = _mm512_and_si512(_mm512_or_si512(e8, _mm512_srli_epi32(e8, 1)), _mm512_set1_epi32(0x3333));
  e8 = _mm512_and_si512(_mm512_or_si512(e8, _mm512_srli_epi32(e8, 2)), _mm512_set1_epi32(0x0F0F));
  // Bytes: the later four runs of 8, the earlier four.
  e8 = _mm512_or_si512(_mm512_srli_epi32(e8, 8), _mm512_slli_epi32(e8, 4));
  return _mm512_or_si512(e16, _mm512_slli_epi32(_mm512_and_si512(e8, _mm512_set1_epi32(0xFF)), 8));
}

template <typename Layout>
struct CodeOrder {  // for 16-bit words: of 32-bit lanes the low halves, runs in order
  uint16_t lane[32];
  constexpr CodeOrder() : lane{} {
    for (int run = 0; run < 32; run++) lane[run] = static_cast<uint16_t>(2 * lane_of<Layout>(run & 15));
  }
};

template <typename Layout>
HIF4_TARGET HIF4_INLINE void encode_unit(int u, Units* units, uint8_t* codes) {
  static constexpr CodeOrder<Layout> kOrder;
  const __m512 inverse = _mm512_set1_ps(units->inverse[u]);
  const __m512 w16 = _mm512_mul_ps(_mm512_castsi512_ps(units->run_max[u]), inverse);
  const __m512 w8 = _mm512_mul_ps(_mm512_castsi512_ps(units->pair_max[u]), inverse);
  const __mmask16 e8 = _mm512_cmp_ps_mask(w8, _mm512_set1_ps(4), _CMP_GE_OQ);
  const __m512 limit = _mm512_mask_blend_ps(e8, _mm512_set1_ps(2), _mm512_set1_ps(4));
  const __mmask16 e16 = _mm512_cmp_ps_mask(w16, limit, _CMP_GE_OQ);
  units->exponents[u] = static_cast<uint32_t>(e16) | static_cast<uint32_t>(e8) << 16;
  // Powers of two commute with rounding, so they are part of the one factor.
  __m512 factor = _mm512_mul_ps(inverse, _mm512_mask_blend_ps(e8, _mm512_set1_ps(4), _mm512_set1_ps(2)));
  factor = _mm512_mask_mul_ps(factor, e16, factor, _mm512_set1_ps(0.5f));
  __m512i nibble[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512 x = units->x[u][i];
    const __m512 t = _mm512_add_ps(_mm512_mul_ps(_mm512_abs_ps(x), factor), _mm512_set1_ps(0.5f));
    const __m512i q = _mm512_cvttps_epi32(_mm512_min_ps(t, _mm512_set1_ps(7)));
    const __mmask16 below = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    nibble[i] = _mm512_mask_or_epi32(q, below, q, _mm512_set1_epi32(8));
  }
  // 0xFE: a | b | c
  const __m512i low = _mm512_or_si512(nibble[0], _mm512_slli_epi32(nibble[1], 4));
  const __m512i run = _mm512_ternarylogic_epi32(low, _mm512_slli_epi32(nibble[2], 8), _mm512_slli_epi32(nibble[3], 12),
                                                0xFE);
  const __m512i ordered = _mm512_permutexvar_epi16(_mm512_loadu_si512(kOrder.lane), run);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm512_castsi512_si256(ordered));
}

template <typename Layout>
HIF4_TARGET HIF4_INLINE void encode_units(Units* units, int count, uint8_t* codes, uint8_t* scales) {
  const __m512i vmax = max_of_lanes(units->pair_max);
  const __mmask16 there = static_cast<__mmask16>((1u << count) - 1);
  const __mmask16 invalid = _mm512_mask_cmpge_epi32_mask(there, vmax, _mm512_set1_epi32(0x7F800000));
  // As level1.
  __m512i sf = bf16_rne16(_mm512_mul_ps(_mm512_castsi512_ps(vmax), _mm512_set1_ps(0.142578125f)));
  sf = _mm512_min_epi32(_mm512_max_epi32(sf, _mm512_set1_epi32(0x2780)), _mm512_set1_epi32(0x4740));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(sf, 5), _mm512_set1_epi32(1));
  const __m512i bits = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(sf, odd), _mm512_set1_epi32(15)), 5);
  const __m512 e6m2 = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 21));
  _mm512_storeu_si512(units->inverse, _mm512_slli_epi32(bf16_rne16(_mm512_div_ps(_mm512_set1_ps(1), e6m2)), 16));
  for (int u = 0; u < count; u++) encode_unit<Layout>(u, units, codes + u * kUnitBytes);
  const __m512i stored = _mm512_sub_epi32(bits, _mm512_set1_epi32((127 - 48) << 2));
  __m512i packed = _mm512_or_si512(stored, metadata<Layout>(_mm512_loadu_si512(units->exponents)));
  packed = _mm512_mask_set1_epi32(packed, invalid, 0xFF);
  _mm512_mask_storeu_epi32(scales, there, packed);
  if (__builtin_expect(invalid, 0))
    for (int u = 0; u < count; u++)
      if (invalid >> u & 1) memset(codes + u * kUnitBytes, 0, kUnitBytes);
}

// Butterflies of whole units, for widths beyond one.
HIF4_TARGET HIF4_INLINE void rotate_units(Units* units, int count, Rotation rotation) {
  for (int stride = 1; stride * kUnit < rotation.width; stride *= 2)
    for (int start = 0; start < count; start += 2 * stride)
      for (int u = start; u < start + stride; u++)
        for (int i = 0; i < 4; i++) butterfly(&units->x[u][i], &units->x[u + stride][i]);
}

template <typename Layout, bool MASK, bool ROTATE>
HIF4_TARGET void quantize_row(const void* x, const float* mask, Rotation rotation, int64_t k, uint8_t* codes,
                              uint8_t* scales) {
  constexpr int64_t kBytes = Layout::kBytes, kAhead = 4096;
  const int64_t whole = k / kUnit, total = (k + kUnit - 1) / kUnit;
  const bool wide = ROTATE && rotation.width > kUnit;
  alignas(64) uint8_t tail[kUnit * kBytes] = {};
  if (whole < total) memcpy(tail, static_cast<const uint8_t*>(x) + whole * kUnit * kBytes, k % kUnit * kBytes);
  Units units;
  for (int u = 0; u < 16; u++) units.pair_max[u] = _mm512_setzero_si512();
  for (int64_t start = 0; start < total; start += 16) {
    const int count = static_cast<int>(total - start < 16 ? total - start : 16);
    for (int u = 0; u < count; u++) {
      const int64_t at = start + u;
      if (MASK)  // its own stream of reads keeps the processor from foreseeing the one from memory
        for (int64_t byte = 0; byte < kUnit * kBytes; byte += 64)
          __builtin_prefetch(static_cast<const uint8_t*>(x) + at * kUnit * kBytes + kAhead + byte);
      Unit unit;
      load_unit(Layout(), at < whole ? static_cast<const uint8_t*>(x) + at * kUnit * kBytes : tail, &unit);
      if (MASK)
        for (int i = 0; i < 4; i++) unit.x[i] = _mm512_mul_ps(unit.x[i], _mm512_loadu_ps(mask + at * kUnit + 16 * i));
      if (ROTATE) {
        rotate_unit<Layout>(&unit, rotation.width);
        if (wide) {
          for (int i = 0; i < 4; i++) units.x[u][i] = unit.x[i];
          continue;
        }
        scale_unit(&unit, rotation.factor);
      }
      keep_unit<Layout>(unit, u, &units);
    }
    if (wide) {
      rotate_units(&units, count, rotation);
      for (int u = 0; u < count; u++) {
        Unit unit;
        for (int i = 0; i < 4; i++) unit.x[i] = units.x[u][i];
        scale_unit(&unit, rotation.factor);
        keep_unit<Layout>(unit, u, &units);
      }
    }
    encode_units<Layout>(&units, count, codes + start * kUnitBytes, scales + start * kScaleBytes);
  }
}

template <typename Layout>
HIF4_TARGET void quantize_as(const void* x, const float* mask, Rotation rotation, int64_t k, uint8_t* codes,
                             uint8_t* scales) {
  if (mask && rotation.width > 1) return quantize_row<Layout, true, true>(x, mask, rotation, k, codes, scales);
  if (mask) return quantize_row<Layout, true, false>(x, mask, rotation, k, codes, scales);
  if (rotation.width > 1) return quantize_row<Layout, false, true>(x, mask, rotation, k, codes, scales);
  quantize_row<Layout, false, false>(x, mask, rotation, k, codes, scales);
}

HIF4_TARGET void quantize(const void* x, Dtype dtype, const float* mask, Rotation rotation, int64_t k, uint8_t* codes,
                          uint8_t* scales) {
  if (dtype == kBfloat16) return quantize_as<Bfloat16Layout>(x, mask, rotation, k, codes, scales);
  quantize_as<Float32Layout>(x, mask, rotation, k, codes, scales);
}

struct ExponentBits {
  int32_t e8[kUnit], e16[kUnit];  // of a unit's scale bytes as one word, for each channel
  constexpr ExponentBits() : e8{}, e16{} {
    for (int i = 0; i < kUnit; i++) {
      e8[i] = 1 << (8 + 7 - i / 8);
      e16[i] = static_cast<int32_t>(1u << (16 + 8 * (i / 32) + 7 - i / 4 % 8));
    }
  }
};
constexpr ExponentBits kExponentBits;

HIF4_TARGET void dequantize(const uint8_t* codes, const uint8_t* scales, int64_t k, void* out, Dtype dtype) {
  const __m512 magnitudes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -0.0f, -1, -2, -3, -4, -5, -6, -7);
  for (int64_t start = 0; start < k; start += 16, codes += 8) {
    const uint8_t* stored = scales + start / kUnit * kScaleBytes;
    const int quarter = static_cast<int>(start % kUnit);
    const __mmask16 there = static_cast<__mmask16>(k - start < 16 ? (1u << (k - start)) - 1 : 0xFFFF);
    int32_t packed;
    memcpy(&packed, stored, 4);
    const __m512i meta = _mm512_set1_epi32(packed);
    __m512 step = _mm512_set1_ps(unit_scale(stored[0]));
    const __mmask16 e8 = _mm512_test_epi32_mask(meta, _mm512_loadu_si512(kExponentBits.e8 + quarter));
    step = _mm512_mask_add_ps(step, e8, step, step);
    const __mmask16 e16 = _mm512_test_epi32_mask(meta, _mm512_loadu_si512(kExponentBits.e16 + quarter));
    step = _mm512_mask_add_ps(step, e16, step, step);
    // Each byte to two lanes whose low four bits are its nibbles.
    const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    const __m512i nibbles = _mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28));
    const __m512 values = _mm512_mul_ps(_mm512_permutexvar_ps(nibbles, magnitudes), step);
    if (dtype == kFloat32)
      _mm512_mask_storeu_ps(static_cast<float*>(out) + start, there, values);
    else
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + start, there,
                               _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(values), 16)));
  }
}

template <typename Layout>
HIF4_INLINE void arrange(const float* mask, int64_t k, float* out) {
  for (int64_t channel = 0; channel < (k + kUnit - 1) / kUnit * kUnit; channel++) {
    const int within = static_cast<int>(channel % kUnit);
    out[channel - within + within % 4 * 16 + lane_of<Layout>(within / 4)] = channel < k ? mask[channel] : 1.0f;
  }
}

HIF4_TARGET void arrange_mask(const float* mask, Dtype dtype, int64_t k, float* out) {
  if (dtype == kBfloat16) return arrange<Bfloat16Layout>(mask, k, out);
  arrange<Float32Layout>(mask, k, out);
}
