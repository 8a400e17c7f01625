"""How each operator of a program becomes ONNX: `LOWERINGS`, one entry for each of `runtime.graph.TARGETS`.

A lowering is called with the graph, the type of the result, and the node's arguments, in which references are replaced
by what they stand for: `Tensor`, `Size`, or a list of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hif4c.compiler.onnx_graph import END, OnnxGraph, Size, Tensor, computed
from hif4c.compiler.onnx_operators_hif4 import HIF4_LOWERINGS
from hif4c.compiler.onnx_rows import attention, layer_norm, rms_norm
from hif4c.runtime.graph import DTYPE_NAMES, DTYPES, TensorType

__all__ = ["LOWERINGS", "Lowering"]

Lowering = Callable[..., Any]


def _operand(g: OnnxGraph, value: Any, dtype: str) -> Tensor:
    """A tensor, size or number as a value of a dtype."""
    if isinstance(value, Tensor):
        return g.cast(value, dtype)
    if isinstance(value, Size) and isinstance(value.value, str):
        return g.cast(Tensor(value.value, TensorType("int64", (1,))), dtype)
    number = value.value if isinstance(value, Size) else value
    kind = computed(TensorType(dtype, ()))
    return Tensor(g.constant(number, np.dtype(kind.dtype)), kind)


def _arithmetic(operator: str) -> Lowering:
    def lower(g: OnnxGraph, kind: TensorType, a: Any, b: Any, *, alpha: float = 1) -> Tensor:
        first, second = _operand(g, a, kind.dtype), _operand(g, b, kind.dtype)
        if alpha != 1:
            second = g.add("Mul", [second.name, _operand(g, alpha, kind.dtype).name], second.type)
        return g.add(operator, [first.name, second.name], kind)

    return lower


def _unary(operator: str) -> Lowering:
    def lower(g: OnnxGraph, kind: TensorType, x: Tensor) -> Tensor:
        return g.add(operator, [g.cast(x, kind.dtype).name], kind)

    return lower


def _arange(g: OnnxGraph, kind: TensorType, start: Any, end: Any, **options: Any) -> Tensor:
    ends = [start, end]
    if all(isinstance(item, (int, float)) for item in ends):
        values = torch.arange(start, end, dtype=DTYPES[computed(kind).dtype]).numpy()
        return Tensor(g.constant(values, values.dtype), computed(kind))
    if any(isinstance(item, float) for item in ends):
        raise ValueError("a range from or to a fraction, whose other end is not known")
    scalar = TensorType("int64", ())
    names = [
        g.add("Squeeze", [item.value], scalar).name
        if isinstance(item, Size) and isinstance(item.value, str)
        else g.constant(item.value if isinstance(item, Size) else item, np.int64)
        for item in ends
    ]
    found = g.add("Range", [*names, g.constant(1, np.int64)], TensorType("int64", kind.shape))
    return g.cast(found, kind.dtype)


def _cat(g: OnnxGraph, kind: TensorType, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    names = [g.cast(item, kind.dtype).name for item in tensors]
    return g.add("Concat", names, kind, axis=tensors[0].axis(dim))


def _stack(g: OnnxGraph, kind: TensorType, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    axis = dim % len(kind.shape)
    part = TensorType(kind.dtype, (*kind.shape[:axis], 1, *kind.shape[axis + 1 :]))
    axes = g.constant([axis], np.int64)
    names = [g.add("Unsqueeze", [g.cast(item, kind.dtype).name, axes], part).name for item in tensors]
    return g.add("Concat", names, kind, axis=axis)


def _chunk(g: OnnxGraph, kinds: tuple[TensorType, ...], x: Tensor, chunks: int, dim: int = 0) -> list[Tensor]:
    axis = x.axis(dim)
    sizes = [kind.shape[axis] for kind in kinds]
    if len(kinds) == 1:
        return [x]
    if all(isinstance(size, int) for size in sizes):
        return g.add_many("Split", [x.name, g.constant(sizes, np.int64)], kinds, axis=axis)
    return g.add_many("Split", [x.name], kinds, axis=axis, num_outputs=len(kinds))


def _split_with_sizes(
    g: OnnxGraph, kinds: tuple[TensorType, ...], x: Tensor, sizes: Sequence[int | Size], dim: int = 0
) -> list[Tensor]:
    return g.add_many("Split", [x.name, g.shape_vector(sizes)], kinds, axis=x.axis(dim))


def _unbind(g: OnnxGraph, kinds: tuple[TensorType, ...], x: Tensor, dim: int = 0) -> list[Tensor]:
    axis = x.axis(dim)
    return [g.add("Gather", [x.name, g.constant(index, np.int64)], kind, axis=axis) for index, kind in enumerate(kinds)]


def _same(g: OnnxGraph, kind: TensorType, x: Tensor, **options: Any) -> Tensor:
    return x


def _conv3d(
    g: OnnxGraph,
    kind: TensorType,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    inputs = [x.name, weight.name, *([] if bias is None else [bias.name])]
    pads = _triple(padding)
    return g.add(
        "Conv",
        inputs,
        kind,
        strides=_triple(stride),
        pads=[*pads, *pads],
        dilations=_triple(dilation),
        group=groups,
        kernel_shape=[int(size) for size in weight.shape[2:]],
    )


def _triple(value: Any) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return [int(item) for item in (values * 3 if len(values) == 1 else values)]


def _expand(g: OnnxGraph, kind: TensorType, x: Tensor, sizes: Sequence[int | Size], **options: Any) -> Tensor:
    wanted = [1 if isinstance(size, int) and size == -1 else size for size in sizes]
    if x.shape == kind.shape:
        return x
    return g.add("Expand", [x.name, g.shape_vector(wanted)], kind)


def _flatten(g: OnnxGraph, kind: TensorType, x: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    if x.rank == 0:
        return g.reshape(x, [1], kind)
    first, last = x.axis(start_dim), x.axis(end_dim)
    before = [g.size(x, axis) for axis in range(first)]
    return g.reshape(x, [*before, -1, *(g.size(x, axis) for axis in range(last + 1, x.rank))], kind)


def _unflatten(g: OnnxGraph, kind: TensorType, x: Tensor, dim: int, sizes: Sequence[int | Size]) -> Tensor:
    axis = x.axis(dim)
    before = [g.size(x, position) for position in range(axis)]
    return g.reshape(x, [*before, *sizes, *(g.size(x, position) for position in range(axis + 1, x.rank))], kind)


def _reshape(g: OnnxGraph, kind: TensorType, x: Tensor, sizes: Sequence[int | Size]) -> Tensor:
    return g.reshape(x, sizes, kind)


def _gelu(g: OnnxGraph, kind: TensorType, x: Tensor, *, approximate: str = "none") -> Tensor:
    return g.add("Gelu", [x.name], kind, approximate=approximate)


def _silu(g: OnnxGraph, kind: TensorType, x: Tensor) -> Tensor:
    return g.add("Mul", [x.name, g.add("Sigmoid", [x.name], kind).name], kind)


def _index_select(g: OnnxGraph, kind: TensorType, x: Tensor, dim: int, index: Tensor) -> Tensor:
    if index.rank == 0:
        index = g.reshape(index, [1], TensorType(index.type.dtype, (1,)))
    return g.add("Gather", [x.name, index.name], kind, axis=x.axis(dim))


def _layer_norm(
    g: OnnxGraph,
    kind: TensorType,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return layer_norm(g, x, len(normalized_shape), weight, bias, eps)


def _rms_norm(
    g: OnnxGraph,
    kind: TensorType,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    eps = torch.finfo(DTYPES[kind.dtype]).eps if eps is None else eps
    return rms_norm(g, x, len(normalized_shape), weight, eps)


def _linear(g: OnnxGraph, kind: TensorType, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.rank == 2:
        inputs = [x.name, weight.name, *([] if bias is None else [bias.name])]
        return g.add("Gemm", inputs, kind, transB=1)
    turned = g.add("Transpose", [weight.name], TensorType("float32", weight.shape[::-1]), perm=[1, 0])
    product = g.add("MatMul", [x.name, turned.name], kind)
    return product if bias is None else g.add("Add", [product.name, bias.name], kind)


def _matmul(g: OnnxGraph, kind: TensorType, a: Tensor, b: Tensor) -> Tensor:
    return g.add("MatMul", [a.name, b.name], kind)


def _permute(g: OnnxGraph, kind: TensorType, x: Tensor, dims: Sequence[int]) -> Tensor:
    return g.add("Transpose", [x.name], kind, perm=[x.axis(dim) for dim in dims])


def _transpose(g: OnnxGraph, kind: TensorType, x: Tensor, dim0: int, dim1: int) -> Tensor:
    order = list(range(x.rank))
    first, second = x.axis(dim0), x.axis(dim1)
    order[first], order[second] = order[second], order[first]
    return g.add("Transpose", [x.name], kind, perm=order)


def _attention(
    g: OnnxGraph,
    kind: TensorType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p or is_causal or enable_gqa or (attn_mask is not None and attn_mask.type.dtype == "bool"):
        raise ValueError("attention with dropout, a causal or boolean mask, or grouped heads")
    return attention(g, query, key, value, attn_mask, scale)


def _slice(
    g: OnnxGraph,
    kind: TensorType,
    x: Tensor,
    dim: int = 0,
    start: int | Size | None = None,
    end: int | Size | None = None,
    step: int = 1,
) -> Tensor:
    if x.shape == kind.shape and step == 1:
        return x
    ends = [g.shape_vector([0 if start is None else start]), g.shape_vector([END if end is None else end])]
    axes, steps = g.constant([x.axis(dim)], np.int64), g.constant([step], np.int64)
    return g.add("Slice", [x.name, *ends, axes, steps], kind)


def _squeeze(g: OnnxGraph, kind: TensorType, x: Tensor, dim: int) -> Tensor:
    if len(kind.shape) == x.rank:
        return x
    return g.add("Squeeze", [x.name, g.constant([x.axis(dim)], np.int64)], kind)


def _unsqueeze(g: OnnxGraph, kind: TensorType, x: Tensor, dim: int) -> Tensor:
    return g.add("Unsqueeze", [x.name, g.constant([dim % len(kind.shape)], np.int64)], kind)


def _to_dtype(g: OnnxGraph, kind: TensorType, x: Tensor, dtype: Any, *rest: Any, **options: Any) -> Tensor:
    return g.cast(x, DTYPE_NAMES[dtype])


def _sym_size(g: OnnxGraph, kind: Any, x: Tensor, dim: int) -> Size:
    return g.size(x, x.axis(dim))


def _getitem(g: OnnxGraph, kind: Any, values: Sequence[Any], index: int) -> Any:
    return values[index]


def _size_arithmetic(operator: str, function: Callable[[int, int], int]) -> Lowering:
    def lower(g: OnnxGraph, kind: Any, a: int | Size, b: int | Size) -> Size:
        first, second = (item.value if isinstance(item, Size) else item for item in (a, b))
        if isinstance(first, int) and isinstance(second, int):
            return Size(function(first, second))
        names = [g.shape_vector([item]) for item in (a, b)]
        found = Size(g.add(operator, names, TensorType("int64", (1,))).name)
        return g.sizes.setdefault(kind, found) if isinstance(kind, str) else found

    return lower


LOWERINGS: dict[str, Lowering] = {
    "aten.add.Tensor": _arithmetic("Add"),
    "aten.arange.start": _arange,
    "aten.cat.default": _cat,
    "aten.chunk.default": _chunk,
    "aten.contiguous.default": _same,
    "aten.conv3d.default": _conv3d,
    "aten.cos.default": _unary("Cos"),
    "aten.div.Tensor": _arithmetic("Div"),
    "aten.exp.default": _unary("Exp"),
    "aten.expand.default": _expand,
    "aten.flatten.using_ints": _flatten,
    "aten.gelu.default": _gelu,
    "aten.index_select.default": _index_select,
    "aten.layer_norm.default": _layer_norm,
    "aten.linear.default": _linear,
    "aten.matmul.default": _matmul,
    "aten.mul.Tensor": _arithmetic("Mul"),
    "aten.permute.default": _permute,
    "aten.reshape.default": _reshape,
    "aten.rms_norm.default": _rms_norm,
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.silu.default": _silu,
    "aten.sin.default": _unary("Sin"),
    "aten.slice.Tensor": _slice,
    "aten.split_with_sizes.default": _split_with_sizes,
    "aten.squeeze.dim": _squeeze,
    "aten.stack.default": _stack,
    "aten.sub.Tensor": _arithmetic("Sub"),
    "aten.sym_size.int": _sym_size,
    "aten.to.dtype": _to_dtype,
    "aten.transpose.int": _transpose,
    "aten.unbind.int": _unbind,
    "aten.unflatten.int": _unflatten,
    "aten.unsqueeze.default": _unsqueeze,
    "aten.view.default": _reshape,
    **HIF4_LOWERINGS,
    "getitem": _getitem,
    "size.mul": _size_arithmetic("Mul", lambda a, b: a * b),
    "size.floordiv": _size_arithmetic("Div", lambda a, b: a // b),
}
