"""report.json and report.html: what an artifact holds, computed from its bytes as reopened."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hif4c.runtime.artifact import Artifact, ExpertInfo, canonical_json
from hif4c.runtime.graph import Graph
from hif4c.runtime.safetensors_stream import TensorFile

__all__ = ["ExpertSummary", "render_report", "summarize", "write_report"]


@dataclass(frozen=True)
class ExpertSummary:
    """What the files of one expert hold.

    Attributes:
        expert: its name.
        recipe: name of its recipe.
        precisions: precision -> number of linears.
        quantized_weights: weights stored in 4 bits.
        plane_bytes: bytes of their planes.
        other_bytes: bytes of all other tensors.
        file_bytes: bytes of the expert's files, headers and graph included.
        bf16_bytes: bytes of the expert's parameters in bf16.
        nodes: nodes of the program.
    """

    expert: str
    recipe: str
    precisions: dict[str, int]
    quantized_weights: int
    plane_bytes: int
    other_bytes: int
    file_bytes: int
    bf16_bytes: int
    nodes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits that a quantized weight takes in the file."""
        return 8 * self.plane_bytes / self.quantized_weights if self.quantized_weights else 0.0

    @property
    def ratio(self) -> float:
        """Bytes of the expert's files over those of its parameters in bf16."""
        return self.file_bytes / self.bf16_bytes


def summarize(artifact: Artifact) -> list[ExpertSummary]:
    """Read the headers of every expert's weight files and add up what is there."""
    return [_summarize_expert(artifact, name) for name in artifact.experts]


def _summarize_expert(artifact: Artifact, name: str) -> ExpertSummary:
    info = artifact.expert(name)
    graph = artifact.graph(name)
    constants = _not_parameters(info, graph)
    planes = others = parameters = 0
    for relative in artifact.files:
        if relative.startswith(f"{name}/") and relative.endswith(".safetensors"):
            with TensorFile(artifact.path(relative)) as file:
                for tensor in file.names:
                    dtype, shape = file.info(tensor)
                    elements = math.prod(shape)
                    if tensor.endswith((".codes", ".scales")):
                        planes += elements
                    else:
                        others += elements * dtype.itemsize
                        parameters += 0 if tensor in constants else elements
    quantized = sum(
        linear["in_features"] * linear["out_features"] for linear in info.linears if linear["precision"] != "high"
    )
    precisions: dict[str, int] = {}
    for linear in info.linears:
        precisions[linear["precision"]] = precisions.get(linear["precision"], 0) + 1
    size = sum(count for relative, (count, _) in artifact.files.items() if relative.startswith(f"{name}/"))
    return ExpertSummary(
        name, info.recipe["name"], precisions, quantized, planes, others, size, 2 * (parameters + quantized),
        len(graph.nodes),
    )  # fmt: skip


def _not_parameters(info: ExpertInfo, graph: Graph) -> set[str]:
    """Stored tensors that the original model computes instead of storing: tables, masks and folded constants."""
    masks = {linear["mask"] for linear in info.linears}
    parameters = (".weight", ".bias", "scale_shift_table")
    return {item.name for item in graph.tensors if item.name in masks or not item.name.endswith(parameters)}


def render_report(artifact: Artifact) -> list[Table]:
    """The summary and the linears as tables for people."""
    overview = Table(title=escape(f"{artifact.manifest['model']['source']}, compiled"), box=box.SIMPLE_HEAD)
    for column in ("expert", "recipe", "4-bit", "high", "bits a weight", "file", "bf16", "ratio", "nodes"):
        overview.add_column(
            column, justify="left" if column in ("expert", "recipe") else "right", no_wrap=column == "expert"
        )
    for item in summarize(artifact):
        quantized = sum(count for precision, count in item.precisions.items() if precision != "high")
        overview.add_row(
            item.expert, escape(item.recipe), str(quantized), str(item.precisions.get("high", 0)),
            f"{item.bits_per_weight:.2f}", f"{item.file_bytes / 1e6:,.2f} MB", f"{item.bf16_bytes / 1e6:,.2f} MB",
            f"{item.ratio:.1%}", str(item.nodes),
        )  # fmt: skip
    tables = [overview]
    for name, info in artifact.experts.items():
        table = Table(title=f"{name}: linears", box=box.SIMPLE_HEAD)
        for column in ("linear", "shape", "precision", "reason"):
            table.add_column(column)
        for linear in info.linears:
            shape = f"{linear['out_features']} x {linear['in_features']}"
            table.add_row(linear["path"], shape, linear["precision"], escape(linear["reason"]))
        tables.append(table)
    return tables


def write_report(artifact: Artifact, directory: Path) -> None:
    """Write report.json and report.html (self-contained) into the artifact's directory."""
    experts = {
        item.expert: {
            "recipe": item.recipe,
            "precisions": item.precisions,
            "quantized_weights": item.quantized_weights,
            "bits_per_quantized_weight": item.bits_per_weight,
            "plane_bytes": item.plane_bytes,
            "other_bytes": item.other_bytes,
            "file_bytes": item.file_bytes,
            "bf16_bytes": item.bf16_bytes,
            "ratio_to_bf16": item.ratio,
            "nodes": item.nodes,
        }
        for item in summarize(artifact)
    }
    report = {"model": artifact.manifest["model"]["source"], "experts": experts}
    (directory / "report.json").write_bytes(canonical_json(report))
    console = Console(
        record=True, width=140, height=100, file=io.StringIO(), force_terminal=True, color_system="truecolor",
        emoji=False, _environ={},  # TERM and the like must not change the bytes
    )  # fmt: skip
    for table in render_report(artifact):
        console.print(table)
    (directory / "report.html").write_text(console.export_html(inline_styles=False), encoding="utf-8")
