"""An artifact as ONNX: one .onnx file a program, whose weights are read from safetensors files beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hif4c.runtime.artifact import Artifact

__all__ = ["DEFAULT_OPSET", "MAX_OPSET", "MIN_OPSET", "ExportedProgram", "export_onnx"]

MIN_OPSET, MAX_OPSET, DEFAULT_OPSET = 18, 23, 18


@dataclass(frozen=True)
class ExportedProgram:
    """One .onnx file.

    Attributes:
        expert: its name.
        variant: None for the main program, "bf16" for the one whose activations are not quantized.
        path: the .onnx file.
        nodes: nodes of its main graph, calls of functions counted once.
        onnx_bytes: size of the .onnx file.
        data: (location relative to the .onnx's folder, bytes referenced) of each file of external data.
        quantized: for each quantizer of the program, the module path of the first linear that reads it and the name
            of the value that holds the quantized activations [B, T, Kp] float32.
    """

    expert: str
    variant: str | None
    path: Path
    nodes: int
    onnx_bytes: int
    data: tuple[tuple[str, int], ...]
    quantized: tuple[tuple[str, str], ...]


def export_onnx(
    artifact: Artifact,
    output: Path,
    *,
    experts: Sequence[str] | None = None,
    opset: int = DEFAULT_OPSET,
    weights: str = "auto",
    qdq: bool = False,
    on_event: Callable[[str, Any], None] = lambda event, value: None,
) -> list[ExportedProgram]:
    """Write an artifact's programs as ONNX, main programs first within an expert."""
    raise NotImplementedError
