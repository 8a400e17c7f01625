"""The figures of the report, as plain data: what an artifact holds, read again from its files, and its calibration's.

Nothing is remembered from the compile: bytes, ranges and histograms come from the headers and the data of the weight
files, decisions and measured errors from the manifest, activations from a calibration file of the same weights.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hif4c.compiler.activation_statistics import GroupNumbers, group_numbers
from hif4c.compiler.calibration import Calibration
from hif4c.compiler.report import ExpertSummary, open_weights, summarize_expert
from hif4c.compiler.weight_statistics import WeightStatistics, dense_statistics, packed_statistics
from hif4c.runtime.artifact import Artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.safetensors_stream import TensorFile

__all__ = ["ArtifactNumbers", "ExpertNumbers", "LinearNumbers", "artifact_numbers", "expert_numbers", "to_json"]

Events = Callable[[str, Any], None]
"""Called with (event, value): "step" sentence; of a long step its "total", and "bytes" 1 after each piece."""

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_DIGITS = 6


@dataclass(frozen=True)
class LinearNumbers:
    """One linear.

    Attributes:
        path: module path.
        block: number of the transformer block, None outside.
        kind: what it is in its block, for example "attn1.to_q"; outside of blocks its path.
        in_features, out_features: K and N.
        precision: "w4a4", "w4a16" or "high".
        reason: for it, a sentence.
        mask: name of the channel mask of its input, or None.
        mask_folded: what makes the input applies the mask; it is then not stored.
        alpha: exponent of the mask; None without one, or with one that only takes out outlier columns.
        mask_min, mask_max: of the mask as stored, but for the zeros of outlier columns; None where it is not stored.
        shift: whether its input arrives without its channels' means.
        hadamard: width of the input's rotation, 0 for none.
        rounding: "nearest", "search" or "gptq".
        rank: of the low-rank branch, 0 for none.
        outlier_columns: columns kept in 16 bits.
        sqnr: of its output on calibration rows, in dB; None where it was not measured.
        errors: relative energy of its output error on calibration rows by plain rounding, "w4a16" and "w4a4": its
            sensitivity. Empty where nothing was chosen by a calibration.
        bytes: of its tensors as stored: planes or weight, side branch and bias, without the mask, which others share.
        bf16_bytes: of weight and bias in bf16.
        weight: spread of the stored weight; None where it was not asked for, or is not stored under its own name.
    """

    path: str
    block: int | None
    kind: str
    in_features: int
    out_features: int
    precision: str
    reason: str
    mask: str | None
    mask_folded: bool
    alpha: float | None
    mask_min: float | None
    mask_max: float | None
    shift: bool
    hadamard: int
    rounding: str
    rank: int
    outlier_columns: int
    sqnr: float | None
    errors: Mapping[str, float]
    bytes: int
    bf16_bytes: int
    weight: WeightStatistics | None


@dataclass(frozen=True)
class ExpertNumbers:
    """One expert.

    Attributes:
        name: "transformer" or "transformer_2".
        summary: bytes, precisions, and what the recipe became.
        config: of the model class.
        recipe: all fields of the recipe.
        variants: programs beside the main one.
        bf16_timesteps: ranges in which the program "bf16" runs.
        step_errors: of both programs on the calibration's calls, {"timestep", "w4a4", "w4a16"}, relative energies.
        loras: what was added to the weights, in order: {"file", "scale", "tensors", "sha256"}.
        calibration: {"sha256", "runs"} of the calibration that it was compiled with, None without one.
        bin_edges: of the timestep bins of `GroupNumbers.bin_maxima`; empty without a calibration file.
        linears: in the manifest's order.
        groups: the inputs, in the program's order; empty without a calibration file.
    """

    name: str
    summary: ExpertSummary
    config: Mapping[str, Any]
    recipe: Mapping[str, Any]
    variants: tuple[str, ...]
    bf16_timesteps: tuple[tuple[float, float], ...]
    step_errors: tuple[Mapping[str, float], ...]
    loras: tuple[Mapping[str, Any], ...]
    calibration: Mapping[str, Any] | None
    bin_edges: tuple[float, ...]
    linears: tuple[LinearNumbers, ...]
    groups: tuple[GroupNumbers, ...]


@dataclass(frozen=True)
class ArtifactNumbers:
    """A whole artifact.

    Attributes:
        source: the model that was compiled, as it was named.
        pipeline_class: of diffusers.
        boundary_ratio: share of the timesteps from which on the first expert serves; None for one expert.
        expand_timesteps: one timestep a token.
        format_version: of the artifact.
        digest: of the manifest.
        targets: target -> bytes of its kernels; "portable" needs none.
        files: relative path -> bytes.
        versions: package -> version that it was compiled with.
        experts: in sampling order.
    """

    source: str
    pipeline_class: str
    boundary_ratio: float | None
    expand_timesteps: bool
    format_version: int
    digest: str
    targets: Mapping[str, int]
    files: Mapping[str, int]
    versions: Mapping[str, str]
    experts: tuple[ExpertNumbers, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all listed files."""
        return sum(self.files.values())


def artifact_numbers(
    artifact: Artifact, calibration: Calibration | None = None, on_event: Events = lambda event, value: None
) -> ArtifactNumbers:
    """All numbers of an artifact.

    Args:
        artifact: opened.
        calibration: for the activations; it need not hold every expert. None for none.
        on_event: progress, see `Events`.

    Raises:
        Hif4Error: the calibration is of other weights or of none of the experts, or a file is damaged.
    """
    if calibration is not None:
        known = [name for name in artifact.experts if name in calibration.experts]
        for name in known or artifact.experts:
            calibration.check(name, artifact.expert(name).fingerprint)
    manifest, model = artifact.manifest, artifact.manifest["model"]
    files = {name: size for name, (size, _) in artifact.files.items()}
    return ArtifactNumbers(
        source=str(model["source"]),
        pipeline_class=str(model["pipeline_class"]),
        boundary_ratio=_number(model.get("boundary_ratio")),
        expand_timesteps=artifact.expand_timesteps,
        format_version=manifest["format_version"],
        digest=manifest["digest"],
        targets={
            str(target): sum(size for name, size in files.items() if name.startswith(f"kernels/{target}/"))
            for target in manifest.get("targets", [])
        },
        files=files,
        versions={str(name): str(version) for name, version in manifest.get("versions", {}).items()},
        experts=tuple(expert_numbers(artifact, name, calibration, on_event) for name in artifact.experts),
    )


def expert_numbers(
    artifact: Artifact,
    expert: str,
    calibration: Calibration | None = None,
    on_event: Events = lambda event, value: None,
    *,
    weights: bool = True,
) -> ExpertNumbers:
    """The numbers of one expert.

    Memory: one stored weight at a time is mapped, and a few MB are decoded. Time: large weights are sampled, see
    `hif4c.compiler.weight_statistics`.

    Args:
        artifact: opened.
        expert: its name.
        calibration: for the activations; without this expert it gives none. None for none.
        on_event: progress, see `Events`.
        weights: whether to read the weights; else `LinearNumbers.weight` is None, and it takes no time.

    Raises:
        Hif4Error: the calibration is of other weights, or a file is damaged.
    """
    info, entry = artifact.expert(expert), artifact.manifest["experts"][expert]
    calibrated = None
    if calibration is not None and expert in calibration.experts:
        calibration.check(expert, info.fingerprint)
        calibrated = calibration.expert(expert)
    if weights:
        on_event("step", f"reading the weights of {expert}")
        on_event("total", len(info.linears))
    linears = []
    with open_weights(artifact, expert) as files:
        stored = {name: file for file in files for name in file.names}
        for linear in info.linears:
            linears.append(_linear(linear, stored, weights))
            if weights:
                on_event("bytes", 1)
    groups = []
    if calibrated is not None:
        on_event("step", f"reading the activations of {expert}")
        on_event("total", len(calibrated.groups))
        for name, group in calibrated.groups.items():
            blocks = {_place(path)[0] for path in group.readers}
            groups.append(group_numbers(calibrated, name, blocks.pop() if len(blocks) == 1 else None))
            on_event("bytes", 1)
    return ExpertNumbers(
        name=expert,
        summary=summarize_expert(artifact, expert),
        config=info.config,
        recipe=info.recipe,
        variants=tuple(artifact.variants(expert)),
        bf16_timesteps=info.bf16_timesteps,
        step_errors=tuple(entry.get("step_errors", [])),
        loras=tuple(entry.get("loras", [])),
        calibration=entry.get("calibration"),
        bin_edges=() if calibrated is None else calibrated.edges,
        linears=tuple(linears),
        groups=tuple(groups),
    )


def to_json(numbers: Any) -> str:
    """Numbers (a dataclass of this module, or several in lists and dicts) as compact JSON, floats to 6 digits.

    A summary has its properties too, under "bits_per_weight" and "ratio".
    """
    return json.dumps(_plain(numbers), separators=(",", ":"), allow_nan=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        if isinstance(value, ExpertSummary):
            fields |= {"bits_per_weight": value.bits_per_weight, "ratio": value.ratio}
        return _plain(fields)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _place(path: str) -> tuple[int | None, str]:
    """Block and kind of a linear."""
    found = _BLOCK.fullmatch(path)
    return (None, path) if found is None else (int(found[1]), found[2])


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _linear(entry: Mapping[str, Any], stored: Mapping[str, TensorFile], weights: bool) -> LinearNumbers:
    path, inputs, outputs = str(entry["path"]), int(entry["in_features"]), int(entry["out_features"])
    block, kind = _place(path)
    parts = ("weight", "weight.codes", "weight.scales", "weight.down", "weight.up", "bias")
    sizes = {part: stored[name].nbytes(name) for part in parts if (name := f"{path}.{part}") in stored}
    mask = None if entry.get("mask") is None else str(entry["mask"])
    low, high = (None, None) if mask is None or mask not in stored else _mask_range(stored[mask], mask)
    return LinearNumbers(
        path=path,
        block=block,
        kind=kind,
        in_features=inputs,
        out_features=outputs,
        precision=str(entry["precision"]),
        reason=str(entry["reason"]),
        mask=mask,
        mask_folded=bool(entry.get("mask_folded")),
        alpha=_number(entry.get("alpha")),
        mask_min=low,
        mask_max=high,
        shift=entry.get("shift") is not None,
        hadamard=int(entry.get("hadamard", 0)),
        rounding=str(entry.get("rounding", "nearest")),
        rank=int(entry.get("rank", 0)),
        outlier_columns=int(entry.get("outlier_columns", 0)),
        sqnr=_number(entry.get("sqnr")),
        errors={str(name): float(value) for name, value in entry.get("errors", {}).items()},
        bytes=sum(sizes.values()),
        bf16_bytes=2 * outputs * (inputs + ("bias" in sizes)),
        weight=_weight(path, inputs, outputs, stored) if weights else None,
    )


def _mask_range(file: TensorFile, name: str) -> tuple[float, float]:
    mask = file.read(name)
    kept = mask[mask != 0].float()
    if not len(kept) or not bool(torch.isfinite(kept).all()):
        raise Hif4Error(f"{file.path}: {name} is zero everywhere or not finite; the artifact is damaged.")
    return float(kept.min()), float(kept.max())


def _weight(path: str, inputs: int, outputs: int, stored: Mapping[str, TensorFile]) -> WeightStatistics | None:
    whole, codes, scales = (f"{path}.weight{suffix}" for suffix in ("", ".codes", ".scales"))
    names = [codes, scales] if codes in stored and scales in stored else [whole]
    if names[0] not in stored:
        return None
    where = f"{stored[names[0]].path}: {names[0]}"
    tensors = [stored[name].read(name) for name in names]
    shape = (outputs, inputs) if len(names) == 1 else (outputs, *tensors[0].shape[1:])
    if tensors[0].shape != shape:
        raise Hif4Error(f"{where}: does not have the shape that the manifest says; the artifact is damaged.")
    if len(names) == 1:
        found = dense_statistics(tensors[0], where)
    else:
        found = packed_statistics(tensors[0], tensors[1], inputs, where)
    for name in names:
        stored[name].release(name)
    return found
