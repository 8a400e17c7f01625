"""The native weight-only linear as a function of tensors; what it does not cover goes to the portable one.

Symbols: M rows, K channels, N outputs, U units of 64 channels, S columns of a side branch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from hif4c.runtime import format as hif4_format
from hif4c.runtime import reference
from hif4c.runtime.native.linear_bindings import gate_by_rows
from hif4c.runtime.native.status import BEST, raise_status

if TYPE_CHECKING:
    from hif4c.runtime.native.bindings import Library

__all__ = ["NativeLinearW4", "linear_w4_operators"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_I, _L, _P, _F = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class NativeLinearW4:
    """The weight-only linear of a library."""

    def __init__(self, library: Library) -> None:
        function = library.functions.hif4_linear_w4
        function.argtypes = (
            _P, _I, _P, _I, _F, _L, _P, _P, _P, _I, _P, _P, _L, _P, _L, _P, _I, _P, _I, _L, _L, _I, _I, _P, _I,
        )  # fmt: skip
        self._linear: Callable[..., int] = function
        self._library = library

    def __call__(
        self,
        x: torch.Tensor,
        w_codes: torch.Tensor,
        w_scales: torch.Tensor,
        bias: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        hadamard: int = 0,
        activation: str | None = None,
        dtype: torch.dtype = torch.float32,
        side: torch.Tensor | None = None,
        side_weight: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        instruction_set: int = BEST,
        bf16: bool = True,
    ) -> torch.Tensor:
        """As `hif4c.runtime.reference.linear_w4`; sums are in fp32 in an order of their own.

        x in bf16 is multiplied as it is where the processor can (AVX512-BF16, which takes numbers below 2^-126 for
        zeros); `bf16=False` and other dtypes widen it to fp32. `instruction_set` -1 is the best there is.
        """
        reference.check_linear_w4(
            x, w_codes, w_scales, bias, mask, hadamard, activation, dtype, side, side_weight, gate, residual
        )
        k, n = x.shape[-1], w_codes.shape[0]
        shape = (*x.shape[:-1], n)
        tensors = (x, w_codes, w_scales, bias, mask, side, side_weight, gate, residual)
        m = x.numel() // k
        if m == 0 or n == 0 or any(tensor is not None and not tensor.is_cpu for tensor in tensors):
            return reference.linear_w4(
                x, w_codes, w_scales, bias, mask, hadamard, activation, dtype, side, side_weight, gate, residual
            )
        if x.dtype == torch.float16:  # rounded as fp16, then fp32 holds it
            x, mask, hadamard = reference.masked_and_rotated(x, mask, hadamard).float(), None, 0
        x, w_codes, w_scales = x.contiguous(), w_codes.contiguous(), w_scales.contiguous()
        width = 0 if side is None else side.shape[-1]
        bias, mask, side, side_weight = (_vector(vector) for vector in (bias, mask, side, side_weight))
        gate_rows = 1
        if gate is not None:
            gate, gate_rows = gate_by_rows(gate, shape)
        residual = None if residual is None else residual.contiguous()
        if residual is not None and residual.dtype not in _DTYPES:
            residual = residual.float()
        out = torch.empty(shape, dtype=dtype)
        status = self._linear(
            x.data_ptr(), _DTYPES[x.dtype], _address(mask), hadamard, max(hadamard, 1) ** -0.5, k, w_codes.data_ptr(),
            w_scales.data_ptr(), _address(bias), activation == "gelu_tanh", _address(side), _address(side_weight),
            width, _address(gate), gate_rows, _address(residual), 0 if residual is None else _DTYPES[residual.dtype],
            out.data_ptr(), _DTYPES[dtype], m, n, bf16, torch.get_num_threads(), self._library.parallel,
            instruction_set,
        )  # fmt: skip
        raise_status(status, instruction_set)
        return out

    def agrees(self) -> bool:
        """Whether small products, of few rows and of more, are the portable ones: what a bad compiler would break."""
        generator = torch.Generator().manual_seed(0)
        x, w = (torch.randn(rows, 320, generator=generator, dtype=torch.float32) for rows in (11, 50))
        weight, bias = hif4_format.quantize(w), w[:, 0]
        same = True
        for rows in (3, 11):
            for value in (x[:rows], x[:rows].bfloat16()):
                arguments = (value, *weight, bias, w[0], 64, None, torch.float32)
                found, expected = self(*arguments), reference.linear_w4(*arguments)
                # Sums of 320 products of about 1 in another order; a mask or rotation that rounds to another bf16
                # would be some 1e-2 off.
                same &= torch.allclose(found, expected, rtol=0, atol=1e-3)
        return same


def linear_w4_operators(library: Library) -> dict[str, Callable[..., Any]]:
    """What stands in for the portable operator on the CPU: name in the `hif4` namespace -> function."""
    linear = NativeLinearW4(library)

    def linear_w4(
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
        return linear(
            x, w_codes, w_scales, bias, mask, hadamard, activation, dtype or x.dtype, side, side_weight, gate, residual
        )

    return {"linear_w4": linear_w4}


def _vector(vector: torch.Tensor | None) -> torch.Tensor | None:
    return None if vector is None else vector.float().contiguous()


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
