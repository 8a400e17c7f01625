"""hif4c compile MODEL -o OUT: make the artifact."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path.pop(0)  # run as a script: this folder must not hide the standard library (inspect)

import time
from pathlib import Path
from typing import Annotated

import typer

from hif4c.tools.console import Reporter, console, run_command
from hif4c.tools.ranks import speaking_ranks

__all__ = ["compile_command"]


def compile_command(
    model: Annotated[str, typer.Argument(help="Directory, built-in name (wan-tiny, ...) or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the artifact; must not exist.")],
    recipe: Annotated[
        list[str] | None, typer.Option(help="Recipe name or .toml file; EXPERT=RECIPE for one expert. Repeatable.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="File of `hif4c calibrate`. Without: a small model is calibrated on the way.")
    ] = None,
    expert: Annotated[list[str] | None, typer.Option(help="Only this expert. Repeatable.")] = None,
    components: Annotated[
        str, typer.Option(help="Text encoder, VAE and the rest: copy, link (hard links) or none.")
    ] = "copy",
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="What to build kernels for: cpu (like this machine), cuda-sm80, cuda-sm89, cuda-sm90, cuda-sm100, "
            "cuda-sm120, hip-gfx942, all, or portable (none). Repeatable, or with commas. Default: cpu."
        ),
    ] = None,
    golden: Annotated[bool, typer.Option(help="Record golden outputs, replayed by `hif4c verify`.")] = True,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="LoRA to fuse before quantization: [EXPERT=]FILE[:SCALE]. Repeatable."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a compile that was killed or interrupted, or filled the disk.")
    ] = False,
) -> None:
    """Compile a model once, ahead of time, into a 4-bit artifact.

    The artifact appears under its name only when it is complete and a fresh process has loaded and verified it. What
    is finished before that is in .NAME.partial beside it; after a kill, the same command with --resume continues it.
    The kernels that were built into it are recorded as trusted on this machine; elsewhere that takes `hif4c trust`.
    Several processes or machines share the work under torchrun:
    torchrun --nproc-per-node 2 --no-python hif4c compile MODEL -o OUTPUT.
    """
    from hif4c.compiler.compile import CompileOptions, compile_model
    from hif4c.compiler.kernels import check_targets, resolve_targets
    from hif4c.compiler.locate import describe_model
    from hif4c.compiler.lora import parse_loras
    from hif4c.compiler.recipe import resolve_recipes
    from hif4c.compiler.report import render_report
    from hif4c.runtime.artifact import open_artifact

    started = time.perf_counter()
    with speaking_ranks() as ranks:
        with ranks.together():
            targets = resolve_targets(target or ["cpu"])
            check_targets(targets)
            experts = list(describe_model(model, revision=revision).configs)
            recipes = resolve_recipes(experts, recipe or [], expert or [])
            loras = parse_loras(lora or [], list(recipes))
        options = CompileOptions(recipes, components, golden, revision, calibration, targets, loras, resume)
        with Reporter.open(silent=not ranks.first) as report:
            path = compile_model(model, output, options, report, ranks=ranks)
        artifact = open_artifact(path)
        console.print(render_report(artifact)[0])
        seconds = time.perf_counter() - started
        console.print(f"{path} compiled and verified in {seconds:.1f} s", highlight=False, markup=False)
        written = sum(item["bytes"] for item in artifact.manifest["files"].values())
        console.print(report.summary(seconds, written), highlight=False, markup=False)


if __name__ == "__main__":
    run_command(compile_command)
