"""The `hif4::` operators. Importing this module registers them; importing it again changes nothing.

    hif4::quantize(Tensor x, Tensor? mask=None, int hadamard=0) -> (Tensor codes, Tensor scales)
    hif4::dequantize(Tensor codes, Tensor scales, SymInt k, ScalarType dtype=bfloat16) -> Tensor
    hif4::linear(Tensor codes, Tensor scales, Tensor w_codes, Tensor w_scales, Tensor? bias=None, ...) -> Tensor
    hif4::linear_w4(Tensor x, Tensor w_codes, Tensor w_scales, Tensor? bias=None, Tensor? mask=None, ...) -> Tensor

Shapes, dtypes and errors are those of the functions in `hif4c.runtime.format` and `hif4c.runtime.reference`. An output
dtype of None means the bias's dtype, or float32 without a bias, for `linear`; the dtype of x for `linear_w4`. The last
two arguments of both linears, `side` [..., S] and `side_weight` [S, N], are a branch in high precision beside the 4-bit
product.

The portable implementation sits under CompositeExplicitAutograd, so a kernel that a backend registers for "CPU" or
"CUDA" takes precedence. Registration is plain `torch.library.define`/`impl`, without the wrapper of `custom_op`, whose
dispatch takes longer. The operators are for inference: they have no gradient.
"""

from collections.abc import Callable
from typing import Any

import torch

from hif4c.runtime import format as hif4_format
from hif4c.runtime import reference

__all__ = ["NAMESPACE", "output_dtype"]

NAMESPACE = "hif4"

_SCHEMAS = {
    "quantize": "(Tensor x, Tensor? mask=None, int hadamard=0) -> (Tensor codes, Tensor scales)",
    "dequantize": "(Tensor codes, Tensor scales, SymInt k, ScalarType dtype=bfloat16) -> Tensor",
    "linear": (
        "(Tensor codes, Tensor scales, Tensor w_codes, Tensor w_scales, Tensor? bias=None, "
        "str? activation=None, ScalarType? dtype=None, Tensor? side=None, Tensor? side_weight=None) -> Tensor"
    ),
    "linear_w4": (
        "(Tensor x, Tensor w_codes, Tensor w_scales, Tensor? bias=None, Tensor? mask=None, int hadamard=0, "
        "str? activation=None, ScalarType? dtype=None, Tensor? side=None, Tensor? side_weight=None) -> Tensor"
    ),
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
) -> torch.Tensor:
    dtype = output_dtype(bias, dtype)
    return reference.linear(codes, scales, w_codes, w_scales, bias, activation, dtype, side, side_weight)


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
) -> torch.Tensor:
    dtype = dtype or x.dtype
    return reference.linear_w4(x, w_codes, w_scales, bias, mask, hadamard, activation, dtype, side, side_weight)


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
) -> torch.Tensor:
    dtype = output_dtype(bias, dtype)
    reference.check_linear(codes, scales, w_codes, w_scales, bias, activation, dtype, side, side_weight)
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
) -> torch.Tensor:
    dtype = dtype or x.dtype
    reference.check_linear_w4(x, w_codes, w_scales, bias, mask, hadamard, activation, dtype, side, side_weight)
    return x.new_empty((*x.shape[:-1], w_codes.shape[0]), dtype=dtype)


def _register() -> None:
    portable: dict[str, Callable[..., Any]] = {
        "quantize": hif4_format.quantize,
        "dequantize": hif4_format.dequantize,
        "linear": _linear,
        "linear_w4": _linear_w4,
    }
    fakes: dict[str, Callable[..., Any]] = {
        "quantize": _quantize_fake,
        "dequantize": _dequantize_fake,
        "linear": _linear_fake,
        "linear_w4": _linear_w4_fake,
    }
    for name, schema in _SCHEMAS.items():
        qualified = f"{NAMESPACE}::{name}"
        torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(qualified, "CompositeExplicitAutograd", portable[name])
        torch.library.register_fake(qualified, fakes[name])


# The registry belongs to the process, not to this module: a second import finds the operators there.
if not hasattr(torch.ops.hif4, "linear_w4"):
    _register()
