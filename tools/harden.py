"""Make a harder yardstick of a model: the same function, with outlier channels in the inputs of its 4-bit linears."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path.pop(0)  # run as a script: this folder must not hide the standard library (inspect)

from pathlib import Path
from typing import Annotated

import typer

from hif4c.tools.console import MAX_SEED, Reporter, console, make_table, run_command

__all__ = ["harden"]


def harden(
    model: Annotated[str, typer.Argument(help="A diffusers pipeline: directory, built-in name or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write; must not exist.")],
    profile: Annotated[str, typer.Option(help="Where and how large: x32, x128 or wan2.2.")],
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Chooses the outlier channels.")] = 0,
) -> None:
    """Write a variant of MODEL with injected outlier channels, whose bf16 output is the same to rounding.

    Channels grow by powers of two where they are made, and the weights that read them shrink by as much. What was
    injected is in hardened.json.
    """
    from hif4c.compiler.harden import harden_model

    with Reporter.open() as report:
        record = harden_model(model, output, profile=profile, seed=seed, events=report)
    table = make_table(
        f"{record['source']}, profile {profile}", ("expert", "input", "blocks", "channels", "factor"), left=2
    )
    for name, expert in record["experts"].items():
        sites: dict[str, list[dict]] = {}
        for item in expert["injections"]:
            sites.setdefault(item["site"], []).append(item)
        for site, items in sites.items():
            blocks = sum(len(item["blocks"]) for item in items)
            which = "the same in all" if len(items) == 1 and blocks > 1 else "each its own"
            table.add_row(name, site, f"{blocks}, {which}", str(len(items[0]["channels"])), str(items[0]["factor"]))
    console.print(table)
    console.print(f"{output} written", highlight=False)


if __name__ == "__main__":
    run_command(harden)
