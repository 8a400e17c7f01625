"""Norms, rotary embedding and attention in ONNX: what `runtime.rows` does, in float32 without roundings to bf16."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hif4c.compiler.onnx_graph import OnnxGraph, Tensor
from hif4c.runtime.graph import TensorType

__all__ = ["attention", "layer_norm", "modulated_norm", "rms_norm", "rms_rotary"]

FUSED_OPSET = 23
"""The first that has RMSNormalization and Attention: half the memory of attention's parts, in onnxruntime's CPU."""


def layer_norm(g: OnnxGraph, x: Tensor, dims: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last `dims` dimensions."""
    scale = g.constant(np.ones(x.shape[-dims:])) if weight is None else weight.name
    inputs = [x.name, scale, *([] if bias is None else [bias.name])]
    return g.add("LayerNormalization", inputs, x.type, axis=-dims, epsilon=eps)


def modulated_norm(
    g: OnnxGraph,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> Tensor:
    """`runtime.rows.norm`: layer norm over the channels, then `* (scale + 1) + shift`."""
    y = layer_norm(g, x, 1, weight, bias, eps)
    if scale is None or shift is None:
        return y
    factor = g.add("Add", [scale.name, g.constant(1.0)], scale.type)
    return g.add("Add", [g.add("Mul", [y.name, factor.name], x.type).name, shift.name], x.type)


def rms_norm(g: OnnxGraph, x: Tensor, dims: int, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm over the last `dims` dimensions."""
    if g.opset >= FUSED_OPSET:
        scale = g.constant(np.ones(x.shape[-dims:])) if weight is None else weight.name
        return g.add("RMSNormalization", [x.name, scale], x.type, axis=-dims, epsilon=eps)
    row = replace(x.type, shape=(*x.shape[:-dims], *(1 for _ in range(dims))))
    square = g.add("Pow", [x.name, g.constant(2.0)], x.type)
    axes = g.constant(list(range(-dims, 0)), np.int64)
    mean = g.add("ReduceMean", [square.name, axes], row)
    root = g.add("Sqrt", [g.add("Add", [mean.name, g.constant(eps)], row).name], row)
    y = g.add("Div", [x.name, root.name], x.type)
    return y if weight is None else g.add("Mul", [y.name, weight.name], x.type)


def rms_rotary(
    g: OnnxGraph, x: Tensor, weight: Tensor, eps: float, heads: int, cos: Tensor | None, sin: Tensor | None
) -> Tensor:
    """`runtime.rows.rms_rotary`: x [B, T, H*D] to [B, T, H, D]."""
    batch, tokens, channels = x.shape
    if not isinstance(channels, int):
        raise ValueError("the channels of an RMS norm are not known")
    width = channels // heads
    by_head = TensorType("float32", (batch, tokens, heads, width))
    y = rms_norm(g, x, 1, weight, eps)
    if cos is None or sin is None:
        return g.reshape(y, [0, 0, heads, width], by_head)
    pairs = g.reshape(y, [0, 0, heads, width // 2, 2], replace(by_head, shape=(*by_head.shape[:3], width // 2, 2)))
    half = replace(by_head, shape=(*by_head.shape[:3], width // 2, 1))
    first, second = (
        item.name for item in g.add_many("Split", [pairs.name, g.constant([1, 1], np.int64)], [half, half], axis=-1)
    )
    axes = g.constant([4], np.int64)
    c, s = (
        g.add("Unsqueeze", [table.name, axes], replace(table.type, shape=(*table.shape, 1))).name
        for table in (cos, sin)
    )
    turned = [
        g.add("Sub", [g.add("Mul", [first, c], half).name, g.add("Mul", [second, s], half).name], half).name,
        g.add("Add", [g.add("Mul", [first, s], half).name, g.add("Mul", [second, c], half).name], half).name,
    ]
    return g.reshape(g.add("Concat", turned, pairs.type, axis=-1), [0, 0, heads, width], by_head)


def attention(
    g: OnnxGraph,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k^T * scale + mask) v: q [..., T, D], k and v [..., S, D]; without a scale it is 1/sqrt(D)."""
    width, rank = query.shape[-1], query.rank
    if not isinstance(width, int):
        raise ValueError("the width of a head is not known")
    scale = width**-0.5 if scale is None else scale
    if g.opset >= FUSED_OPSET and rank == 4:
        inputs = [query.name, key.name, value.name, *([] if mask is None else [mask.name])]
        return g.add("Attention", inputs, replace(query.type, shape=(*query.shape[:-1], value.shape[-1])), scale=scale)
    factor = g.constant(scale)
    scaled = g.add("Mul", [query.name, factor], query.type)
    turned = g.add(
        "Transpose",
        [key.name],
        replace(key.type, shape=(*key.shape[:-2], key.shape[-1], key.shape[-2])),
        perm=[*range(rank - 2), rank - 1, rank - 2],
    )
    square = replace(query.type, shape=(*query.shape[:-1], key.shape[-2]))
    scores = g.add("MatMul", [scaled.name, turned.name], square)
    if mask is not None:
        scores = g.add("Add", [scores.name, mask.name], square)
    weights = g.add("Softmax", [scores.name], square, axis=-1)
    result = replace(query.type, shape=(*query.shape[:-1], value.shape[-1]))
    return g.add("MatMul", [weights.name, value.name], result)
