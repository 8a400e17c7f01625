"""A whole model at its full size: what making its artifact, loading it and a step of it take on this machine.

The checkpoint is synthetic. Every stage is a process of its own and begins with a page cache that holds nothing of the
files that it reads; the disk is measured in the same run.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hif4c.compiler.bench_disk import DiskRates, cached_bytes, drop_cached, measure_disk
from hif4c.compiler.bench_inputs import Latent
from hif4c.compiler.bench_scale_stage import read_counters, status_bytes
from hif4c.compiler.locate import describe_model, locate_model
from hif4c.compiler.synthetic_checkpoint import CheckpointOptions, chosen_configs, make_checkpoint
from hif4c.runtime.errors import Hif4Error

__all__ = ["PartFigures", "ScaleOptions", "ScaleResult", "StageFigures", "measure_scale"]

LATENT = "1x24x52"
_SAMPLE_SECONDS = 0.1

Events = Callable[[str, Any], None]


@dataclass(frozen=True)
class ScaleOptions:
    """What is measured.

    Attributes:
        model: a built-in name, or a directory to be like.
        experts: of the model's, None for all.
        layers: transformer blocks, None for the model's own number.
        recipe: of the artifact.
        calibration: for a recipe that needs one.
        latent: of the step that is timed.
        text: its text tokens.
        seed: of the checkpoint.
    """

    model: str
    experts: tuple[str, ...] | None = None
    layers: int | None = None
    recipe: str = "rtn"
    calibration: Path | None = None
    latent: str = LATENT
    text: int = 512
    seed: int = 0


@dataclass(frozen=True)
class PartFigures:
    """A part of a stage.

    Attributes:
        name: what it does.
        seconds: it took.
        read: bytes that the process and those that it started read from disks.
        written: bytes that they wrote to disks.
        resident: the process's resident memory at its end. Pages of mapped files count.
    """

    name: str
    seconds: float
    read: int
    written: int
    resident: int


@dataclass(frozen=True)
class StageFigures:
    """A process.

    Attributes:
        name: what it does.
        seconds: from its start to its end.
        read: bytes read from disks, page faults included.
        written: bytes written to disks.
        peak: most resident memory of one process: of itself, or of one that it started. Mapped files count.
        together: most resident memory of them all at a time, as seen ten times a second; what they share counts twice.
        cached: bytes of the files that it reads that were in the page cache before it began; None: unknown.
        parts: its own steps, one after the other.
        result: what it says of itself.
    """

    name: str
    seconds: float
    read: int
    written: int
    peak: int
    together: int
    cached: int | None
    parts: list[PartFigures]
    result: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScaleResult:
    """A whole run.

    Attributes:
        options: see `ScaleOptions`.
        weights: bytes of the checkpoint's weights.
        artifact: bytes of the artifact.
        made: seconds that writing the checkpoint took; None where it was there.
        disk: the disk by itself.
        stages: in order.
    """

    options: ScaleOptions
    weights: int
    artifact: int
    made: float | None
    disk: DiskRates
    stages: list[StageFigures]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        options = self.options
        path = None if options.calibration is None else options.calibration.name
        return {**asdict(self), "options": {**asdict(options), "calibration": path}}


def measure_scale(options: ScaleOptions, directory: Path, events: Events) -> ScaleResult:
    """Make (or use again) the checkpoint, and compile, verify, load and run it.

    Args:
        options: see `ScaleOptions`.
        directory: receives the checkpoint and the artifact, which are left in it.
        events: ("step", sentence), and those of `make_checkpoint`.

    Raises:
        Hif4Error: no such model or expert, a checkpoint or artifact in the way, too little disk, or a failed stage.
    """
    Latent.parse(options.latent)  # what is wrong with it should be said before the long part
    model = describe_model(options.model)
    configs = chosen_configs(model, options.experts, options.layers)
    directory.mkdir(parents=True, exist_ok=True)
    suffix = "" if options.layers is None else f"-{options.layers}-layers"
    checkpoint = directory / f"{model.source}{suffix}"
    artifact = directory / f"{checkpoint.name}-{options.recipe}.hif4"
    if artifact.exists():
        raise Hif4Error(f"{artifact}: already exists; remove it, or choose another directory.")
    made = None
    if not checkpoint.exists():
        started = time.perf_counter()
        asked = CheckpointOptions(layers=options.layers, experts=tuple(configs), seed=options.seed)
        make_checkpoint(model, checkpoint, asked, events)
        made = time.perf_counter() - started
    location = locate_model(str(checkpoint))
    if {name: location.configs.get(name) for name in configs} != configs:
        raise Hif4Error(f"{checkpoint}: holds another model, or not {' and '.join(configs)}; remove it.")
    files = [path for name in configs for path in sorted(location.experts[name].glob("*.safetensors"))]
    events("step", "measuring the disk")
    disk = measure_disk(files, directory)
    names = list(configs)
    calibration = None if options.calibration is None else str(options.calibration)
    stages = [
        _run(
            f"compile, {options.recipe}", files, events, stage="compile", model=str(checkpoint), output=str(artifact),
            recipe=options.recipe, experts=names, calibration=calibration,
        )
    ]  # fmt: skip
    compiled = sorted(path for path in artifact.rglob("*") if path.is_file())
    stages.append(_run("verify", compiled, events, stage="verify", artifact=str(artifact)))
    for name in names:
        stages.append(
            _run(
                f"forward, {name}", compiled, events, stage="forward", artifact=str(artifact), expert=name,
                latent=options.latent, text=options.text,
            )
        )  # fmt: skip
    weights = sum(path.stat().st_size for path in files)
    return ScaleResult(options, weights, sum(path.stat().st_size for path in compiled), made, disk, stages)


def _run(name: str, files: Sequence[Path], events: Events, **arguments: Any) -> StageFigures:
    """Run one stage after the files that it reads have left the page cache."""
    events("step", name)
    drop_cached(files)
    cached = cached_bytes(files)
    # -P: nothing in the user's current directory may stand in for a module of the standard library.
    command = [sys.executable, "-P", "-m", "hif4c.compiler.bench_scale_stage", json.dumps(arguments)]
    started = time.perf_counter()
    lines: list[dict[str, Any]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        watch = _Watch(process.pid)
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            errors: list[str] = []
            reader = threading.Thread(target=lambda stream: errors.append(stream.read()), args=(process.stderr,))
            reader.start()
            for line in process.stdout:
                lines.append(json.loads(line))
                if "step" in lines[-1]:
                    events("note", lines[-1]["step"])
            # Its counters can be read until it is waited for.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            seconds = time.perf_counter() - started
            read, written = read_counters(process.pid)
            reader.join()
        finally:
            watch.stop()
            process.kill()
    if process.returncode or "result" not in (lines or [{}])[-1]:
        last = (errors[0].strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        raise Hif4Error(f"{name}: the process failed ({last}).")
    result = lines[-1]["result"]
    parts = [
        PartFigures(
            one["step"], after["at"] - one["at"], after["read"] - one["read"], after["written"] - one["written"],
            after["resident"],
        )
        for one, after in itertools.pairwise(lines)
    ]  # fmt: skip
    # The interpreter starts before the first line, and ends after the last.
    parts[0] = replace(parts[0], seconds=seconds - sum(part.seconds for part in parts[1:]))
    return StageFigures(name, seconds, read, written, result.pop("peak_rss"), watch.most, cached, parts, result)


class _Watch:
    """Adds up the resident memory of a process and its children, again and again, until it is stopped."""

    def __init__(self, process: int) -> None:
        self.most = 0
        self._process = process
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(_SAMPLE_SECONDS):
            self.most = max(self.most, sum(status_bytes("VmRSS", process) for process in _family(self._process)))


def _family(process: int) -> list[int]:
    """A process and those below it."""
    found = [process]
    for parent in found:
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(word) for word in path.read_text(encoding="ascii").split()]
            except OSError:
                continue
    return found
