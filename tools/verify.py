"""hif4c verify OUT: hashes, programs, golden outputs."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path.pop(0)  # run as a script: this folder must not hide the standard library (inspect)

from pathlib import Path
from typing import Annotated

import typer

from hif4c.tools.console import KERNELS_HELP, Reporter, console, make_table, run_command

__all__ = ["verify"]


def verify(
    artifact: Annotated[Path, typer.Argument(help="Directory of the artifact.")],
    kernels: Annotated[str, typer.Option(help=KERNELS_HELP)] = "auto",
) -> None:
    """Check every hash, load every expert, and replay its golden outputs. Exit status 1 when anything is off."""
    from hif4c.runtime.artifact import open_artifact
    from hif4c.runtime.golden import OPERATOR_ERROR
    from hif4c.runtime.verify import verify_artifact

    total = sum(size for size, _ in open_artifact(artifact).files.values())
    with Reporter.open() as report:
        begun = False

        def on_node(nodes: int) -> None:
            nonlocal begun
            if not begun:
                report.begin("replaying", nodes)
                begun = True
            report.advance(1)

        report.begin("hashing", total, "bytes")
        checks = verify_artifact(
            artifact, progress=lambda _, size: report.advance(size), kernels=kernels, on_node=on_node
        )
    table = make_table(str(artifact), ("expert", "nodes", "codes", "4-bit linears", "whole expert", "verdict"))
    for check in checks:
        codes = linear = whole = "not recorded"
        if check.replay is not None:
            found = check.replay
            codes = "identical" if found.codes_differ == 0 else f"{found.codes_differ} differ"
            linear = f"{found.linears}: {_error(found.linear_error)} {found.worst}".rstrip()
            whole = _error(found.distance)
            if found.distance:
                whole += f" (last-bit changes: {found.flip_distance:.1e})"
            if found.operator_error > OPERATOR_ERROR:
                whole += f"; {found.worst_operator} differs by {found.operator_error:.1e}"
        verdict = "[green]ok[/]" if check.passed else "[red]differs[/]"
        name = check.expert if check.variant is None else f"{check.expert}, {check.variant} steps"
        table.add_row(name, str(check.nodes), codes, linear, whole, verdict)
    console.print(table)
    if not all(check.passed for check in checks):
        raise typer.Exit(1)
    console.print(f"{total / 1e6:,.2f} MB match the manifest", highlight=False)


def _error(value: float) -> str:
    return "identical" if value == 0 else f"differs by {value:.1e}"


if __name__ == "__main__":
    run_command(verify)
