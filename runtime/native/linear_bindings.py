"""The native 4-bit linear as a function of tensors.

Symbols: M rows, K channels, N outputs, U units of 64 channels (see `hif4c.runtime.format`), S columns of a side branch.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from hif4c.runtime import format as hif4_format
from hif4c.runtime import ops, reference
from hif4c.runtime.native.status import BEST, raise_status

if TYPE_CHECKING:
    from hif4c.runtime.native.bindings import Library

__all__ = ["LinearKernel", "gate_by_rows", "linear_operators"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_I, _L, _P = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


class LinearKernel:
    """The linear of a library; `instruction_set` -1 is the best one there is."""

    def __init__(self, library: Library) -> None:
        library.functions.hif4_linear.argtypes = (
            _P, _P, _P, _P, _P, _I, _P, _P, _L, _P, _L, _P, _I, _P, _I, _L, _L, _L, _I, _P, _I,
        )  # fmt: skip
        self._linear: Callable[..., int] = library.functions.hif4_linear
        self._library = library

    def linear(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        w_codes: torch.Tensor,
        w_scales: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        dtype: torch.dtype = torch.float32,
        side: torch.Tensor | None = None,
        side_weight: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        instruction_set: int = BEST,
    ) -> torch.Tensor:
        """As `hif4c.runtime.reference.linear`.

        Equal bit for bit (NaN's payload apart) without GELU. GELU is x * sigmoid(2u) of the same fp32 x, with u =
        sqrt(2 / pi) * (x + 0.044715 x^3): within 4.4 * 2^-24 * |x| of its exact value, and the same on every
        instruction set. torch's own, x / 2 * (1 + tanh(u)), is about as near.
        """
        ends = (side, side_weight, gate, residual)
        plain = side is None and side_weight is None and gate is None and residual is None
        if not (plain and _is_plain(codes, scales, w_codes, w_scales, bias, activation, dtype)):
            reference.check_linear(codes, scales, w_codes, w_scales, bias, activation, dtype, *ends)
        n, units = w_codes.shape[0], w_codes.shape[1] // (hif4_format.UNIT // 2)
        shape = (*codes.shape[:-1], n)
        m = math.prod(shape[:-1])
        tensors = (codes, scales, w_codes, w_scales, bias, side, side_weight, gate, residual)
        fits = residual is None or residual.dtype in _DTYPES
        if not (m and n and units and fits and all(tensor is None or tensor.is_cpu for tensor in tensors)):
            return reference.linear(
                codes, scales, w_codes, w_scales, bias, activation, dtype, side, side_weight, gate, residual
            )
        out = torch.empty(shape, dtype=dtype)
        # These names keep copies alive until the kernel has read them.
        codes, scales = codes.contiguous(), scales.contiguous()
        w_codes, w_scales = w_codes.contiguous(), w_scales.contiguous()
        bias, side, side_weight = _plain(bias), _plain(side), _plain(side_weight)
        gate_rows = 1
        if gate is not None:
            gate, gate_rows = gate_by_rows(gate, shape)
        residual = None if residual is None else residual.contiguous()
        status = self._linear(
            codes.data_ptr(), scales.data_ptr(), w_codes.data_ptr(), w_scales.data_ptr(), _address(bias),
            activation is not None, _address(side), _address(side_weight), 0 if side is None else side.shape[-1],
            _address(gate), gate_rows, _address(residual), 0 if residual is None else _DTYPES[residual.dtype],
            out.data_ptr(), _DTYPES[dtype], m, n, units, torch.get_num_threads(), self._library.parallel,
            instruction_set,
        )  # fmt: skip
        raise_status(status, instruction_set)
        return out

    def agrees(self) -> bool:
        """Whether small products are the portable ones: what a bad compiler would break."""
        generator = torch.Generator().manual_seed(1)
        x, w = (torch.randn(rows, 320, generator=generator, dtype=torch.float32) for rows in (11, 50))
        planes, weight = hif4_format.quantize(x), hif4_format.quantize(w)
        for rows in (3, 11):  # few rows have a kernel of their own
            arguments: tuple[Any, ...] = (planes[0][:rows], planes[1][:rows], *weight, w[:, 7])
            branch = (x[:rows, :5].bfloat16(), w[:, :5].t().bfloat16())
            ends = (x[:rows, :50] + 1, x[:rows, 50:100].half())
            ways: list[tuple[Any, ...]] = [(None, torch.float32, *branch), (None, torch.bfloat16, *branch, *ends)]
            for rest in ways:
                if not torch.equal(self.linear(*arguments, *rest), reference.linear(*arguments, *rest)):
                    return False
            arguments = (*arguments, "gelu_tanh", torch.float32)
            if not torch.allclose(self.linear(*arguments), reference.linear(*arguments), rtol=1e-5, atol=1e-5):
                return False
        return True


def linear_operators(library: Library) -> dict[str, Callable[..., Any]]:
    """What stands in for the portable linear on the CPU: name in the `hif4` namespace -> function."""
    kernel = library.linears

    def linear(
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
        dtype = ops.output_dtype(bias, dtype)
        return kernel.linear(
            codes, scales, w_codes, w_scales, bias, activation, dtype, side, side_weight, gate, residual
        )

    return {"linear": linear}


def gate_by_rows(gate: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, int]:
    """The gate's rows [R, N], and how many rows of an output of this shape follow each other for one of them."""
    axis = len(shape) - 1
    while axis > 0 and gate.shape[axis - 1] == 1:
        axis -= 1
    if gate.shape[:axis] == shape[:axis]:
        return gate.contiguous(), math.prod(shape[axis:-1])
    return gate.expand(shape).contiguous(), 1  # of [B, T, N] a gate [1, T, N], whose rows come again


def _is_plain(
    codes: torch.Tensor,
    scales: torch.Tensor,
    w_codes: torch.Tensor,
    w_scales: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
) -> bool:
    """Whether `check_linear` has nothing against these, in a fraction of its time, which one row would notice."""
    u8, shape, w_shape = torch.uint8, codes.shape, w_codes.shape
    if not (codes.dtype == scales.dtype == w_codes.dtype == w_scales.dtype == u8 and len(w_shape) == 2 and shape):
        return False
    planes = (w_shape[1] // (hif4_format.UNIT // 2), hif4_format.SCALE_BYTES)
    whole = shape[-1] == w_shape[1] == planes[0] * (hif4_format.UNIT // 2)
    fits = scales.shape == (*shape[:-1], *planes) and w_scales.shape == (w_shape[0], *planes)
    known = dtype in _DTYPES and (activation is None or activation in reference.ACTIVATIONS)
    return whole and fits and known and (bias is None or bias.shape == w_shape[:1])


def _plain(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """In fp32, one element after the other."""
    return None if tensor is None else tensor.float().contiguous()


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
