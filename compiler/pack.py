"""Write an expert's weight files block by block; what is on the disk is journaled, and ranks share the blocks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hif4c.compiler.checkpoint import Checkpoint, Fingerprint
from hif4c.compiler.journal import Journal, run_on_first, sync_path
from hif4c.compiler.planes import InputStatistics, Planes, PreparedWeight, pack_tensors, stored_dtype
from hif4c.compiler.ranks import ALONE, Ranks
from hif4c.passes.program import Program, TensorSource
from hif4c.runtime.placed_writer import PlacedWriter
from hif4c.runtime.safetensors_stream import TensorSpec

__all__ = ["Written", "changed_tensor", "stored_tensors", "write_weights"]

BLOCK = re.compile(r"blocks\.\d+(?=\.)")


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        files: file name -> (bytes, sha256).
        fingerprint: of the checkpoint's weights.
        sqnr: path of a linear -> what `measure` said of it.
    """

    files: dict[str, tuple[int, str]]
    fingerprint: str
    sqnr: dict[str, float]


def stored_tensors(program: Program, checkpoint: Checkpoint) -> list[TensorSpec]:
    """Name, dtype and shape of every tensor of the weight file, in the program's order."""
    return [
        TensorSpec(source.name, stored_dtype(source, checkpoint), source.shape) for source in program.tensors.values()
    ]


def write_weights(
    program: Program,
    checkpoint: Checkpoint,
    directory: Path,
    events: Callable[[str, Any], None] = lambda event, value: None,
    *,
    solved: Callable[[str], Planes | None] = lambda source: None,
    statistics: Callable[[TensorSource], InputStatistics | None] = lambda source: None,
    measure: Callable[[TensorSource, PreparedWeight, Planes], float | None] | None = None,
    journal: Journal | None = None,
    ranks: Ranks = ALONE,
) -> Written:
    """Write `weights*.safetensors`, one transformer block after the other; every rank calls this.

    Args:
        program: a packed or lowered program.
        checkpoint: where its sources are; every tensor is checked for NaN and infinity as it is read.
        directory: existing; its name is that of the expert in the journal. Files in it that the journal does not know
            are begun anew.
        events: "total" and "unit", "skipped" for what the journal knows, and "bytes" of the checkpoint as they are
            done; of this rank's share.
        solved, statistics, measure: as for `pack_tensors`.
        journal: of the blocks that are on the disk.
        ranks: who share the blocks, and see the directory.

    Raises:
        Hif4Error: a weight is not finite, the disk is full, or another rank failed.
    """
    journal = journal or Journal()
    units = _units(program)
    sizes = {
        key: sum(_nbytes(group[0].source, checkpoint) for group in groups if group[0].source is not None)
        for key, groups in units.items()
    }
    keys = {f"pack/{directory.name}/{unit}": unit for unit in units}
    with PlacedWriter(directory, stored_tensors(program, checkpoint)) as writer:
        run_on_first(ranks, lambda: _open(writer, directory, journal))

        done = sum(sizes[unit] for key, unit in keys.items() if journal.done(key) is not None)

        def pack(mine: list[str]) -> None:
            if not ranks.first:
                writer.open()
            events("total", done + sum(sizes[keys[key]] for key in mine))
            events("unit", "bytes")
            if done:
                events("skipped", done)
            groups = [group for key in mine for group in units[keys[key]]]
            made = pack_tensors(groups, program, checkpoint, solved=solved, statistics=statistics, measure=measure)
            for key in mine:
                tensors, sqnr = [], {}
                for _ in units[keys[key]]:
                    packed = next(made)
                    for name, value in packed.stored.items():
                        writer.write(name, value)
                    if packed.source is not None:
                        tensors.append([packed.source, packed.digest])
                    if packed.source is not None and packed.sqnr is not None:
                        sqnr[packed.source.removesuffix(".weight")] = packed.sqnr
                    events("bytes", packed.nbytes)
                writer.sync()  # the journal must not know of what a power cut would lose
                journal.record(key, {"tensors": tensors, "sqnr": sqnr})

        entries = journal.complete(list(keys), pack, ranks)
        files = run_on_first(ranks, writer.finish)
    fingerprint = Fingerprint()
    sqnr: dict[str, float] = {}
    for entry in entries.values():
        for name, digest in entry.values["tensors"]:
            fingerprint.add_digest(name, checkpoint.dtype(name), checkpoint.shape(name), digest)
        sqnr |= entry.values["sqnr"]
    return Written(files, fingerprint.hexdigest(), sqnr)


def changed_tensor(expert: str, checkpoint: Checkpoint, journal: Journal) -> str | None:
    """The first tensor that was packed from other bytes than the checkpoint has now, None where all are the same."""
    for key in journal.keys(f"pack/{expert}"):
        entry = journal.done(key)
        for name, digest in [] if entry is None else entry.values["tensors"]:
            found = checkpoint.digest(name, checkpoint.read(name))
            checkpoint.release(name)
            if found != digest:
                return str(name)
    return None


def _open(writer: PlacedWriter, directory: Path, journal: Journal) -> None:
    """Begin the files, or continue them where they were begun."""
    key = f"files/{directory.name}"
    # A finished block was written into these files, also where a disk has lost the entry that says that they were made.
    if journal.done(key) is not None or journal.keys(f"pack/{directory.name}"):
        writer.open()
        return
    for path in directory.glob("weights*.safetensors*"):
        path.unlink()
    writer.create()
    for folder in (directory, directory.parent):
        sync_path(folder)
    journal.record(key)


def _units(program: Program) -> dict[str, list[list[TensorSource]]]:
    """The tensors by block, and the rest; within them those made from one checkpoint tensor side by side, in order."""
    units: dict[str, list[list[TensorSource]]] = {}
    for group in _by_checkpoint_tensor(program):
        found = BLOCK.match(group[0].source or group[0].name)
        units.setdefault(found[0] if found else "rest", []).append(group)
    return units


def _by_checkpoint_tensor(program: Program) -> Iterator[list[TensorSource]]:
    group: list[TensorSource] = []
    for source in program.tensors.values():
        if group and (source.source is None or source.source != group[0].source):
            yield group
            group = []
        group.append(source)
    if group:
        yield group


def _nbytes(name: str | None, checkpoint: Checkpoint) -> int:
    return 0 if name is None else checkpoint.shape(name).numel() * checkpoint.dtype(name).itemsize
