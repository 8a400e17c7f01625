"""hif4c bench scale: a model at its full size, from a synthetic checkpoint to a step of the artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hif4c.tools.bench_output import Markdown, Output, check_outputs, machine_sentence, show_tables, write_values
from hif4c.tools.console import MAX_SEED, Reporter

__all__ = ["scale"]


def scale(
    model: Annotated[str, typer.Argument(help="Wan2.2-T2V-A14B, Wan2.2-I2V-A14B, Wan2.2-TI2V-5B or wan-tiny.")],
    directory: Annotated[
        Path, typer.Option("--dir", help="Receives the synthetic checkpoint and the artifact, which stay there.")
    ],
    experts: Annotated[
        str | None, typer.Option(help="Only these, with commas: transformer, transformer_2. Default: the model's.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Transformer blocks. Default: the model's.")] = None,
    recipe: Annotated[str, typer.Option(help="Recipe of the artifact.")] = "rtn",
    calibration: Annotated[Path | None, typer.Option(help="For a recipe that needs one.")] = None,
    latent: Annotated[str, typer.Option(help="Latent FRAMESxHEIGHTxWIDTH of the step that is timed.")] = "1x24x52",
    text: Annotated[int, typer.Option(min=1, max=4096, help="Its text tokens.")] = 512,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the checkpoint.")] = 0,
    output: Output = None,
    markdown: Markdown = None,
) -> None:
    """Compile, verify, load and run a model at its full size, from a synthetic checkpoint; and the disk by itself.

    The checkpoint is made by tools/make_checkpoint.py's code, or used again when it is there. Every stage is a process
    of its own, and begins with nothing of its files in the page cache. Reads and writes are those that reached a disk.
    A14B with both experts takes 57 GB for the checkpoint and 17 GB for the artifact.
    """
    from hif4c.compiler.bench_scale import ScaleOptions, measure_scale
    from hif4c.compiler.bench_timing import describe_machine
    from hif4c.tools.bench_tables import scale_tables

    chosen = None if experts is None else tuple(name.strip() for name in experts.split(","))
    options = ScaleOptions(model, chosen, layers, recipe, calibration, latent, text, seed)
    check_outputs(output, markdown)
    with Reporter.open() as report:
        result = measure_scale(options, directory, report)
    machine = describe_machine("auto")
    show_tables(scale_tables(result), machine_sentence(machine), markdown)
    write_values(output, {"machine": machine, **result.to_dict()})
