// Included by linear_w4_avx512.cpp once for each HIF4_TARGET, inside a namespace of its own, after linear_avx512.inl.
// HIF4_PAIRS says whether pairs of bf16 are multiplied at once, else fp32.

struct Bf16Table {
  uint16_t value[64];  // by code and E6M2's two fraction bits << 4: the value at the largest exponents, 15 + 1 + 1
  constexpr Bf16Table() : value{} {
    for (int index = 0; index < 64; index++) {
      int product = (index & 7) * (4 + (index >> 4)), exponent = 127 + 17 - 4 + 7;  // product / 16, first bit at 128
      if (!product) continue;
      while (product < 128) product *= 2, exponent--;
      value[index] = static_cast<uint16_t>((index & 8) << 12 | exponent << 7 | (product & 127));
    }
  }
};
constexpr Bf16Table kBf16Table;

#if HIF4_PAIRS
struct PairFields {
  uint8_t at[4][8];  // where in 64 bits the two codes of byte p of each 32-bit lane start, the other bytes anything
  constexpr PairFields() : at{} {
    for (int p = 0; p < 4; p++)
      for (int i = 0; i < 8; i++) at[p][i] = static_cast<uint8_t>(i / 4 * 32 + p * 8 + i % 4 / 2 * 4);
  }
};
constexpr PairFields kPairFields;

// The two codes of byte p of each 32-bit lane to the low bits of its halves; what stands above them is anything.
HIF4_TARGET HIF4_INLINE __m512i split_codes(__m512i codes, int p) {
  int64_t fields;
  memcpy(&fields, kPairFields.at[p], 8);
  return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(fields), codes);
}
#else
struct PairBytes {
  uint8_t at[4][64];  // of each 32-bit lane byte p, and as the third byte again, the others zero
  constexpr PairBytes() : at{} {
    for (int p = 0; p < 4; p++)
      for (int i = 0; i < 64; i++) at[p][i] = static_cast<uint8_t>(i % 2 ? 0x80 : i % 16 / 4 * 4 + p);
  }
};
constexpr PairBytes kPairBytes;

// The two codes of byte p of each 32-bit lane to the low bits of its halves; what stands above them is anything.
HIF4_TARGET HIF4_INLINE __m512i split_codes(__m512i codes, int p) {
  const __m512i bytes = _mm512_shuffle_epi8(codes, _mm512_loadu_si512(kPairBytes.at[p]));
  return _mm512_srlv_epi16(bytes, _mm512_set1_epi32(4 << 16));
}
#endif

// What turns the codes of one unit of 16 columns to values.
struct Decoder {
  __m512i low, high, fraction, lowered;

  HIF4_TARGET explicit inline __attribute__((always_inline)) Decoder(__m512i meta) {
    low = _mm512_loadu_si512(kBf16Table.value);
    high = _mm512_loadu_si512(kBf16Table.value + 32);
    const __m512i stored = _mm512_and_si512(meta, _mm512_set1_epi32(0xFF));
    const __m512i m = _mm512_slli_epi32(_mm512_and_si512(stored, _mm512_set1_epi32(3)), 4);
    fraction = _mm512_or_si512(m, _mm512_slli_epi32(m, 16));
    // The largest exponent, 15 as stored, less this one's.
    const __m512i less = _mm512_slli_epi32(
        _mm512_sub_epi32(_mm512_set1_epi32(15 + 48 + 2), _mm512_srli_epi32(stored, 2)), 7);
    lowered = _mm512_or_si512(less, _mm512_slli_epi32(less, 16));
  }
};

HIF4_TARGET HIF4_INLINE __m512i raise(__m512i lowered, __m512i meta, int bit) {  // one exponent up where the bit is set
  return _mm512_mask_sub_epi32(lowered, _mm512_test_epi32_mask(meta, _mm512_set1_epi32(static_cast<int>(1u << bit))),
                               lowered, _mm512_set1_epi32(0x00800080));
}

// The bf16 pair p of a code dword, for 16 columns; the subtraction saturates, so that zeros stay zeros.
HIF4_TARGET HIF4_INLINE __m512i decode_pair(const Decoder& decoder, __m512i codes, __m512i lowered, int p) {
  // 0xEA: (a & b) | c
  const __m512i index =
      _mm512_ternarylogic_epi32(split_codes(codes, p), _mm512_set1_epi32(0x000F000F), decoder.fraction, 0xEA);
  return _mm512_subs_epu16(_mm512_permutex2var_epi16(decoder.low, index, decoder.high), lowered);
}

HIF4_TARGET HIF4_INLINE __m512i nan_of(__m512i meta) {  // bf16 NaN twice where E6M2 is 0xFF, else 0
  const __mmask16 nan = _mm512_cmpeq_epi32_mask(_mm512_and_si512(meta, _mm512_set1_epi32(0xFF)), _mm512_set1_epi32(0xFF));
  return _mm512_maskz_set1_epi32(nan, 0x7FC07FC0);
}

HIF4_TARGET void expand_tile_pairs(const Packed& weight, int64_t column, int64_t first, int64_t count,
                                   uint16_t* values) {
  const Rows rows = rows_from(weight, column);
  __m512i metas[4];
  for (int64_t u = 0; u < count; u++) {
    if (u % 4 == 0) load_scales(rows, first + u, count - u, metas);
    const __m512i meta = metas[u % 4];
    const Decoder decoder(meta);
    __m512i codes[8];
    load_codes(rows, first + u, codes);
    uint16_t* out = values + u * kPairs * kCols * 2;
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      const __m512i run8 = raise(decoder.lowered, meta, bit8(i));
      const __m512i runs[2] = {raise(run8, meta, bit16(2 * i)), raise(run8, meta, bit16(2 * i + 1))};
#pragma GCC unroll 4
      for (int p = 0; p < 4; p++)
        _mm512_storeu_si512(out + (4 * i + p) * kCols * 2, decode_pair(decoder, codes[i], runs[p / 2], p));
    }
    const __m512i nan = nan_of(meta);
    if (__builtin_expect(_mm512_test_epi32_mask(nan, nan) != 0, 0))
      for (int p = 0; p < kPairs; p++) {
        uint16_t* at = out + p * kCols * 2;
        _mm512_storeu_si512(at, _mm512_or_si512(_mm512_loadu_si512(at), nan));
      }
  }
}

// All 8 rows of a group by 48 columns: 24 sums in registers, as named variables (see linear_avx512_multiply.inl).
#define HIF4_EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)
#define HIF4_LOAD(i)                                \
  __m512 sum##i##a = _mm512_loadu_ps(acc + i * kCols),      \
         sum##i##b = _mm512_loadu_ps(acc + i * kCols + 16), \
         sum##i##c = _mm512_loadu_ps(acc + i * kCols + 32);
#define HIF4_STORE(i)                              \
  _mm512_storeu_ps(acc + i * kCols, sum##i##a);      \
  _mm512_storeu_ps(acc + i * kCols + 16, sum##i##b); \
  _mm512_storeu_ps(acc + i * kCols + 32, sum##i##c);

#if HIF4_PAIRS
using Element = uint16_t;

#define HIF4_STEP(i)                                          \
  memcpy(&pair, x + 2 * i, 4);                                 \
  value = (__m512bh)_mm512_set1_epi32(pair);                   \
  sum##i##a = _mm512_dpbf16_ps(sum##i##a, value, w0);          \
  sum##i##b = _mm512_dpbf16_ps(sum##i##b, value, w1);          \
  sum##i##c = _mm512_dpbf16_ps(sum##i##c, value, w2);

HIF4_TARGET void multiply_pairs(const void* group, int64_t count, const uint16_t* values, float* acc) {
  static_assert(kRows == 8 && kCols == 48, "the macros are written for these");
  const uint16_t* x = static_cast<const uint16_t*>(group);
  int32_t pair;
  __m512bh value;
  HIF4_EACH_ROW(HIF4_LOAD)
  for (int64_t p = 0; p < count * kPairs; p++, x += 2 * kRows, values += 2 * kCols) {
    const __m512bh w0 = (__m512bh)_mm512_loadu_si512(values);
    const __m512bh w1 = (__m512bh)_mm512_loadu_si512(values + 32);
    const __m512bh w2 = (__m512bh)_mm512_loadu_si512(values + 64);
    HIF4_EACH_ROW(HIF4_STEP)
  }
  HIF4_EACH_ROW(HIF4_STORE)
}

HIF4_TARGET HIF4_INLINE __m512 add_pair(__m512 sum, const uint16_t* x, __m512i w) {
  int32_t pair;
  memcpy(&pair, x, 4);
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)w);
}
#else
using Element = float;

#define HIF4_STEP(i)                                      \
  value = _mm512_set1_ps(x[i]);                            \
  sum##i##a = _mm512_fmadd_ps(value, w0, sum##i##a);       \
  sum##i##b = _mm512_fmadd_ps(value, w1, sum##i##b);       \
  sum##i##c = _mm512_fmadd_ps(value, w2, sum##i##c);

HIF4_TARGET void multiply_pairs(const void* group, int64_t count, const uint16_t* values, float* acc) {
  static_assert(kRows == 8 && kCols == 48, "the macros are written for these");
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
  const float* x = static_cast<const float*>(group);
  __m512 value, w0, w1, w2;
  HIF4_EACH_ROW(HIF4_LOAD)
  for (int64_t p = 0; p < count * kPairs; p++, values += 2 * kCols) {
    const __m512i a = _mm512_loadu_si512(values), b = _mm512_loadu_si512(values + 32),
                  c = _mm512_loadu_si512(values + 64);
    w0 = _mm512_castsi512_ps(_mm512_slli_epi32(a, 16));
    w1 = _mm512_castsi512_ps(_mm512_slli_epi32(b, 16));
    w2 = _mm512_castsi512_ps(_mm512_slli_epi32(c, 16));
    HIF4_EACH_ROW(HIF4_STEP)
    x += kRows;
    w0 = _mm512_castsi512_ps(_mm512_and_si512(a, upper));
    w1 = _mm512_castsi512_ps(_mm512_and_si512(b, upper));
    w2 = _mm512_castsi512_ps(_mm512_and_si512(c, upper));
    HIF4_EACH_ROW(HIF4_STEP)
    x += kRows;
  }
  HIF4_EACH_ROW(HIF4_STORE)
}

HIF4_TARGET HIF4_INLINE __m512 add_pair(__m512 sum, const float* x, __m512i w) {
  const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
  const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
  return _mm512_fmadd_ps(_mm512_set1_ps(x[kRows]), odd, _mm512_fmadd_ps(_mm512_set1_ps(x[0]), even, sum));
}
#endif

#undef HIF4_EACH_ROW
#undef HIF4_LOAD
#undef HIF4_STORE
#undef HIF4_STEP

// Few rows read each weight once, so it is decoded into registers and multiplied there.
template <int ROWS>
HIF4_TARGET void multiply_decoded(const Element* x, const Packed& weight, int64_t column, float* acc) {
  constexpr int64_t kPair = 2 * kRows;       // elements of a pair of channels
  constexpr int kSlot = 4 / sizeof(Element);  // and from row to row
  constexpr int64_t kAhead = 8;  // units
  constexpr int kSums = ROWS >= 4 ? 1 : 4 / ROWS;  // more sums a row than one, as each addition waits for the last
  const Rows rows = rows_from(weight, column);
  __m512i metas[4];
  __m512 sum[ROWS][kSums];
  for (int i = 0; i < ROWS; i++)
    for (int s = 0; s < kSums; s++) sum[i][s] = _mm512_setzero_ps();
  for (int64_t u = 0; u < weight.units; u++, x += kPairs * kPair) {
    if (u % 4 == 0) load_scales(rows, u, weight.units - u, metas);
    const __m512i meta = metas[u % 4], nan = nan_of(meta);
    const Decoder decoder(meta);
    __m512i codes[8];
    load_codes(rows, u, codes);
    if (u % 2 == 0) {  // more streams than the processor foresees; past the end of these rows, those of the next tile
      const int64_t ahead = u + kAhead, at = ahead + (ahead < weight.units ? 0 : (kTile - 1) * weight.units);
      for (int c = 0; c < kTile; c++) __builtin_prefetch(rows.codes[c] + at * kUnitBytes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      const __m512i run8 = raise(decoder.lowered, meta, bit8(i));
      const __m512i runs[2] = {raise(run8, meta, bit16(2 * i)), raise(run8, meta, bit16(2 * i + 1))};
#pragma GCC unroll 4
      for (int p = 0; p < 4; p++) {
        __m512i w = decode_pair(decoder, codes[i], runs[p / 2], p);
        if (i == 0 && p == 0) w = _mm512_or_si512(w, nan);  // one NaN makes the sum one
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++)
          sum[row][p % kSums] = add_pair(sum[row][p % kSums], x + (4 * i + p) * kPair + row * kSlot, w);
      }
    }
  }
  for (int i = 0; i < ROWS; i++) {
    __m512 total = sum[i][0];
    for (int s = 1; s < kSums; s++) total = _mm512_add_ps(total, sum[i][s]);
    _mm512_storeu_ps(acc + i * kTile, total);
  }
}

HIF4_TARGET void few_rows_pairs(const void* group, int rows, const Packed& weight, int64_t column, float* acc) {
  const Element* x = static_cast<const Element*>(group);
  if (rows == 1) return multiply_decoded<1>(x, weight, column, acc);
  if (rows == 2) return multiply_decoded<2>(x, weight, column, acc);
  if (rows <= 4) return multiply_decoded<4>(x, weight, column, acc);
  multiply_decoded<8>(x, weight, column, acc);
}
