"""Files of an artifact that are made once and hashed once: copied components, kernels, golden outputs."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hif4c.compiler.journal import Journal, run_on_first, sync_path, sync_tree
from hif4c.compiler.ranks import ALONE, Ranks
from hif4c.compiler.workers import in_order
from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.file_hashes import hash_files
from hif4c.runtime.golden import make_golden
from hif4c.runtime.native import portable_kernels
from hif4c.runtime.safetensors_stream import StreamingWriter, TensorSpec
from hif4c.runtime.transformer import load_expert

__all__ = ["Piece", "make_pieces", "write_golden"]

Events = Callable[[str, Any], None]


@dataclass(frozen=True)
class Piece:
    """A file or folder of the artifact.

    Attributes:
        path: relative; also its key in the journal.
        make: makes it, or nothing; nothing of it is there before.
    """

    path: str
    make: Callable[[], None]


def make_pieces(
    pieces: Sequence[Piece],
    root: Path,
    journal: Journal,
    ranks: Ranks = ALONE,
    *,
    threads: int = 1,
    stop: Callable[[], None] = lambda: None,
) -> dict[str, tuple[int, str]]:
    """Make the pieces that are not finished yet; relative path -> (bytes, sha256) of the files of all.

    Args:
        pieces: the same on every rank.
        root: the artifact's directory.
        journal: of the finished ones.
        ranks: who share the pieces.
        threads: how many are made at once, each with one thread of torch's.
        stop: as for `in_order`.
    """
    keys = {f"made/{piece.path}": piece for piece in pieces}

    def make(key: str) -> None:
        path = root / keys[key].path
        # What an earlier process was killed over.
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        keys[key].make()
        paths = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
        found = hash_files([item for item in paths if item.is_file()])
        for folder in {item.parent for item in found}:
            sync_tree(folder)
        for folder in {root, path.parent} if found else ():
            sync_path(folder)
        journal.record(key, {item.relative_to(root).as_posix(): entry for item, entry in found.items()})

    def work(mine: list[str]) -> None:
        for _ in in_order(make, mine, threads=threads, stop=stop):
            pass

    entries = journal.complete(list(keys), work, ranks)
    return {name: (size, digest) for entry in entries.values() for name, (size, digest) in entry.values.items()}


def write_golden(root: Path, journal: Journal, events: Events, ranks: Ranks = ALONE) -> dict[str, tuple[int, str]]:
    """Record golden outputs with the runtime, from the bytes that were written; every rank calls this.

    With the portable kernels, which define what an operator computes to the last bit. The programs run side by side
    with one thread each: the portable operators work in small blocks, which a team of threads makes slower.

    Args:
        root: the artifact, with a manifest.
        journal: of what is recorded.
        events: progress, see `hif4c.compiler.experts.Events`.
        ranks: who share the programs.
    """
    artifact = open_artifact(root)
    run_on_first(ranks, lambda: (root / "golden").mkdir(exist_ok=True))

    def record(name: str, variant: str | None, base_name: str) -> None:
        model = load_expert(artifact, name, verify=False, release=True).variant(variant)
        golden = make_golden(model, on_node)
        specs = [TensorSpec(key, value.dtype, tuple(value.shape)) for key, value in golden.items()]
        with StreamingWriter(root / "golden", specs, base_name=base_name) as writer:
            for key, value in golden.items():
                writer.write(key, value)

    lock, stopped = threading.Lock(), threading.Event()

    def on_node() -> None:
        if stopped.is_set():
            raise InterruptedError  # a whole run of a large model is too long to wait for
        with lock:
            events("bytes", 1)

    pieces = []
    left = []
    for name in artifact.experts:
        for variant in (None, *artifact.variants(name)):
            base_name = name if variant is None else f"{name}.{variant}"
            if journal.done(f"made/golden/{base_name}.safetensors") is None:
                left.append(len(artifact.graph(name, variant).nodes))
            pieces.append(Piece(f"golden/{base_name}.safetensors", partial(record, name, variant, base_name)))
    if left:
        events("total", sum(ranks.share(left)))
        events("unit", "pieces")
    with portable_kernels():
        threads = min(torch.get_num_threads(), len(pieces))
        return make_pieces(pieces, root, journal, ranks, threads=threads, stop=stopped.set)
