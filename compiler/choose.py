"""What a recipe leaves open, decided from a calibration: masks, shifts, and the precision of every linear."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from hif4c.compiler.calibration import ExpertCalibration, Group
from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.masks import channel_mask, choose_mask, relative_error, round_trip
from hif4c.compiler.plan import ExpertPlan, PlannedLinear, branch_bytes
from hif4c.compiler.recipe import LARGEST, SEARCH, Recipe
from hif4c.passes.program import Precision, inverse_mask
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import UNIT
from hif4c.runtime.rotation import MAX_WIDTH

__all__ = ["Choices", "choose"]

SEARCH_OUTPUTS = 512
"""Outputs of a linear that errors are measured on: evenly spaced rows of its weight."""
SEARCH_READERS = 6
"""Linears of a group that its mask is searched on (the text's keys and values have two in every block)."""


@dataclass(frozen=True)
class Choices:
    """The resolved recipe of one expert.

    Attributes:
        plan: with the precision, rank and rounding of every linear.
        masks: mask name -> m [K] float32, 0 for outlier columns.
        mask_of: linear's path -> mask name.
        shifts: shift name -> mean [K] float32 of an input, taken off it before quantization.
        shift_of: linear's path -> shift name.
        alphas: mask name -> exponent, None where no mask but only outlier columns are.
        errors: linear's path -> relative output error {"w4a4", "w4a16"} on calibration rows, by plain rounding.
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
    progress: Callable[[int], None] = lambda count: None,
) -> Choices:
    """Resolve a recipe.

    Args:
        plan: what the config alone decides.
        recipe: the recipe.
        calibration: the expert's; None for a recipe that needs none.
        checkpoint: its weights, each read at most twice, one in memory.
        progress: called with 1 after every group of linears.

    Raises:
        Hif4Error: a calibration is needed and there is none, or a budget that cannot be met.
    """
    if not recipe.needs_calibration:
        return Choices(plan)
    if calibration is None:
        raise Hif4Error(
            f"recipe {recipe.name} needs a calibration; make one with `hif4c calibrate` and give --calibration."
        )
    decided = {linear.decision.path: linear for linear in plan.linears}
    found = _Found()
    for group in calibration.groups.values():
        _choose_group(group, decided, recipe, calibration, checkpoint, found)
        progress(1)
    linears = _spend(plan.linears, recipe, calibration, found)
    notes = []
    if found.floored:
        notes.append(
            f"{sum(found.floored.values())} channels of {len(found.floored)} inputs have dead statistics, floored"
        )
    if found.alphas:
        used = sorted({alpha for alpha in found.alphas.values() if alpha is not None})
        without = sum(group not in found.masks for group in calibration.groups)
        notes.append(f"{len(found.masks)} masks with alpha {_span(used)}, {without} inputs without")
    if found.shifts:
        notes.append(f"{len(found.shifts)} inputs can be shifted by their channels' means")
    return Choices(
        replace(plan, linears=tuple(linears)),
        found.masks,
        found.mask_of,
        found.shifts,
        found.shift_of,
        found.alphas,
        found.errors,
        notes,
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


def _choose_group(
    group: Group,
    decided: Mapping[str, PlannedLinear],
    recipe: Recipe,
    calibration: ExpertCalibration,
    checkpoint: Checkpoint,
    found: _Found,
) -> None:
    readers = [path for path in group.readers if decided[path].decision.precision == Precision.W4A4]
    if not readers:
        return
    rows = calibration.rows(group.name).float()
    mean = None
    if recipe.shift and can_shift(group.name):
        mean = rows.mean(0)
        rows = rows - mean
        found.shifts[f"{group.name}.shift"] = mean
        found.shift_of |= dict.fromkeys(group.readers, f"{group.name}.shift")
    width = rotation_width(recipe, group.channels)
    mask = None
    if recipe.mask_percentile is not None or recipe.outlier_columns:
        mask = _choose_mask(group, readers, rows, mean is not None, width, recipe, calibration, checkpoint, found)
    if mask is not None:
        found.masks[f"{group.name}.mask"] = mask
        found.mask_of |= dict.fromkeys(readers, f"{group.name}.mask")
    # Errors are only needed where something is chosen by them, and for the report.
    rounded = round_trip(rows, mask, width)
    inverse = None if mask is None else inverse_mask(mask)
    kept = None if mask is None else rows * (mask == 0)
    for path in readers:
        weight = _some_rows(checkpoint, path)
        expected = rows @ weight.T
        both = rounded @ round_trip(weight, inverse, width).T
        if kept is not None:
            both = both + kept @ weight.T
        one = rows @ round_trip(weight, None, 0).T
        found.errors[path] = {"w4a4": relative_error(both, expected), "w4a16": relative_error(one, expected)}
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
    activation = rows.abs().amax(0) if shifted else calibration.sketch(group.name).percentile(percentile)
    name = f"{group.name}.mask"
    mask: torch.Tensor | None = None
    found.alphas[name] = None
    if recipe.mask_percentile is not None:
        largest = torch.zeros(group.channels)
        for path in readers:
            largest = torch.maximum(largest, checkpoint.read(f"{path}.weight").abs().amax(0).float())
            checkpoint.release(f"{path}.weight")
        if recipe.alpha == SEARCH:
            chosen = readers[:: -(-len(readers) // SEARCH_READERS)]
            choice = choose_mask(rows, [_some_rows(checkpoint, path) for path in chosen], activation, largest, width)
            mask, found.alphas[name], floored = choice.mask, choice.alpha, choice.floored
        else:
            mask, floored = channel_mask(activation, largest, float(recipe.alpha))
            found.alphas[name] = float(recipe.alpha)
        if floored:
            found.floored[name] = floored
    if recipe.outlier_columns:
        if recipe.outlier_columns > group.channels - UNIT:
            raise Hif4Error(
                f"recipe {recipe.name}: outlier_columns {recipe.outlier_columns} leaves too little of the "
                f"{group.channels} channels of {group.name}."
            )
        mask = torch.ones(group.channels) if mask is None else mask
        largest_left = (activation * mask).topk(recipe.outlier_columns).indices
        mask = mask.index_fill(0, largest_left, 0.0)
    return mask


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
    blocks = [linear for linear in result.values() if linear.decision.quantized]
    weights = sum(linear.in_features * linear.out_features for linear in blocks)
    columns = {path: int((found.masks[name] == 0).sum()) for path, name in found.mask_of.items()}
    used = sum(
        8 * (linear.plane_bytes + branch_bytes(linear, linear.decision.rank, columns.get(linear.decision.path, 0)))
        for linear in blocks
    )
    assert recipe.average_bits is not None
    if used > recipe.average_bits * weights:
        raise Hif4Error(
            f"recipe {recipe.name}: average_bits {recipe.average_bits} is less than the {used / weights:.2f} bits that "
            "4-bit weights and their side branches take; raise it, or lower rank and outlier_columns."
        )
    left = recipe.average_bits * weights - used

    def gain(linear: PlannedLinear) -> float:
        return found.errors.get(linear.decision.path, {}).get("w4a4", 0.0) / (linear.in_features * linear.out_features)

    for linear in sorted(blocks, key=gain, reverse=True):
        cost = 16 * linear.in_features * linear.out_features - 8 * linear.plane_bytes
        if cost <= left:
            left -= cost
            error = found.errors.get(linear.decision.path, {}).get("w4a4", 0.0)
            reason = f"recipe {recipe.name}: among the most sensitive (relative error {error:.1e} in 4 bits)"
            decision = replace(linear.decision, precision=Precision.HIGH, reason=reason, rank=0, rounding="nearest")
            result[linear.decision.path] = replace(linear, decision=decision, bytes_after=linear.bytes_before)


def _spend_multiplications(
    result: dict[str, PlannedLinear], recipe: Recipe, calibration: ExpertCalibration, found: _Found
) -> None:
    tokens = {
        path: int(calibration.sketch(group.name).count().sum())
        for group in calibration.groups.values()
        for path in group.readers
    }
    work = {
        path: linear.in_features * linear.out_features * tokens[path]
        for path, linear in result.items()
        if linear.decision.precision == Precision.W4A4 and path in found.errors
    }
    left = recipe.bf16_layers * sum(work.values())

    def gain(path: str) -> float:
        errors = found.errors[path]
        return (errors["w4a4"] - errors["w4a16"]) / work[path]

    for path in sorted(work, key=gain, reverse=True):
        if work[path] <= left:
            left -= work[path]
            reason = f"recipe {recipe.name}: bf16 activations, relative error {found.errors[path]['w4a4']:.1e} without"
            linear = result[path]
            result[path] = replace(linear, decision=replace(linear.decision, precision=Precision.W4A16, reason=reason))


def _span(values: Sequence[float]) -> str:
    return "-" if not values else f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
