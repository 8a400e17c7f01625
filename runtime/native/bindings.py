"""The native CPU kernels as functions of tensors, bit for bit the portable ones; what they do not cover goes there.

Symbols: M rows, K channels, N outputs, U units of 64 channels (see `hif4c.runtime.format`), S columns of a side branch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hif4c.runtime import format as hif4_format
from hif4c.runtime import ops, reference
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.native.attention_bindings import NativeAttention, attention_operators
from hif4c.runtime.native.row_bindings import RowKernels, row_operators
from hif4c.runtime.native.status import BEST, INSTRUCTION_SETS, raise_status

__all__ = ["INSTRUCTION_SETS", "Library"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
# Elements of the fp32 block in which what torch finishes (GELU, the cast to fp16) is computed: 16 MB.
_BLOCK = 1 << 22

_I, _L, _P = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


class Library:
    """A built library.

    Raises Hif4Error when it cannot be loaded, or does not compute what the portable implementation does.
    """

    def __init__(self, path: Path) -> None:
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise Hif4Error(
                f"{path}: cannot be loaded ({error}); delete it to have it built again, or use kernels='portable'."
            ) from None
        library.hif4_linear.argtypes = (_P, _P, _P, _P, _P, _P, _P, _L, _P, _I, _L, _L, _L, _I, _P, _I)
        self.path = path
        self.functions = library
        self._linear: Callable[..., int] = library.hif4_linear
        self.parallel = _torch_openmp()  # what every entry point takes to start its threads
        self.rows = RowKernels(self)
        self.instruction_set: int = library.hif4_instruction_set()
        self._check()

    def operators(self) -> dict[str, Callable[..., Any]]:
        """What stands in for the portable operators on the CPU: name in the `hif4` namespace -> function."""

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
            if gate is not None or residual is not None:
                return reference.linear(
                    codes, scales, w_codes, w_scales, bias, activation, dtype, side, side_weight, gate, residual
                )
            return self.linear(codes, scales, w_codes, w_scales, bias, activation, dtype, side, side_weight)

        def quantize(
            x: torch.Tensor, mask: torch.Tensor | None = None, hadamard: int = 0
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return self.quantize(x, mask, hadamard)

        return {"linear": linear, "quantize": quantize, **row_operators(self), **attention_operators(self)}

    def quantize(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, hadamard: int = 0, instruction_set: int = BEST
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `hif4c.runtime.format.quantize`, with the kernels of an instruction set (-1: the best there is)."""
        return self.rows.quantize(x, mask, hadamard, instruction_set)

    @torch.no_grad()
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
        instruction_set: int = BEST,
    ) -> torch.Tensor:
        """As `hif4c.runtime.reference.linear`, with the kernels of an instruction set (-1: the best there is).

        Equal bit for bit (NaN's payload apart). GELU is torch's, on the same fp32 numbers; torch itself rounds its last
        bits differently at the end of a row of vectors, so there the equality is up to those.
        """
        reference.check_linear(codes, scales, w_codes, w_scales, bias, activation, dtype, side, side_weight)
        tensors = (codes, scales, w_codes, w_scales, bias, side, side_weight)
        if any(tensor is not None and tensor.device.type != "cpu" for tensor in tensors):
            return reference.linear(codes, scales, w_codes, w_scales, bias, activation, dtype, side, side_weight)
        n, units = w_codes.shape[0], w_codes.shape[1] // (hif4_format.UNIT // 2)
        out = torch.empty((*codes.shape[:-1], n), dtype=dtype)
        if out.numel() == 0 or units == 0:
            return reference.linear(codes, scales, w_codes, w_scales, bias, activation, dtype, side, side_weight)
        m, row = out.numel() // n, w_codes.shape[1]
        codes, scales = codes.contiguous(), scales.contiguous()
        w_codes, w_scales = w_codes.contiguous(), w_scales.contiguous()
        bias = None if bias is None else bias.float().contiguous()
        width = 0 if side is None else side.shape[-1]
        side = None if side is None else side.float().contiguous()
        side_weight = None if side_weight is None else side_weight.float().contiguous()

        def compute(start: int, count: int, result: torch.Tensor) -> None:
            status = self._linear(
                codes.data_ptr() + start * row, scales.data_ptr() + start * units * hif4_format.SCALE_BYTES,
                w_codes.data_ptr(), w_scales.data_ptr(), _address(bias), _address(side, start * width),
                _address(side_weight), width, result.data_ptr(), _DTYPES[result.dtype], count, n, units,
                torch.get_num_threads(), self.parallel, instruction_set,
            )  # fmt: skip
            raise_status(status, instruction_set)

        if activation is None and dtype in _DTYPES:
            compute(0, m, out)
            return out
        flat, step = out.view(m, n), max(64, _BLOCK // n)
        scratch = torch.empty((min(step, m), n))
        for start in range(0, m, step):
            block = scratch[: min(step, m - start)]
            compute(start, block.shape[0], block)
            if activation == "gelu_tanh":
                block = torch.nn.functional.gelu(block, approximate="tanh")
            flat[start : start + block.shape[0]] = block
        return out

    def _check(self) -> None:
        """A small quantization and products, compared with the portable ones: what a bad compiler would break."""
        generator = torch.Generator().manual_seed(0)
        x, w = torch.randn(11, 320, generator=generator), torch.randn(50, 320, generator=generator)
        expected, weight = hif4_format.quantize(x, None, 64), hif4_format.quantize(w)
        same = all(map(torch.equal, self.quantize(x, None, 64), expected)) and self.rows.agree()
        for rows in (3, 11):  # few rows have a kernel of their own
            planes = (expected[0][:rows], expected[1][:rows], *weight)
            same &= torch.equal(self.linear(*planes), reference.linear(*planes))
            branch = (x[:rows, :5].bfloat16(), w[:, :5].t().bfloat16())
            found = self.linear(*planes, side=branch[0], side_weight=branch[1])
            same &= torch.equal(found, reference.linear(*planes, side=branch[0], side_weight=branch[1]))
        same &= NativeAttention(self).agrees()
        if not same:
            raise Hif4Error(
                f"{self.path}: computes something else than the portable implementation; "
                "set CXX to another C++ compiler, or use kernels='portable'."
            )


def _torch_openmp() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch is linked with; None for a torch without one.

    Two pools of threads would wait for each other's busy threads; with torch's own there is one, which also behaves
    after a fork, and under `torch.set_num_threads`, as torch's operators do.
    """
    directory = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            # A lookup in a library that is loaded already also searches the libraries that it was linked with.
            function = ctypes.CDLL(str(directory / name)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None


def _address(tensor: torch.Tensor | None, element: int = 0) -> int | None:
    return None if tensor is None else tensor.data_ptr() + element * tensor.element_size()
