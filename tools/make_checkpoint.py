"""Write a checkpoint of made-up weights, of any size, to try what a model of that size takes on this machine."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path.pop(0)  # run as a script: this folder must not hide the standard library (inspect)

import time
from pathlib import Path
from typing import Annotated

import typer

from hif4c.tools.console import MAX_SEED, Reporter, console, run_command

__all__ = ["make_checkpoint"]


def make_checkpoint(
    model: Annotated[
        str,
        typer.Argument(help="Wan2.2-T2V-A14B, Wan2.2-I2V-A14B, Wan2.2-TI2V-5B, wan-tiny, or a directory to be like."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the checkpoint; must not exist.")],
    layout: Annotated[str, typer.Option(help="diffusers, or wan for the layout of Wan's own releases.")] = "diffusers",
    layers: Annotated[int | None, typer.Option(min=1, help="Transformer blocks. Default: the model's.")] = None,
    experts: Annotated[
        str | None, typer.Option(help="Only these, with commas: transformer, transformer_2. Default: the model's.")
    ] = None,
    shard_size: Annotated[float, typer.Option(min=0.001, help="GB of weights in one file.")] = 5.0,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the values.")] = 0,
    pipeline: Annotated[
        bool,
        typer.Option(
            "--pipeline", help="A small VAE, text encoder and tokenizer as well: enough to sample and to calibrate."
        ),
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="That make values. Default: one a processor.")] = None,
) -> None:
    """Write a checkpoint of made-up weights: real bytes at full size, without a download.

    The values are random; the sizes of weights and norms are such that the activations are about as large as those
    published of Wan2.2. Equal seeds give equal tensors in every layout, dtype and number of layers.
    """
    from hif4c.compiler.amounts import format_bytes, format_seconds
    from hif4c.compiler.synthetic_checkpoint import DTYPES, CheckpointOptions
    from hif4c.compiler.synthetic_checkpoint import make_checkpoint as write

    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is not one of {', '.join(DTYPES)}")
    options = CheckpointOptions(
        layout=layout,
        layers=layers,
        experts=None if experts is None else tuple(name.strip() for name in experts.split(",")),
        shard_bytes=int(shard_size * 1e9),
        seed=seed,
        dtype=DTYPES[dtype],
        components=pipeline,
        threads=threads,
    )
    started = time.perf_counter()
    with Reporter.open() as report:
        written = sum(write(model, output, options, report).values())
    took = format_seconds(time.perf_counter() - started)
    console.print(f"{output}: {format_bytes(written)} of weights in {took}", highlight=False, markup=False)


if __name__ == "__main__":
    run_command(make_checkpoint)
