"""The native kernels that work on whole rows as functions of tensors; what they do not cover goes to the portable ones.

Symbols: B samples, T tokens, C or K channels, H heads of D channels, U units of 64 channels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from hif4c.runtime import format as hif4_format
from hif4c.runtime import rows as portable
from hif4c.runtime.native.status import BEST, raise_status

if TYPE_CHECKING:
    from hif4c.runtime.native.bindings import Library

__all__ = ["RowKernels", "row_operators"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}

_I, _L, _P, _F, _D = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float, ctypes.c_double


class RowKernels:
    """Quantization, norms and rotary embedding of a library; `instruction_set` -1 is the best one there is."""

    def __init__(self, library: Library) -> None:
        functions = library.functions
        functions.hif4_quantize.argtypes = (_P, _I, _P, _I, _F, _L, _L, _P, _P, _I, _P, _I)
        functions.hif4_dequantize.argtypes = (_P, _P, _L, _L, _P, _I, _I, _P, _I)
        functions.hif4_norm.argtypes = (
            _P, _I, _P, _P, _P, _L, _L, _P, _L, _L, _D, _L, _L, _L, _P, _I, _P, _I, _F, _P, _P, _I, _P, _I,
        )  # fmt: skip
        functions.hif4_rms_rotary.argtypes = (
            _P, _I, _P, _D, _L, _L, _L, _L, _P, _L, _L, _P, _L, _L, _P, _I, _P, _I,
        )  # fmt: skip
        self._quantize: Callable[..., int] = functions.hif4_quantize
        self._dequantize: Callable[..., int] = functions.hif4_dequantize
        self._norm: Callable[..., int] = functions.hif4_norm
        self._rms_rotary: Callable[..., int] = functions.hif4_rms_rotary
        self._library = library

    def quantize(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, hadamard: int = 0, instruction_set: int = BEST
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `hif4c.runtime.format.quantize`, bit for bit."""
        hif4_format.check_input(x, mask, hadamard)
        if not _on_cpu(x, mask):
            return hif4_format.quantize(x, mask, hadamard)
        k = x.shape[-1]
        codes, scales = _planes(x.shape)
        count = x.numel() // k
        if count:
            source, factors = _source(x), _vector(mask)
            status = self._quantize(
                source.data_ptr(), _DTYPES[source.dtype], _address(factors), hadamard, max(hadamard, 1) ** -0.5, count,
                k, codes.data_ptr(), scales.data_ptr(), torch.get_num_threads(), self._library.parallel,
                instruction_set,
            )  # fmt: skip
            raise_status(status, instruction_set)
        return codes, scales

    def dequantize(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        k: int,
        dtype: torch.dtype = torch.bfloat16,
        instruction_set: int = BEST,
    ) -> torch.Tensor:
        """As `hif4c.runtime.format.dequantize`, bit for bit."""
        hif4_format.check_decode(codes, scales, k, dtype)
        if not _on_cpu(codes, scales):
            return hif4_format.dequantize(codes, scales, k, dtype)
        out = torch.empty((*codes.shape[:-1], k), dtype=dtype if dtype in _DTYPES else torch.float32)
        if out.numel():
            codes, scales = codes.contiguous(), scales.contiguous()
            status = self._dequantize(
                codes.data_ptr(), scales.data_ptr(), out.numel() // k, k, out.data_ptr(), _DTYPES[out.dtype],
                torch.get_num_threads(), self._library.parallel, instruction_set,
            )  # fmt: skip
            raise_status(status, instruction_set)
        return out.to(dtype)

    def norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        eps: float,
        dtype: torch.dtype,
        instruction_set: int = BEST,
    ) -> torch.Tensor:
        """As `hif4c.runtime.rows.norm`; the sums are in one order of their own on every instruction set."""
        portable.check_norm(x, weight, bias, scale, shift, dtype)
        if not _on_cpu(x, weight, bias, scale, shift):
            return portable.norm(x, weight, bias, scale, shift, eps, dtype)
        if dtype not in _DTYPES:
            return self.norm(x, weight, bias, scale, shift, eps, torch.float32, instruction_set).to(dtype)
        out = torch.empty(x.shape, dtype=dtype)
        if out.numel():
            self._run_norm(
                x, weight, bias, scale, shift, eps, out.data_ptr(), dtype, None, 0, None, None, instruction_set
            )
        return out

    def norm_quantize(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        eps: float,
        dtype: torch.dtype,
        mask: torch.Tensor | None = None,
        hadamard: int = 0,
        instruction_set: int = BEST,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`quantize(norm(...), mask, hadamard)` of these kernels, bit for bit, while each row is in the cache."""
        portable.check_norm(x, weight, bias, scale, shift, dtype)
        hif4_format.check_input(x, mask, hadamard)
        if not _on_cpu(x, weight, bias, scale, shift, mask):
            return portable.norm_quantize(x, weight, bias, scale, shift, eps, dtype, mask, hadamard)
        if dtype not in _DTYPES:
            y = self.norm(x, weight, bias, scale, shift, eps, dtype, instruction_set)
            return self.quantize(y, mask, hadamard, instruction_set)
        codes, scales = _planes(x.shape)
        if codes.numel():
            self._run_norm(
                x, weight, bias, scale, shift, eps, None, dtype, mask, hadamard, codes.data_ptr(), scales.data_ptr(),
                instruction_set,
            )  # fmt: skip
        return codes, scales

    def _run_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        eps: float,
        out: int | None,
        dtype: torch.dtype,
        mask: torch.Tensor | None,
        hadamard: int,
        codes: int | None,
        scales: int | None,
        instruction_set: int,
    ) -> None:
        source, c = _source(x), x.shape[-1]
        samples, tokens = (x.shape[0], x.shape[1]) if x.dim() == 3 else (1, x.numel() // c)
        weight, bias, factors = _vector(weight), _vector(bias), _vector(mask)
        scale, *scale_strides = _rows_of(scale, x.shape)
        shift, *shift_strides = _rows_of(shift, x.shape)
        status = self._norm(
            source.data_ptr(), _DTYPES[source.dtype], _address(weight), _address(bias), _address(scale),
            *scale_strides, _address(shift), *shift_strides, eps, samples, tokens, c, out, _DTYPES[dtype],
            _address(factors), hadamard, max(hadamard, 1) ** -0.5, codes, scales, torch.get_num_threads(),
            self._library.parallel, instruction_set,
        )  # fmt: skip
        raise_status(status, instruction_set)

    def rms_rotary(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        heads: int,
        cos: torch.Tensor | None = None,
        sin: torch.Tensor | None = None,
        instruction_set: int = BEST,
    ) -> torch.Tensor:
        """As `hif4c.runtime.rows.rms_rotary`; the sum is in one order of its own on every instruction set."""
        portable.check_rms_rotary(x, weight, heads, cos, sin)
        if x.dtype not in _DTYPES or not _on_cpu(x, weight, cos, sin):
            return portable.rms_rotary(x, weight, eps, heads, cos, sin)
        samples, tokens, c = x.shape
        out = torch.empty((samples, tokens, heads, c // heads), dtype=x.dtype)
        if out.numel() == 0:
            return out
        source, factors = x.contiguous(), weight.float().contiguous()
        status = self._rms_rotary(
            source.data_ptr(), _DTYPES[x.dtype], factors.data_ptr(), eps, samples, tokens, heads, c // heads,
            _address(cos), *_table_strides(cos), _address(sin), *_table_strides(sin), out.data_ptr(),
            torch.get_num_threads(), self._library.parallel, instruction_set,
        )  # fmt: skip
        raise_status(status, instruction_set)
        return out

    def agree(self) -> bool:
        """Whether a small norm and a small embedding are the portable ones: what a bad compiler would break."""
        generator = torch.Generator().manual_seed(0)
        x, factor = (torch.randn(2, tokens, 192, generator=generator, dtype=torch.float32) for tokens in (3, 1))
        arguments = (x, factor[0, 0], None, factor, factor, 1e-6, torch.float32)
        planes = self.norm_quantize(*arguments)
        same = all(map(torch.equal, planes, hif4_format.quantize(self.norm(*arguments))))
        same &= torch.equal(self.dequantize(*planes, 190), hif4_format.dequantize(*planes, 190))
        table = x[:1, :, None, :32:2]
        rotary = (x, factor[0, 0], 1e-6, 6, table, table)
        pairs = (
            (self.norm(*arguments), portable.norm(*arguments)),
            (self.rms_rotary(*rotary), portable.rms_rotary(*rotary)),
        )
        # Values of some units: sums in another order, and torch's own normalization, are a few 1e-7 off.
        return same and all(torch.allclose(found, expected, rtol=0, atol=1e-5) for found, expected in pairs)


def row_operators(library: Library) -> dict[str, Callable[..., Any]]:
    """What stands in for the portable operators on the CPU: name in the `hif4` namespace -> function."""
    rows = library.rows

    def dequantize(
        codes: torch.Tensor, scales: torch.Tensor, k: int, dtype: torch.dtype = torch.bfloat16
    ) -> torch.Tensor:
        return rows.dequantize(codes, scales, k, dtype)

    def norm(
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        return rows.norm(x, weight, bias, scale, shift, eps, dtype)

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
        return rows.norm_quantize(x, weight, bias, scale, shift, eps, dtype, mask, hadamard)

    def rms_rotary(
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        heads: int,
        cos: torch.Tensor | None = None,
        sin: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return rows.rms_rotary(x, weight, eps, heads, cos, sin)

    return {"dequantize": dequantize, "norm": norm, "norm_quantize": norm_quantize, "rms_rotary": rms_rotary}


def _planes(shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = hif4_format.packed_shapes(shape)
    return torch.empty(codes, dtype=torch.uint8), torch.empty(scales, dtype=torch.uint8)


def _source(x: torch.Tensor) -> torch.Tensor:
    return (x if x.dtype in _DTYPES else x.float()).contiguous()


def _vector(vector: torch.Tensor | None) -> torch.Tensor | None:
    return None if vector is None else vector.float().contiguous()


def _rows_of(factor: torch.Tensor | None, shape: torch.Size) -> tuple[torch.Tensor | None, int, int]:
    """A factor that broadcasts to `shape`, and how far it is from sample to sample and from token to token."""
    if factor is None:
        return None, 0, 0
    if len(shape) != 3:
        factor = factor.expand(shape).reshape(1, -1, shape[-1])
    if factor.stride(2) != 1:
        factor = factor.contiguous()
    sample, token, _ = (0 if size == 1 else stride for size, stride in zip(factor.shape, factor.stride(), strict=True))
    return factor, sample, token


def _table_strides(table: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if table is None else (table.stride(1), table.stride(3))


def _on_cpu(*tensors: torch.Tensor | None) -> bool:
    return all(tensor is None or tensor.is_cpu for tensor in tensors)


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
