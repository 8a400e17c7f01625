"""The kernels of `hif4c.runtime.gpu.kernels`, compiled by Triton on this machine when they are first launched.

With TRITON_INTERPRET=1 in the environment Triton runs them on CPU tensors instead, slowly: that is how tests without a
GPU compute with them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.gpu.launcher import Kernel, Value, grid_of

__all__ = ["Jit"]

# Rows, columns, warps, stages: most of what artifacts ship, one list for every GPU; what does not fit one is dropped.
_INT8_TILES = ((128, 128, 8, 3), (128, 128, 8, 4), (64, 128, 4, 3), (128, 64, 4, 3))
_BF16_TILES = ((128, 128, 8, 3), (128, 256, 8, 3))


class Jit:
    """Kernels from Triton.

    Raises:
        Hif4Error: Triton is not installed.
    """

    name = "jit"

    def __init__(self) -> None:
        try:
            self._triton: Any = importlib.import_module("triton")
            self._module: Any = importlib.import_module("hif4c.runtime.gpu.kernels")
        except ImportError as error:
            raise Hif4Error(
                f"kernels='jit' needs Triton on a GPU ({error}); install it with `pip install triton`, or compile the "
                "artifact with a GPU target and use kernels='bundled'."
            ) from None

    def serves(self, device: torch.device) -> bool:
        return True

    def identity(self, device: torch.device) -> list[str]:
        sources = hashlib.sha256(Path(self._module.__file__).read_bytes()).hexdigest()
        if device.type == "cpu":
            return ["interpreter", self._triton.__version__, sources]
        properties = torch.cuda.get_device_properties(device)
        driver = f"{torch.version.cuda or torch.version.hip} {self._triton.__version__}"
        return [properties.name, driver, sources]

    def variants(
        self, name: str, device: torch.device, values: Mapping[str, Value], constants: Mapping[str, int]
    ) -> list[Kernel]:
        function = getattr(self._module, name, None)
        if function is None:
            return []
        known = set(function.arg_names)
        taken = {key: number for key, number in constants.items() if key in known}
        extra = {"MAGIC": int(not _has_wgmma(device)), "GROUP_M": 8}
        taken.update({key: number for key, number in extra.items() if key in known and key not in taken})
        tiles: list[tuple[dict[str, int], int, int]]
        if name.startswith("linear"):
            shapes = _INT8_TILES if name == "linear_int8" else _BF16_TILES
            tiles = [({"BLOCK_M": m, "BLOCK_N": n}, warps, stages) for m, n, warps, stages in shapes]
        elif name.startswith("expand"):
            tiles = [({"BLOCK_R": 16, "BLOCK_U": 4}, 4, 1)]
        elif name == "quantize":
            # A rotation of up to 16 units has to lie in one block.
            rows, units, warps = (16, 4, 4) if constants["HADAMARD"] <= 256 else (8, 16, 8)
            tiles = [({"BLOCK_M": rows, "BLOCK_U": units}, warps, 1)]
        elif name == "norm_quantize":
            rows, units, warps = (8, 4, 4) if constants["HADAMARD"] <= 256 else (4, 16, 8)
            tiles = [({"BLOCK_M": rows, "BLOCK_U": units}, warps, 1)]
        else:
            return []
        prefix = "packed_" if constants.get("PACKED") else ""
        return [
            Kernel(name, f"{prefix}{'x'.join(map(str, tile.values()))}_w{warps}_s{stages}", {**taken, **tile}, warps,
                   num_stages=stages)
            for tile, warps, stages in tiles
        ]  # fmt: skip

    def launch(self, kernel: Kernel, device: torch.device, values: Mapping[str, Value]) -> None:
        function = getattr(self._module, kernel.name)
        arguments = {name: value for name, value in values.items() if name in function.arg_names}
        on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        try:
            with on_device:
                function[grid_of(kernel, values)](
                    **{**arguments, **kernel.constants}, num_warps=kernel.num_warps, num_stages=kernel.num_stages,
                    enable_fp_fusion=False,
                )  # fmt: skip
        except (RuntimeError, ValueError, TypeError, self._triton.TritonError) as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise Hif4Error(f"{kernel.name} {kernel.variant} on {device}: Triton cannot run it ({line}).") from error


def _has_wgmma(device: torch.device) -> bool:
    """Whether matrix units add into registers only after a copy: then MAGIC costs as much as a conversion."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] in (9, 10)
