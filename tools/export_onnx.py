"""hif4c export-onnx OUT -o model.onnx: an artifact's programs as ONNX, which stock onnxruntime runs."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path.pop(0)  # run as a script: this folder must not hide the standard library (inspect)

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from hif4c.tools.console import Reporter, console, make_table, run_command

if TYPE_CHECKING:
    from hif4c.compiler.onnx_export import ExportedProgram
    from hif4c.compiler.onnx_verify import OnnxCheck
    from hif4c.runtime.artifact import Artifact

__all__ = ["export_onnx_command"]


def export_onnx_command(
    artifact: Annotated[Path, typer.Argument(help="Directory of the artifact.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="model.onnx; several programs become model.EXPERT.onnx. Must not be there yet."
        ),
    ],
    opset: Annotated[int | None, typer.Option(help="ONNX opset. Default: one that onnxruntime 1.22 runs.")] = None,
    expert: Annotated[list[str] | None, typer.Option(help="Only this expert. Repeatable.")] = None,
    weights: Annotated[
        str,
        typer.Option(
            help="artifact (the .onnx refers to the artifact's own files, which must lie below its folder), copy "
            "(beside the .onnx), or auto: the first where it is possible."
        ),
    ] = "auto",
    qdq: Annotated[
        bool, typer.Option("--qdq", help="Quantize and Dequantize as two nodes with the 4-bit planes between them.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run onnxruntime on the artifact's golden inputs and compare.")
    ] = False,
) -> None:
    """Export every program of an artifact to ONNX, with 4-bit weights and free sizes, for stock onnxruntime.

    HiFloat4 is in the functions of domain `hif4`, whose bodies are standard operators; activations are float32. The
    weights are external data in safetensors files. Neither the original model nor a GPU is needed.
    """
    from hif4c.compiler.onnx_export import DEFAULT_OPSET, export_onnx
    from hif4c.runtime.artifact import open_artifact

    started = time.perf_counter()
    opened = open_artifact(artifact)
    if verify:
        _check_verifiable(opened, expert)
    with Reporter.open() as report:
        programs = export_onnx(
            opened,
            output,
            experts=expert,
            opset=DEFAULT_OPSET if opset is None else opset,
            weights=weights,
            qdq=qdq,
            on_event=report,
        )
    table = make_table(str(output.parent), ("file", "nodes", "bytes", "weights in", "their bytes"), left=1)
    for program in programs:
        locations = ", ".join(location for location, _ in program.data)
        table.add_row(
            escape(program.path.name),
            str(program.nodes),
            f"{program.onnx_bytes:,}",
            escape(locations),
            f"{sum(size for _, size in program.data):,}",
        )
    console.print(table)
    if verify and not _verify(opened, programs):
        raise typer.Exit(1)
    seconds = time.perf_counter() - started
    written = sum(program.onnx_bytes for program in programs) + _copied(programs, opened)
    console.print(report.summary(seconds, written), highlight=False, markup=False)


def _copied(programs: Sequence[ExportedProgram], artifact: Artifact) -> int:
    """Bytes of weights that lie beside the .onnx files and not in the artifact; two programs may read the same."""
    files = {program.path.parent / location: size for program in programs for location, size in program.data}
    root = artifact.root.resolve()
    return sum(size for path, size in files.items() if not path.resolve().is_relative_to(root))


def _check_verifiable(artifact: Artifact, experts: Sequence[str] | None) -> None:
    """Refuse --verify where it cannot be done, before anything is written."""
    from hif4c.runtime.golden import golden_path
    from hif4c.runtime.onnx_session import CPU, check_providers

    check_providers(CPU)
    for name in experts or artifact.experts:
        for variant in (None, *artifact.variants(name)):
            golden_path(artifact, name, variant)


def _verify(artifact: Artifact, programs: Sequence[ExportedProgram]) -> bool:
    """Print what onnxruntime computes against what it should; whether all is well."""
    from hif4c.compiler.onnx_verify import verify_onnx

    with Reporter.open() as report:
        checks = verify_onnx(
            artifact,
            [program.path for program in programs],
            on_event=lambda event, path: report("step", f"running {path.name}"),
        )
    columns = (
        "program",
        "codes",
        "4-bit linears",
        "equal codes",
        "flips",
        "distance",
        "of last bits",
        "of bf16",
        "verdict",
    )
    table = make_table("onnxruntime on the golden inputs", columns)
    for check in checks:
        table.add_row(
            escape(check.path.name),
            _codes(check),
            f"{check.linears}: {check.linear_error:.2f} of tolerance"
            + (f" in {escape(check.worst)}" if check.linear_error > 1 else ""),
            f"{check.program_error:.1e}" + ("" if check.passed else f" in {escape(check.worst_value)}"),
            f"{check.flips:,} of {check.activations:,}",
            f"{check.distance:.1e}",
            f"{check.flip_distance:.1e}",
            f"{check.recorded:.1e}",
            "[green]ok[/]" if check.passed else "[red]differs[/]",
        )
    console.print(table)
    console.print(
        "equal codes: largest difference from the program in float32 where both quantize alike\n"
        "distance: relative L2 from it as it is; beside it what last bits of the input, and bf16, change",
        highlight=False,
    )
    return all(check.passed for check in checks)


def _codes(check: OnnxCheck) -> str:
    if not check.activations:
        return "none quantized"
    return "identical" if check.codes_differ == 0 else f"{check.codes_differ} differ"


if __name__ == "__main__":
    run_command(export_onnx_command)
