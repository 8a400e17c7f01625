"""The `hif4::` operators. Importing this module registers them; importing it again changes nothing.

    hif4::quantize(Tensor x, Tensor? mask=None, int hadamard=0) -> (Tensor codes, Tensor scales)
    hif4::dequantize(Tensor codes, Tensor scales, SymInt k, ScalarType dtype=bfloat16) -> Tensor
    hif4::linear(Tensor codes, Tensor scales, Tensor w_codes, Tensor w_scales, Tensor? bias=None, ...) -> Tensor
    hif4::linear_w4(Tensor x, Tensor w_codes, Tensor w_scales, Tensor? bias=None, Tensor? mask=None, ...) -> Tensor
    hif4::norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, float eps, ...) -> Tensor
    hif4::norm_quantize(Tensor x, ..., Tensor? mask=None, int hadamard=0) -> (Tensor codes, Tensor scales)
    hif4::rms_rotary(Tensor x, Tensor weight, float eps, int heads, Tensor? cos=None, Tensor? sin=None) -> Tensor
    hif4::attention(Tensor q, Tensor k, Tensor v) -> Tensor

Shapes, dtypes and errors are those of the functions in `hif4c.runtime.format`, `hif4c.runtime.reference` and
`hif4c.runtime.rows`. An output dtype of None means the bias's dtype, or float32 without a bias, for `linear`; the dtype
of x for `linear_w4`. The last four arguments of both linears are a branch in high precision beside the 4-bit product
(`side` [..., S], `side_weight` [S, N]) and the gated residual that follows it (`gate`, `residual`).

The portable implementation sits under CompositeExplicitAutograd, so a kernel that a backend registers for "CPU" or
"CUDA" takes precedence. Registration is plain `torch.library.define`/`impl`, without the wrapper of `custom_op`, whose
dispatch takes longer. The operators are for inference: they have no gradient.
"""

from collections.abc import Callable
from typing import Any

import torch

from hif4c.runtime import format as hif4_format
from hif4c.runtime import reference, rows

__all__ = ["NAMESPACE", "PORTABLE", "output_dtype"]

NAMESPACE = "hif4"

_SCHEMAS = {
    "quantize": "(Tensor x, Tensor? mask=None, int hadamard=0) -> (Tensor codes, Tensor scales)",
    "dequantize": "(Tensor codes, Tensor scales, SymInt k, ScalarType dtype=bfloat16) -> Tensor",
    "linear": (
        "(Tensor codes, Tensor scales, Tensor w_codes, Tensor w_scales, Tensor? bias=None, "
        "str? activation=None, ScalarType? dtype=None, Tensor? side=None, Tensor? side_weight=None, "
        "Tensor? gate=None, Tensor? residual=None) -> Tensor"
    ),
    "linear_w4": (
        "(Tensor x, Tensor w_codes, Tensor w_scales, Tensor? bias=None, Tensor? mask=None, int hadamard=0, "
        "str? activation=None, ScalarType? dtype=None, Tensor? side=None, Tensor? side_weight=None, "
        "Tensor? gate=None, Tensor? residual=None) -> Tensor"
    ),
    "norm": (
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, float eps, ScalarType dtype) -> Tensor"
    ),
    "norm_quantize": (
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, float eps, ScalarType dtype, "
        "Tensor? mask=None, int hadamard=0) -> (Tensor codes, Tensor scales)"
    ),
    "rms_rotary": ("(Tensor x, Tensor weight, float eps, int heads, Tensor? cos=None, Tensor? sin=None) -> Tensor"),
    "attention": "(Tensor q, Tensor k, Tensor v) -> Tensor",
}


def output_dtype(bias: torch.Tensor | None, dtype: torch.dtype | None) -> torch.dtype:
    """The output dtype of `hif4::linear`: `dtype`, else the bias's, else float32."""
    if dtype is not None:
        return dtype
    return torch.float32 if bias is None else bias.dtype


def _linear(
    codes: torch.Tensor,
    scales: torch.Tensor,
    w_codes: torch.Tensor,
    w_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    dtype: torch.dtype | None = None,
    side: torch.Tensor | None = None,
    side_weight: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    dtype = output_dtype(bias, dtype)
    return reference.linear(
        codes, scales, w_codes, w_scales, bias, activation, dtype, side, side_weight, gate, residual
    )


def _linear_w4(
    x: torch.Tensor,
    w_codes: torch.Tensor,
    w_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    hadamard: int = 0,
    activation: str | None = None,
    dtype: torch.dtype | None = None,
    side: torch.Tensor | None = None,
    side_weight: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    dtype = dtype or x.dtype
    return reference.linear_w4(
        x, w_codes, w_scales, bias, mask, hadamard, activation, dtype, side, side_weight, gate, residual
    )


def _quantize_fake(
    x: torch.Tensor, mask: torch.Tensor | None = None, hadamard: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    hif4_format.check_input(x, mask, hadamard)
    codes_shape, scales_shape = hif4_format.packed_shapes(x.shape)
    return x.new_empty(codes_shape, dtype=torch.uint8), x.new_empty(scales_shape, dtype=torch.uint8)


def _dequantize_fake(
    codes: torch.Tensor, scales: torch.Tensor, k: int, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    hif4_format.check_decode(codes, scales, k, dtype)
    return codes.new_empty((*codes.shape[:-1], k), dtype=dtype)


def _linear_fake(
    codes: torch.Tensor,
    scales: torch.Tensor,
    w_codes: torch.Tensor,
    w_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    dtype: torch.dtype | None = None,
    side: torch.Tensor | None = None,
    side_weight: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    dtype = output_dtype(bias, dtype)
    reference.check_linear(codes, scales, w_codes, w_scales, bias, activation, dtype, side, side_weight, gate, residual)
    return codes.new_empty((*codes.shape[:-1], w_codes.shape[0]), dtype=dtype)


def _linear_w4_fake(
    x: torch.Tensor,
    w_codes: torch.Tensor,
    w_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    hadamard: int = 0,
    activation: str | None = None,
    dtype: torch.dtype | None = None,
    side: torch.Tensor | None = None,
    side_weight: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    dtype = dtype or x.dtype
    reference.check_linear_w4(
        x, w_codes, w_scales, bias, mask, hadamard, activation, dtype, side, side_weight, gate, residual
    )
    return x.new_empty((*x.shape[:-1], w_codes.shape[0]), dtype=dtype)


def _norm_fake(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    rows.check_norm(x, weight, bias, scale, shift, dtype)
    return x.new_empty(x.shape, dtype=dtype)


def _norm_quantize_fake(
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
    return _quantize_fake(_norm_fake(x, weight, bias, scale, shift, eps, dtype), mask, hadamard)


def _rms_rotary_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    heads: int,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
) -> torch.Tensor:
    rows.check_rms_rotary(x, weight, heads, cos, sin)
    return x.new_empty((*x.shape[:-1], heads, x.shape[-1] // heads))


def _attention_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    rows.check_attention(q, k, v)
    return q.new_empty(q.shape)


PORTABLE: dict[str, Callable[..., Any]] = {
    "quantize": hif4_format.quantize,
    "dequantize": hif4_format.dequantize,
    "linear": _linear,
    "linear_w4": _linear_w4,
    "norm": rows.norm,
    "norm_quantize": rows.norm_quantize,
    "rms_rotary": rows.rms_rotary,
    "attention": rows.attention,
}
"""Operator -> its definition, whatever kernels are selected."""


def _register() -> None:
    fakes: dict[str, Callable[..., Any]] = {
        "quantize": _quantize_fake,
        "dequantize": _dequantize_fake,
        "linear": _linear_fake,
        "linear_w4": _linear_w4_fake,
        "norm": _norm_fake,
        "norm_quantize": _norm_quantize_fake,
        "rms_rotary": _rms_rotary_fake,
        "attention": _attention_fake,
    }
    for name, schema in _SCHEMAS.items():
        qualified = f"{NAMESPACE}::{name}"
        torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(qualified, "CompositeExplicitAutograd", PORTABLE[name])
        torch.library.register_fake(qualified, fakes[name])


# The registry belongs to the process, not to this module: a second import finds the operators there.
if not hasattr(torch.ops.hif4, "attention"):
    _register()
