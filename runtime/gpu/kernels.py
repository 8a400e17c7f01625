"""The Triton kernels of the operators: quantize, expand, linear, norm. Importing this module imports Triton.

Symbols: M rows of the input, N outputs, R rows of either, U units of 64 channels (see `hif4c.runtime.format`), S
columns of the side branch. A *code word* holds 8 codes and a *scale word* a unit's 4 scale bytes, both as little-endian
int32: the canonical planes seen through another dtype.

    quantize      x [M, K] -> code words [M, U * 8], scale words [M, U]
    norm_quantize x [M, K] -> the same, of its layer norm
    expand_int8   planes of R rows -> in-unit integers int8 [R, U * 64], E6M2/4 fp32 [U, stride]
    expand_bf16   planes of R rows -> exact values bf16 [R, U * 64]
    linear_int8   integer matrix units: an exact int32 dot product a unit, fp32 over the units in order
    linear_bf16   bf16 matrix units: exact values, products and sums in fp32

What is expanded leaves its channels in an order of its own inside each run of 8: `INT8_ORDER` or `BF16_ORDER`. A dot
product does not depend on the order that its two operands share, and this one costs no shuffles.

Compile with floating-point contraction off (`enable_fp_fusion=False`): where one rounding is meant, tl.fma says so.
Triton's interpreter (TRITON_INTERPRET=1) truncates fp32 to bf16 and cannot multiply bf16 matrices; `_to_bf16` and
`_dot_bf16` stand in for both there.
"""

# mypy: ignore-errors
# (These functions are in Triton's language, whose types mypy does not know.)
import triton
import triton.language as tl

__all__ = [
    "BF16_ORDER",
    "INT8_ORDER",
    "SCALE_PADDING",
    "expand_bf16",
    "expand_int8",
    "linear_bf16",
    "linear_int8",
    "norm_quantize",
    "quantize",
]

INT8_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # channel at each place of a run of 8, as expand_int8 writes it
BF16_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # and as expand_bf16 writes it
SCALE_PADDING = 256  # unit scales of R rows lie `stride` apart, R rounded up to this: every tile reads without a mask

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

_ABS = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(0x7F800000)  # bits of fp32
_INVERSE_SEVEN = tl.constexpr(0.142578125)  # bf16_rne(1/7)
_MIN_SCALE = tl.constexpr((127 - 48) << 7)  # bf16 bits of 2^-48
_MAX_SCALE = tl.constexpr(((127 + 15) << 7) + 0x40)  # and of 1.5 * 2^15
_E6M2_BIAS = tl.constexpr((127 - 48) << 2)
# Significands of bf16_rne(1 / (1 + m/4)) for m = 0..3, a byte each.
_RECIPROCALS = tl.constexpr(0x122B4D00)
# 1.5 * 2^23: an fp32 of these bits plus an integer d, |d| < 2^22, is 1.5 * 2^23 + d.
_MAGIC_BITS = tl.constexpr(0x4B400000)
_MAGIC = tl.constexpr(12582912.0)
_BYTES_80 = tl.constexpr(-0x7F7F7F80)  # 0x80808080; a literal above 2^31 - 1 would not be an int32
_NIBBLES_8 = tl.constexpr(-0x77777778)  # 0x88888888
_HIGH_HALF = tl.constexpr(-0x10000)  # 0xFFFF0000
_HALF_SIGNS = tl.constexpr(-0x7FFF8000)  # 0x80008000


@triton.jit
def _round_bf16_bits(x):
    """fp32 to bf16, half to even, as int32 with 16 significant bits; x is not NaN and its sign is clear or kept."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@triton.jit
def _to_bf16(x):
    if _INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (_round_bf16_bits(x) << 16).to(tl.float32, bitcast=True)
        x = tl.where((bits & _ABS) > _INFINITY, x, rounded)
    return x.to(tl.bfloat16)


@triton.jit
def _cast(x, dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        x = _to_bf16(x)
    return x.to(dtype)


@triton.jit
def _fma(a, b, c):
    """a * b + c with one rounding. The interpreter's tl.fma has two; fp64 has one where a * b + c fits it."""
    if _INTERPRETED:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def _dot_bf16(a, b, acc):
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc)


@triton.jit
def _rotate(x, WIDTH: tl.constexpr, LOG2_WIDTH: tl.constexpr, LOG2_RUN: tl.constexpr):
    """Block Hadamard rotation of x fp32 [rows, columns], in the order of `hif4c.runtime.rotation.block_hadamard`.

    2^LOG2_RUN neighbours are expected in one thread, as they were loaded. Pairs inside such a run meet in registers,
    the others through one warp shuffle an element: other layouts cost five times the instructions.
    """
    rows: tl.constexpr = x.shape[0]
    columns: tl.constexpr = x.shape[1]
    inside: tl.constexpr = LOG2_WIDTH if LOG2_WIDTH < LOG2_RUN else LOG2_RUN
    for j in tl.static_range(inside):
        pairs = tl.reshape(x, [rows, columns // (2 << j), 2, 1 << j])
        a, b = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), [rows, columns])
    if LOG2_WIDTH > LOG2_RUN:
        runs: tl.constexpr = columns >> LOG2_RUN
        x = tl.reshape(x, [rows, runs, 1 << LOG2_RUN])
        run = tl.arange(0, runs)[None, :, None]
        for j in tl.static_range(LOG2_WIDTH - LOG2_RUN):
            other = tl.gather(x, tl.broadcast_to(run ^ (1 << j), [rows, runs, 1 << LOG2_RUN]), 1)
            x = tl.fma(x, tl.where((run & (1 << j)) == 0, 1.0, -1.0), other)  # the product is exact
        x = tl.reshape(x, [rows, columns])
    return x * (WIDTH**-0.5)


@triton.jit
def _encode(x):
    """x fp32 [rows, units * 64] to code words [rows, units * 8] and scale words [rows, units], as `format.quantize`."""
    rows: tl.constexpr = x.shape[0]
    units: tl.constexpr = x.shape[1] // 64
    n: tl.constexpr = rows * units
    # Magnitudes are compared as integers: the order is that of the floats, and NaN is above all of them.
    a = x.to(tl.int32, bitcast=True) & _ABS
    v16 = tl.max(tl.reshape(a, [n, 16, 4]), 2)
    v8 = tl.max(tl.reshape(v16, [n, 8, 2]), 2)
    vmax = tl.max(v8, 1)
    valid = vmax < _INFINITY

    sf = _round_bf16_bits(vmax.to(tl.float32, bitcast=True) * _INVERSE_SEVEN)
    sf = tl.minimum(tl.maximum(sf, _MIN_SCALE), _MAX_SCALE)
    stored = (sf + 15 + ((sf >> 5) & 1)) >> 5  # exponent with bias 127, two fraction bits
    fraction = stored & 3
    exponent = 254 - (stored >> 2) - tl.where(fraction == 0, 0, 1)
    reciprocal = (exponent << 7) | ((_RECIPROCALS >> (fraction << 3)) & 0xFF)
    r = (reciprocal << 16).to(tl.float32, bitcast=True)

    e8 = v8.to(tl.float32, bitcast=True) * r[:, None] >= 4.0
    half8 = tl.where(e8, 0.5, 1.0)
    t16 = tl.reshape(v16.to(tl.float32, bitcast=True) * r[:, None], [n, 8, 2]) * half8[:, :, None]
    e16 = t16 >= 2.0
    factor = tl.reshape((4.0 * half8)[:, :, None] * tl.where(e16, 0.5, 1.0), [n, 16])
    t = tl.reshape(tl.reshape(a, [n, 64]).to(tl.float32, bitcast=True) * r[:, None], [n, 16, 4])
    q = tl.minimum(t * factor[:, :, None] + 0.5, 7.0).to(tl.int32)
    sign = tl.where(x < 0.0, 8, 0)
    nibbles = tl.reshape(tl.reshape(q, [rows, units * 64]) | sign, [n, 8, 8])
    codes = tl.sum(nibbles << (4 * tl.arange(0, 8))[None, None, :], 2)
    codes = tl.where(valid[:, None], codes, 0)

    run8, run16 = tl.arange(0, 8), tl.arange(0, 16)
    bits8 = tl.sum(e8.to(tl.int32) << (15 - run8)[None, :], 1)
    bits16 = tl.sum(tl.reshape(e16.to(tl.int32), [n, 16]) << (16 + (run16 ^ 7))[None, :], 1)
    scales = tl.where(valid, (stored - _E6M2_BIAS) | bits8 | bits16, 0xFF)
    return tl.reshape(codes, [rows, units * 8]), tl.reshape(scales, [rows, units])


@triton.jit
def _store_planes(x, row, unit, codes_ptr, scales_ptr, M, U, BLOCK_M: tl.constexpr, BLOCK_U: tl.constexpr):
    """Encode x [BLOCK_M, BLOCK_U * 64] and store it at rows from `row` and units from `unit`, those that are there."""
    codes, scales = _encode(x)
    rows = row + tl.arange(0, BLOCK_M)
    words = unit * 8 + tl.arange(0, BLOCK_U * 8)
    units = unit + tl.arange(0, BLOCK_U)
    there = rows[:, None] < M
    start = rows[:, None].to(tl.int64) * U
    tl.store(codes_ptr + start * 8 + words[None, :], codes, mask=there & (words[None, :] < U * 8))
    tl.store(scales_ptr + start + units[None, :], scales, mask=there & (units[None, :] < U))


@triton.jit
def quantize(
    x_ptr,
    mask_ptr,
    codes_ptr,
    scales_ptr,
    M,
    K,
    x_stride,
    HAS_MASK: tl.constexpr,
    HADAMARD: tl.constexpr,
    LOG2_HADAMARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """x [M, K] bf16, fp16 or fp32, rows `x_stride` apart, times mask [K] fp32, rotated, to planes of U = ceil(K / 64).

    HADAMARD = 2^LOG2_HADAMARD is 1 for no rotation and at most BLOCK_U * 64. Grid: (ceil(M / BLOCK_M), ceil(U /
    BLOCK_U)). Bit for bit `hif4c.runtime.format.quantize`.
    """
    U = tl.cdiv(K, 64)
    row = tl.program_id(0) * BLOCK_M
    unit = tl.program_id(1) * BLOCK_U
    rows = row + tl.arange(0, BLOCK_M)
    channels = unit * 64 + tl.arange(0, BLOCK_U * 64)
    there = (rows[:, None] < M) & (channels[None, :] < K)
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * x_stride + channels[None, :], mask=there, other=0.0)
    x = x.to(tl.float32)
    if HAS_MASK:
        x = x * tl.load(mask_ptr + channels, mask=channels < K, other=0.0)[None, :]
    if HADAMARD > 1:
        x = _rotate(x, HADAMARD, LOG2_HADAMARD, 2 if x_ptr.dtype.element_ty == tl.float32 else 3)
    _store_planes(x, row, unit, codes_ptr, scales_ptr, M, U, BLOCK_M, BLOCK_U)


@triton.jit
def norm_quantize(
    x_ptr,
    gain_ptr,
    shift_ptr,
    mask_ptr,
    codes_ptr,
    scales_ptr,
    M,
    K,
    x_stride,
    gain_rows,
    gain_stride,
    offset,
    eps,
    HAS_MASK: tl.constexpr,
    HADAMARD: tl.constexpr,
    LOG2_HADAMARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """Planes, as from `quantize`, of a layer norm of x [M, K]: bf16 of `normalized * (gain + offset) + shift`.

    gain and shift fp32 [., K], row m of x taking row m // gain_rows of both, rows `gain_stride` apart. They are AdaLN's
    scale and shift with offset = 1, or a norm's own weight and bias with offset = 0 and gain_rows = M. Mean and
    variance are in fp32, of blocks of columns that are merged one after the other (Chan, Golub, LeVeque 1979). Grid:
    ceil(M / BLOCK_M).
    """
    U = tl.cdiv(K, 64)
    row = tl.program_id(0) * BLOCK_M
    rows = tl.minimum(row + tl.arange(0, BLOCK_M), M - 1)
    x_ptr += rows[:, None].to(tl.int64) * x_stride
    block: tl.constexpr = BLOCK_U * 64
    mean = tl.zeros([BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, K, block):
        channels = start + tl.arange(0, block)
        there = channels[None, :] < K
        x = tl.load(x_ptr + channels[None, :], mask=there, other=0.0).to(tl.float32)
        count = tl.minimum(K - start, block).to(tl.float32)
        total = start + count
        block_mean = tl.sum(x, 1) / count
        deviation = tl.where(there, x - block_mean[:, None], 0.0)
        difference = block_mean - mean
        mean += difference * (count / total)
        squares += tl.sum(deviation * deviation, 1) + difference * difference * (start * (count / total))
    factor = 1.0 / tl.sqrt_rn(squares / K + eps)
    gain_row = (rows // gain_rows)[:, None].to(tl.int64) * gain_stride
    for unit in range(0, U, BLOCK_U):
        channels = unit * 64 + tl.arange(0, block)
        there = channels[None, :] < K
        x = tl.load(x_ptr + channels[None, :], mask=there, other=0.0).to(tl.float32)
        gain = tl.load(gain_ptr + gain_row + channels[None, :], mask=there, other=0.0) + offset
        shift = tl.load(shift_ptr + gain_row + channels[None, :], mask=there, other=0.0)
        y = _to_bf16((x - mean[:, None]) * factor[:, None] * gain + shift).to(tl.float32)
        y = tl.where(there, y, 0.0)
        if HAS_MASK:
            y = y * tl.load(mask_ptr + channels, mask=channels < K, other=0.0)[None, :]
        if HADAMARD > 1:
            y = _rotate(y, HADAMARD, LOG2_HADAMARD, 3)
        _store_planes(y, row, unit, codes_ptr, scales_ptr, M, U, BLOCK_M, BLOCK_U)


@triton.jit
def _run_bits(scales, run):
    """E1_8 and the E1_16 of the first and second half, 0 or 1, of each run of 8: scale words [R, 1], run [1, 8]."""
    e8 = (scales >> (15 - run)) & 1
    first = (scales >> (16 + ((2 * run) ^ 7))) & 1
    second = (scales >> (16 + ((2 * run + 1) ^ 7))) & 1
    return e8, first, second


@triton.jit
def _integer_words(words, e8, second_level):
    """Four nibbles in the low halves of the bytes of a word to their in-unit integers, int8 each.

    `second_level` has ones in the halves of the word whose E1_16 is set.
    """
    n = words & 0x07070707
    n = (n + (n & second_level)) << e8
    negative = n & (((words >> 3) & 0x01010101) * 31)
    return ((n | _BYTES_80) - 2 * negative) ^ _BYTES_80  # the 0x80 keeps each byte's borrow to itself


@triton.jit
def _unit_scales(scales):
    """E6M2/4 fp32 from scale words; NaN where E6M2 is 0xFF."""
    stored = scales & 0xFF
    value = ((stored + (_E6M2_BIAS - 8)) << 21).to(tl.float32, bitcast=True)
    return tl.where(stored == 0xFF, float("nan"), value)


@triton.jit
def expand_int8(
    codes_ptr,
    scales_ptr,
    values_ptr,
    value_scales_ptr,
    R,
    U,
    stride,
    BLOCK_R: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """Planes of R rows (code words [R, U * 8], scale words [R, U]) to in-unit integers and unit scales.

    values int32 [R, U * 16], that is int8 [R, U * 64] with each run of 8 in INT8_ORDER; value_scales fp32 [U, stride],
    rows from R to stride left as they are. Grid: (ceil(R / BLOCK_R), ceil(U / BLOCK_U)).
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    unit = tl.program_id(1) * BLOCK_U
    start = rows[:, None].to(tl.int64) * U

    units = unit + tl.arange(0, BLOCK_U)
    there = (rows[:, None] < R) & (units[None, :] < U)
    value_scales = _unit_scales(tl.load(scales_ptr + start + units[None, :], mask=there, other=0))
    tl.store(value_scales_ptr + units[None, :].to(tl.int64) * stride + rows[:, None], value_scales, mask=there)

    word = unit * 8 + tl.arange(0, BLOCK_U * 8)[None, :]
    there = (rows[:, None] < R) & (word < U * 8)
    words = tl.load(codes_ptr + start * 8 + word, mask=there, other=0)
    scales = tl.load(scales_ptr + start + word // 8, mask=there, other=0)
    e8, first, second = _run_bits(scales, word % 8)
    second_level = first * 0xFFFF + second * _HIGH_HALF
    even = _integer_words(words, e8, second_level)
    odd = _integer_words(words >> 4, e8, second_level)
    place = unit * 16 + tl.arange(0, BLOCK_U * 16)[None, :]
    values = tl.reshape(tl.join(even, odd), [BLOCK_R, BLOCK_U * 16])
    tl.store(values_ptr + start * 16 + place, values, mask=(rows[:, None] < R) & (place < U * 16))


@triton.jit
def _value_words(words, lower, upper):
    """The nibbles at bits 0..3 and 16..19 of a word to two bf16 values in one; `lower`, `upper` fp32: their scales."""
    signs = (words << 12) & _HALF_SIGNS
    first = ((words & 7).to(tl.float32) * lower).to(tl.int32, bitcast=True)
    second = (((words >> 16) & 7).to(tl.float32) * upper).to(tl.int32, bitcast=True)
    return (((first >> 16) & 0xFFFF) | (second & _HIGH_HALF)) | signs


@triton.jit
def expand_bf16(
    codes_ptr,
    scales_ptr,
    values_ptr,
    R,
    U,
    BLOCK_R: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """Planes of R rows (code words [R, U * 8], scale words [R, U]) to their values, exact.

    values int32 [R, U * 32], that is bf16 [R, U * 64] with each run of 8 in BF16_ORDER. Grid: (ceil(R / BLOCK_R),
    ceil(U / BLOCK_U)).
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    unit = tl.program_id(1) * BLOCK_U
    start = rows[:, None].to(tl.int64) * U
    word = unit * 8 + tl.arange(0, BLOCK_U * 8)[None, :]
    there = (rows[:, None] < R) & (word < U * 8)
    words = tl.load(codes_ptr + start * 8 + word, mask=there, other=0)
    scales = tl.load(scales_ptr + start + word // 8, mask=there, other=0)
    e8, first, second = _run_bits(scales, word % 8)
    step = _unit_scales(scales)
    lower = step * (1 << (e8 + first)).to(tl.float32)
    upper = step * (1 << (e8 + second)).to(tl.float32)
    v0 = _value_words(words, lower, upper)
    v1 = _value_words(words >> 4, lower, upper)
    v2 = _value_words(words >> 8, lower, upper)
    v3 = _value_words(words >> 12, lower, upper)
    values = tl.reshape(tl.join(tl.join(v0, v2), tl.join(v1, v3)), [BLOCK_R, BLOCK_U * 32])
    place = unit * 32 + tl.arange(0, BLOCK_U * 32)[None, :]
    tl.store(values_ptr + start * 32 + place, values, mask=(rows[:, None] < R) & (place < U * 32))


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of this program's tile: GROUP_M tiles of rows share columns while they are in the L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    first = program // (GROUP_M * tiles_n) * GROUP_M
    group = tl.minimum(tiles_m - first, GROUP_M)
    inside = program % (GROUP_M * tiles_n)
    return (first + inside % group) * BLOCK_M, inside // group * BLOCK_N


@triton.jit
def _store_part(
    acc,
    row,
    column,
    gate_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    gate_rows,
    gate_stride,
    GELU: tl.constexpr,
    GATE: tl.constexpr,
):
    """The element-wise part of the epilogue and the store, for the part of a tile at `row` and `column`."""
    rows = row + tl.arange(0, acc.shape[0])
    columns = column + tl.arange(0, acc.shape[1])
    there = (rows[:, None] < M) & (columns[None, :] < N)
    place = rows[:, None].to(tl.int64) * N + columns[None, :]
    if GELU:
        # 0.5 * y * (1 + tanh(u)) = y / (1 + exp(-2u)) with u = sqrt(2 / pi) * (y + 0.044715 * y^3)
        acc = acc / (1.0 + tl.exp(acc * (-1.5957691216057308 - 0.07135481627159 * acc * acc)))
    if GATE:
        gate_row = (rows // gate_rows)[:, None].to(tl.int64) * gate_stride
        acc = acc * tl.load(gate_ptr + gate_row + columns[None, :], mask=there, other=0.0)
        acc = tl.load(residual_ptr + place, mask=there, other=0.0).to(tl.float32) + acc
    tl.store(out_ptr + place, _cast(acc, out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _finish(
    acc,
    row,
    column,
    bias_ptr,
    gate_ptr,
    residual_ptr,
    side_ptr,
    side_weight_ptr,
    out_ptr,
    M,
    N,
    S,
    gate_rows,
    gate_stride,
    GELU: tl.constexpr,
    GATE: tl.constexpr,
):
    """Side branch, bias, then GELU or gate and residual, on acc fp32 [BLOCK_M, BLOCK_N]; one cast and the store.

    The last steps take the tile in 2 or 4 parts of its columns: fewer values of gate and residual are held at once,
    which halves the registers of a kernel and lets two tiles share a multiprocessor.
    """
    m: tl.constexpr = acc.shape[0]
    n: tl.constexpr = acc.shape[1]
    rows = tl.minimum(row + tl.arange(0, m), M - 1)[:, None].to(tl.int64)
    columns = column + tl.arange(0, n)
    for s in tl.range(0, S, 16, num_stages=1):
        j = s + tl.arange(0, 16)
        side = tl.load(side_ptr + rows * S + j[None, :], mask=j[None, :] < S, other=0.0)
        there = (j[:, None] < S) & (columns[None, :] < N)
        side_weight = tl.load(side_weight_ptr + j[:, None].to(tl.int64) * N + columns[None, :], mask=there, other=0.0)
        acc = _dot_bf16(side, side_weight, acc)
    acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0)[None, :]
    half: tl.constexpr = n // 2
    quarter: tl.constexpr = n // 4
    for i in tl.static_range(2):
        a, b = tl.split(tl.permute(tl.reshape(acc, [m, 2, half]), (0, 2, 1)))
        part = a if i == 0 else b
        at = column + i * half
        if n < 128:
            _store_part(part, row, at, gate_ptr, residual_ptr, out_ptr, M, N, gate_rows, gate_stride, GELU, GATE)
        else:
            c, d = tl.split(tl.permute(tl.reshape(part, [m, 2, quarter]), (0, 2, 1)))
            _store_part(c, row, at, gate_ptr, residual_ptr, out_ptr, M, N, gate_rows, gate_stride, GELU, GATE)
            at += quarter
            _store_part(d, row, at, gate_ptr, residual_ptr, out_ptr, M, N, gate_rows, gate_stride, GELU, GATE)


@triton.jit
def linear_int8(
    values_ptr,
    value_scales_ptr,
    weight_ptr,
    weight_scales_ptr,
    bias_ptr,
    gate_ptr,
    residual_ptr,
    side_ptr,
    side_weight_ptr,
    out_ptr,
    M,
    N,
    U,
    S,
    value_stride,
    weight_stride,
    gate_rows,
    gate_stride,
    GELU: tl.constexpr,
    GATE: tl.constexpr,
    MAGIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out [M, N] = epilogue(input @ weight^T), both expanded by `expand_int8`.

    values int8 [M, U * 64] and weight int8 [N, U * 64]; value_scales fp32 [U, value_stride] and weight_scales fp32 [U,
    weight_stride], the strides at least M and N rounded up to SCALE_PADDING. bias fp32 [N]; side [M, S] and side_weight
    [S, N] bf16, S = 0 for none. out bf16 or fp32.

    The epilogue is y = side + product + bias, then with GELU its tanh form, with GATE residual + y * gate: residual
    [M, N], gate fp32, row m of the output taking row m // gate_rows of it, rows `gate_stride` apart (0: one for all).
    Products of the epilogue are rounded before they are added. N, the strides and gate_stride are multiples of 16.

    MAGIC converts the dot products by adding them to the bits of 1.5 * 2^23 (free where the matrix unit takes its
    accumulator from registers); without it they are converted. Both are exact, and so is their product with a unit
    scale (16 + 3 bits): every unit adds one rounding, as `hif4c.runtime.reference.linear` does. Grid: ceil(M / BLOCK_M)
    * ceil(N / BLOCK_N).
    """
    row, column = _tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, 64)
    # 64 bits to the tile and 32 bits inside it take fewer instructions a turn than 64 bits for each row.
    a_ptr = values_ptr + row.to(tl.int64) * (U * 64)
    b_ptr = weight_ptr + column.to(tl.int64) * (U * 64)
    a_offsets = (tl.minimum(rows, M - 1) - row)[:, None] * (U * 64) + channel[None, :]
    b_offsets = (tl.minimum(columns, N - 1) - column)[None, :] * (U * 64) + channel[:, None]
    sa_ptr = value_scales_ptr + rows
    sb_ptr = weight_scales_ptr + columns
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(U):
        a = tl.load(a_ptr + a_offsets)
        b = tl.load(b_ptr + b_offsets)
        sa = tl.load(sa_ptr)
        sb = tl.load(sb_ptr)
        if MAGIC:
            dot = tl.dot(a, b, tl.full([BLOCK_M, BLOCK_N], _MAGIC_BITS, tl.int32), out_dtype=tl.int32)
            term = _fma(dot.to(tl.float32, bitcast=True), sb[None, :], (sb * -_MAGIC)[None, :])
        else:
            dot = tl.dot(a, b, out_dtype=tl.int32)
            term = dot.to(tl.float32) * sb[None, :]
        acc = _fma(term, sa[:, None], acc)
        a_ptr += 64
        b_ptr += 64
        sa_ptr += value_stride
        sb_ptr += weight_stride
    _finish(
        acc,
        row,
        column,
        bias_ptr,
        gate_ptr,
        residual_ptr,
        side_ptr,
        side_weight_ptr,
        out_ptr,
        M,
        N,
        S,
        gate_rows,
        gate_stride,
        GELU,
        GATE,
    )


@triton.jit
def _decode_bf16(words, scales, magic):
    """Code words [R, 8] and scale words [R] of one unit to exact bf16 [R, 64] in BF16_ORDER, two values an instruction.

    Nibbles become 8 + v, halves of a word then 128 + 8 + v as bf16; 136 is subtracted and the rest multiplied by
    E6M2/4 * 2^(E1_8 + E1_16), whose exponent field is added up in both halves of a word at once.
    """
    rows: tl.constexpr = words.shape[0]
    negative = words & (((words >> 3) & 0x11111111) * 7)
    offset = ((words & 0x77777777) | _NIBBLES_8) - 2 * negative
    h0 = (offset & 0x000F000F) | magic
    h1 = ((offset >> 4) & 0x000F000F) | magic
    h2 = ((offset >> 8) & 0x000F000F) | magic
    h3 = ((offset >> 12) & 0x000F000F) | magic
    pairs = tl.reshape(tl.join(tl.join(h0, h2), tl.join(h1, h3)), [rows, 8, 4])
    values = tl.join(pairs, pairs >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)

    run = tl.arange(0, 8)[None, :]
    stored = scales & 0xFF
    step = tl.where(stored == 0xFF, 0x7FC0, (stored + (_E6M2_BIAS - 8)) << 5) * 0x00010001
    e8 = (scales[:, None] >> (8 - run)) & 0x80
    e16 = (scales[:, None] >> (16 + ((2 * run + 1) ^ 7))) & 3  # the first half's bit above the second's
    steps = step[:, None] + e8 * 0x00010001 + ((e16 * 0x00800040) & 0x00800080)
    steps = tl.join(steps, steps >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)[:, :, None, :]
    if _INTERPRETED:
        exact = (values.to(tl.float32) - 136.0) * steps.to(tl.float32)
        return tl.reshape(exact.to(tl.bfloat16), [rows, 64])
    return tl.reshape((values - 136.0) * steps, [rows, 64])


@triton.jit
def linear_bf16(
    values_ptr,
    weight_ptr,
    weight_scales_ptr,
    bias_ptr,
    gate_ptr,
    residual_ptr,
    side_ptr,
    side_weight_ptr,
    out_ptr,
    M,
    N,
    U,
    S,
    gate_rows,
    gate_stride,
    PACKED: tl.constexpr,
    GELU: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """As `linear_int8` on bf16 matrix units: the same exact products, added in fp32 in the unit's own order.

    values bf16 [M, U * 64] from `expand_bf16`. With PACKED the weight is code words int32 [N, U * 8] and scale words
    int32 [N, U], decoded here; else bf16 [N, U * 64] from `expand_bf16`, and weight_scales is not read.
    """
    row, column = _tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, 64)
    weight_row = tl.minimum(columns, N - 1) - column
    a_ptr = values_ptr + row.to(tl.int64) * (U * 64)
    a_offsets = (tl.minimum(rows, M - 1) - row)[:, None] * (U * 64) + channel[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if PACKED:
        b_ptr = weight_ptr + column.to(tl.int64) * (U * 8)
        b_offsets = weight_row[:, None] * (U * 8) + tl.arange(0, 8)[None, :]
        sb_ptr = weight_scales_ptr + column.to(tl.int64) * U
        sb_offsets = weight_row * U
        # 128 as bf16, twice. S is never negative, but the compiler does not know: it keeps the constant in a register,
        # which makes one instruction of `& ... | magic`.
        magic = 0x43004300 | (S >> 31)
        for _ in range(U):
            b = _decode_bf16(tl.load(b_ptr + b_offsets), tl.load(sb_ptr + sb_offsets), magic)
            acc = _dot_bf16(tl.load(a_ptr + a_offsets), tl.trans(b), acc)
            a_ptr += 64
            b_ptr += 8
            sb_ptr += 1
    else:
        b_ptr = weight_ptr + column.to(tl.int64) * (U * 64)
        b_offsets = weight_row[None, :] * (U * 64) + channel[:, None]
        for _ in range(U):
            acc = _dot_bf16(tl.load(a_ptr + a_offsets), tl.load(b_ptr + b_offsets), acc)
            a_ptr += 64
            b_ptr += 64
    _finish(
        acc,
        row,
        column,
        bias_ptr,
        gate_ptr,
        residual_ptr,
        side_ptr,
        side_weight_ptr,
        out_ptr,
        M,
        N,
        S,
        gate_rows,
        gate_stride,
        GELU,
        GATE,
    )
