"""How the `hif4::` operators of a program become ONNX: calls of the functions of domain `hif4`, standard nodes around.

Between a quantizer and the linears that read it stand the values that the planes decode to, [B, T, Kp] float32: once a
quantizer, whatever reads it. The planes themselves are in the graph in the form "qdq", and where anything else reads
them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hif4c.compiler.onnx_functions import hadamard as hadamard_function
from hif4c.compiler.onnx_graph import OnnxGraph, Tensor
from hif4c.compiler.onnx_rows import attention, modulated_norm, rms_rotary
from hif4c.runtime.format import SCALE_BYTES, UNIT, packed_shapes
from hif4c.runtime.graph import TensorType

__all__ = ["HIF4_LOWERINGS", "QUANTIZERS", "Decoded"]

QUANTIZERS = ("hif4.quantize", "hif4.norm_quantize")


@dataclass(frozen=True)
class Decoded:
    """Stands for a plane of a quantizer that only linears read: the values [B, T, Kp] that both planes decode to."""

    values: Tensor


def _rows(g: OnnxGraph, x: Tensor, rank: int = 3) -> Tensor:
    """x with the batch that the functions expect: [T, K] as [1, T, K]."""
    if x.rank == rank:
        return x
    if x.rank != rank - 1:
        raise ValueError(f"a 4-bit operator on a tensor of {x.rank} dimensions")
    return g.add("Unsqueeze", [x.name, g.constant([0], np.int64)], replace(x.type, shape=(1, *x.shape)))


def _without_batch(g: OnnxGraph, y: Tensor, rank: int) -> Tensor:
    """What `_rows` has made, in the rank that it had."""
    if y.rank == rank:
        return y
    return g.add("Squeeze", [y.name, g.constant([0], np.int64)], replace(y.type, shape=y.shape[1:]))


def _channels(x: Tensor) -> int:
    k = x.shape[-1]
    if not isinstance(k, int):
        raise ValueError("a number of channels that is not known")
    return k


def _prepared(g: OnnxGraph, x: Tensor, mask: Tensor | None, hadamard: int) -> Tensor:
    """x times the mask, rotated, as [B, T, Kp] with channels of 0 behind the last."""
    k = _channels(x)
    x = _rows(g, x)
    if mask is not None:
        x = g.add("Mul", [x.name, mask.name], x.type)
    if hadamard > 1:
        (x,) = g.call(hadamard_function(hadamard), [x], [x.type])
    missing = -k % UNIT
    if missing:
        kind = replace(x.type, shape=(*x.shape[:-1], k + missing))
        x = g.add("Pad", [x.name, g.constant([0, 0, 0, 0, 0, missing], np.int64)], kind)
    return x


def _quantize(
    g: OnnxGraph, kinds: Any, x: Tensor, mask: Tensor | None = None, hadamard: int = 0, *, planes: bool = False
) -> list[Any]:
    rows = _prepared(g, x, mask, hadamard)
    if not planes:
        (values,) = g.call("QuantizeDequantize", [rows], [rows.type])
        return [Decoded(values), Decoded(values)]
    codes, scales = packed_shapes(rows.shape)
    found = g.call("Quantize", [rows], [TensorType("uint8", codes), TensorType("uint8", scales)])
    return [_without_batch(g, plane, x.rank + place) for place, plane in enumerate(found)]


def _decoded(g: OnnxGraph, codes: Tensor | Decoded, scales: Tensor | Decoded) -> Tensor:
    """The values [B, T, Kp] of planes."""
    if isinstance(codes, Decoded) or isinstance(scales, Decoded):
        if codes != scales or not isinstance(codes, Decoded):
            raise ValueError("planes of two tensors in one operator")
        return codes.values
    codes, scales = _rows(g, codes), _rows(g, scales, 4)
    kind = TensorType("float32", (*codes.shape[:-1], scales.shape[-2] * UNIT))
    return g.call("Dequantize", [codes, scales], [kind])[0]


def _dequantize(
    g: OnnxGraph, kind: TensorType, codes: Tensor | Decoded, scales: Tensor | Decoded, k: int, dtype: Any = None
) -> Tensor:
    values = _decoded(g, codes, scales)
    if _channels(values) != k:
        bounds = [g.constant([value], np.int64) for value in (0, k, -1)]
        values = g.add("Slice", [values.name, *bounds], replace(values.type, shape=(*values.shape[:-1], k)))
    return g.cast(_without_batch(g, values, len(kind.shape)), kind.dtype)


def _linear(
    g: OnnxGraph,
    kind: TensorType,
    codes: Tensor | Decoded,
    scales: Tensor | Decoded,
    w_codes: Tensor,
    w_scales: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    dtype: Any = None,
    side: Tensor | None = None,
    side_weight: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    values = _decoded(g, codes, scales)
    g.quantized.setdefault(values.name, g.module)
    product = _product(g, kind, values, w_codes, w_scales)
    return _finish(g, product, bias, activation, side, side_weight, gate, residual)


def _linear_w4(
    g: OnnxGraph,
    kind: TensorType,
    x: Tensor,
    w_codes: Tensor,
    w_scales: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    hadamard: int = 0,
    activation: str | None = None,
    dtype: Any = None,
    side: Tensor | None = None,
    side_weight: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    product = _product(g, kind, _prepared(g, x, mask, hadamard), w_codes, w_scales)
    return _finish(g, product, bias, activation, side, side_weight, gate, residual)


def _product(g: OnnxGraph, kind: TensorType, values: Tensor, w_codes: Tensor, w_scales: Tensor) -> Tensor:
    """The 4-bit product of values [B, T, Kp], in the rank of the result."""
    if tuple(w_scales.shape[1:]) != (_channels(values) // UNIT, SCALE_BYTES):
        raise ValueError("a 4-bit weight that does not fit its input")
    result = replace(values.type, shape=(*values.shape[:-1], w_codes.shape[0]))
    (product,) = g.call("Linear", [values, w_codes, w_scales, g.last_product or values], [result])
    g.last_product = product
    return _without_batch(g, product, len(kind.shape))


def _finish(
    g: OnnxGraph,
    y: Tensor,
    bias: Tensor | None,
    activation: str | None,
    side: Tensor | None,
    side_weight: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """Side branch, bias, activation, gate and residual, in the order of `runtime.reference`."""
    if side is not None and side_weight is not None:
        branch = g.add("MatMul", [side.name, side_weight.name], y.type)
        y = g.add("Add", [y.name, branch.name], y.type)
    if bias is not None:
        y = g.add("Add", [y.name, bias.name], y.type)
    if activation is not None:
        if activation != "gelu_tanh":
            raise ValueError(f"the activation {activation!r}")
        y = g.add("Gelu", [y.name], y.type, approximate="tanh")
    if gate is not None:
        y = g.add("Mul", [y.name, gate.name], y.type)
    return y if residual is None else g.add("Add", [residual.name, y.name], y.type)


def _norm(
    g: OnnxGraph,
    kind: TensorType,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    dtype: Any,
) -> Tensor:
    return modulated_norm(g, x, weight, bias, scale, shift, eps)


def _norm_quantize(
    g: OnnxGraph,
    kinds: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    dtype: Any,
    mask: Tensor | None = None,
    hadamard: int = 0,
    *,
    planes: bool = False,
) -> list[Any]:
    y = modulated_norm(g, x, weight, bias, scale, shift, eps)
    return _quantize(g, kinds, y, mask, hadamard, planes=planes)


def _rms_rotary(
    g: OnnxGraph,
    kind: TensorType,
    x: Tensor,
    weight: Tensor,
    eps: float,
    heads: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    return rms_rotary(g, x, weight, eps, heads, cos, sin)


def _attention(g: OnnxGraph, kind: TensorType, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(g, q, k, v)


HIF4_LOWERINGS: dict[str, Callable[..., Any]] = {
    "hif4.quantize": _quantize,
    "hif4.dequantize": _dequantize,
    "hif4.linear": _linear,
    "hif4.linear_w4": _linear_w4,
    "hif4.norm": _norm,
    "hif4.norm_quantize": _norm_quantize,
    "hif4.rms_rotary": _rms_rotary,
    "hif4.attention": _attention,
}
