"""HiFloat4 as ONNX: local functions of domain `hif4`, whose bodies are standard operators that stock onnxruntime runs.

B, T, N are any sizes, K channels a multiple of 64 (the caller pads), U = K/64 units; planes as in `runtime.format`.

    Quantize(x f32 [B,T,K]) -> codes u8 [B,T,K/2], scales u8 [B,T,U,4]      bit for bit `runtime.format.quantize`
    Dequantize(codes, scales) -> values f32 [B,T,K]                         exact
    QuantizeDequantize(x f32 [B,T,K]) -> values f32 [B,T,K]                 Dequantize(Quantize(x)), sign of zero too
    Linear(x f32 [B,T,K], codes u8 [N,K/2], scales u8 [N,U,4], after f32) -> f32 [B,T,N]     x @ Dequantize(weight)^T
    Hadamard64(x f32 [B,T,K]) -> f32 [B,T,K]     one function a width; exactly `runtime.rotation.block_hadamard`, but
        a zero may lose its sign and a run with Inf becomes NaN throughout, which quantizes alike

A weight is decoded once `after` has been computed, a value of any shape whose numbers do not matter: a session that
knew the weights from the start would fold them into constants of eight times their size, or decode them all before the
first product. With the result of the linear before (for the first one: its own x) one weight at a time is unpacked.

A call takes tables besides, which all calls share: `call` writes the node, `tables` gives the initializers, and
`table_nodes` the nodes that compute the largest table from them (a session folds it into a constant of 3 MiB).
"""

import functools
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import UNIT, quantize
from hif4c.runtime.rotation import check_width

__all__ = [
    "DOMAIN",
    "MAX_OPSET",
    "MIN_OPSET",
    "call",
    "check_opset",
    "functions",
    "hadamard",
    "table_nodes",
    "tables",
]

DOMAIN = "hif4"
MIN_OPSET = 20
MAX_OPSET = 26

_THRESHOLDS, _RECIPROCALS, _PRODUCTS, _NOTHING = "hif4.thresholds", "hif4.reciprocals", "hif4.products", "hif4.nothing"
_NEIGHBOUR, _RUNS = "hif4.half_of_neighbour", "hif4.runs"
_NIBBLES, _EXPONENTS, _EIGHTHS = "hif4.nibbles", "hif4.exponents", "hif4.eighths"
_MAGNITUDES, _JOIN, _LEVEL2, _LEVEL3 = "hif4.magnitudes", "hif4.join", "hif4.level2", "hif4.level3"
_UNITS, _LOW, _HIGH, _POWERS = "hif4.units", "hif4.low_pairs", "hif4.high_pairs", "hif4.powers"
_GRID, _ROWS = "hif4.grid", "hif4.rows"
_SCALE_TABLES = (_NOTHING, _THRESHOLDS, _RECIPROCALS, _NEIGHBOUR, _RUNS)
_DECODE_TABLES = (_MAGNITUDES, _JOIN, _UNITS, _LEVEL2, _LEVEL3)
_TABLES = {
    "Quantize": (*_SCALE_TABLES, _NIBBLES, _EXPONENTS, _EIGHTHS),
    "Dequantize": _DECODE_TABLES,
    "QuantizeDequantize": (*_SCALE_TABLES, _PRODUCTS),
    "Linear": _DECODE_TABLES,
}
_INNER = 64  # widest butterfly matrix: the higher bits of a wider rotation are a matrix on the other side


def check_opset(opset: int) -> None:
    """Raise Hif4Error for an opset of the default domain that is not supported, here or by the package onnx."""
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise Hif4Error(f"ONNX opset {opset} is not supported; choose one from {MIN_OPSET} to {MAX_OPSET}.")
    from onnx import __version__, defs

    if opset > (newest := defs.onnx_opset_version()):
        raise Hif4Error(
            f"ONNX opset {opset} is newer than the package onnx {__version__} knows; upgrade it, or choose one from "
            f"{MIN_OPSET} to {newest}."
        )


def functions(opset: int, widths: Collection[int], *, qdq: bool) -> list[Any]:
    """FunctionProtos of domain `hif4` for a model whose default domain is at `opset`.

    `widths`: the Hadamard widths that occur. `qdq`: Quantize and Dequantize instead of QuantizeDequantize.
    Raises Hif4Error for an opset that is not supported or a width that is not a power of two from 2 to 1024.
    """
    check_opset(opset)
    bodies = [_quantize(), _dequantize()] if qdq else [_quantize_dequantize()]
    bodies.append(_linear())
    bodies.extend(_hadamard(width) for width in sorted(set(widths)))
    return [_parse(opset, body) for body in bodies]


def hadamard(width: int) -> str:
    """Name of the function that rotates by `width`; raises Hif4Error for a width that there cannot be."""
    check_width(width, width)
    return f"Hadamard{width}"


def call(function: str, inputs: Iterable[str], outputs: Iterable[str], name: str = "") -> Any:
    """NodeProto that calls `function` ("Linear", `hadamard(64)`, ...): its inputs as in the module's docstring."""
    from onnx import helper

    return helper.make_node(function, [*inputs, *_table_names(function)], [*outputs], name=name, domain=DOMAIN)


def tables(called: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
    """Initializers (name -> array) that calls of the functions of these names read; a few ten KB in all."""
    found: dict[str, npt.NDArray[Any]] = {}
    for function in sorted(set(called)):
        known = _format_tables() if function in _TABLES else _hadamard_tables(_width(function))
        names = set(_table_names(function))
        if _MAGNITUDES in names:
            names = names - {_MAGNITUDES} | {_LOW, _HIGH, _POWERS, _GRID, _ROWS}
        found.update({name: known[name] for name in sorted(names)})
    return found


def table_nodes(called: Iterable[str]) -> list[tuple[Any, tuple[int, ...]]]:
    """Nodes to put before the calls of the functions of these names, each with the shape of its fp32 result.

    They compute a table from initializers: row (E1_8 + E1_16) * 65536 + c, fp32 [196608, 4], holds the in-unit integers
    of a run of 4 whose two code bytes are the number c, the first byte in its low half.
    """
    from onnx import helper

    if not any(_MAGNITUDES in _table_names(function) for function in called):
        return []
    low, high, pairs, scaled = (f"{_MAGNITUDES}/{step}" for step in ("low", "high", "pairs", "scaled"))
    return [
        (helper.make_node("Expand", [_LOW, _GRID], [low], name=low), (256, 256, 2)),
        (helper.make_node("Expand", [_HIGH, _GRID], [high], name=high), (256, 256, 2)),
        (helper.make_node("Concat", [low, high], [pairs], name=pairs, axis=2), (256, 256, 4)),
        (helper.make_node("Mul", [pairs, _POWERS], [scaled], name=scaled), (3, 256, 256, 4)),
        (helper.make_node("Reshape", [scaled, _ROWS], [_MAGNITUDES], name=_MAGNITUDES), (3 * 65536, 4)),
    ]


def _table_names(function: str) -> tuple[str, ...]:
    return _TABLES[function] if function in _TABLES else tuple(_hadamard_tables(_width(function)))


def _width(function: str) -> int:
    return int(function.removeprefix("Hadamard"))


def _parse(opset: int, body: str) -> Any:
    from onnx import parser

    return parser.parse_function(f'<opset_import: ["" : {opset}], domain: "{DOMAIN}">\n{body}')


# From x to the in-unit magnitudes q, in a view [B, T, U, 64].
# `index` is 255 - E6M2 byte: the first of 256 falling thresholds that the unit's maximum reaches. A unit that holds NaN
# or Inf gives NaN when multiplied by zeros (pooling need not keep NaN) and reaches none: index 0, the byte 0xFF.
# `power` is 2^(E1_8 + E1_16) / 2 of each run of 4: its scaled maximum rounded down to 1/2, 1 or 2, and at least half of
# that of the other run of the pair, as a pair shares E1_8. Products with `runs` repeat each number 4 times, times 4.
_MAGNITUDE = """
    by_unit = Constant <value_ints = [0, 0, -1, 64]> ()
    half = Constant <value_float = 0.5> ()
    two = Constant <value_float = 2.0> ()
    seven = Constant <value_float = 7.0> ()
    x_units = Reshape (x, by_unit)
    a = Abs (x_units)
    top4 = MaxPool <kernel_shape = [1, 4], strides = [1, 4]> (a)
    top = MaxPool <kernel_shape = [1, 16], strides = [1, 16]> (top4)
    invalid = MatMul (x_units, nothing)
    top_or_nan = Add (top, invalid)
    reached = GreaterOrEqual (top_or_nan, thresholds)
    reached_u8 = Cast <to = 2> (reached)
    index = ArgMax <axis = -1> (reached_u8)
    reciprocal = Gather (reciprocals, index)
    scaled = Mul (top4, reciprocal)
    whole = Floor (scaled)
    own = Clip (whole, half, two)
    other = MatMul (own, neighbour)
    power = Max (own, other)
    factor4 = Div (reciprocal, power)
    factor = MatMul (factor4, runs)
    t = Mul (a, factor)
    u = Add (t, half)
    floor = Floor (u)
    q = Min (floor, seven)
"""
_FLAT = "flat = Constant <value_ints = [0, 0, -1]> ()"


def _quantize_dequantize() -> str:
    # The scale of a run is product / factor: (r * E6M2) / (r / power) with every quotient exact.
    return f"""QuantizeDequantize (x, nothing, thresholds, reciprocals, neighbour, runs, products) => (values) {{
    {_MAGNITUDE}
    sign = Sign (x_units)
    signed = Mul (q, sign)
    product = Gather (products, index)
    scale = Div (product, factor)
    value_units = Mul (signed, scale)
    {_FLAT}
    values = Reshape (value_units, flat)
}}"""


def _quantize() -> str:
    # Bits come from sums of powers of two: `exponents` weighs E1_8 + E1_16, `eighths` adds E1_8's byte and takes E1_8
    # from both bits of E1_16.
    return f"""Quantize (x, nothing, thresholds, reciprocals, neighbour, runs, nibbles, exponents, eighths)
    => (codes, scales) {{
    {_MAGNITUDE}
    zero = Constant <value_float = 0.0> ()
    eight = Constant <value_float = 8.0> ()
    last = Constant <value_float = 255.0> ()
    negative = Less (x_units, zero)
    negative_f32 = Cast <to = 1> (negative)
    sign = Mul (negative_f32, eight)
    nibble = Add (q, sign)
    bytes = MatMul (nibble, nibbles)
    bad = IsNaN (top_or_nan)
    good_bytes = Where (bad, zero, bytes)
    codes_units = Cast <to = 2> (good_bytes)
    {_FLAT}
    codes = Reshape (codes_units, flat)
    both = Floor (power)
    both_bytes = MatMul (both, exponents)
    top8 = MaxPool <kernel_shape = [1, 2], strides = [1, 2]> (power)
    level2 = GreaterOrEqual (top8, two)
    level2_f32 = Cast <to = 1> (level2)
    level2_bytes = MatMul (level2_f32, eighths)
    levels = Add (both_bytes, level2_bytes)
    good_levels = Where (bad, zero, levels)
    index_f32 = Cast <to = 1> (index)
    e6m2 = Sub (last, index_f32)
    scales_f32 = Concat <axis = -1> (e6m2, good_levels)
    scales = Cast <to = 2> (scales_f32)
}}"""


def _decode(lead: str, codes: str, scales: str) -> str:
    """Lines that decode the planes `codes` and `scales` to `values`; `lead`: a 0 for each leading dimension."""
    return f"""
    codes_f32 = Cast <to = 1> ({codes})
    by_half = Constant <value_ints = [{lead}, -1, 2, 16]> ()
    halves = Reshape (codes_f32, by_half)
    code_pairs = MatMul (halves, join)
    scales_index = Cast <to = 6> ({scales})
    sizes = Constant <value_ints = [1, 1, 2]> ()
    byte0, byte1, bytes23 = Split <axis = -1> (scales_index, sizes)
    unit = Gather (units, byte0)
    row2 = Gather (level2, byte1)
    by_run = Constant <value_ints = [{lead}, -1, 2, 8]> ()
    row2_halves = Reshape (row2, by_run)
    row3_halves = Gather (level3, bytes23)
    level_rows = Add (row2_halves, row3_halves)
    rows_f32 = Add (level_rows, code_pairs)
    rows = Cast <to = 6> (rows_f32)
    integers = Gather (magnitudes, rows)
    by_unit = Constant <value_ints = [{lead}, -1, 64]> ()
    in_units = Reshape (integers, by_unit)
    value_units = Mul (in_units, unit)
    flat = Constant <value_ints = [{lead}, -1]> ()
    values = Reshape (value_units, flat)
"""


def _dequantize() -> str:
    body = _decode("0, 0", "codes", "scales")
    return f"Dequantize (codes, scales, magnitudes, join, units, level2, level3) => (values) {{ {body} }}"


def _linear() -> str:
    return f"""Linear (x, codes, scales, after, magnitudes, join, units, level2, level3) => (y) {{
    largest = ReduceMax <keepdims = 0> (after)
    never = Less (largest, largest)
    zero = Cast <to = 2> (never)
    live_codes = BitwiseXor (codes, zero)
    live_scales = BitwiseXor (scales, zero)
    {_decode("0", "live_codes", "live_scales")}
    transposed = Transpose <perm = [1, 0]> (values)
    y = MatMul (x, transposed)
}}"""


def _hadamard(width: int) -> str:
    """Each stage is a product with 0 and +-1, two of them not 0 in a column: one rounding, in any order of the sum."""
    inner, outer = _split_width(width)
    arguments = ["x", "scale", "inner", *(["outer"] if outer > 1 else [])]
    lines = [f"by_inner = Constant <value_ints = [0, 0, -1, {inner}]> ()", "y0 = Reshape (x, by_inner)"]
    stage = 0
    for _ in range(inner.bit_length() - 1):
        lines.append(f"y{stage + 1} = MatMul (y{stage}, inner)")
        stage += 1
    if outer > 1:
        lines.append(f"by_outer = Constant <value_ints = [0, 0, -1, {outer}, {inner}]> ()")
        lines.append(f"y{stage + 1} = Reshape (y{stage}, by_outer)")
        stage += 1
        for _ in range(outer.bit_length() - 1):
            lines.append(f"y{stage + 1} = MatMul (outer, y{stage})")
            stage += 1
    lines += ["flat = Constant <value_ints = [0, 0, -1]> ()", f"z = Reshape (y{stage}, flat)", "y = Mul (z, scale)"]
    return f"{hadamard(width)} ({', '.join(arguments)}) => (y) {{ {chr(10).join(lines)} }}"


def _split_width(width: int) -> tuple[int, int]:
    check_width(width, width)
    inner = min(width, _INNER)
    return inner, width // inner


@functools.cache
def _hadamard_tables(width: int) -> dict[str, npt.NDArray[Any]]:
    inner, outer = _split_width(width)
    found: dict[str, npt.NDArray[Any]] = {f"hif4.rotation_scale.{width}": np.array(width**-0.5, np.float32)}
    found[f"hif4.butterfly.{inner}"] = _butterfly(inner)
    if outer > 1:
        found[f"hif4.butterfly.{outer}.left"] = np.ascontiguousarray(_butterfly(outer).T)
    return found


def _butterfly(width: int) -> npt.NDArray[np.float32]:
    """One stage for row vectors: (x[2j], x[2j+1]) becomes their sum at j and their difference at j + width/2.

    The shuffle moves an index's lowest bit to the top: log2(width) stages with this one matrix pair strides 1, 2, 4,
    ... in turn and end in the natural order (the constant geometry of Pease, 1968).
    """
    matrix = np.zeros((width, width), np.float32)
    j = np.arange(width // 2)
    matrix[2 * j, j] = matrix[2 * j + 1, j] = matrix[2 * j, j + width // 2] = 1
    matrix[2 * j + 1, j + width // 2] = -1
    return matrix


@functools.cache
def _format_tables() -> dict[str, npt.NDArray[Any]]:
    byte = torch.arange(255, -1, -1)  # of an index
    e6m2 = torch.ldexp(1 + (byte % 4) / 4, torch.div(byte, 4, rounding_mode="floor") - 48)
    r = e6m2.reciprocal().to(torch.bfloat16).float()
    e6m2[0] = torch.nan
    code = np.arange(256)
    nibble = np.arange(16)
    magnitude = np.where(nibble > 7, -1, 1).astype(np.float32) * (nibble & 7).astype(np.float32)
    pairs = np.stack((magnitude[code & 0xF], magnitude[code >> 4]), axis=-1)
    bits = (code[:, None] >> np.arange(7, -1, -1)) & 1
    weights = (1 << np.arange(7, -1, -1)).astype(np.float32)
    exponents = np.zeros((16, 3), np.float32)
    exponents[:8, 1] = exponents[8:, 2] = weights
    eighths = -exponents.reshape(8, 2, 3).sum(1)
    eighths[:, 0] = weights
    return {
        _NOTHING: np.zeros((UNIT, 1), np.float32),
        _THRESHOLDS: _thresholds(),
        _RECIPROCALS: (r / 2).numpy(),
        _PRODUCTS: (r * e6m2).numpy(),
        _NEIGHBOUR: np.kron(np.eye(8), [[0, 0.5], [0.5, 0]]).astype(np.float32),
        _RUNS: np.kron(np.eye(16), np.full((1, 4), 4)).astype(np.float32),
        _NIBBLES: np.kron(np.eye(UNIT // 2), [[1], [16]]).astype(np.float32),
        _EXPONENTS: exponents,
        _EIGHTHS: eighths,
        _JOIN: np.kron(np.eye(8), [[1], [256]]).astype(np.float32),
        _UNITS: (e6m2 / 4).numpy()[::-1].copy(),
        _LEVEL2: (65536 * bits).astype(np.float32).repeat(2, axis=-1),
        _LEVEL3: (65536 * bits).astype(np.float32),
        _LOW: pairs,
        _HIGH: pairs[:, None],
        _POWERS: np.array([1, 2, 4], np.float32).reshape(3, 1, 1, 1),
        _GRID: np.array([256, 256, 2], np.int64),
        _ROWS: np.array([-1, 4], np.int64),
    }


@functools.cache
def _thresholds() -> npt.NDArray[np.float32]:
    """Falling, fp32 [256]: the least maximum of a unit that gives the byte 255 - index; Inf for 0xFF, 0 for byte 0.

    The byte rises with the maximum, and the bits of positive fp32 rise with the value: a bisection over the bits.
    """
    byte = torch.arange(255, -1, -1)
    low = torch.zeros(256, dtype=torch.int32)  # gives a byte below, or is the answer for byte 0
    high = torch.full((256,), 0x7F800000, dtype=torch.int32)
    while (high - low).max() > 1:
        middle = low + (high - low) // 2
        unit = torch.zeros(256, UNIT)
        unit[:, 0] = middle.view(torch.float32)
        reached = quantize(unit)[1][:, 0, 0] >= byte
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    high[-1] = 0
    return high.view(torch.float32).numpy()
