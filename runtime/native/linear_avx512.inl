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
  uint8_t value[64];     // n + 28 by nibble | E1_16 << 4 | E1_8 << 5
  uint8_t pairs[64];     // of four runs j: E1_16 at bit 2j, E1_8 at bit 2j + 1, by the bits as they are stored
  uint8_t stored8[8];    // each byte's window of a pair of scale dwords with the E1_8 of its four runs from bit 4 on
  uint8_t stored16[8];   // and with their E1_16 from bit 0 on
  uint8_t spread[4][16];  // for two dwords of codes, the byte of each dword of pairs that has their runs, four times
  constexpr DecodeTables() : value{}, pairs{}, stored8{}, stored16{}, spread{} {
    for (int index = 0; index < 64; index++) {
      const int magnitude = (index & 7) << (((index >> 4) & 1) + ((index >> 5) & 1));
      value[index] = static_cast<uint8_t>(kShift + (index & 8 ? -magnitude : magnitude));
      for (int j = 0; j < 4; j++) {
        const int e16 = (index >> (3 - j)) & 1, e8 = (index >> (5 - j / 2)) & 1;
        pairs[index] = static_cast<uint8_t>(pairs[index] | e16 << (2 * j) | e8 << (2 * j + 1));
      }
    }
    for (int b = 0; b < 8; b++) {
      const int dword = 32 * (b / 4), quarter = b % 4;
      stored8[b] = static_cast<uint8_t>(dword + bit8(2 * quarter + 1) - 4);
      stored16[b] = static_cast<uint8_t>(dword + bit16(4 * quarter + 3));
    }
    for (int b = 0; b < 64; b++) spread[b / 16][b % 16] = static_cast<uint8_t>(b % 16 / 4 * 4 + b / 16);
  }
};
constexpr DecodeTables kDecode;

HIF4_TARGET HIF4_INLINE __m512i windows(const uint8_t (&offsets)[8], __m512i dwords) {
  int64_t offset;
  memcpy(&offset, offsets, 8);
  return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(offset), dwords);
}

// The low nibbles of a, the high ones of b.
HIF4_TARGET HIF4_INLINE __m512i nibbles(__m512i a, __m512i b) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x0F), a, b, 0xCA);
}

// Scale dwords to dwords of 16 runs' two exponents. A permutation takes the six low bits of a byte as an index.
HIF4_TARGET HIF4_INLINE __m512i exponents_of(__m512i meta) {
  const __m512i stored = nibbles(windows(kDecode.stored16, meta), windows(kDecode.stored8, meta));
  return _mm512_permutexvar_epi8(stored, _mm512_loadu_si512(kDecode.pairs));
}
#else
HIF4_TARGET HIF4_INLINE __m512i exponents_of(__m512i meta) { return meta; }
#endif

#if HIF4_VBMI
// The exponents of dword i's runs at bits 4 and 5 of their bytes. Shifting words that repeat a byte rotates it, and
// unlike a multishift leaves the pipes of the dot products alone.
HIF4_TARGET HIF4_INLINE __m512i exponents_at(__m512i exponents, int i) {
  const __m128i spread = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kDecode.spread[i / 2]));
  const __m512i runs = _mm512_shuffle_epi8(exponents, _mm512_broadcast_i32x4(spread));
  return i % 2 ? _mm512_srlv_epi16(runs, _mm512_set1_epi32(2 << 16))
               : _mm512_sllv_epi16(runs, _mm512_set1_epi32(4 | 2 << 16));
}
#endif

// Dword i of the codes of 16 columns, with their exponents_of, to the weight bytes of quads 2i and 2i + 1.
HIF4_TARGET HIF4_INLINE void decode(__m512i codes, __m512i exponents, int i, __m512i* low, __m512i* high) {
#if HIF4_VBMI
  const __m512i value = _mm512_loadu_si512(kDecode.value), e = exponents_at(exponents, i);
  *low = _mm512_permutexvar_epi8(nibbles(codes, e), value);
  *high = _mm512_permutexvar_epi8(nibbles(_mm512_srli_epi32(codes, 4), e), value);
#else
  const __m512i meta = exponents, nibble = _mm512_set1_epi8(0x0F);
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

HIF4_INLINE Rows rows_from(const Packed& weight, int64_t column) {
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
      const uint8_t* a = rows.codes[8 * half + k] + unit * kUnitBytes;
      const uint8_t* b = rows.codes[8 * half + k + 4] + unit * kUnitBytes;
      z[half][k] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a))),
                                      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)), 1);
    }
  transpose4(z[0]);  // lanes: rows 0-3 dword k, rows 0-3 dword k + 4, rows 4-7 dword k, rows 4-7 dword k + 4
  transpose4(z[1]);  // the same of rows 8-11 and 12-15
  for (int k = 0; k < 4; k++) {
    out[k] = _mm512_shuffle_i64x2(z[0][k], z[1][k], 0x88);      // lanes 0 and 2 of both
    out[k + 4] = _mm512_shuffle_i64x2(z[0][k], z[1][k], 0xDD);  // lanes 1 and 3
  }
}

// The scale dwords of units [first, first + count), count <= 4, each for 16 columns.
HIF4_TARGET HIF4_INLINE void load_scales(const Rows& rows, int64_t first, int64_t count, __m512i (&out)[4]) {
  const __mmask8 there = static_cast<__mmask8>(count < 4 ? (1 << count) - 1 : 15);
  const int64_t at = first * kScaleBytes;
  for (int k = 0; k < 4; k++) {
    const __m128i a = _mm_maskz_loadu_epi32(there, rows.scales[k] + at);
    const __m128i b = _mm_maskz_loadu_epi32(there, rows.scales[4 + k] + at);
    const __m128i c = _mm_maskz_loadu_epi32(there, rows.scales[8 + k] + at);
    const __m128i d = _mm_maskz_loadu_epi32(there, rows.scales[12 + k] + at);
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(c), d, 1);
    out[k] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  transpose4(out);  // lane L of out[k]: unit k of rows 4L .. 4L + 3
}

HIF4_TARGET HIF4_INLINE __m512 scales_of(__m512i meta) {  // E6M2 / 4, as unit_scale
  const __m512i stored = _mm512_and_si512(meta, _mm512_set1_epi32(0xFF));
  const __m512i bits = _mm512_slli_epi32(_mm512_add_epi32(stored, _mm512_set1_epi32(((127 - 48) << 2) - 8)), 21);
  const __mmask16 nan = _mm512_cmpeq_epi32_mask(stored, _mm512_set1_epi32(0xFF));
  return _mm512_castsi512_ps(_mm512_mask_set1_epi32(bits, nan, 0x7FC00000));
}

// For one column vector, what added to the bits of a row's E6M2 / 4 gives the bits of the product of both scales: for
// each of the four significands that the row's can have, the product with that one, less the row's bits at exponent 0.
// The exponent of the product cannot leave fp32's, from 2^-100 to 2^28. Not for NaN.
HIF4_TARGET HIF4_INLINE void column_tables(__m512 scale, float* out) {
  for (int m = 0; m < kTables; m++) {
    const __m512i bits = _mm512_castps_si512(_mm512_mul_ps(scale, _mm512_set1_ps(1.0f + 0.25f * m)));
    _mm512_storeu_si512(out + m * kTile, _mm512_sub_epi32(bits, _mm512_set1_epi32((127 << 23) + (m << 21))));
  }
}

HIF4_TARGET uint32_t expand_tile(const Packed& weight, int64_t column, int64_t first, int64_t count, uint8_t* values,
                                 float* scales) {
  const Rows rows = rows_from(weight, column);
  __m512i metas[4];
  __mmask16 nan = 0;
  for (int64_t u = 0; u < count; u++) {
    if (u % 4 == 0) load_scales(rows, first + u, count - u, metas);
    const __m512i meta = metas[u % 4], exponents = exponents_of(meta);
    __m512i codes[8];
    load_codes(rows, first + u, codes);
    uint8_t* out = values + u * kUnit * kCols;
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      __m512i low, high;
      decode(codes[i], exponents, i, &low, &high);
      _mm512_storeu_si512(out + 128 * i, low);
      _mm512_storeu_si512(out + 128 * i + 64, high);
    }
    const __m512 scale = scales_of(meta);
    nan |= _mm512_cmp_ps_mask(scale, scale, _CMP_UNORD_Q);
    column_tables(scale, scales + u * kTables * kCols);
  }
  return nan;
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

// The quads of one unit.
HIF4_TARGET HIF4_INLINE __m512i decode_row(const uint8_t* codes, const uint8_t* scales) {
  const __m512i magnitudes =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 0, -1, -2, -3, -4, -5, -6, -7));
  const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
  __m512i n = _mm512_and_si512(_mm512_or_si512(bytes, _mm512_slli_epi16(bytes, 4)), _mm512_set1_epi8(0x0F));
  n = _mm512_shuffle_epi8(magnitudes, _mm512_shuffle_epi8(n, _mm512_loadu_si512(kInput.order)));
  int32_t packed;
  memcpy(&packed, scales, 4);
  const __m512i meta = _mm512_set1_epi32(packed);
  const __m512i at8 = _mm512_shuffle_epi8(meta, _mm512_loadu_si512(kInput.byte8));
  const __m512i at16 = _mm512_shuffle_epi8(meta, _mm512_loadu_si512(kInput.byte16));
  n = _mm512_mask_add_epi8(n, _mm512_test_epi8_mask(at8, _mm512_loadu_si512(kInput.bit8)), n, n);
  return _mm512_mask_add_epi8(n, _mm512_test_epi8_mask(at16, _mm512_loadu_si512(kInput.bit16)), n, n);
}

HIF4_TARGET void expand_rows(const Packed& rows, int64_t row, int64_t first, int64_t count, const Group& group) {
  const int there = static_cast<int>(rows.n - row < kRows ? rows.n - row : kRows);
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int64_t u = 0; u < count; u++) {
    __m512i z[2][4];
    for (int i = 0; i < kRows; i++) {
      const int64_t at = (row + i) * rows.units + first + u;
      z[i / 4][i % 4] = i < there ? decode_row(rows.codes + at * kUnitBytes, rows.scales + at * kScaleBytes)
                                  : _mm512_setzero_si512();
      group.scales[u * kRows + i] = i < there ? unit_scale(rows.scales[at * kScaleBytes]) : 1.0f;
    }
    transpose4(z[0]);  // lane L of z[0][k]: quad 4L + k of rows 0-3
    transpose4(z[1]);  // the same of rows 4-7
    __m512i sum = _mm512_setzero_si512();
    int8_t* out = group.values + u * kUnit * kRows;
    for (int k = 0; k < 4; k++)
      for (int pair = 0; pair < 2; pair++) {  // quads 8 * pair + k and 8 * pair + 4 + k
        const __m512i quads = _mm512_permutex2var_epi64(z[0][k], pair ? high : low, z[1][k]);
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(kShift), quads);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (8 * pair + k) * kRows * 4),
                            _mm512_castsi512_si256(quads));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (8 * pair + 4 + k) * kRows * 4),
                            _mm512_extracti64x4_epi64(quads, 1));
      }
    const __m256i total = _mm256_add_epi32(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(group.offsets + u * kRows),
                        _mm256_sub_epi32(_mm256_setzero_si256(), total));
  }
}

// Few rows read each weight once, so it is decoded into registers and multiplied there, for two tiles at once: an input
// byte that is loaded for one tile alone keeps the load ports as busy as the dot products do theirs.
template <int ROWS>
HIF4_TARGET void multiply_packed(const Group& group, const Packed& weight, int64_t column, float* acc) {
  static_assert(kFewTiles == 2, "the sums of two tiles are in registers");
  const Rows rows[2] = {rows_from(weight, column), rows_from(weight, column + kTile)};
  // A processor does not foresee 32 streams that end with every call: the next columns' bytes are fetched meanwhile.
  const int64_t next = column + 2 * kTile < weight.n ? column + 2 * kTile : column;
  const uint8_t* ahead = weight.codes + next * weight.units * kUnitBytes;
  const uint8_t* ahead_scales = weight.scales + next * weight.units * kScaleBytes;
  __m512i metas[2][4];
  for (int i = 0; i < 2 * ROWS; i++) _mm512_storeu_ps(acc + i * kTile, _mm512_setzero_ps());
  for (int64_t u = 0; u < weight.units; u++) {
    __m512i codes[2][8], exponents[2], dot[ROWS][2];
    for (int i = 0; i < 2 * kTile * kUnitBytes; i += 64)
      __builtin_prefetch(ahead + u * 2 * kTile * kUnitBytes + i, 0, 2);
    for (int i = 0; i < 2 * kTile * kScaleBytes; i += 64)
      __builtin_prefetch(ahead_scales + u * 2 * kTile * kScaleBytes + i, 0, 2);
#pragma GCC unroll 2
    for (int t = 0; t < 2; t++) {
      if (u % 4 == 0) load_scales(rows[t], u, weight.units - u, metas[t]);
      exponents[t] = exponents_of(metas[t][u % 4]);
      load_codes(rows[t], u, codes[t]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) dot[i][0] = dot[i][1] = _mm512_set1_epi32(group.offsets[u * kRows + i]);
    const int8_t* a = group.values + u * kUnit * kRows;
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) {
      __m512i w[2][2];
#pragma GCC unroll 2
      for (int t = 0; t < 2; t++) decode(codes[t][k], exponents[t], k, &w[0][t], &w[1][t]);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
          int32_t quad;
          memcpy(&quad, a + ((k * 2 + half) * kRows + i) * 4, 4);
          const __m512i x = _mm512_set1_epi32(quad);
          dot[i][0] = _mm512_dpbusd_epi32(dot[i][0], w[half][0], x);
          dot[i][1] = _mm512_dpbusd_epi32(dot[i][1], w[half][1], x);
        }
    }
#pragma GCC unroll 2
    for (int t = 0; t < 2; t++) {
      const __m512 w_scale = scales_of(metas[t][u % 4]);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; i++) {
        float* sum = acc + (2 * i + t) * kTile;
        const __m512 term = _mm512_mul_ps(_mm512_set1_ps(group.scales[u * kRows + i]), w_scale);
        _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[i][t]), term, _mm512_loadu_ps(sum)));
      }
    }
  }
}

HIF4_TARGET void few_rows(const Group& group, int rows, const Packed& weight, int64_t column, float* acc) {
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
