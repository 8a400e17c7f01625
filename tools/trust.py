"""hif4c trust OUT: show the kernels that an artifact brings, and let them run on this machine."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path.pop(0)  # run as a script: this folder must not hide the standard library (inspect)

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from hif4c.tools.console import console, make_table, progress_bar, run_command

if TYPE_CHECKING:
    from rich.table import Table

    from hif4c.runtime.artifact import Artifact

__all__ = ["trust"]


def trust(
    artifact: Annotated[Path, typer.Argument(help="Directory of the artifact.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    revoke: Annotated[bool, typer.Option("--revoke", help="Take the trust in these kernels away again.")] = False,
) -> None:
    """Show every binary in an artifact and, after one question, let them run on this machine.

    Kernels are code. The hashes in an artifact show that it is whole, not who made it: trust what comes from someone
    whom you would let run programs here. What `hif4c compile` builds is trusted where it was built.
    """
    from hif4c.runtime.artifact import open_artifact
    from hif4c.runtime.errors import Hif4Error
    from hif4c.runtime.kernel_files import trust_entries
    from hif4c.runtime.trust import record_trust, revoke_trust, trust_path, trusted_hashes

    opened = open_artifact(artifact)
    entries = trust_entries(opened)
    if not entries:
        console.print(f"{artifact}: brings no kernels, there is nothing to trust", highlight=False, markup=False)
        return
    if revoke:
        known = entries.keys() & trusted_hashes()
        console.print(_table(opened))
        revoke_trust(known)
        console.print(f"no longer trusted: {len(known)} files ({trust_path()})", highlight=False, markup=False)
        return
    total = sum(size for size, _ in opened.files.values())
    with progress_bar("hashing", total, "bytes") as advance:
        opened.verify(progress=lambda _, size: advance(size))
    console.print(_table(opened))
    if entries.keys() <= trusted_hashes():
        console.print("all of them are trusted already", highlight=False)
        return
    if not yes:
        if not is_interactive():
            raise Hif4Error(
                f"{artifact}: there is no terminal to ask on; look at the table, and give --yes to trust its kernels."
            )
        if not typer.confirm("Let these run on this machine?"):
            console.print("nothing was trusted")
            raise typer.Exit(1)
    record_trust(entries)
    console.print(f"trusted ({trust_path()})", highlight=False, markup=False)


def is_interactive() -> bool:
    """Whether someone is there to answer."""
    return sys.stdin.isatty()


def _table(artifact: Artifact) -> Table:
    """A row a binary."""
    from hif4c.runtime.kernel_files import kernel_targets, read_kernel_set
    from hif4c.runtime.trust import trusted_hashes

    trusted = trusted_hashes()
    table = make_table(f"kernels in {artifact.root}", ("target", "file", "sha256", "bytes", "trusted"), left=3)
    for target in kernel_targets(artifact):
        kernel_set = read_kernel_set(artifact, target)
        assert kernel_set is not None
        for kernel in kernel_set.kernels:
            known = {kernel.sha256, kernel_set.sha256} <= trusted
            table.add_row(
                target, escape(kernel.file), kernel.sha256[:32], f"{kernel.bytes:,}", "yes" if known else "[bold]no[/]"
            )
    return table


if __name__ == "__main__":
    run_command(trust)
