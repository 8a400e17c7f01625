"""report.json and report.html: what an artifact holds, computed from its bytes as reopened."""

from __future__ import annotations

import contextlib
import io
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hif4c.runtime.artifact import Artifact, ExpertInfo, canonical_json
from hif4c.runtime.graph import Graph
from hif4c.runtime.safetensors_stream import TensorFile

__all__ = [
    "ExpertSummary",
    "Resolved",
    "open_weights",
    "render_report",
    "summarize",
    "summarize_expert",
    "write_report",
]


@dataclass(frozen=True)
class Resolved:
    """What the recipe became in one expert, as the manifest says.

    Attributes:
        shifts: inputs whose channel means were taken off.
        masks: inputs with a channel mask.
        folded: those of them whose mask is applied by what makes the input.
        alphas: exponents of the masks, ascending.
        rotations: widths of the inputs' rotations, ascending.
        roundings: rounding -> number of weights.
        rank: the largest of a low-rank branch.
        outlier_columns: the most that an input keeps in 16 bits.
        sqnr_median, sqnr_min: of the linears' outputs on calibration rows, in dB; None where nothing was measured.
    """

    shifts: int
    masks: int
    folded: int
    alphas: tuple[float, ...]
    rotations: tuple[int, ...]
    roundings: dict[str, int]
    rank: int
    outlier_columns: int
    sqnr_median: float | None
    sqnr_min: float | None


@dataclass(frozen=True)
class ExpertSummary:
    """What the files of one expert hold.

    Attributes:
        expert: its name.
        recipe: name of its recipe.
        precisions: precision -> number of linears.
        quantized_weights: weights stored in 4 bits.
        plane_bytes: bytes of their planes.
        branch_bytes: bytes of their side branches.
        other_bytes: bytes of all other tensors.
        file_bytes: bytes of the expert's files, headers and graph included.
        bf16_bytes: bytes of the expert's parameters in bf16.
        nodes: nodes of the program.
        resolved: what its recipe became.
    """

    expert: str
    recipe: str
    precisions: dict[str, int]
    quantized_weights: int
    plane_bytes: int
    branch_bytes: int
    other_bytes: int
    file_bytes: int
    bf16_bytes: int
    nodes: int
    resolved: Resolved

    @property
    def bits_per_weight(self) -> float:
        """Bits that a quantized weight takes in the file, with its side branch."""
        packed = self.plane_bytes + self.branch_bytes
        return 8 * packed / self.quantized_weights if self.quantized_weights else 0.0

    @property
    def ratio(self) -> float:
        """Bytes of the expert's files over those of its parameters in bf16."""
        return self.file_bytes / self.bf16_bytes


def summarize(artifact: Artifact) -> list[ExpertSummary]:
    """Read the headers of every expert's weight files and add up what is there."""
    return [summarize_expert(artifact, name) for name in artifact.experts]


@contextlib.contextmanager
def open_weights(artifact: Artifact, expert: str) -> Iterator[list[TensorFile]]:
    """An expert's weight files, opened."""
    with contextlib.ExitStack() as stack:
        names = [name for name in artifact.files if name.startswith(f"{expert}/") and name.endswith(".safetensors")]
        yield [stack.enter_context(TensorFile(artifact.path(name))) for name in names]


def summarize_expert(artifact: Artifact, name: str) -> ExpertSummary:
    """Read the headers of one expert's weight files and add up what is there."""
    info = artifact.expert(name)
    graph = artifact.graph(name)
    constants = _not_parameters(info, graph)
    planes = branches = others = parameters = 0
    with open_weights(artifact, name) as files:
        for file in files:
            for tensor in file.names:
                dtype, shape = file.info(tensor)
                elements = math.prod(shape)
                if tensor.endswith((".codes", ".scales")):
                    planes += elements
                elif tensor.endswith((".weight.down", ".weight.up")):
                    branches += elements * dtype.itemsize
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
        name, info.recipe["name"], precisions, quantized, planes, branches, others, size, 2 * (parameters + quantized),
        len(graph.nodes), _resolve(info.linears),
    )  # fmt: skip


def _resolve(linears: Sequence[Mapping[str, Any]]) -> Resolved:
    quantized = [linear for linear in linears if linear["precision"] != "high"]
    masked = {linear["mask"]: linear for linear in quantized if linear["mask"] is not None}
    sqnr = [linear["sqnr"] for linear in quantized if linear.get("sqnr") is not None]
    return Resolved(
        shifts=len({linear["shift"] for linear in linears if linear.get("shift") is not None}),
        masks=len(masked),
        folded=sum(bool(linear.get("mask_folded")) for linear in masked.values()),
        alphas=tuple(sorted({linear["alpha"] for linear in masked.values() if linear.get("alpha") is not None})),
        rotations=tuple(sorted({linear["hadamard"] for linear in quantized if linear["hadamard"]})),
        roundings=dict(sorted(Counter(linear.get("rounding", "nearest") for linear in quantized).items())),
        rank=max((linear.get("rank", 0) for linear in quantized), default=0),
        outlier_columns=max((linear.get("outlier_columns", 0) for linear in quantized), default=0),
        sqnr_median=statistics.median(sqnr) if sqnr else None,
        sqnr_min=min(sqnr, default=None),
    )


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
    resolved = Table(title="what the recipes became", box=box.SIMPLE_HEAD)
    for column in (
        "expert", "shifts", "masks", "folded", "alpha", "rotation", "rounding", "rank", "columns", "SQNR, dB", "lowest",
    ):  # fmt: skip
        resolved.add_column(column, justify="left" if column == "expert" else "right", no_wrap=column == "expert")
    for item in summarize(artifact):
        quantized = sum(count for precision, count in item.precisions.items() if precision != "high")
        overview.add_row(
            item.expert, escape(item.recipe), str(quantized), str(item.precisions.get("high", 0)),
            f"{item.bits_per_weight:.2f}", f"{item.file_bytes / 1e6:,.2f} MB", f"{item.bf16_bytes / 1e6:,.2f} MB",
            f"{item.ratio:.1%}", str(item.nodes),
        )  # fmt: skip
        found = item.resolved
        resolved.add_row(
            item.expert, _count(found.shifts), _count(found.masks), _count(found.folded), _span(found.alphas),
            _span(found.rotations), ", ".join(f"{count} {name}" for name, count in found.roundings.items()),
            _count(found.rank), _count(found.outlier_columns), _decibels(found.sqnr_median), _decibels(found.sqnr_min),
        )  # fmt: skip
    loras = _loras(artifact)
    tables = [overview, resolved, loras] if loras.row_count else [overview, resolved]
    return [*tables, *(_linears(info) for info in artifact.experts.values())]


def _loras(artifact: Artifact) -> Table:
    """A row for each LoRA that was added to an expert's weights before they were quantized, in order."""
    table = Table(title="LoRAs in the weights", box=box.SIMPLE_HEAD)
    for column in ("expert", "LoRA", "scale", "tensors", "sha256"):
        table.add_column(column, justify="right" if column in ("scale", "tensors") else "left")
    for name in artifact.experts:
        for item in artifact.manifest["experts"][name].get("loras", []):
            table.add_row(
                name, escape(str(item["file"])), f"{item['scale']:g}", str(item["tensors"]), str(item["sha256"])[:16]
            )
    return table


def _linears(info: ExpertInfo) -> Table:
    """A row a linear; what no linear has gets no column."""
    rows = [
        {
            "linear": linear["path"],
            "shape": f"{linear['out_features']} x {linear['in_features']}",
            "is": linear["precision"],
            **_how(linear),
            "reason": escape(linear["reason"]),
        }
        for linear in info.linears
    ]
    # Narrow, so that the reasons fit beside the rest.
    table = Table(title=f"{info.name}: linears", box=box.SIMPLE_HEAD, collapse_padding=True)
    columns = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
    for name in columns:
        table.add_column(name, justify="right" if name == "SQNR" else "left", no_wrap=name in ("linear", "shape"))
    for row in rows:
        table.add_row(*(row[name] for name in columns))
    return table


def _how(linear: Mapping[str, Any]) -> dict[str, str]:
    """How a linear is quantized and how well, in a few words each."""
    shift = "" if linear.get("shift") is None else "yes"
    if linear["precision"] == "high":
        return {"shift": shift, "mask": "", "rotation": "", "rounding": "", "branch": "", "SQNR": ""}
    alpha, rank, columns = linear.get("alpha"), linear.get("rank", 0), linear.get("outlier_columns", 0)
    mask = "" if linear["mask"] is None else "ones" if alpha is None else f"{alpha:g}"
    branch = [f"rank {rank}"] if rank else []
    branch += [f"{columns} columns"] if columns else []
    return {
        "shift": shift,
        "mask": f"{mask} folded" if linear.get("mask_folded") else mask,
        "rotation": _count(linear["hadamard"]),
        "rounding": linear.get("rounding", "nearest"),
        "branch": ", ".join(branch),
        "SQNR": _decibels(linear.get("sqnr")),
    }


def _count(value: int) -> str:
    return str(value) if value else ""


def _span(values: Sequence[float]) -> str:
    """The ends of ascending values."""
    return "" if not values else f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def write_report(artifact: Artifact, directory: Path) -> None:
    """Write report.json and report.html (self-contained) into the artifact's directory."""
    experts = {
        item.expert: {
            "recipe": item.recipe,
            "precisions": item.precisions,
            "quantized_weights": item.quantized_weights,
            "bits_per_quantized_weight": item.bits_per_weight,
            "plane_bytes": item.plane_bytes,
            "branch_bytes": item.branch_bytes,
            "other_bytes": item.other_bytes,
            "file_bytes": item.file_bytes,
            "bf16_bytes": item.bf16_bytes,
            "ratio_to_bf16": item.ratio,
            "nodes": item.nodes,
            "resolved": asdict(item.resolved),
            **{key: value for key, value in artifact.manifest["experts"][item.expert].items() if key == "loras"},
        }
        for item in summarize(artifact)
    }
    report = {"model": artifact.manifest["model"]["source"], "experts": experts}
    (directory / "report.json").write_bytes(canonical_json(report))
    console = Console(
        record=True, width=180, height=100, file=io.StringIO(), force_terminal=True, color_system="truecolor",
        emoji=False, _environ={},  # TERM and the like must not change the bytes
    )  # fmt: skip
    for table in render_report(artifact):
        console.print(table)
    (directory / "report.html").write_text(console.export_html(inline_styles=False), encoding="utf-8")
