"""What differs between two artifacts of one model: linears, masks, bytes, errors, recipes and programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hif4c.compiler.report import ExpertSummary
from hif4c.compiler.report_numbers import ExpertNumbers, LinearNumbers, expert_numbers
from hif4c.compiler.stored_tensors import StoredTensors
from hif4c.runtime.artifact import Artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.graph_text import count_targets

__all__ = ["Change", "ExpertDifference", "LinearDifference", "compare_artifacts"]

PIECE_BYTES = 4 << 20
"""Bytes of a tensor that are compared at once, so that memory stays small whatever a tensor's size."""

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Events = Callable[[str, Any], None]


@dataclass(frozen=True)
class Change:
    """What something was before and is after, as people read it; "" for nothing."""

    before: str
    after: str


@dataclass(frozen=True)
class LinearDifference:
    """What differs of one linear; a field is None where it does not.

    Attributes:
        path: module path.
        precision: "w4a4", "w4a16" or "high".
        shift: whether its input arrives without its channels' means.
        mask: how its input is masked: the exponent, and whether another operator applies it.
        mask_ratio: the largest ratio of the stored masks' values in one channel; inf where only one of them is zero.
        rotation: width, "" for none.
        rounding: "nearest", "search" or "gptq".
        branch: low-rank branch and columns in 16 bits.
        bytes: of its tensors as stored, without the mask.
        sqnr: (before, after) in dB; None for one that was not measured.
        weight: share of the stored weight that is another: of its 4-bit codes, or of its elements in 16 bits; 0 where
            only scales differ, 1 where it is stored otherwise.
        tensors: what else of it differs: "bias", "weight.down", "weight.up".
    """

    path: str
    precision: Change | None = None
    shift: Change | None = None
    mask: Change | None = None
    mask_ratio: float | None = None
    rotation: Change | None = None
    rounding: Change | None = None
    branch: Change | None = None
    bytes: tuple[int, int] | None = None
    sqnr: tuple[float | None, float | None] | None = None
    weight: float | None = None
    tensors: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return self == LinearDifference(self.path)


@dataclass(frozen=True)
class ExpertDifference:
    """What differs in one expert that both artifacts have.

    Attributes:
        expert: its name.
        summaries: of its files, before and after.
        settings: recipe, calibration, LoRAs, timesteps, config and the like, where they differ. Name -> change.
        linears: those that both have in the same shape, in the order of the model.
        only: paths of linears that only one of them has, or has in another shape: before, after.
        tensors: names of stored tensors of no linear that differ, masks left out.
        same_tensors: how many of them do not.
        programs: variant ("main", "bf16") -> operator -> (calls before, calls after), where they differ; empty for a
            program that calls the same operators as often, with other arguments or in another order.
    """

    expert: str
    summaries: tuple[ExpertSummary, ExpertSummary]
    settings: dict[str, Change]
    linears: tuple[LinearDifference, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    tensors: tuple[str, ...]
    same_tensors: int
    programs: dict[str, dict[str, tuple[int, int]]]


def compare_artifacts(
    before: Artifact, after: Artifact, on_event: Events = lambda event, value: None
) -> list[ExpertDifference]:
    """Compare the experts that both artifacts have.

    Tensors are compared bit by bit, 4 MB at a time; those in files that the manifests give the same hash are not read.

    Args:
        before: what changes are told from.
        after: what they lead to.
        on_event: told "step", "total" and "unit", and "bytes" as tensors are read.

    Raises:
        Hif4Error: no expert is in both, one is of another model there, or an artifact is damaged.
    """
    common = [name for name in before.experts if name in after.experts]
    if not common:
        raise Hif4Error(
            f"{after.root}: holds {', '.join(after.experts)}, and {before.root} holds {', '.join(before.experts)}; "
            "give two artifacts that have an expert in common."
        )
    pairs = [_Pair(before, after, name, on_event) for name in common]
    on_event("step", "comparing the stored tensors")
    on_event("total", sum(pair.amount for pair in pairs))
    on_event("unit", "bytes")
    return [pair.difference() for pair in pairs]


class _Pair:
    """One expert in two artifacts. Tensors are read side by side, each once."""

    def __init__(self, before: Artifact, after: Artifact, expert: str, on_event: Events) -> None:
        self.artifacts = (before, after)
        self.expert = expert
        self.on_event = on_event
        self.numbers: tuple[ExpertNumbers, ExpertNumbers] = (
            expert_numbers(before, expert, weights=False),
            expert_numbers(after, expert, weights=False),
        )
        self.linears = tuple({item.path: item for item in numbers.linears} for numbers in self.numbers)
        self.common = [
            path
            for path, item in self.linears[0].items()
            if path in self.linears[1] and _shape(item) == _shape(self.linears[1][path])
        ]
        if not self.common:
            raise Hif4Error(
                f"{after.root}: its {expert} is of another model than that of {before.root}; no linear has the same "
                "name and shape in both."
            )
        self.stores = (StoredTensors(before, expert), StoredTensors(after, expert))
        self.equal = self._in_equal_files()
        self.ratios: dict[tuple[str, str], float | None] = {}
        kept = [name for name in self.stores[0] if self._comparable(name) and name not in self.equal]
        self.amount = sum(2 * self.stores[0].nbytes(name) for name in kept)

    def difference(self) -> ExpertDifference:
        linears = tuple(self._linear(path) for path in self.common)
        of_linears = {path for linears in self.linears for path in linears}
        masks = {item.mask for linears in self.linears for item in linears.values()}
        others = [
            name
            for name in dict.fromkeys([*self.stores[0], *self.stores[1]])
            if name not in masks and _owner(name, of_linears) is None
        ]
        differing = tuple(name for name in others if self._differs(name))
        first, second = self.linears
        return ExpertDifference(
            expert=self.expert,
            summaries=(self.numbers[0].summary, self.numbers[1].summary),
            settings=_settings(self.artifacts, self.numbers),
            linears=linears,
            only=(
                tuple(path for path in first if path not in self.common),
                tuple(path for path in second if path not in self.common),
            ),
            tensors=differing,
            same_tensors=len(others) - len(differing),
            programs=_programs(*self.artifacts, self.expert),
        )

    def _linear(self, path: str) -> LinearDifference:
        first, second = self.linears[0][path], self.linears[1][path]
        weight, others = None, []
        for part in ("weight", "weight.codes", "weight.scales", "weight.down", "weight.up", "bias"):
            if (share := self._share(f"{path}.{part}")) is None:
                continue
            if part in ("weight", "weight.codes", "weight.scales"):
                # A share of scales says less than that of the codes beside them.
                scales = part == "weight.scales" and self._comparable(f"{path}.{part}")
                weight = max(weight or 0.0, 0.0 if scales else share)
            else:
                others.append(part)
        return LinearDifference(
            path=path,
            precision=_change(first.precision, second.precision),
            shift=_change("yes" if first.shift else "", "yes" if second.shift else ""),
            mask=_change(_mask(first), _mask(second)),
            mask_ratio=self._mask_ratio(first, second),
            rotation=_change(str(first.hadamard or ""), str(second.hadamard or "")),
            rounding=_change(_rounding(first), _rounding(second)),
            branch=_change(_branch(first), _branch(second)),
            bytes=None if first.bytes == second.bytes else (first.bytes, second.bytes),
            sqnr=None if first.sqnr == second.sqnr else (first.sqnr, second.sqnr),
            weight=weight,
            tensors=tuple(others),
        )

    def _mask_ratio(self, first: LinearNumbers, second: LinearNumbers) -> float | None:
        """How far apart two stored masks are; None where they are equal or one of them is not stored."""
        if first.mask is None or second.mask is None:
            return None
        if first.mask not in self.stores[0] or second.mask not in self.stores[1]:
            return None
        key = (first.mask, second.mask)
        if key not in self.ratios:
            one, two = (store.place(name).read(name).double() for store, name in zip(self.stores, key, strict=True))
            ratio = 1.0
            if one.shape == two.shape and len(one):
                either = torch.maximum(one.abs(), two.abs()) / torch.minimum(one.abs(), two.abs())
                ratio = float(torch.where(one == two, 1.0, either).max())
            self.ratios[key] = None if ratio == 1 else ratio
        return self.ratios[key]

    def _comparable(self, name: str) -> bool:
        """Whether both store a tensor in the same dtype and shape."""
        first, second = self.stores
        return name in first and name in second and first.info(name) == second.info(name)

    def _differs(self, name: str) -> bool:
        return self._share(name) is not None

    def _share(self, name: str) -> float | None:
        """The share of a tensor that differs, 1 where it is stored otherwise; None where nothing differs."""
        if not self._comparable(name):
            return 1.0 if name in self.stores[0] or name in self.stores[1] else None
        if name in self.equal:
            return None
        files = [store.place(name) for store in self.stores]
        per_element = 2 if name.endswith(".codes") else 1
        count = total = 0
        for one, two in zip(*(_pieces(file.read(name)) for file in files), strict=True):
            total += per_element * one.numel()
            count += 0 if _equal(one, two) else _differing(one, two, per_element)
            self.on_event("bytes", 2 * one.nbytes)
            for file in files:  # the largest tensor of A14B alone has 315 MB
                file.release(name)
        return count / total if count else None

    def _in_equal_files(self) -> set[str]:
        """Tensors in files of which both have one with the same hash."""
        first, second = (
            {artifact.files[relative][1]: file for relative, file in store.files.items()}
            for artifact, store in zip(self.artifacts, self.stores, strict=True)
        )
        return {name for digest in first.keys() & second.keys() for name in first[digest].names}


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor's bits as integers of its elements' size: NaN equals itself, and -0 is not 0."""
    flat = tensor.flatten().view(_SAME_SIZE[tensor.dtype.itemsize])
    yield from flat.split(PIECE_BYTES // flat.itemsize)


def _equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether two pieces are equal; compared in words where they can be, which takes an eighth of the time."""
    if one.nbytes % 8 == 0:
        one, two = one.view(torch.int64), two.view(torch.int64)
    return torch.equal(one, two)


def _differing(one: torch.Tensor, two: torch.Tensor, per_element: int) -> int:
    """How many elements differ; how many 4-bit halves of bytes, where there are two codes an element."""
    if per_element == 1:
        return int(torch.count_nonzero(one != two))
    bits = one ^ two
    return int(torch.count_nonzero(bits & 0x0F) + torch.count_nonzero(bits & 0xF0))


def _owner(name: str, paths: set[str]) -> str | None:
    """The linear that a stored tensor belongs to."""
    for suffix in (".weight", ".bias", ".weight.codes", ".weight.scales", ".weight.down", ".weight.up"):
        if name.endswith(suffix) and (path := name.removesuffix(suffix)) in paths:
            return path
    return None


def _shape(item: LinearNumbers) -> tuple[int, int]:
    return item.out_features, item.in_features


def _change(before: str, after: str) -> Change | None:
    return None if before == after else Change(before, after)


def _mask(item: LinearNumbers) -> str:
    if item.mask is None:
        return ""
    alpha = "ones" if item.alpha is None else f"{item.alpha:g}"
    return f"{alpha} folded" if item.mask_folded else alpha


def _rounding(item: LinearNumbers) -> str:
    return "" if item.precision == "high" else item.rounding


def _branch(item: LinearNumbers) -> str:
    parts = [f"rank {item.rank}"] if item.rank else []
    return ", ".join([*parts, f"{item.outlier_columns} columns"] if item.outlier_columns else parts)


def _settings(artifacts: tuple[Artifact, Artifact], numbers: tuple[ExpertNumbers, ExpertNumbers]) -> dict[str, Change]:
    """What is told of an expert as a whole, where it differs."""
    first, second = (_told(artifact, item) for artifact, item in zip(artifacts, numbers, strict=True))
    changes = {name: Change(first.get(name, ""), second.get(name, "")) for name in {**first, **second}}
    return {name: change for name, change in changes.items() if change.before != change.after}


def _told(artifact: Artifact, item: ExpertNumbers) -> dict[str, str]:
    info, manifest = artifact.expert(item.name), artifact.manifest
    loras = [f"{lora['file']} at {lora['scale']:g} ({str(lora['sha256'])[:12]})" for lora in item.loras]
    return {
        "model": str(manifest["model"]["source"]),
        "original weights": str(info.fingerprint)[:12],
        "dtype": str(info.dtype).removeprefix("torch."),
        **{f"config: {name}": _text(value) for name, value in item.config.items()},
        **{f"recipe: {name}": _text(value) for name, value in item.recipe.items() if name != "description"},
        "calibration": str((item.calibration or {}).get("sha256", ""))[:12],
        "LoRAs": ", ".join(loras),
        "timesteps with bf16 activations": ", ".join(f"{low:g} to {high:g}" for low, high in item.bf16_timesteps),
        "targets": ", ".join(map(str, manifest.get("targets", ()))),
        **{f"version of {name}": str(value) for name, value in manifest.get("versions", {}).items()},
    }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _programs(before: Artifact, after: Artifact, expert: str) -> dict[str, dict[str, tuple[int, int]]]:
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for variant in (None, *dict.fromkeys([*before.variants(expert), *after.variants(expert)])):
        first, second = (
            artifact.graph(expert, variant) if variant in (None, *artifact.variants(expert)) else None
            for artifact in (before, after)
        )
        if first != second:
            calls = [Counter() if graph is None else count_targets(graph) for graph in (first, second)]
            pairs = {target: (calls[0][target], calls[1][target]) for target in sorted({*calls[0], *calls[1]})}
            found[variant or "main"] = {target: pair for target, pair in pairs.items() if pair[0] != pair[1]}
    return found
