"""hif4c calibrate MODEL -o FILE: record the activations that a recipe's masks, shifts and roundings are made from."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path.pop(0)  # run as a script: this folder must not hide the standard library (inspect)

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hif4c.tools.console import MAX_SEED, Reporter, console, make_table, parse_size, run_command
from hif4c.tools.progress import run_summary
from hif4c.tools.ranks import speaking_ranks

if TYPE_CHECKING:
    from rich.table import Table

    from hif4c.compiler.calibration import ExpertCalibration

__all__ = ["calibrate"]


def calibrate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="Directory, built-in name or hub id; with --merge, files.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The calibration file (.safetensors).")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge the given calibration files into one.")] = False,
    prompt_file: Annotated[Path | None, typer.Option(help="Prompts, one a line. Default: built-in ones.")] = None,
    prompts: Annotated[int, typer.Option(help="How many built-in prompts.")] = 16,
    clips: Annotated[
        Path | None, typer.Option(help="Folder of clips (NAME.mp4 and NAME.txt): noise them instead of sampling.")
    ] = None,
    calls: Annotated[
        int,
        typer.Option(
            min=1,
            help="Calls to record of each expert; what they hold on the way waits on the disk (335 MB each at "
            "832x480x81).",
        ),
    ] = 32,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of noise and choices.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Default: the model's.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels. Default: the model's.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames. Default: the model's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance. Default: the model's.")] = None,
    image: Annotated[Path | None, typer.Option(help="First frame, for an image-to-video model.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Prompts sampled together. Default: 1, of a small model 16.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="LoRA to fuse, as in the compile that follows: [EXPERT=]FILE[:SCALE]. Repeatable."),
    ] = None,
) -> None:
    """Record what a model's 4-bit inputs look like: histograms of every channel, by timestep, and sample tokens.

    The samples come from the pipeline's own sampling, or from clips that are noised. They run through the traced
    program with one layer of the checkpoint in memory. Give the file to `hif4c compile --calibration`.
    Several processes or machines share the work under torchrun, with the same result:
    torchrun --nproc-per-node 2 --no-python hif4c calibrate MODEL -o FILE.
    """
    from hif4c.compiler.calibration_writer import merge_calibrations
    from hif4c.runtime.errors import Hif4Error

    started = time.perf_counter()
    if merge:
        if len(models) < 2:
            raise Hif4Error("--merge needs two calibration files or more.")
        merge_calibrations([Path(item) for item in models], output)
        _print(output, time.perf_counter() - started, None)
        return
    if len(models) > 1:
        raise Hif4Error(f"{len(models)} models: calibrate one at a time, or merge calibration files with --merge.")

    from hif4c.compiler.calibration_run import CalibrationOptions, run_calibration
    from hif4c.compiler.locate import locate_model
    from hif4c.compiler.lora import parse_loras

    width, height = parse_size(size)
    asked = {"height": height, "width": width, "frames": frames, "steps": steps, "guidance": guidance}
    sampling = tuple((name, value) for name, value in asked.items() if value is not None)
    texts = () if prompt_file is None else _read_prompts(prompt_file)
    with speaking_ranks(device) as ranks:
        with ranks.together():
            location = locate_model(models[0], revision=revision, expert_files_only=False)
            loras = parse_loras(lora or [], list(location.experts))
        options = CalibrationOptions(texts, prompts, clips, image, seed, calls, batch, device, sampling, loras)
        with Reporter.open(silent=not ranks.first) as report:
            run_calibration(location, output, options, report, ranks=ranks)
    if ranks.first:
        _print(output, time.perf_counter() - started, report)


def _read_prompts(path: Path) -> tuple[str, ...]:
    from hif4c.runtime.errors import Hif4Error

    try:
        texts = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise Hif4Error(f"{path}: cannot be read ({error}).") from None
    if not texts:
        raise Hif4Error(f"{path}: holds no prompt.")
    return texts


def _print(output: Path, seconds: float, report: Reporter | None) -> None:
    """What the file holds, and what it took to make."""
    from hif4c.compiler.calibration import Calibration

    with Calibration(output) as calibration:
        for expert in calibration.experts.values():
            console.print(_table(calibration.model, expert))
    size = output.stat().st_size
    console.print(f"{output} written, {size / 1e6:,.1f} MB", highlight=False, markup=False)
    summary = run_summary(seconds, written=size) if report is None else report.summary(seconds, size)
    console.print(summary, highlight=False, markup=False)


def _table(model: str, expert: ExpertCalibration) -> Table:
    """Inputs of one kind, of all blocks, a row."""
    kinds: dict[str, list[tuple[int, float, float]]] = {}
    for group in expert.groups:
        sketch = expert.sketch(group)
        kind = ".".join(group.split(".")[2:])
        entry = (int(sketch.count().sum()), float(sketch.percentile(99.9).max()), float(sketch.maximum().max()))
        kinds.setdefault(kind, []).append(entry)
    title = f"{model}, {expert.name}: inputs of the 4-bit linears, {expert.call_count} calls"
    table = make_table(title, ("first reader", "inputs", "tokens", "99.9 % of a channel", "maximum"))
    for kind, entries in kinds.items():
        table.add_row(
            kind, str(len(entries)), f"{entries[0][0]:,}", f"{max(item[1] for item in entries):.3g}",
            f"{max(item[2] for item in entries):.3g}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    run_command(calibrate)
