"""Write a calibration file part by part, and merge several into one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch

from hif4c.compiler.calibration import KEY, VERSION, Calibration, Group
from hif4c.compiler.calibration_calls import Call, write_tensors
from hif4c.compiler.ranks import ALONE, Ranks
from hif4c.compiler.sketch import ChannelSketch
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.safetensors_stream import StreamingWriter, TensorFile, TensorSpec, tensor_bytes

__all__ = ["MAX_ROWS", "CalibrationWriter", "check_calibration_path", "merge_calibrations", "scratch_folder"]

MAX_ROWS = 256
"""Tokens that are kept of every group."""
_ONE_FILE = 1 << 62


def check_calibration_path(path: Path) -> None:
    """Make the file's folder, before any time is spent on calibrating.

    Raises:
        Hif4Error: the file cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "is a directory" if path.is_dir() else "its folder is not writable")
    except OSError as error:
        raise Hif4Error(f"{path}: the calibration cannot be written there ({error.strerror}).") from None


@contextmanager
def scratch_folder(path: Path, ranks: Ranks = ALONE) -> Iterator[Path]:
    """A folder beside `path` that every rank can use, removed when all ranks leave the context.

    Raises:
        Hif4Error: a rank does not see it.
    """
    with ExitStack() as stack:
        with ranks.together():
            made = None
            if ranks.first:
                temporary = TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", ignore_cleanup_errors=True)
                made = stack.enter_context(temporary)
        folder = Path(ranks.all_gather(made)[0])
        with ranks.together():
            if not folder.is_dir():
                raise Hif4Error(
                    f"{folder}: made by rank 0 and not seen here; write to a file system that all ranks share."
                )
        with ranks.together():
            yield folder


class CalibrationWriter:
    """A calibration file in the making.

    What is handed over waits on the disk, in a folder beside the file that is removed on leaving the context; the file
    appears under its name, or takes the place of an older one, when it is complete.

    Args:
        path: the file; its folder must exist.
        ranks: all enter and leave the context; rank 0 is handed everything.
    """

    def __init__(self, path: Path, ranks: Ranks = ALONE) -> None:
        self._path, self._ranks = path, ranks
        self._parts: list[Path] = []
        self._groups: dict[str, list[dict[str, Any]]] = {}
        self._experts: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        self._context = scratch_folder(self._path, self._ranks)
        self.folder = self._context.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._context.__exit__(kind, error, trace)

    def add_group(self, expert: str, group: Group, sketch: ChannelSketch, rows: torch.Tensor) -> None:
        """Keep a group's histograms and tokens [R, K]; of more than `MAX_ROWS` tokens as many, evenly spaced."""
        if len(rows) > MAX_ROWS:
            rows = rows[torch.arange(MAX_ROWS) * len(rows) // MAX_ROWS]
        prefix = f"{expert}/groups/{group.name}"
        tensors = {f"{prefix}/sketch.{key}": value for key, value in sketch.to_tensors().items()}
        self._write_part({**tensors, f"{prefix}/rows": rows})
        entry = {"readers": list(group.readers), "channels": group.channels}
        self._groups.setdefault(expert, []).append(entry)

    def add_expert(
        self, expert: str, fingerprint: str, edges: Sequence[float], calls: Iterable[tuple[Call, torch.Tensor]]
    ) -> None:
        """Finish an expert whose groups are all there.

        Args:
            expert: its name.
            fingerprint: of its weights.
            edges: of the timestep bins of its histograms.
            calls: with the unquantized program's outputs, one in memory at a time; text embeddings that several share
                are stored once.
        """
        texts: dict[Any, int] = {}
        count = 0
        for index, (call, sample) in enumerate(calls):
            text = call.encoder_hidden_states
            identity = (text.dtype, text.shape, hashlib.sha256(tensor_bytes(text)).digest())
            prefix = f"{expert}/calls/{index}"
            tensors = {} if identity in texts else {f"{expert}/texts/{len(texts)}": text}
            number = texts.setdefault(identity, len(texts))
            tensors |= {
                f"{prefix}/hidden_states": call.hidden_states,
                f"{prefix}/timestep": call.timestep.float(),
                f"{prefix}/text": torch.tensor(number),
                f"{prefix}/sample": sample,
            }
            self._write_part(tensors)
            count += 1
        self._experts[expert] = {
            "fingerprint": fingerprint,
            "edges": list(edges),
            "groups": self._groups[expert],
            "calls": count,
        }

    def finish(self, model: str, runs: list[dict[str, Any]]) -> None:
        """Assemble the file.

        Args:
            model: name of the model.
            runs: where the calls came from.
        """
        header = {"version": VERSION, "model": model, "runs": runs, "experts": self._experts}
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
        specs = []
        for path in self._parts:
            with TensorFile(path) as part:
                specs += [TensorSpec(name, *part.info(name)) for name in part.names]
        with StreamingWriter(
            self.folder, specs, base_name="whole", shard_bytes=_ONE_FILE, metadata={KEY: text}, fsync=True
        ) as writer:
            # One part open at a time: a large model has more of them than a process may have open files.
            for path in self._parts:
                with TensorFile(path) as part:
                    for name in part.names:
                        writer.write(name, part.read(name))
                        part.release(name)
        (self.folder / "whole.safetensors").replace(self._path)

    def _write_part(self, tensors: Mapping[str, torch.Tensor]) -> None:
        path = self.folder / f"part-{len(self._parts)}.safetensors"
        write_tensors(path, tensors)
        self._parts.append(path)


def merge_calibrations(paths: Sequence[Path], output: Path) -> None:
    """Merge calibrations of one model: histograms are added, rows and calls put one after the other.

    Rows above `MAX_ROWS` are thinned out evenly.

    Args:
        paths: calibration files, each once.
        output: the file to write; it may be one of them.

    Raises:
        Hif4Error: a file is given twice, files of different weights, bins or groups, or a full disk.
    """
    check_calibration_path(output)
    if len({path.resolve() for path in paths}) < len(paths):
        raise Hif4Error("a calibration file is given twice; its samples would count twice, so give each once.")
    with ExitStack() as stack:
        files = [stack.enter_context(Calibration(path)) for path in paths]
        first = files[0]
        for other in files[1:]:
            _check_mergeable(first, other)
        writer = stack.enter_context(CalibrationWriter(output))
        for name, expert in first.experts.items():
            for group in expert.groups.values():
                sketch = expert.sketch(group.name)
                for file in files[1:]:
                    try:
                        sketch.merge(file.experts[name].sketch(group.name))
                    except ValueError as error:
                        raise Hif4Error(f"{file.path}: {name}, {group.name} cannot be merged: {error}.") from None
                rows = torch.cat([file.experts[name].rows(group.name) for file in files])
                writer.add_group(name, group, sketch, rows)
            calls = (item for file in files for item in file.experts[name].calls())
            writer.add_expert(name, expert.fingerprint, expert.edges, calls)
        writer.finish(first.model, [run for file in files for run in file.runs])


def _check_mergeable(first: Calibration, other: Calibration) -> None:
    if other.experts.keys() != first.experts.keys():
        raise Hif4Error(f"{other.path}: has other experts than {first.path}; merge calibrations of one model.")
    for name, mine in first.experts.items():
        theirs = other.experts[name]
        if theirs.fingerprint != mine.fingerprint:
            raise Hif4Error(
                f"{other.path}: was made from other weights than {first.path}; merge calibrations of one model."
            )
        # The order of the groups does not matter, that of a group's readers names it.
        if (theirs.edges, theirs.groups) != (mine.edges, mine.groups):
            raise Hif4Error(
                f"{other.path}: has other timestep bins or groups of linears than {first.path}; calibrate again."
            )
