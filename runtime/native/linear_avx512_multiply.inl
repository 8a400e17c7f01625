// Included by linear_avx512.cpp: the product of 8 input rows and 48 columns, in assembly.
//
// A byte dot product (vpdpbusd) and the addition that ends a unit share two of the four vector pipes of a Zen 4 (or the
// one or two ports of an Intel core), so a unit takes 384 + 24 cycles at best, and that only if everything else hides
// behind the dot products. Hence two halves of four rows: while one half multiplies, the other's sums are converted,
// scaled and added. Compilers keep neither that order nor 24 sums in registers.
//
// Registers: sums of row i in zmm(3i .. 3i + 2), columns in zmm24-26, inputs in zmm27-28, scales in zmm30-31.

#define HIF4_S(text) #text
// Row `row` times the three column vectors of quad q.
#define HIF4_ROW(q, row, x, s0, s1, s2)                                                 \
  "vpbroadcastd 32*" HIF4_S(q) "+4*" HIF4_S(row) "(%[a]), %%zmm" HIF4_S(x) "\n"          \
  "vpdpbusd %%zmm" HIF4_S(x) ", %%zmm24, %%zmm" HIF4_S(s0) "\n"                         \
  "vpdpbusd %%zmm" HIF4_S(x) ", %%zmm25, %%zmm" HIF4_S(s1) "\n"                         \
  "vpdpbusd %%zmm" HIF4_S(x) ", %%zmm26, %%zmm" HIF4_S(s2) "\n"
#define HIF4_COLUMNS(q)                                       \
  "vmovdqa64 64*" HIF4_S(q) "(%[w]), %%zmm24\n"               \
  "vmovdqa64 64*" HIF4_S(q) "+1024(%[w]), %%zmm25\n"          \
  "vmovdqa64 64*" HIF4_S(q) "+2048(%[w]), %%zmm26\n"
// Quad q of rows 0-3 or 4-7, with what is to hide behind it.
#define HIF4_LOW(q, hidden)                                                                        \
  HIF4_COLUMNS(q) HIF4_ROW(q, 0, 27, 0, 1, 2) hidden HIF4_ROW(q, 1, 28, 3, 4, 5)                   \
  HIF4_ROW(q, 2, 27, 6, 7, 8) HIF4_ROW(q, 3, 28, 9, 10, 11)
#define HIF4_HIGH(q, hidden)                                                                       \
  HIF4_COLUMNS(q) HIF4_ROW(q, 4, 27, 12, 13, 14) hidden HIF4_ROW(q, 5, 28, 15, 16, 17)             \
  HIF4_ROW(q, 6, 27, 18, 19, 20) HIF4_ROW(q, 7, 28, 21, 22, 23)
#define HIF4_START(row, s0, s1, s2)                                           \
  "vpbroadcastd 4*" HIF4_S(row) "(%[offsets]), %%zmm" HIF4_S(s0) "\n"         \
  "vmovdqa64 %%zmm" HIF4_S(s0) ", %%zmm" HIF4_S(s1) "\n"                      \
  "vmovdqa64 %%zmm" HIF4_S(s0) ", %%zmm" HIF4_S(s2) "\n"
#define HIF4_START_LOW HIF4_START(0, 0, 1, 2) HIF4_START(1, 3, 4, 5) HIF4_START(2, 6, 7, 8) HIF4_START(3, 9, 10, 11)
#define HIF4_START_HIGH \
  HIF4_START(4, 12, 13, 14) HIF4_START(5, 15, 16, 17) HIF4_START(6, 18, 19, 20) HIF4_START(7, 21, 22, 23)
// The end of a row, `back` units ago: its scale, and where in the tables its significand's vectors are; then, for each
// of the three vectors, acc += dot * (row scale * column scale). That product is exact: bits are added, see
// column_scales. dot times it is exact too (22 bits), so the fused addition rounds as a separate one.
#define HIF4_SCALE(row, back)                                                       \
  "vpbroadcastd 4*" HIF4_S(row) "-32*" HIF4_S(back) "(%[scales]), %%zmm31\n"        \
  "movl 4*" HIF4_S(row) "-32*" HIF4_S(back) "(%[scales]), %%eax\n"                  \
  "shrl $15, %%eax\n"                                                               \
  "andl $0xC0, %%eax\n"
#define HIF4_FINISH(row, tile, s, back)                                                          \
  "vcvtdq2ps %%zmm" HIF4_S(s) ", %%zmm" HIF4_S(s) "\n"                                           \
  "vpaddd 256*" HIF4_S(tile) "-768*" HIF4_S(back) "(%[tables],%%rax), %%zmm31, %%zmm30\n"        \
  "vfmadd213ps 192*" HIF4_S(row) "+64*" HIF4_S(tile) "(%[acc]), %%zmm30, %%zmm" HIF4_S(s) "\n"   \
  "vmovaps %%zmm" HIF4_S(s) ", 192*" HIF4_S(row) "+64*" HIF4_S(tile) "(%[acc])\n"
// Three quads of one half that hide the end of one row of the other.
#define HIF4_THREE(HALF, q0, q1, q2, row, s0, s1, s2, back)                                        \
  HALF(q0, HIF4_SCALE(row, back) HIF4_FINISH(row, 0, s0, back))                                    \
  HALF(q1, HIF4_FINISH(row, 1, s1, back)) HALF(q2, HIF4_FINISH(row, 2, s2, back))
#define HIF4_FOUR(HALF, q0, q1, q2, q3) HALF(q0, ) HALF(q1, ) HALF(q2, ) HALF(q3, )
#define HIF4_END(row, s0, s1, s2) \
  HIF4_SCALE(row, 1) HIF4_FINISH(row, 0, s0, 1) HIF4_FINISH(row, 1, s1, 1) HIF4_FINISH(row, 2, s2, 1)

HIF4_TARGET void multiply(const Group& group, int, int64_t count, const uint8_t* values,
                          const float* scales, float* acc) {
  static_assert(kRows == 8 && kCols == 48 && kTables == 4, "the assembly is written for these");
  const int8_t* a = group.values;
  const int32_t* offsets = group.offsets;
  const float* row_scales = group.scales;
  if (count <= 0) return;
  asm volatile(
      HIF4_START_LOW
      HIF4_FOUR(HIF4_LOW, 0, 1, 2, 3) HIF4_FOUR(HIF4_LOW, 4, 5, 6, 7)
      HIF4_FOUR(HIF4_LOW, 8, 9, 10, 11) HIF4_FOUR(HIF4_LOW, 12, 13, 14, 15)
      "jmp 2f\n"
      ".p2align 6\n"
      "1:\n"
      HIF4_START_LOW
      HIF4_THREE(HIF4_LOW, 0, 1, 2, 4, 12, 13, 14, 1) HIF4_THREE(HIF4_LOW, 3, 4, 5, 5, 15, 16, 17, 1)
      HIF4_THREE(HIF4_LOW, 6, 7, 8, 6, 18, 19, 20, 1) HIF4_THREE(HIF4_LOW, 9, 10, 11, 7, 21, 22, 23, 1)
      HIF4_FOUR(HIF4_LOW, 12, 13, 14, 15)
      "2:\n"
      HIF4_START_HIGH
      HIF4_THREE(HIF4_HIGH, 0, 1, 2, 0, 0, 1, 2, 0) HIF4_THREE(HIF4_HIGH, 3, 4, 5, 1, 3, 4, 5, 0)
      HIF4_THREE(HIF4_HIGH, 6, 7, 8, 2, 6, 7, 8, 0) HIF4_THREE(HIF4_HIGH, 9, 10, 11, 3, 9, 10, 11, 0)
      HIF4_FOUR(HIF4_HIGH, 12, 13, 14, 15)
      "addq $512, %[a]\n"
      "addq $3072, %[w]\n"
      "addq $32, %[offsets]\n"
      "addq $32, %[scales]\n"
      "addq $768, %[tables]\n"
      "decq %[count]\n"
      "jnz 1b\n"
      HIF4_END(4, 12, 13, 14) HIF4_END(5, 15, 16, 17) HIF4_END(6, 18, 19, 20) HIF4_END(7, 21, 22, 23)
      "vzeroupper\n"
      : [a] "+r"(a), [w] "+r"(values), [offsets] "+r"(offsets), [scales] "+r"(row_scales), [tables] "+r"(scales),
        [count] "+r"(count)
      : [acc] "r"(acc)
      : "rax", "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
        "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22",
        "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm30", "xmm31");
}

#undef HIF4_S
#undef HIF4_ROW
#undef HIF4_COLUMNS
#undef HIF4_LOW
#undef HIF4_HIGH
#undef HIF4_START
#undef HIF4_START_LOW
#undef HIF4_START_HIGH
#undef HIF4_SCALE
#undef HIF4_FINISH
#undef HIF4_THREE
#undef HIF4_FOUR
#undef HIF4_END
