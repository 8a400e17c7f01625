"""What a recipe leaves open, decided from a calibration: masks, shifts, and the precision of every linear."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, NoReturn

import torch

from hif4c.compiler.calibration import ExpertCalibration, Group
from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.journal import Entry, Journal
from hif4c.compiler.masks import MaskChoice, channel_mask, choose_mask, column_maxima, relative_error, round_trip
from hif4c.compiler.plan import ExpertPlan, PlannedLinear, packed_bytes
from hif4c.compiler.ranks import ALONE, Ranks
from hif4c.compiler.recipe import LARGEST, SEARCH, Recipe
from hif4c.compiler.sketch import ChannelSketch
from hif4c.passes.program import Precision, inverse_mask
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.rotation import MAX_WIDTH

__all__ = ["Choices", "choose", "largest_percentile"]

SEARCH_OUTPUTS = 512
"""Outputs of a linear that errors are measured on: evenly spaced rows of its weight."""
SEARCH_READERS = 6
"""Linears of a group that its mask is searched on (the text's keys and values have two in every block)."""

MASK, SHIFT = ".mask", ".shift"
"""Behind the name of a group, the names of what is chosen for its input."""


@dataclass(frozen=True)
class Choices:
    """The resolved recipe of one expert.

    Attributes:
        plan: with the precision, rank and rounding of every linear.
        masks: mask name -> m [K] float32, 0 for outlier columns.
        mask_of: linear's path -> mask name.
        shifts: shift name -> mean [K] float32 of an input, taken off it before quantization.
        shift_of: linear's path -> shift name.
        alphas: mask name -> exponent; None for a mask that only marks outlier columns, and where a search found that
            no mask is best.
        errors: quantized linear's path -> relative energy of its output error on calibration rows, by plain rounding
            and without a low-rank branch: "w4a16" with activations in bf16, and "w4a4" where they may be in 4 bits.
        notes: what people should know.
    """

    plan: ExpertPlan
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    mask_of: Mapping[str, str] = field(default_factory=dict)
    shifts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    shift_of: Mapping[str, str] = field(default_factory=dict)
    alphas: Mapping[str, float | None] = field(default_factory=dict)
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: Sequence[str] = ()


def choose(
    plan: ExpertPlan,
    recipe: Recipe,
    calibration: ExpertCalibration | None,
    checkpoint: Checkpoint,
    events: Callable[[str, Any], None] = lambda event, value: None,
    *,
    journal: Journal | None = None,
    ranks: Ranks = ALONE,
) -> Choices:
    """Resolve a recipe.

    The linears that read one input share its mask, which is chosen before any of them gets more bits from a budget.

    Args:
        plan: what the config alone decides.
        recipe: the recipe.
        calibration: the expert's; None for a recipe that needs none.
        checkpoint: its weights, each read at most three times; of those that a mask is searched on, some rows of a few
            are in memory, else one weight.
        events: "total" groups of linears, "skipped" of them that the journal knows, and "bytes" 1 after each.
        journal: of the groups that are done.
        ranks: who share the groups; every rank calls this, and gets the same.

    Raises:
        Hif4Error: a calibration is needed and there is none, it is not one of the plan's linears, or another rank
            failed.
    """
    if not recipe.needs_calibration:
        return Choices(plan)
    if calibration is None:
        raise Hif4Error(
            f"recipe {recipe.name} needs a calibration; make one with `hif4c calibrate` and give --calibration."
        )
    decided = {linear.decision.path: linear for linear in plan.linears}
    _check_groups(calibration, decided)
    journal = journal or Journal()
    keys = {f"choose/{calibration.name}/{name}": group for name, group in calibration.groups.items()}
    done = sum(journal.done(key) is not None for key in keys)

    def work(mine: list[str]) -> None:
        events("total", done + len(mine))
        if done:
            events("skipped", done)
        for key in mine:
            part = _Found()
            _choose_group(keys[key], decided, recipe, calibration, checkpoint, part)
            journal.record(key, *part.to_entry())
            events("bytes", 1)

    found = _Found()
    for entry in journal.complete(list(keys), work, ranks).values():
        found.add(entry)
    linears = _spend(plan.linears, recipe, calibration, found)
    return Choices(
        replace(plan, linears=tuple(linears)),
        found.masks,
        found.mask_of,
        found.shifts,
        found.shift_of,
        found.alphas,
        found.errors,
        _notes(found),
    )


@dataclass
class _Found:
    """What `_choose_group` collects."""

    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    mask_of: dict[str, str] = field(default_factory=dict)
    shifts: dict[str, torch.Tensor] = field(default_factory=dict)
    shift_of: dict[str, str] = field(default_factory=dict)
    alphas: dict[str, float | None] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    floored: dict[str, int] = field(default_factory=dict)

    def to_entry(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """As a journal keeps it."""
        values = {name: getattr(self, name) for name in ("mask_of", "shift_of", "alphas", "errors", "floored")}
        return values, {**self.masks, **self.shifts}

    def add(self, entry: Entry) -> None:
        """Count in what was found for a group."""
        self.masks |= {name: value for name, value in entry.tensors.items() if name.endswith(MASK)}
        self.shifts |= {name: value for name, value in entry.tensors.items() if name.endswith(SHIFT)}
        for name, values in entry.values.items():
            getattr(self, name).update(values)


def _check_groups(calibration: ExpertCalibration, decided: Mapping[str, PlannedLinear]) -> None:
    """Refuse (Hif4Error) a calibration that does not hold the inputs of exactly the plan's linears."""

    def refuse(problem: str) -> NoReturn:
        raise Hif4Error(f"the calibration of {calibration.name} {problem}; calibrate this model again.")

    seen = set()
    for group in calibration.groups.values():
        for path in group.readers:
            if path not in decided:
                refuse(f"has {path}, which the model has not")
            if path in seen or decided[path].in_features != group.channels:
                refuse(f"has another input for {path} than the model")
            seen.add(path)
    lacking = [path for path, linear in decided.items() if linear.decision.quantized and path not in seen]
    if lacking:
        refuse(f"lacks {lacking[0]}")


def _notes(found: _Found) -> list[str]:
    notes = []
    if found.floored:
        notes.append(
            f"{sum(found.floored.values())} channels of {len(found.floored)} inputs have dead statistics, floored"
        )
    used = sorted({alpha for alpha in found.alphas.values() if alpha is not None})
    if used:
        masked = sum(alpha is not None for alpha in found.alphas.values())
        notes.append(f"{masked} masks with alpha {_span(used)}, {len(found.alphas) - masked} inputs without")
    if found.shifts:
        notes.append(f"{len(found.shifts)} inputs can be shifted by their channels' means")
    return notes


def _choose_group(
    group: Group,
    decided: Mapping[str, PlannedLinear],
    recipe: Recipe,
    calibration: ExpertCalibration,
    checkpoint: Checkpoint,
    found: _Found,
) -> None:
    quantized = [path for path in group.readers if decided[path].decision.quantized]
    if not quantized:
        return
    rows = calibration.rows(group.name).float()
    # Masks, shifts and rotations are for inputs in 4 bits.
    readers = [path for path in quantized if decided[path].decision.precision == Precision.W4A4]
    shifted = bool(readers) and recipe.shift and can_shift(group.name)
    if shifted:
        mean = rows.mean(0)
        rows = rows - mean
        found.shifts[f"{group.name}{SHIFT}"] = mean
        found.shift_of |= dict.fromkeys(group.readers, f"{group.name}{SHIFT}")
    width = rotation_width(recipe, group.channels) if readers else 0
    mask = None
    if readers and (recipe.mask_percentile is not None or recipe.outlier_columns):
        mask = _choose_mask(group, readers, rows, shifted, width, recipe, calibration, checkpoint, found)
    if mask is not None:
        found.masks[f"{group.name}{MASK}"] = mask
        found.mask_of |= dict.fromkeys(readers, f"{group.name}{MASK}")
    # Errors are only needed where something is chosen by them, and for the report.
    rounded = round_trip(rows, mask, width) if readers else rows
    inverse = None if mask is None else inverse_mask(mask)
    outliers = None if mask is None else rows * (mask == 0)
    for path in quantized:
        weight = _some_rows(checkpoint, path)
        expected = rows @ weight.T
        found.errors[path] = {"w4a16": relative_error(rows @ round_trip(weight, None, 0).T, expected)}
        if path in readers:
            output = rounded @ round_trip(weight, inverse, width).T
            if outliers is not None:
                output = output + outliers @ weight.T
            found.errors[path]["w4a4"] = relative_error(output, expected)
        checkpoint.release(f"{path}.weight")


def _choose_mask(
    group: Group,
    readers: Sequence[str],
    rows: torch.Tensor,
    shifted: bool,
    width: int,
    recipe: Recipe,
    calibration: ExpertCalibration,
    checkpoint: Checkpoint,
    found: _Found,
) -> torch.Tensor | None:
    # A shifted input has other magnitudes than the histograms know; its rows have them.
    percentile = 100.0 if recipe.mask_percentile is None else recipe.mask_percentile
    if shifted:
        activation = _percentile(rows.abs(), percentile)
    else:
        activation = largest_percentile(calibration.sketch(group.name), percentile)
    name = f"{group.name}{MASK}"
    found.alphas[name] = None
    if recipe.mask_percentile is None:
        return _without_outliers(activation, recipe.outlier_columns)
    largest = torch.zeros(group.channels)
    for path in readers:
        largest = torch.maximum(largest, column_maxima(checkpoint, f"{path}.weight"))
    # A mask moves a channel's size between input and weight; the product stays.
    kept = _without_outliers(activation * largest, recipe.outlier_columns)
    if recipe.alpha == SEARCH:
        chosen = readers[:: -(-len(readers) // SEARCH_READERS)]
        weights = [_some_rows(checkpoint, path) * kept for path in chosen]
        choice = choose_mask(rows * kept, weights, activation, largest, width)
    else:
        choice = MaskChoice(*channel_mask(activation, largest, float(recipe.alpha)), float(recipe.alpha))
    found.alphas[name] = choice.alpha
    if choice.floored:
        found.floored[name] = choice.floored
    if choice.mask is None:
        return kept if recipe.outlier_columns else None
    return choice.mask * kept


def largest_percentile(sketch: ChannelSketch, p: float) -> torch.Tensor:
    """The percentile [K] of the timestep bin where it is largest, channel by channel; the maximum for p = 100.

    Within a bin a percentile leaves out rare tokens. Over all timesteps together it would leave out whole noise levels:
    the last steps are few, have the largest activations, and move the latents most.
    """
    bins = [index for index, count in enumerate(sketch.count().tolist()) if count]
    return torch.stack([sketch.percentile(p, [index]) for index in bins]).amax(0)


def _without_outliers(sizes: torch.Tensor, count: int) -> torch.Tensor:
    """Factors [K]: 0 for the largest of the sizes [K], else 1."""
    return torch.ones(len(sizes)).index_fill(0, sizes.topk(count).indices, 0.0)


def _percentile(values: torch.Tensor, p: float) -> torch.Tensor:
    """Nearest-rank percentile of every column of [R, K], as a sketch reads it."""
    rank = math.ceil(Fraction(str(p)) * len(values) / 100)
    return values.kthvalue(rank, dim=0).values


def _some_rows(checkpoint: Checkpoint, path: str) -> torch.Tensor:
    """At most SEARCH_OUTPUTS evenly spaced rows of a weight, float32."""
    weight = checkpoint.read(f"{path}.weight")
    step = -(-weight.shape[0] // SEARCH_OUTPUTS)
    return weight[::step].float()


def rotation_width(recipe: Recipe, channels: int) -> int:
    """The rotation that `rotate_inputs` will choose for an input."""
    return min(channels & -channels, MAX_WIDTH) if recipe.hadamard == LARGEST else int(recipe.hadamard)


def can_shift(group: str) -> bool:
    """Whether something before the input has a bias that can take the shift: not so behind a GELU or for the text."""
    return not group.endswith(("ffn.net.2", "attn2.to_k", "attn2.to_v"))


def _spend(
    linears: Sequence[PlannedLinear], recipe: Recipe, calibration: ExpertCalibration, found: _Found
) -> list[PlannedLinear]:
    """Give the most sensitive linears more bits while the recipe's budgets last."""
    result = {linear.decision.path: linear for linear in linears}
    if recipe.average_bits is not None:
        _spend_bits(result, recipe, found)
    if recipe.bf16_layers:
        _spend_multiplications(result, recipe, calibration, found)
    return list(result.values())


def _spend_bits(result: dict[str, PlannedLinear], recipe: Recipe, found: _Found) -> None:
    """Within `make_plan`'s check of the budget; a linear in bf16 has no side branch either."""
    blocks = [linear for linear in result.values() if linear.decision.quantized]
    weights = sum(linear.in_features * linear.out_features for linear in blocks)
    assert recipe.average_bits is not None
    left = recipe.average_bits * weights - 8 * sum(packed_bytes(linear, recipe) for linear in blocks)

    def error(linear: PlannedLinear) -> float:
        return found.errors[linear.decision.path][linear.decision.precision]

    def gain(linear: PlannedLinear) -> float:
        return error(linear) / (linear.in_features * linear.out_features)

    for linear in sorted(blocks, key=gain, reverse=True):
        cost = 16 * linear.in_features * linear.out_features - 8 * packed_bytes(linear, recipe)
        if cost <= left:
            left -= cost
            reason = f"recipe {recipe.name}: among the most sensitive (relative error {error(linear):.1e} in 4 bits)"
            decision = replace(linear.decision, precision=Precision.HIGH, reason=reason, rank=0, rounding="nearest")
            result[linear.decision.path] = replace(linear, decision=decision, bytes_after=linear.bytes_before)


def _spend_multiplications(
    result: dict[str, PlannedLinear], recipe: Recipe, calibration: ExpertCalibration, found: _Found
) -> None:
    tokens: dict[str, int] = {}
    for group in calibration.groups.values():
        tokens |= dict.fromkeys(group.readers, int(calibration.sketch(group.name).count().sum()))
    work = {
        path: linear.in_features * linear.out_features * tokens[path]
        for path, linear in result.items()
        if linear.decision.precision == Precision.W4A4
    }
    left = recipe.bf16_layers * sum(work.values())

    def gain(path: str) -> float:
        errors = found.errors[path]
        return (errors["w4a4"] - errors["w4a16"]) / work[path]

    for path in sorted(work, key=gain, reverse=True):
        if work[path] <= left and gain(path) > 0:
            left -= work[path]
            reason = f"recipe {recipe.name}: bf16 activations, relative error {found.errors[path]['w4a4']:.1e} without"
            linear = result[path]
            relaxed = replace(linear, decision=replace(linear.decision, precision=Precision.W4A16, reason=reason))
            saved = packed_bytes(linear, recipe) - packed_bytes(relaxed, recipe)
            result[path] = replace(relaxed, bytes_after=relaxed.bytes_after - saved)


def _span(values: Sequence[float]) -> str:
    return "-" if not values else f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
