"""The library of native CPU kernels, and the operators that it offers: the portable ones, faster."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hif4c.runtime import format as hif4_format
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.native.attention_bindings import NativeAttention, attention_operators
from hif4c.runtime.native.linear_bindings import LinearKernel, linear_operators
from hif4c.runtime.native.linear_w4_bindings import NativeLinearW4, linear_w4_operators
from hif4c.runtime.native.row_bindings import RowKernels, row_operators
from hif4c.runtime.native.status import BEST, INSTRUCTION_SETS

__all__ = ["INSTRUCTION_SETS", "Library"]


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
        self.path = path
        self.functions = library
        self.parallel = _torch_openmp()  # what every entry point takes to start its threads
        self.linears = LinearKernel(self)
        self.rows = RowKernels(self)
        self.instruction_set: int = library.hif4_instruction_set()
        with torch.device("cpu"):  # whatever default the user has set
            self._check()

    def operators(self) -> dict[str, Callable[..., Any]]:
        """What stands in for the portable operators on the CPU: name in the `hif4` namespace -> function."""

        def quantize(
            x: torch.Tensor, mask: torch.Tensor | None = None, hadamard: int = 0
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return self.quantize(x, mask, hadamard)

        linears = {**linear_operators(self), **linear_w4_operators(self)}
        return {"quantize": quantize, **linears, **row_operators(self), **attention_operators(self)}

    def quantize(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, hadamard: int = 0, instruction_set: int = BEST
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `hif4c.runtime.format.quantize`, with the kernels of an instruction set (-1: the best there is)."""
        return self.rows.quantize(x, mask, hadamard, instruction_set)

    def linear(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        """As `hif4c.runtime.reference.linear`; see `LinearKernel.linear`."""
        return self.linears.linear(*arguments, **keywords)

    def _check(self) -> None:
        """A small quantization and products, compared with the portable ones: what a bad compiler would break."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(11, 320, generator=generator, dtype=torch.float32)
        same = all(map(torch.equal, self.quantize(x, None, 64), hif4_format.quantize(x, None, 64)))
        same &= self.rows.agree()
        same &= self.linears.agrees()
        same &= NativeLinearW4(self).agrees()
        same &= NativeAttention(self).agrees()
        if not same:
            raise Hif4Error(
                f"{self.path}: computes something else than the portable implementation; "
                "set CXX to another C++ compiler, or use kernels='portable'."
            )


def _torch_openmp() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch is linked with; None for a torch without one.

    Two pools of threads would wait for each other's busy threads; with torch's own there is one, and these kernels do
    what torch's operators do under `torch.set_num_threads` and after a fork.
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
