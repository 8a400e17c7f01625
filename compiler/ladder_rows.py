"""What a ladder measures, and how it is kept on the disk: a line of JSON a row, and the clips of the bf16 model."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from hif4c.compiler.calibration import Calibration
from hif4c.compiler.evaluation import Clip
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.safetensors_stream import TensorFile
from hif4c.runtime.sampling import SamplingSettings

__all__ = [
    "CalibrationFile",
    "LadderResult",
    "LadderRow",
    "ReferenceFigures",
    "append_row",
    "open_calibration",
    "read_clips",
    "read_rows",
    "write_clips",
]


@dataclass(frozen=True)
class CalibrationFile:
    """A calibration file as the ladder names it.

    Attributes:
        path: the file.
        label: its name without the ending.
        digest: its sha256.
        seed: that it was made with, None for a merged one.
        prompts: how many prompts or clips it was made from.
    """

    path: Path
    label: str
    digest: str
    seed: int | None
    prompts: int | None


@dataclass(frozen=True)
class LadderRow:
    """One recipe with one calibration file, measured.

    Attributes:
        key: digest of all that the row depends on.
        model: source of the model.
        recipe: its name.
        values: the recipe as recorded in a manifest.
        calibration: label of the calibration file, None without one.
        calibration_seed: the file's own seed, where recorded.
        calibration_prompts: the number of prompts that it was made from, where recorded.
        prompts: number of clips.
        seed: seed of the first.
        scores: axis -> mean over the clips, 0..1; None where there is no scorer.
        distance: as `measure_distance`: medians over the clips.
        spread: as `measure_distance`: quartiles over the clips.
        sqnr: kind of linear -> median over blocks and experts of the output SQNR in decibels, None where not recorded.
        compile_seconds: of the whole compile, capture and verification included.
        sample_seconds: of sampling and decoding all clips.
        artifact_bytes: of the experts' files.
        bf16_bytes: of the experts' parameters in bf16.
        bits_per_weight: bits that a quantized weight takes in the files, over all experts.
    """

    key: str
    model: str
    recipe: str
    values: dict[str, Any]
    calibration: str | None
    calibration_seed: int | None
    calibration_prompts: int | None
    prompts: int
    seed: int
    scores: dict[str, float] | None
    distance: dict[str, float]
    spread: dict[str, list[float]]
    sqnr: dict[str, float | None]
    compile_seconds: float
    sample_seconds: float
    artifact_bytes: int
    bf16_bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class ReferenceFigures:
    """The bf16 model on the yardstick: its scores (None where there is no scorer) and its sampling time."""

    scores: dict[str, float] | None
    sample_seconds: float


@dataclass(frozen=True)
class LadderResult:
    """All rows, in the order recipes then calibration files, beside the bf16 model."""

    model: str
    prompts: int
    seed: int
    settings: SamplingSettings
    reference: ReferenceFigures
    rows: list[LadderRow] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; distances of equal clips are infinite."""
        return dataclasses.asdict(self)


def open_calibration(path: Path, fingerprints: Mapping[str, str]) -> CalibrationFile:
    """Read what a ladder says of a calibration file.

    Args:
        path: the file.
        fingerprints: expert -> fingerprint of the weights that it must be of.

    Raises:
        Hif4Error: no calibration file, or one of other weights.
    """
    with Calibration(path) as calibration:
        for name, fingerprint in fingerprints.items():
            calibration.check(name, fingerprint)
        runs = calibration.runs
        sources = [run.get("prompts", run.get("clips")) for run in runs]
        counts = [len(item) for item in sources if isinstance(item, list)]
        seed = runs[0].get("seed") if len(runs) == 1 else None
        return CalibrationFile(
            path,
            path.stem,
            calibration.digest(),
            seed if type(seed) is int else None,
            sum(counts) if counts and len(counts) == len(sources) else None,
        )


def read_rows(path: Path) -> dict[str, LadderRow]:
    """The rows of earlier runs by key; Hif4Error for a file that holds anything else."""
    if not path.exists():
        return {}
    rows = {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        os.truncate(path, len(whole))  # a run was killed while it wrote its last row
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = LadderRow(**json.loads(line))
        except (TypeError, ValueError):
            raise Hif4Error(f"{path}: line {number} is not a row of this ladder; remove the file.") from None
        rows[row.key] = row
    return rows


def append_row(path: Path, row: LadderRow) -> None:
    """Keep one more row."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(row), sort_keys=True) + "\n")


def write_clips(path: Path, clips: Sequence[Clip], seconds: float) -> None:
    """Keep clips and the seconds that sampling them took; the file appears when it is complete."""
    tensors = {
        "latents": torch.stack([clip.latents for clip in clips]).contiguous(),
        "frames": torch.from_numpy(np.ascontiguousarray([clip.frames for clip in clips])),
        "seconds": torch.tensor(seconds, dtype=torch.float64),
    }
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)


def read_clips(path: Path) -> tuple[list[Clip], float]:
    """What `write_clips` kept."""
    with TensorFile(path) as file:
        latents, frames, seconds = (file.read(name) for name in ("latents", "frames", "seconds"))
        clips = [Clip(latent, frame.numpy()) for latent, frame in zip(latents, frames, strict=True)]
        return clips, float(seconds)
