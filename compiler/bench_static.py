"""What the GPU kernels of an artifact, or of a fresh build, say of themselves before any GPU runs them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hif4c.compiler.binary_report import BinaryReport, analyse
from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.kernel_files import GPU_TARGETS, SIDECAR, kernel_targets, read_kernel_set

__all__ = ["StaticFigures", "analyse_kernels", "check_targets", "find_kernels"]

# Opcodes of SASS, without suffixes, and prefixes of AMD's, that are fp32 arithmetic: what a promotion every 64 costs.
_FP32 = ("FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2", "v_fma_f32", "v_fmac_f32", "v_mul_f32", "v_add_f32")
_FP32_PREFIXES = ("v_pk_fma_f32", "v_pk_mul_f32", "v_pk_add_f32")


@dataclass(frozen=True)
class StaticFigures:
    """One binary.

    Attributes:
        target: "cuda-sm80", ...
        name: of the kernel.
        variant: its tile.
        file: the binary.
        bytes: its size.
        report: what is in it.
    """

    target: str
    name: str
    variant: str
    file: str
    bytes: int
    report: BinaryReport

    @property
    def fp32(self) -> int | None:
        """fp32 arithmetic of a warp in one turn of the main loop; None without one."""
        if self.report.loop is None:
            return None
        return sum(
            count
            for opcode, count in self.report.loop.opcodes.items()
            if opcode.removesuffix("_e32").removesuffix("_e64") in _FP32 or opcode.startswith(_FP32_PREFIXES)
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "fp32": self.fp32}


def check_targets(targets: Sequence[str]) -> None:
    """Raise Hif4Error for a target that is not a GPU's."""
    for target in targets:
        if target not in GPU_TARGETS:
            raise Hif4Error(f"target {target!r} is not known; choose from {', '.join(GPU_TARGETS)}.")


def find_kernels(
    artifact: Path | None, targets: Sequence[str], directory: Path, on_build: Callable[[str], None]
) -> dict[str, Path]:
    """Target -> folder of its binaries: an artifact's own, or built below `directory`.

    Args:
        artifact: where to look; None to build.
        targets: empty for all that the artifact has, or that there are.
        directory: an empty one.
        on_build: called with a sentence for each binary that was built.

    Raises:
        Hif4Error: the artifact lacks a target or was changed; a target that is not known; or Triton is missing.
    """
    check_targets(targets)
    if artifact is None:
        from hif4c.compiler.gpu_kernels import build_gpu_kernels

        for target in targets or GPU_TARGETS:
            build_gpu_kernels(target, directory / target, on_build)
        return {target: directory / target for target in targets or GPU_TARGETS}
    opened = open_artifact(artifact)
    there = [target for target in kernel_targets(opened) if target in GPU_TARGETS]
    for target in targets or there:
        if read_kernel_set(opened, target) is None:
            raise Hif4Error(
                f"{artifact}: has no kernels for {target}, but for {', '.join(there) or 'no GPU'}; compile the model "
                f"with --target {target}."
            )
    if not there:
        raise Hif4Error(f"{artifact}: has kernels for no GPU; compile the model with --target all.")
    opened.verify("kernels/")
    return {target: opened.root / "kernels" / target for target in targets or there}


def analyse_kernels(target: str, folder: Path, on_kernel: Callable[[str], None]) -> list[StaticFigures]:
    """Read every binary of a target, in the order of kernels.json; Hif4Error where that is impossible."""
    figures = []
    for entry in json.loads((folder / SIDECAR).read_bytes())["kernels"]:
        path = folder / entry["file"]
        report = analyse(path, target)
        figures.append(StaticFigures(target, entry["name"], entry["variant"], path.name, path.stat().st_size, report))
        on_kernel(path.name)
    return figures
