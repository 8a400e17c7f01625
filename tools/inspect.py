"""hif4c inspect OUT: the transformed graph as text, and what is in the files."""

from __future__ import annotations

import contextlib
import os
import sys

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path.pop(0)  # run as a script: this folder must not hide the standard library (inspect)

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hif4c.tools.console import Reporter, console, run_command

if TYPE_CHECKING:
    from hif4c.runtime.artifact import Artifact
    from hif4c.runtime.graph import Graph

__all__ = ["inspect"]


def inspect(
    artifact: Annotated[Path, typer.Argument(help="Directory of the artifact.")],
    expert: Annotated[str | None, typer.Option(help="transformer or transformer_2. Default: the first.")] = None,
    block: Annotated[int | None, typer.Option(help="Only this transformer block.")] = None,
    stage: Annotated[
        str | None, typer.Option(help="The graph after this pass (traced again from the config); `list` names them.")
    ] = None,
    graph: Annotated[bool, typer.Option("--graph", help="Print the whole graph.")] = False,
    variant: Annotated[
        str | None, typer.Option(help="bf16: the program of the timesteps that keep activations in bf16.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the report here: one page with graphs, tables and plots, for a browser.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Calibration file of the model, for the report's figures on activations.")
    ] = None,
    model_explorer: Annotated[
        Path | None, typer.Option(help="Write every program here (.json) for Google's Model Explorer, with node data.")
    ] = None,
    diff: Annotated[
        Path | None, typer.Option(help="Another artifact, the one before: what differs in ARTIFACT, the one after.")
    ] = None,
) -> None:
    """Summarize precisions and bytes; with --block, --stage, --graph or --variant, print the program a line a node."""
    from hif4c.compiler.report import render_report
    from hif4c.runtime.artifact import open_artifact
    from hif4c.runtime.errors import Hif4Error
    from hif4c.runtime.graph_text import count_targets, program_lines

    if calibration is not None and html is None:
        raise Hif4Error(f"--calibration {calibration} is for the report; add --html FILE.")
    if diff is not None or model_explorer is not None or html is not None:
        printing = {"expert": expert, "block": block, "stage": stage, "variant": variant, "graph": graph or None}
        for name, value in printing.items():
            if value is not None:
                raise Hif4Error(
                    f"--{name} is for what is printed; leave it out beside --html, --model-explorer and --diff."
                )
    if stage == "list":
        from hif4c.compiler.pipeline import PASS_NAMES

        console.print("\n".join(PASS_NAMES))
        return
    opened = open_artifact(artifact)
    if diff is not None:
        _compare(open_artifact(diff), opened)
    if model_explorer is not None:
        _write_model_explorer(opened, model_explorer)
    if html is not None:
        _write_report(opened, html, calibration)
    if diff is not None or model_explorer is not None or html is not None:
        return
    expert = opened.expert(expert or next(iter(opened.experts))).name
    if stage is not None and variant is not None:
        raise Hif4Error(f"--variant {variant}: is a program as it was compiled; leave out --stage {stage}.")
    if block is None and stage is None and variant is None and not graph:
        for table in render_report(opened):
            console.print(table)
        counts = count_targets(opened.graph(expert))
        lines = [f"{count:6d}  {target}" for target, count in counts.most_common()]
        console.print(f"operators of {expert}:\n" + "\n".join(lines), highlight=False)
        console.print(_kernels(opened), highlight=False, markup=False)
        for name in opened.experts:
            if calibration := opened.manifest["experts"][name].get("calibration"):
                console.print(_calibration(name, calibration), highlight=False)
            if opened.variants(name):
                console.print(_steps(name, opened.expert(name).bf16_timesteps), highlight=False)
        return
    program = opened.graph(expert, variant) if stage is None else _at_stage(opened, expert, stage)
    lines = list(program_lines(program, None if block is None else f"blocks.{block}"))
    if not lines:
        raise Hif4Error(f"{expert} has no block {block}.")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _compare(before: Artifact, after: Artifact) -> None:
    """Print what differs between two artifacts."""
    from hif4c.compiler.artifact_diff import compare_artifacts
    from hif4c.compiler.artifact_diff_tables import render_difference

    with Reporter.open() as report:
        differences = compare_artifacts(before, after, report)
    for part in render_difference(before, after, differences):
        console.print(part)


def _write_report(artifact: Artifact, output: Path, calibration: Path | None) -> None:
    """Write the page, and say where it is."""
    import time

    from hif4c.compiler.amounts import format_bytes
    from hif4c.compiler.calibration import Calibration
    from hif4c.compiler.report_page import write_report_page

    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        known = None if calibration is None else stack.enter_context(Calibration(calibration))
        report = stack.enter_context(Reporter.open())
        size = write_report_page(artifact, output, known, report)
    summary = report.summary(time.perf_counter() - started)
    console.print(f"wrote {output} ({format_bytes(size)}) {summary}", highlight=False, markup=False, soft_wrap=True)


def _write_model_explorer(artifact: Artifact, output: Path) -> None:
    """Write the programs for Model Explorer, and print how to open them."""
    import shlex

    from hif4c.compiler.model_explorer import write_model_explorer

    written = write_model_explorer(artifact, output)
    lines = [f"wrote {path}" for path in (written.graphs, *written.node_data.values())]
    lines += [f"no {metric}: nothing was measured" for metric in written.missing]
    lines += ["open it with (pip install ai-edge-model-explorer):", f"  {shlex.join(written.command)}"]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _kernels(artifact: Artifact) -> str:
    """The targets that an artifact has kernels for; whether they may run here is for `hif4c trust` to say."""
    from hif4c.runtime.kernel_files import kernel_targets

    found = []
    for target in kernel_targets(artifact):
        size = sum(size for name, (size, _) in artifact.files.items() if name.startswith(f"kernels/{target}/"))
        found.append(f"{target} ({size / 1e6:.2f} MB)")
    return f"kernels: {', '.join(found) or 'none, the portable ones run'}"


def _calibration(expert: str, calibration: Mapping[str, Any]) -> str:
    """What an expert's calibration was made of."""
    runs = [f"{_amount(run)}, seed {run.get('seed', '?')}" for run in calibration["runs"]]
    return f"calibration of {expert}: {'; '.join(runs) or 'no run recorded'} (sha256 {calibration['sha256'][:12]})"


def _amount(run: Mapping[str, Any]) -> str:
    kind = "clips" if run.get("source") == "clips" else "prompts"
    count = len(run.get(kind, ()))
    return f"{count} {kind if count != 1 else kind[:-1]}"


def _steps(expert: str, ranges: tuple[tuple[float, float], ...]) -> str:
    """When an expert's second program runs."""
    when = ", ".join(f"{low:g} to {high:g}" for low, high in ranges)
    return f"bf16 activations of {expert}: {f'at timesteps {when}' if ranges else 'at no timestep'} (--variant bf16)"


def _at_stage(artifact: Artifact, expert: str, stage: str) -> Graph:
    """Trace the expert again and run the passes up to `stage`; needs no weights."""
    from hif4c.compiler.inspection import graph_at_stage

    return graph_at_stage(artifact, expert, stage)


if __name__ == "__main__":
    run_command(inspect)
