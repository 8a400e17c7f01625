"""The portable operators that work on whole rows: norms, rotary embedding, attention.

Each is what a few operators of the traced model do, with the same roundings in between, so that a program computes the
same with and without them. Symbols: B samples, T tokens, C channels, H heads of D channels.
"""

from typing import Any

import torch

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import quantize

__all__ = ["attention", "check_attention", "check_norm", "check_rms_rotary", "norm", "norm_quantize", "rms_rotary"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def check_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Raise Hif4Error unless the arguments of `norm` fit each other; looks at shapes and dtypes only."""
    if x.dim() < 2 or x.dtype not in _FLOATS or dtype not in _FLOATS:
        raise Hif4Error(f"norm: x must be floating point of 2 dimensions or more, not {x.dtype} {list(x.shape)}.")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and (vector.dim() != 1 or vector.shape[0] != x.shape[-1]):
            raise Hif4Error(f"norm: the {name} must have shape [{x.shape[-1]}], not {list(vector.shape)}.")
    if (scale is None) != (shift is None):
        raise Hif4Error("norm: scale and shift belong together; give both or neither.")
    for name, factor in (("scale", scale), ("shift", shift)):
        if factor is not None and not (factor.dtype == torch.float32 and _broadcasts(factor.shape, x.shape)):
            raise Hif4Error(
                f"norm: the {name} must be float32 and broadcast to {list(x.shape)}, "
                f"not {factor.dtype} {list(factor.shape)}."
            )


def check_rms_rotary(
    x: torch.Tensor, weight: torch.Tensor, heads: int, cos: torch.Tensor | None, sin: torch.Tensor | None
) -> None:
    """Raise Hif4Error unless the arguments of `rms_rotary` fit each other; looks at shapes and dtypes only."""
    if x.dim() != 3 or x.dtype not in _FLOATS or heads < 1 or x.shape[-1] % heads:
        raise Hif4Error(f"rms_rotary: x must be [B, T, {heads} heads of D], not {x.dtype} {list(x.shape)}.")
    if weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        raise Hif4Error(f"rms_rotary: the weight must have shape [{x.shape[-1]}], not {list(weight.shape)}.")
    if (cos is None) != (sin is None):
        raise Hif4Error("rms_rotary: cos and sin belong together; give both or neither.")
    width = x.shape[-1] // heads
    expected = (1, x.shape[1], 1, width // 2)
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None and (
            width % 2
            or table.dtype != torch.float32
            or table.dim() != 4
            or any(a != b for a, b in zip(table.shape, expected, strict=True))
        ):
            raise Hif4Error(f"rms_rotary: {name} must be float32 {list(expected)}, not {list(table.shape)}.")


def check_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise Hif4Error unless the arguments of `attention` fit each other; looks at shapes and dtypes only."""
    same = q.dtype == k.dtype == v.dtype and q.dtype in _FLOATS and q.dim() == k.dim() == v.dim() == 4
    if not same or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise Hif4Error(
            f"attention: q [B, H, T, D], k and v [B, H, S, D] of one dtype do not fit: {list(q.shape)}, "
            f"{list(k.shape)}, {list(v.shape)}."
        )


@torch.no_grad()
def norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Layer norm of x [B, T, C] over C, in fp32: `normalized * weight + bias`, then `* (scale + 1) + shift`.

    weight and bias [C] or None; scale and shift fp32 [B, 1 or T, C], both or neither: the modulation of AdaLN. Each
    product and sum after the normalization is rounded to fp32 by itself, the result once to `dtype`. The order of the
    sums in mean and variance is the backend's. Raises Hif4Error for tensors that do not fit.
    """
    check_norm(x, weight, bias, scale, shift, dtype)
    with torch.autocast(x.device.type, enabled=False):
        weight, bias = (None if vector is None else vector.float() for vector in (weight, bias))
        y = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)
        if scale is not None and shift is not None:
            y = y.mul_(scale + 1).add_(shift)
        return y.to(dtype)


def norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
    mask: torch.Tensor | None = None,
    hadamard: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize(norm(...), mask, hadamard)`: codes [B, T, Cp/2] and scales [B, T, U, 4]."""
    return quantize(norm(x, weight, bias, scale, shift, eps, dtype), mask, hadamard)


@torch.no_grad()
def rms_rotary(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    heads: int,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMS norm of x [B, T, H*D] across all heads, and the rotary embedding of each head; returns [B, T, H, D].

    weight [H*D]. cos and sin fp32 [1, T, 1, D/2], both or neither (keys of a text have no position): each pair
    (x0, x1) of neighbours becomes (x0 * cos - x1 * sin, x0 * sin + x1 * cos), every product and sum rounded to fp32.
    Norm and embedding are each rounded once to the dtype of x. Raises Hif4Error for tensors that do not fit.
    """
    check_rms_rotary(x, weight, heads, cos, sin)
    with torch.autocast(x.device.type, enabled=False):
        y = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps).unflatten(-1, (heads, -1))
        if cos is None or sin is None:
            return y
        first, second = y.unflatten(-1, (-1, 2)).unbind(-1)
        pairs = (first * cos - second * sin, first * sin + second * cos)
        return torch.stack([part.to(x.dtype) for part in pairs], -1).flatten(-2)


@torch.no_grad()
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v, every query to every key: q [B, H, T, D], k and v [B, H, S, D]; any strides.

    Returns [B, H, T, D] of the dtype of q; its strides are the backend's. As in flash attention, probabilities are
    rounded to that dtype before they multiply v. Raises Hif4Error for tensors that do not fit.
    """
    check_attention(q, k, v)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def _broadcasts(shape: tuple[Any, ...], to: tuple[Any, ...]) -> bool:
    return (
        len(shape) == len(to)
        and all(a == 1 or a == b for a, b in zip(shape, to, strict=True))
        and (shape[-1] == to[-1])
    )
