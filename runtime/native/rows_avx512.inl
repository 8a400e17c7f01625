// Included by rows_avx512.cpp inside a namespace, with HIF4_TARGET defined.

HIF4_TARGET HIF4_INLINE uint64_t join_masks(const __mmask16 (&masks)[4]) {
  return masks[0] | static_cast<uint64_t>(masks[1]) << 16 | static_cast<uint64_t>(masks[2]) << 32 |
         static_cast<uint64_t>(masks[3]) << 48;
}

HIF4_TARGET HIF4_INLINE __m512i bf16_rne16(__m512 x) {  // as bf16_rne
  const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  return _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF)), 16);
}

// One unit, given bf16_rne(1 / E6M2): its codes, and its E1_8 and E1_16 as the three bytes after E6M2.
HIF4_TARGET HIF4_INLINE uint32_t quantize_unit(const float* x, __m512 inverse, uint8_t* codes) {
  __mmask16 e8[4], e16[4];
#pragma GCC unroll 4
  for (int v = 0; v < 4; v++) {
    const __m512 z = _mm512_loadu_ps(x + 16 * v);
    // Multiplying by a positive number keeps the order, so the maxima may be taken after it. Each stands in all lanes
    // of its run.
    const __m512 w = _mm512_mul_ps(_mm512_abs_ps(z), inverse);
    const __m512 pair = _mm512_max_ps(w, _mm512_permute_ps(w, 0xB1));
    const __m512 w16 = _mm512_max_ps(pair, _mm512_permute_ps(pair, 0x4E));
    const __m512 w8 = _mm512_max_ps(w16, _mm512_shuffle_f32x4(w16, w16, 0xB1));
    e8[v] = _mm512_cmp_ps_mask(w8, _mm512_set1_ps(4), _CMP_GE_OQ);
    const __m512 limit = _mm512_mask_blend_ps(e8[v], _mm512_set1_ps(2), _mm512_set1_ps(4));
    e16[v] = _mm512_cmp_ps_mask(w16, limit, _CMP_GE_OQ);
    __m512 factor = _mm512_mask_blend_ps(e8[v], _mm512_set1_ps(4), _mm512_set1_ps(2));
    factor = _mm512_mask_mul_ps(factor, e16[v], factor, _mm512_set1_ps(0.5f));
    const __m512 t = _mm512_add_ps(_mm512_mul_ps(w, factor), _mm512_set1_ps(0.5f));
    __m512i nibble = _mm512_cvttps_epi32(_mm512_min_ps(t, _mm512_set1_ps(7)));
    const __mmask16 below = _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_LT_OQ);
    nibble = _mm512_mask_or_epi32(nibble, below, nibble, _mm512_set1_epi32(8));
    // Two lanes are a code byte: the second nibble comes down beside the first.
    nibble = _mm512_or_si512(nibble, _mm512_srli_epi64(nibble, 28));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + 8 * v), _mm512_cvtepi64_epi8(nibble));
  }
  // One bit of each run, then each byte turned round: the first run belongs in the most significant bit.
  uint32_t meta = static_cast<uint32_t>(_pext_u64(join_masks(e8), 0x0101010101010101) |
                                        _pext_u64(join_masks(e16), 0x1111111111111111) << 8);
  meta = (meta >> 4 & 0x0F0F0F0F) | (meta & 0x0F0F0F0F) << 4;
  meta = (meta >> 2 & 0x33333333) | (meta & 0x33333333) << 2;
  meta = (meta >> 1 & 0x55555555) | (meta & 0x55555555) << 1;
  return meta;
}

// Sixteen units at a time: their level-1 scales depend on a long chain of operations, which one vector goes through once.
HIF4_TARGET void quantize(const float* x, int64_t units, uint8_t* codes, uint8_t* scales) {
  for (int64_t start = 0; start < units; start += 16) {
    const int count = static_cast<int>(units - start < 16 ? units - start : 16);
    int32_t largest[16] = {};
    for (int u = 0; u < count; u++) {
      const float* z = x + (start + u) * kUnit;
      // Compared as integers magnitudes have the same order, and NaN and Inf are above everything finite.
      const __m512i a = _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(z)));
      const __m512i b = _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(z + 16)));
      const __m512i c = _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(z + 32)));
      const __m512i d = _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(z + 48)));
      largest[u] = _mm512_reduce_max_epi32(_mm512_max_epi32(_mm512_max_epi32(a, b), _mm512_max_epi32(c, d)));
    }
    const __m512i vmax = _mm512_loadu_si512(largest);
    const __mmask16 invalid = _mm512_cmpge_epi32_mask(vmax, _mm512_set1_epi32(0x7F800000));
    // As level1.
    __m512i sf = bf16_rne16(_mm512_mul_ps(_mm512_castsi512_ps(vmax), _mm512_set1_ps(0.142578125f)));
    sf = _mm512_min_epi32(_mm512_max_epi32(sf, _mm512_set1_epi32(0x2780)), _mm512_set1_epi32(0x4740));
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(sf, 5), _mm512_set1_epi32(1));
    const __m512i bits = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(sf, odd), _mm512_set1_epi32(15)), 5);
    const __m512 e6m2 = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 21));
    float inverse[16];
    uint32_t stored[16];
    _mm512_storeu_si512(inverse, _mm512_slli_epi32(bf16_rne16(_mm512_div_ps(_mm512_set1_ps(1), e6m2)), 16));
    _mm512_storeu_si512(stored, _mm512_sub_epi32(bits, _mm512_set1_epi32((127 - 48) << 2)));
    for (int u = 0; u < count; u++) {
      const int64_t at = start + u;
      uint32_t packed = 0xFF;
      if (invalid >> u & 1)
        memset(codes + at * kUnitBytes, 0, kUnitBytes);
      else
        packed = stored[u] | quantize_unit(x + at * kUnit, _mm512_set1_ps(inverse[u]), codes + at * kUnitBytes) << 8;
      memcpy(scales + at * kScaleBytes, &packed, 4);
    }
  }
}

HIF4_TARGET void load_bf16(const uint16_t* x, const float* mask, int64_t count, float* out) {
  load_bf16_generic(x, mask, count, out);
}

HIF4_TARGET void load_f32(const float* x, const float* mask, int64_t count, float* out) {
  load_f32_generic(x, mask, count, out);
}

// Butterflies within a vector: `swapped` has each lane's partner, `upper` marks the second of each pair.
HIF4_TARGET HIF4_INLINE __m512 butterfly(__m512 x, __m512 swapped, __mmask16 upper) {
  return _mm512_mask_sub_ps(_mm512_add_ps(x, swapped), upper, swapped, x);
}

HIF4_TARGET void rotate(float* x, int64_t count, int width, float factor) {
  if (width < 16) return rotate_generic(x, count, width, factor);
  for (float* v = x; v < x + count; v += 16) {  // a width of 16 or more divides the count
    __m512 z = _mm512_loadu_ps(v);
    z = butterfly(z, _mm512_permute_ps(z, 0xB1), 0xAAAA);
    z = butterfly(z, _mm512_permute_ps(z, 0x4E), 0xCCCC);
    z = butterfly(z, _mm512_shuffle_f32x4(z, z, 0xB1), 0xF0F0);
    z = butterfly(z, _mm512_shuffle_f32x4(z, z, 0x4E), 0xFF00);
    _mm512_storeu_ps(v, z);
  }
  for (int stride = 16; stride < width; stride *= 2) butterflies(x, count, stride);
  for (int64_t i = 0; i < count; i++) x[i] *= factor;
}
