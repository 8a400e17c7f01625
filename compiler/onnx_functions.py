"""HiFloat4 as ONNX: local functions of domain `hif4`, whose bodies are standard operators that stock onnxruntime runs.

B, T, N are any sizes, K channels a multiple of 64 (the caller pads), U = K/64 units; planes as in `runtime.format`.

    Quantize(x f32 [B,T,K]) -> codes u8 [B,T,K/2], scales u8 [B,T,U,4]      bit for bit `runtime.format.quantize`
    Dequantize(codes, scales) -> values f32 [B,T,K]                         exact
    QuantizeDequantize(x f32 [B,T,K]) -> values f32 [B,T,K]                 Dequantize(Quantize(x)); sign of zero too
    Linear(x f32 [B,T,K], codes u8 [N,K/2], scales u8 [N,U,4]) -> f32 [B,T,N]     x @ Dequantize(weight)^T
    Hadamard64(x f32 [B,T,K]) -> f32 [B,T,K]     one function a width; bit for bit `runtime.rotation.block_hadamard`

A call takes more inputs than these: tables, which are initializers shared by all calls, and a zero (uint8, no
dimensions) that is computed from an input of the model, so that a session cannot fold the decoded weights into
constants of eight times their size. `call` writes the node with them, `tables` gives the initializers and `zero_nodes`
the nodes that compute the zero.
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

__all__ = ["DOMAIN", "MAX_OPSET", "MIN_OPSET", "ZERO", "call", "functions", "hadamard", "tables", "zero_nodes"]

DOMAIN = "hif4"
MIN_OPSET = 20
MAX_OPSET = 23
ZERO = "hif4.zero"  # the value's name in the main graph

_RECIPROCALS, _PRODUCTS, _THRESHOLDS = "hif4.reciprocals", "hif4.products", "hif4.thresholds"
_UNITS, _PAIRS, _POWERS = "hif4.units", "hif4.pairs", "hif4.powers"
_PACK_NIBBLES, _PACK_EIGHTS, _PACK_SIXTEENTHS = "hif4.pack_nibbles", "hif4.pack_eighths", "hif4.pack_sixteenths"
_DECODE = (ZERO, _PAIRS, _POWERS, _UNITS)
_EXTRA_INPUTS = {
    "Quantize": (_THRESHOLDS, _RECIPROCALS, _PACK_NIBBLES, _PACK_EIGHTS, _PACK_SIXTEENTHS),
    "Dequantize": _DECODE,
    "QuantizeDequantize": (_THRESHOLDS, _RECIPROCALS, _PRODUCTS),
    "Linear": _DECODE,
}
_INNER = 64  # widest butterfly matrix: the higher bits of a wider rotation are a matrix on the other side


def functions(opset: int, widths: Collection[int], *, qdq: bool) -> list[Any]:
    """FunctionProtos of domain `hif4` for a model whose default domain is at `opset`.

    `widths`: the Hadamard widths that occur. `qdq`: Quantize and Dequantize instead of QuantizeDequantize.
    Raises Hif4Error for an opset that is not supported or a width that is not a power of two from 2 to 1024.
    """
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise Hif4Error(f"ONNX opset {opset} is not supported; choose one from {MIN_OPSET} to {MAX_OPSET}.")
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

    return helper.make_node(function, [*inputs, *_extra_inputs(function)], [*outputs], name=name, domain=DOMAIN)


def zero_nodes(source: str) -> list[Any]:
    """Nodes that compute ZERO from `source`, a small input of the model (the timestep): float or integer, not empty."""
    from onnx import TensorProto, helper

    return [
        helper.make_node("Less", [source, source], ["hif4.never"]),
        helper.make_node("Cast", ["hif4.never"], ["hif4.zeros"], to=TensorProto.UINT8),
        helper.make_node("ReduceMax", ["hif4.zeros"], [ZERO], keepdims=0),
    ]


def tables(called: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
    """Initializers (name -> array) that calls of the functions of these names read; a few hundred KB in all."""
    found: dict[str, npt.NDArray[Any]] = {}
    for function in sorted(set(called)):
        if function in _EXTRA_INPUTS:
            found.update({name: _format_tables()[name] for name in _EXTRA_INPUTS[function] if name != ZERO})
        else:
            found.update(_hadamard_tables(int(function.removeprefix("Hadamard"))))
    return found


def _extra_inputs(function: str) -> tuple[str, ...]:
    if function in _EXTRA_INPUTS:
        return _EXTRA_INPUTS[function]
    return tuple(_hadamard_tables(int(function.removeprefix("Hadamard"))))


def _parse(opset: int, body: str) -> Any:
    from onnx import parser

    return parser.parse_function(f'<opset_import: ["" : {opset}], domain: "{DOMAIN}">\n{body}')


# Index of a unit's scale: 255 - E6M2 byte, the first of 256 falling thresholds that the unit's maximum reaches. NaN
# reaches none and Inf reaches the first, which is Inf: both give index 0, the byte 0xFF.
_SCALE = """
    a = Abs (x)
    inf = Constant <value_float = inf> ()
    finite = Less (a, inf)
    b = Where (finite, a, inf)
    max4 = MaxPool <kernel_shape = [4], strides = [4]> (b)
    max8 = MaxPool <kernel_shape = [2], strides = [2]> (max4)
    max64 = MaxPool <kernel_shape = [8], strides = [8]> (max8)
    by_unit = Constant <value_ints = [0, 0, -1, 1]> ()
    top = Reshape (max64, by_unit)
    reached = GreaterOrEqual (top, thresholds)
    bits = Cast <to = 2> (reached)
    index = ArgMax <axis = -1> (bits)
    r = Gather (reciprocals, index)
    by_run8 = Constant <value_ints = [0, 0, -1, 8]> ()
    top8 = Reshape (max8, by_run8)
    scaled8 = Mul (top8, r)
    sixteen = Constant <value_float = 16.0> ()
    half = Constant <value_float = 0.5> ()
    e8 = GreaterOrEqual (scaled8, sixteen)
    half_r = Mul (r, half)
    g8 = Where (e8, half_r, r)
    by_pair = Constant <value_ints = [0, 0, -1, 8, 1]> ()
    g8_pairs = Reshape (g8, by_pair)
    by_run4 = Constant <value_ints = [0, 0, -1, 8, 2]> ()
    top4 = Reshape (max4, by_run4)
    scaled4 = Mul (top4, g8_pairs)
    eight = Constant <value_float = 8.0> ()
    e16 = GreaterOrEqual (scaled4, eight)
    half_g8 = Mul (g8_pairs, half)
    g16 = Where (e16, half_g8, g8_pairs)
    by_four = Constant <value_ints = [0, 0, -1, 1]> ()
    g = Reshape (g16, by_four)
    runs = Constant <value_ints = [0, 0, -1, 4]> ()
    a_runs = Reshape (b, runs)
    t = Mul (a_runs, g)
    u = Add (t, half)
    whole = Floor (u)
    seven = Constant <value_float = 7.0> ()
    q = Min (whole, seven)
"""


def _quantize_dequantize() -> str:
    return f"""QuantizeDequantize (x, thresholds, reciprocals, products) => (values) {{ {_SCALE}
    sign = Sign (x)
    sign_runs = Reshape (sign, runs)
    signed = Mul (q, sign_runs)
    product = Gather (products, index)
    by_unit_run = Constant <value_ints = [0, 0, -1, 16]> ()
    g_units = Reshape (g, by_unit_run)
    h_units = Div (product, g_units)
    h = Reshape (h_units, by_four)
    values_runs = Mul (signed, h)
    flat = Constant <value_ints = [0, 0, -1]> ()
    values = Reshape (values_runs, flat)
}}"""


def _quantize() -> str:
    return f"""Quantize (x, thresholds, reciprocals, pack_nibbles, pack_eighths, pack_sixteenths) => (codes, scales) {{
    {_SCALE}
    zero = Constant <value_float = 0.0> ()
    negative = Less (x, zero)
    negative_f = Cast <to = 1> (negative)
    sign = Mul (negative_f, eight)
    units = Constant <value_ints = [0, 0, -1, 64]> ()
    sign_units = Reshape (sign, units)
    q_units = Reshape (q, units)
    nibbles = Add (q_units, sign_units)
    bytes = MatMul (nibbles, pack_nibbles)
    valid = Less (top, inf)
    bytes_valid = Where (valid, bytes, zero)
    bytes_u8 = Cast <to = 2> (bytes_valid)
    flat = Constant <value_ints = [0, 0, -1]> ()
    codes = Reshape (bytes_u8, flat)
    e8_f = Cast <to = 1> (e8)
    byte1 = MatMul (e8_f, pack_eighths)
    e16_f = Cast <to = 1> (e16)
    by_sixteen = Constant <value_ints = [0, 0, -1, 16]> ()
    e16_units = Reshape (e16_f, by_sixteen)
    bytes23 = MatMul (e16_units, pack_sixteenths)
    exponents = Concat <axis = -1> (byte1, bytes23)
    exponents_valid = Where (valid, exponents, zero)
    index_f = Cast <to = 1> (index)
    last = Constant <value_float = 255.0> ()
    byte0 = Sub (last, index_f)
    scales_f = Concat <axis = -1> (byte0, exponents_valid)
    scales = Cast <to = 2> (scales_f)
}}"""


def _decode(lead: str) -> str:
    """Lines that decode `codes` and `scales` to `values`; `lead`: a 0 for each leading dimension."""
    return f"""
    codes_live = BitwiseXor (codes, zero)
    codes_index = Cast <to = 6> (codes_live)
    magnitudes = Gather (pairs, codes_index)
    scales_live = BitwiseXor (scales, zero)
    scales_index = Cast <to = 6> (scales_live)
    ends = Constant <value_ints = [1, 1, 2]> ()
    byte0, byte1, bytes23 = Split <axis = -1> (scales_index, ends)
    sixteen = Constant <value = int32 {{16}}> ()
    quarter_k = Constant <value = int32 {{256}}> ()
    high = Div (byte1, sixteen)
    low = Mod (byte1, sixteen)
    eighths = Concat <axis = -1> (high, low)
    shifted = Mul (eighths, quarter_k)
    powers_index = Add (shifted, bytes23)
    power = Gather (powers, powers_index)
    by_unit = Constant <value_ints = [{lead}, -1, 64]> ()
    power_units = Reshape (power, by_unit)
    unit = Gather (units, byte0)
    factor = Mul (power_units, unit)
    magnitude_units = Reshape (magnitudes, by_unit)
    value_units = Mul (magnitude_units, factor)
    flat = Constant <value_ints = [{lead}, -1]> ()
    values = Reshape (value_units, flat)
"""


def _dequantize() -> str:
    return f"Dequantize (codes, scales, zero, pairs, powers, units) => (values) {{ {_decode('0, 0')} }}"


def _linear() -> str:
    return f"""Linear (x, codes, scales, zero, pairs, powers, units) => (y) {{ {_decode("0")}
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
    index = torch.arange(255, -1, -1)  # 255 - index is the byte
    e6m2 = torch.ldexp(1 + (index % 4) / 4, torch.div(index, 4, rounding_mode="floor") - 48)
    e6m2[0] = torch.nan
    r = e6m2.reciprocal().to(torch.bfloat16).float()
    byte = np.arange(256)
    nibble = np.arange(16)
    value = np.where(nibble > 7, -1, 1).astype(np.float32) * (nibble & 7).astype(np.float32)
    combined = np.arange(16 * 256)[:, None]
    level2 = ((combined >> 8) >> np.arange(3, -1, -1) & 1).repeat(2, axis=-1)
    level3 = combined >> np.arange(7, -1, -1) & 1
    pack = np.zeros((UNIT, UNIT // 2), np.float32)
    column = np.arange(UNIT // 2)
    pack[2 * column, column], pack[2 * column + 1, column] = 1, 16
    bits = (1 << np.arange(7, -1, -1)).astype(np.float32)
    sixteenths = np.zeros((16, 2), np.float32)
    sixteenths[:8, 0] = sixteenths[8:, 1] = bits
    return {
        _THRESHOLDS: _thresholds(),
        _RECIPROCALS: (r * 4).numpy(),
        _PRODUCTS: (r * e6m2).numpy(),
        _UNITS: (e6m2 / 4).numpy()[::-1].copy(),
        _PAIRS: np.stack((value[byte & 0xF], value[byte >> 4]), axis=-1),
        _POWERS: (1 << (level2 + level3)).astype(np.float32).repeat(4, axis=-1),
        _PACK_NIBBLES: pack,
        _PACK_EIGHTS: bits[:, None],
        _PACK_SIXTEENTHS: sixteenths,
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
