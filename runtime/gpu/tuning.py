"""Which variant of a kernel is fastest on this GPU for a shape: timed at first use on the real tensors, and remembered.

Static figures reject bad tile shapes but do not order the good ones, so several are shipped and the GPU decides. What a
driver refuses or what computes something else is dropped. A choice is kept for the process and, as nothing but a name,
in the user's cache directory; there it is only a hint, so a file that cannot be read or written is left aside.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hif4c.runtime.errors import Hif4Error

__all__ = ["Candidate", "Tuner", "bucket", "measure_on_device", "sample_rows", "tuning_directory"]

log = logging.getLogger(__name__)

WARM_UP, RUNS = 2, 5
SAMPLED_ROWS = 16
_COMPARED_ROWS = 4096
SCHEMA = 1
MAX_FILE_BYTES = 4 << 20
MAX_ENTRIES = 4096


@dataclass(frozen=True)
class Candidate:
    """One way to compute a result.

    Attributes:
        name: under which the choice is remembered.
        run: computes it on the current stream.
        family: candidates of one family, unless it is None, add in the same order and must agree to the bit.
    """

    name: str
    run: Callable[[], torch.Tensor]
    family: str | None = None


class Tuner:
    """Choices of one device.

    Args:
        machine: what a choice depends on besides the shape: GPU name, driver version, hash of the kernels.
        measure: median seconds of a run; `measure_on_device` on a GPU.
        directory: where choices are kept; None keeps them in memory only.
    """

    def __init__(
        self, machine: Sequence[str], measure: Callable[[Callable[[], torch.Tensor]], float], directory: Path | None
    ) -> None:
        self.machine = [str(item) for item in machine]
        self._measure = measure
        digest = hashlib.sha256(json.dumps([SCHEMA, *self.machine]).encode()).hexdigest()[:32]
        self.path = None if directory is None else directory / f"{digest}.json"
        self._lock = threading.Lock()
        self._busy: dict[str, threading.Lock] = {}
        self._chosen: dict[str, str] | None = None

    def known(self, key: str) -> str | None:
        """The name of the candidate that was chosen for `key`, if one was."""
        with self._lock:
            return self._known().get(key)

    def choose(
        self,
        key: str,
        candidates: Sequence[Candidate],
        disagrees: Callable[[torch.Tensor], str | None],
        spoil: Callable[[], object] = lambda: None,
    ) -> Candidate:
        """The candidate to use for `key`; times all of them when it is asked for the first time.

        Args:
            key: kernel, shape and whatever else a choice depends on.
            candidates: at least one; a remembered name that is not among them is forgotten.
            disagrees: compares a result with what is right; returns what is wrong with it, or None.
            spoil: overwrites a result that candidates share, so that one that writes nothing is found out.

        Raises:
            Hif4Error: no candidate works; the reasons are in the message.
        """
        with self._lock:
            name = self._known().get(key)
            busy = self._busy.setdefault(key, threading.Lock())
        by_name = {candidate.name: candidate for candidate in candidates}
        if name in by_name:
            return by_name[name]
        with busy:  # another thread may be timing the same shape: its choice serves as well
            name = self._known().get(key)
            if name not in by_name:
                name = self._fastest(key, candidates, disagrees, spoil)
                with self._lock:
                    self._known()[key] = name
                    self._store()
        return by_name[name]

    def _fastest(
        self,
        key: str,
        candidates: Sequence[Candidate],
        disagrees: Callable[[torch.Tensor], str | None],
        spoil: Callable[[], object],
    ) -> str:
        times: dict[str, float] = {}
        dropped: dict[str, str] = {}
        firsts: dict[str, torch.Tensor] = {}
        for candidate in candidates:
            try:
                spoil()
                result = candidate.run()
                reason = disagrees(result)
                if reason is None and candidate.family in firsts:
                    if not _same_bits(firsts[candidate.family], result):
                        reason = "its result differs from that of the variant before it"
                elif reason is None and candidate.family is not None and candidate is not candidates[-1]:
                    firsts[candidate.family] = result.clone()  # the next candidate may write into the same memory
                if reason is None:
                    times[candidate.name] = self._measure(candidate.run)
            except (Hif4Error, RuntimeError) as error:  # torch reports a full memory and an unsupported GEMM so
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if reason is not None:
                dropped[candidate.name] = reason
                log.warning("%s on %s: %s is not used: %s", key, self.machine[0], candidate.name, reason)
        if not times:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in dropped.items())
            raise Hif4Error(f"{key}: none of its GPU kernels works here ({reasons}); use kernels='portable'.")
        fastest = min(times, key=times.__getitem__)
        log.info("%s on %s: %s", key, self.machine[0], {name: f"{1e3 * time:.3f} ms" for name, time in times.items()})
        return fastest

    def _known(self) -> dict[str, str]:
        if self._chosen is None:
            self._chosen = {} if self.path is None else _read(self.path)
        return self._chosen

    def _store(self) -> None:
        if self.path is None or self._chosen is None:
            return
        try:
            _make_private(self.path.parent)
            # Another process may have added choices since; ours are newer.
            merged = dict(list({**_read(self.path), **self._chosen}.items())[-MAX_ENTRIES:])
            value = {"schema": SCHEMA, "machine": self.machine, "choices": merged}
            data = (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
            descriptor, temporary = tempfile.mkstemp(prefix="tuning-", dir=self.path.parent)
            try:
                with open(descriptor, "wb") as file:
                    file.write(data)
                os.replace(temporary, self.path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
        except OSError as error:
            log.info("choices of GPU kernels are not kept (%s: %s)", self.path, error.strerror or error)


def tuning_directory() -> Path:
    """Where choices are kept: hif4c/tuning in XDG_CACHE_HOME, or in ~/.cache where that is not an absolute path."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "hif4c" / "tuning"


def bucket(rows: int) -> int:
    """The number of rows rounded up to a power of two: shapes of one bucket share a choice."""
    return 1 << max(0, rows - 1).bit_length()


def sample_rows(m: int, device: torch.device) -> torch.Tensor:
    """Some of m rows, the first and the last among them, to be compared with the portable implementation."""
    return torch.linspace(0, m - 1, min(m, SAMPLED_ROWS), dtype=torch.float64, device=device).round().long()


def measure_on_device(device: torch.device, run: Callable[[], torch.Tensor]) -> float:
    """Median seconds of `RUNS` runs after `WARM_UP`, between CUDA events on the device's current stream."""
    stream = torch.cuda.current_stream(device)
    for _ in range(WARM_UP):
        run()
    events = []
    for _ in range(RUNS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(stream)
        run()
        end.record(stream)
        events.append((start, end))
    stream.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[RUNS // 2] / 1e3


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, NaN's payload apart; a few rows at a time, as results may fill half of a GPU."""
    parts = zip(a.split(_COMPARED_ROWS), b.split(_COMPARED_ROWS), strict=False)
    return a.shape == b.shape and all(bool(((x == y) | (x.isnan() & y.isnan())).all()) for x, y in parts)


def _read(path: Path) -> dict[str, str]:
    """The choices in a file; none when it is not there, not the user's, or not what it should be."""
    try:
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                return {}
            data = file.read(MAX_FILE_BYTES + 1)
        value: Any = json.loads(data) if len(data) <= MAX_FILE_BYTES else None
        choices = value["choices"]
        if value["schema"] != SCHEMA or len(choices) > MAX_ENTRIES:
            return {}
        return {key: name for key, name in choices.items() if isinstance(name, str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _make_private(directory: Path) -> None:
    for path in (directory.parent, directory):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = os.lstat(directory)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(13, "is not the user's own directory")
