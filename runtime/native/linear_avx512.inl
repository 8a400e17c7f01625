// Included by linear_avx512.cpp once for each HIF4_TARGET, inside a namespace of its own.
//
// A quad here is the four even or the four odd channels of a run of 8, as the nibbles lie in the bytes: dword i of a
// unit's codes gives quad 2i from its low nibbles and quad 2i + 1 from its high ones. In both, bytes 0 and 1 belong to
// the run of 4 with index 2i, bytes 2 and 3 to run 2i + 1.

// Where the bits of E1_8 run i and E1_16 run j are in a unit's four scale bytes, read as a little-endian dword.
constexpr int bit8(int i) { return 8 + 7 - i; }
constexpr int bit16(int j) { return 16 + 8 * (j / 8) + 7 - j % 8; }

#if HIF4_VBMI
struct DecodeTables {
  uint8_t value[64];      // n + 28 by nibble | E1_16 << 4 | E1_8 << 5
  uint8_t window8[8][8];  // for dword i, each byte's 8-bit window of a pair of scale dwords with E1_8 at bit 5
  uint8_t window16[8][8];  // and with E1_16 at bit 4
  constexpr DecodeTables() : value{}, window8{}, window16{} {
    for (int index = 0; index < 64; index++) {
      const int magnitude = (index & 7) << (((index >> 4) & 1) + ((index >> 5) & 1));
      value[index] = static_cast<uint8_t>(kShift + (index & 8 ? -magnitude : magnitude));
    }
    for (int i = 0; i < 8; i++)
      for (int b = 0; b < 8; b++) {
        window8[i][b] = static_cast<uint8_t>(bit8(i) - 5 + 32 * (b / 4));
        window16[i][b] = static_cast<uint8_t>(bit16(2 * i + (b % 4) / 2) - 4 + 32 * (b / 4));
      }
  }
};
constexpr DecodeTables kDecode;

HIF4_TARGET HIF4_INLINE __m512i window(const uint8_t (&offsets)[8], __m512i meta) {
  int64_t offset;
  memcpy(&offset, offsets, 8);
  return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(offset), meta);
}
#endif

// Dword i of the codes of 16 columns, with their scale dwords, to the weight bytes of quads 2i and 2i + 1.
HIF4_TARGET HIF4_INLINE void decode(__m512i codes, __m512i meta, int i, __m512i* low, __m512i* high) {
  const __m512i nibble = _mm512_set1_epi8(0x0F);
#if HIF4_VBMI
  const __m512i value = _mm512_loadu_si512(kDecode.value);
  const __m512i e16 = _mm512_and_si512(window(kDecode.window16[i], meta), _mm512_set1_epi8(0x10));
  // 0xF8: a | (b & c)
  const __m512i e = _mm512_ternarylogic_epi32(e16, window(kDecode.window8[i], meta), _mm512_set1_epi8(0x20), 0xF8);
  *low = _mm512_permutexvar_epi8(_mm512_ternarylogic_epi32(e, codes, nibble, 0xF8), value);
  *high = _mm512_permutexvar_epi8(_mm512_ternarylogic_epi32(e, _mm512_srli_epi32(codes, 4), nibble, 0xF8), value);
#else
  const __m512i magnitudes =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 0, -1, -2, -3, -4, -5, -6, -7));
  const __mmask16 run8 = _mm512_test_epi32_mask(meta, _mm512_set1_epi32(1 << bit8(i)));
  const __mmask16 even = _mm512_test_epi32_mask(meta, _mm512_set1_epi32(1 << bit16(2 * i)));
  const __mmask16 odd = _mm512_test_epi32_mask(meta, _mm512_set1_epi32(static_cast<int>(1u << bit16(2 * i + 1))));
  const __m512i e8 = _mm512_maskz_set1_epi32(run8, -1);
  const __m512i e16 = _mm512_or_si512(_mm512_maskz_set1_epi32(even, 0x0000FFFF),
                                      _mm512_maskz_set1_epi32(odd, static_cast<int>(0xFFFF0000)));
  __m512i* const out[2] = {low, high};
  for (int part = 0; part < 2; part++) {
    __m512i n = _mm512_and_si512(part ? _mm512_srli_epi32(codes, 4) : codes, nibble);
    n = _mm512_shuffle_epi8(magnitudes, n);
    n = _mm512_add_epi8(n, _mm512_and_si512(n, e8));
    n = _mm512_add_epi8(n, _mm512_and_si512(n, e16));
    *out[part] = _mm512_add_epi8(n, _mm512_set1_epi8(kShift));
  }
#endif
}

HIF4_TARGET HIF4_INLINE void transpose4(__m512i (&z)[4]) {  // 4 x 4 dwords within each 128-bit lane
  const __m512i a = _mm512_unpacklo_epi32(z[0], z[1]), b = _mm512_unpackhi_epi32(z[0], z[1]);
  const __m512i c = _mm512_unpacklo_epi32(z[2], z[3]), d = _mm512_unpackhi_epi32(z[2], z[3]);
  z[0] = _mm512_unpacklo_epi64(a, c);
  z[1] = _mm512_unpackhi_epi64(a, c);
  z[2] = _mm512_unpacklo_epi64(b, d);
  z[3] = _mm512_unpackhi_epi64(b, d);
}

// 16 weight rows, their codes and scales; rows past the last repeat it and are never stored.
struct Rows {
  const uint8_t* codes[kTile];
  const uint8_t* scales[kTile];
};

HIF4_INLINE Rows rows_from(const Weight& weight, int64_t column) {
  Rows rows;
  for (int c = 0; c < kTile; c++) {
    const int64_t row = column + c < weight.n ? column + c : weight.n - 1;
    rows.codes[c] = weight.codes + row * weight.units * kUnitBytes;
    rows.scales[c] = weight.scales + row * weight.units * kScaleBytes;
  }
  return rows;
}

// The 8 code dwords of one unit, each for 16 columns.
HIF4_TARGET HIF4_INLINE void load_codes(const Rows& rows, int64_t unit, __m512i (&out)[8]) {
  __m512i z[2][4];
  for (int half = 0; half < 2; half++)
    for (int k = 0; k < 4; k++) {
      const uint8_t* a = rows.codes[4 * half + k] + unit * kUnitBytes;
      const uint8_t* b = rows.codes[4 * half + k + 8] + unit * kUnitBytes;
      z[half][k] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a))),
                                      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)), 1);
    }
  transpose4(z[0]);  // lanes: rows 0-3 dword k, rows 0-3 dword k + 4, rows 8-11 dword k, rows 8-11 dword k + 4
  transpose4(z[1]);  // the same of rows 4-7 and 12-15
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
  const __m512i high = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
  for (int k = 0; k < 4; k++) {
    out[k] = _mm512_permutex2var_epi64(z[0][k], low, z[1][k]);
    out[k + 4] = _mm512_permutex2var_epi64(z[0][k], high, z[1][k]);
  }
}

// The scale dwords of units [first, first + count), count <= 16, as meta [16 units][16 columns].
HIF4_TARGET HIF4_INLINE void load_scales(const Rows& rows, int64_t first, int64_t count, int32_t (&meta)[16][16]) {
  const __mmask16 there = static_cast<__mmask16>((1u << count) - 1);
  for (int group = 0; group < 4; group++) {
    __m512i z[4];
    for (int k = 0; k < 4; k++) z[k] = _mm512_maskz_loadu_epi32(there, rows.scales[4 * group + k] + first * kScaleBytes);
    transpose4(z);  // lane L of z[k]: unit 4L + k of four columns
    for (int k = 0; k < 4; k++) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(meta[k] + 4 * group), _mm512_castsi512_si128(z[k]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(meta[4 + k] + 4 * group), _mm512_extracti32x4_epi32(z[k], 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(meta[8 + k] + 4 * group), _mm512_extracti32x4_epi32(z[k], 2));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(meta[12 + k] + 4 * group), _mm512_extracti32x4_epi32(z[k], 3));
    }
  }
}

HIF4_TARGET HIF4_INLINE __m512 scales_of(__m512i meta) {  // E6M2 / 4, as unit_scale
  const __m512i stored = _mm512_and_si512(meta, _mm512_set1_epi32(0xFF));
  const __m512i bits = _mm512_slli_epi32(_mm512_add_epi32(stored, _mm512_set1_epi32(((127 - 48) << 2) - 8)), 21);
  const __mmask16 nan = _mm512_cmpeq_epi32_mask(stored, _mm512_set1_epi32(0xFF));
  return _mm512_castsi512_ps(_mm512_mask_set1_epi32(bits, nan, 0x7FC00000));
}

HIF4_TARGET void expand_tile(const Weight& weight, int64_t column, int64_t first, int64_t count, uint8_t* values,
                             float* scales) {
  const Rows rows = rows_from(weight, column);
  int32_t metas[16][16];
  for (int64_t u = 0; u < count; u++) {
    if (u % 16 == 0) load_scales(rows, first + u, count - u < 16 ? count - u : 16, metas);
    const __m512i meta = _mm512_loadu_si512(metas[u % 16]);
    __m512i codes[8];
    load_codes(rows, first + u, codes);
    uint8_t* out = values + u * kUnit * kCols;
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      __m512i low, high;
      decode(codes[i], meta, i, &low, &high);
      _mm512_storeu_si512(out + 128 * i, low);
      _mm512_storeu_si512(out + 128 * i + 64, high);
    }
    _mm512_storeu_ps(scales + u * kCols, scales_of(meta));
  }
}

struct InputTables {
  uint8_t order[64], byte8[64], bit8[64], byte16[64], bit16[64];
  constexpr InputTables() : order{}, byte8{}, bit8{}, byte16{}, bit16{} {
    for (int p = 0; p < 64; p++) {
      // Position p holds this channel of the unit, and these bits of the scale bytes are its exponents.
      const int channel = p / 8 * 8 + (p % 4) * 2 + (p % 8) / 4;
      order[p] = static_cast<uint8_t>(channel % 16);
      byte8[p] = 1;
      bit8[p] = static_cast<uint8_t>(1 << (7 - channel / 8));
      byte16[p] = static_cast<uint8_t>(2 + channel / 32);
      bit16[p] = static_cast<uint8_t>(1 << (7 - channel / 4 % 8));
    }
  }
};
constexpr InputTables kInput;

HIF4_TARGET void expand_row(const uint8_t* codes, const uint8_t* scales, int64_t units, const Group& group, int row) {
  const __m512i magnitudes =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 0, -1, -2, -3, -4, -5, -6, -7));
  for (int64_t u = 0; u < units; u++, codes += kUnitBytes, scales += kScaleBytes) {
    const __m512i bytes =
        _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    __m512i n = _mm512_and_si512(_mm512_or_si512(bytes, _mm512_slli_epi16(bytes, 4)), _mm512_set1_epi8(0x0F));
    n = _mm512_shuffle_epi8(magnitudes, _mm512_shuffle_epi8(n, _mm512_loadu_si512(kInput.order)));
    int32_t packed;
    memcpy(&packed, scales, 4);
    const __m512i meta = _mm512_set1_epi32(packed);
    const __m512i at8 = _mm512_shuffle_epi8(meta, _mm512_loadu_si512(kInput.byte8));
    const __m512i at16 = _mm512_shuffle_epi8(meta, _mm512_loadu_si512(kInput.byte16));
    n = _mm512_mask_add_epi8(n, _mm512_test_epi8_mask(at8, _mm512_loadu_si512(kInput.bit8)), n, n);
    n = _mm512_mask_add_epi8(n, _mm512_test_epi8_mask(at16, _mm512_loadu_si512(kInput.bit16)), n, n);
    const __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(kShift), n);
    group.offsets[u * kRows + row] = -_mm512_reduce_add_epi32(sum);
    group.scales[u * kRows + row] = unit_scale(scales[0]);
    int32_t quads[kQuads];
    _mm512_storeu_si512(quads, n);
    int8_t* out = group.values + u * kUnit * kRows + row * 4;
    for (int q = 0; q < kQuads; q++) memcpy(out + q * kRows * 4, quads + q, 4);
  }
}

// All 8 rows of a group by 48 columns: 24 int32 accumulators in registers, the fp32 ones in memory (cache). Named
// variables, not arrays: compilers keep an array that a loop goes through in memory, at half the speed.
#define HIF4_EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)
#define HIF4_START(i)                                            \
  __m512i dot##i##a = _mm512_set1_epi32(group.offsets[at + i]);  \
  __m512i dot##i##b = dot##i##a, dot##i##c = dot##i##a;
#define HIF4_STEP(i)                                   \
  memcpy(&quad, a + (q * kRows + i) * 4, 4);           \
  x = _mm512_set1_epi32(quad);                         \
  dot##i##a = _mm512_dpbusd_epi32(dot##i##a, w0, x);   \
  dot##i##b = _mm512_dpbusd_epi32(dot##i##b, w1, x);   \
  dot##i##c = _mm512_dpbusd_epi32(dot##i##c, w2, x);
#define HIF4_FINISH(i)                                             \
  scale = _mm512_set1_ps(group.scales[at + i]);                    \
  add_scaled(acc + i * kCols, dot##i##a, scale, w_scale);          \
  add_scaled(acc + i * kCols + 16, dot##i##b, scale, w_scale + 16); \
  add_scaled(acc + i * kCols + 32, dot##i##c, scale, w_scale + 32);

// Both products are exact (6 and 22 bits), so the fused addition rounds as a separate one.
HIF4_TARGET HIF4_INLINE void add_scaled(float* acc, __m512i dot, __m512 scale, const float* w_scale) {
  const __m512 term = _mm512_mul_ps(scale, _mm512_loadu_ps(w_scale));
  _mm512_storeu_ps(acc, _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), term, _mm512_loadu_ps(acc)));
}

HIF4_TARGET void multiply(const Group& group, int, int64_t first, int64_t count, const uint8_t* values,
                          const float* scales, float* acc) {
  static_assert(kRows == 8 && kCols == 48, "the macros are written for these");
  for (int64_t u = 0; u < count; u++) {
    const int64_t at = (first + u) * kRows;
    const int8_t* a = group.values + at * kUnit;
    const uint8_t* w = values + u * kCols * kUnit;
    const float* w_scale = scales + u * kCols;
    int32_t quad;
    __m512i x;
    __m512 scale;
    HIF4_EACH_ROW(HIF4_START)
#pragma GCC unroll 16  // in a loop left rolled, GCC keeps copies of the sums in memory
    for (int q = 0; q < kQuads; q++) {
      const __m512i w0 = _mm512_loadu_si512(w + q * 64);
      const __m512i w1 = _mm512_loadu_si512(w + q * 64 + 1024);
      const __m512i w2 = _mm512_loadu_si512(w + q * 64 + 2048);
      HIF4_EACH_ROW(HIF4_STEP)
    }
    HIF4_EACH_ROW(HIF4_FINISH)
  }
}

#undef HIF4_EACH_ROW
#undef HIF4_START
#undef HIF4_STEP
#undef HIF4_FINISH

// Few rows read each weight once, so it is decoded into registers and multiplied there.
template <int ROWS>
HIF4_TARGET void multiply_packed(const Group& group, const Weight& weight, int64_t column, float* acc) {
  const Rows rows = rows_from(weight, column);
  int32_t metas[16][16];
  __m512 total[ROWS];
  for (int i = 0; i < ROWS; i++) total[i] = _mm512_setzero_ps();
  for (int64_t u = 0; u < weight.units; u++) {
    if (u % 16 == 0) load_scales(rows, u, weight.units - u < 16 ? weight.units - u : 16, metas);
    const __m512i meta = _mm512_loadu_si512(metas[u % 16]);
    __m512i codes[8], dot[ROWS];
    load_codes(rows, u, codes);
    for (int i = 0; i < ROWS; i++) dot[i] = _mm512_set1_epi32(group.offsets[u * kRows + i]);
    const int8_t* a = group.values + u * kUnit * kRows;
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) {
      __m512i low, high;
      decode(codes[k], meta, k, &low, &high);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; i++) {
        int32_t quad[2];
        memcpy(quad, a + k * 2 * kRows * 4 + i * 4, 4);
        memcpy(quad + 1, a + (k * 2 + 1) * kRows * 4 + i * 4, 4);
        dot[i] = _mm512_dpbusd_epi32(dot[i], low, _mm512_set1_epi32(quad[0]));
        dot[i] = _mm512_dpbusd_epi32(dot[i], high, _mm512_set1_epi32(quad[1]));
      }
    }
    const __m512 w_scale = scales_of(meta);
    for (int i = 0; i < ROWS; i++) {
      const __m512 term = _mm512_mul_ps(_mm512_set1_ps(group.scales[u * kRows + i]), w_scale);
      total[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[i]), term, total[i]);
    }
  }
  for (int i = 0; i < ROWS; i++) _mm512_storeu_ps(acc + i * kTile, total[i]);
}

HIF4_TARGET void few_rows(const Group& group, int rows, const Weight& weight, int64_t column, float* acc) {
  if (rows == 1) return multiply_packed<1>(group, weight, column, acc);
  if (rows == 2) return multiply_packed<2>(group, weight, column, acc);
  if (rows <= 4) return multiply_packed<4>(group, weight, column, acc);
  multiply_packed<8>(group, weight, column, acc);
}

template <int ROWS>
HIF4_TARGET void add_side_rows(const float* side, int64_t width, const float* weight, int tiles, float* acc) {
  for (int tile = 0; tile < tiles; tile++, weight += width * kTile, acc += kTile) {
    __m512 sum[ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) sum[i] = _mm512_loadu_ps(acc + i * tiles * kTile);
    for (int64_t j = 0; j < width; j++) {
      const __m512 w = _mm512_loadu_ps(weight + j * kTile);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; i++)
        sum[i] = _mm512_add_ps(sum[i], _mm512_mul_ps(_mm512_set1_ps(side[i * width + j]), w));
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) _mm512_storeu_ps(acc + i * tiles * kTile, sum[i]);
  }
}

HIF4_TARGET void add_side(const float* side, int64_t width, int64_t rows, const float* weight, int tiles, float* acc) {
  int64_t row = 0;
  for (; row + 8 <= rows; row += 8)
    add_side_rows<8>(side + row * width, width, weight, tiles, acc + row * tiles * kTile);
  for (; row < rows; row++) add_side_rows<1>(side + row * width, width, weight, tiles, acc + row * tiles * kTile);
}
