"""The native CPU attention as a function of tensors; what it does not cover goes to torch's.

Symbols: B samples, H heads of D channels, T queries, S keys.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from hif4c.runtime import rows
from hif4c.runtime.native.status import BEST, raise_status

if TYPE_CHECKING:
    from hif4c.runtime.native.bindings import Library

__all__ = ["NativeAttention", "attention_operators"]

_I, _L, _P = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_Strides = _L * 3

# D that the kernels cover: multiples of the first up to the second.
_WIDTH_STEP, _MAX_WIDTH = 32, 256


def attention_operators(library: Library) -> dict[str, Callable[..., torch.Tensor]]:
    """What stands in for the portable attention on the CPU: name in the `hif4` namespace -> function."""
    return {"attention": NativeAttention(library).attention}


class NativeAttention:
    """The attention of a library: flash attention in bf16 with vdpbf16ps, for AVX-512 with BF16."""

    def __init__(self, library: Library, instruction_set: int = BEST) -> None:
        """Take the kernels of an instruction set (-1: the best there is, torch's own where the processor has AMX).

        `available` tells whether there are any.
        """
        functions = library.functions
        functions.hif4_has_attention.argtypes = (_I,)
        functions.hif4_attention.argtypes = (_P, _P, _P, _P, _P, _P, _P, _L, _L, _L, _L, _L, _I, _P, _I)
        self._attention: Callable[..., int] = functions.hif4_attention
        self._parallel = library.parallel
        self._set = instruction_set
        self.available = bool(functions.hif4_has_attention(instruction_set))

    def covers(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
        """Whether the kernels compute this attention: bf16 on the CPU, not empty, D a multiple of 32 up to 256."""
        d = q.shape[-1]
        return (
            self.available
            and all(x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.numel() > 0 for x in (q, k, v))
            and d % _WIDTH_STEP == 0
            and d <= _MAX_WIDTH
        )

    @torch.no_grad()
    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """As `hif4c.runtime.rows.attention`: [B, H, T, D], in memory [B, T, H, D].

        Sums are fp32; weights are rounded to bf16 and divided by the sum of the rounded, so they add up to one. The
        number of threads changes no bit. Numbers below 2^-126 count as 0, as in every bf16 product of the processor's.
        """
        rows.check_attention(q, k, v)
        if not self.covers(q, k, v):
            return rows.attention(q, k, v)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        batch, heads, queries, d = q.shape
        out = torch.empty((batch, queries, heads, d), dtype=q.dtype)
        status = self._attention(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(),
            *(_Strides(*x.stride()[:3]) for x in (q, k, v)),
            batch, heads, queries, k.shape[2], d, torch.get_num_threads(), self._parallel, self._set,
        )  # fmt: skip
        raise_status(status, self._set)
        return out.transpose(1, 2)

    def agrees(self) -> bool:
        """Whether a small attention is what the portable one gives, up to their roundings."""
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 2, n, 64, generator=generator).bfloat16() for n in (13, 43, 43))
        expected = rows.attention(q.float(), k.float(), v.float())
        # Half a unit of bf16 is 2^-8: of the result, and of each weight times (value - result).
        return bool((self.attention(q, k, v) - expected).abs().max() <= 3 * 2.0**-8 * v.abs().max())
