"""The plan: one decision and its reason for every linear, from the config alone. Nothing expensive is run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

from hif4c.compiler.models import WanConfig
from hif4c.compiler.recipe import Recipe
from hif4c.compiler.wan_parameters import is_linear_weight, parameter_shapes
from hif4c.passes.mark_boundaries import BLOCK_PATTERN
from hif4c.passes.program import Decision, Precision
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import UNIT, packed_shapes

__all__ = ["ExpertPlan", "PlannedLinear", "make_plan", "packed_bytes"]

BOUNDARY_REASONS = {
    "condition_embedder.time_embedder": "boundary: timestep embedding",
    "condition_embedder.time_proj": "boundary: timestep modulation of every block",
    "condition_embedder.text_embedder": "boundary: text embedding",
    "proj_out": "boundary: output projection",
}


@dataclass(frozen=True)
class PlannedLinear:
    """A linear of the model with its decision; sizes in bytes are of weight and bias, before in the model's dtype."""

    decision: Decision
    in_features: int
    out_features: int
    bytes_before: int
    bytes_after: int

    @property
    def plane_bytes(self) -> int:
        """Bytes of the weight's planes, were it quantized."""
        codes, scales = packed_shapes((self.out_features, self.in_features))
        return math.prod(codes) + math.prod(scales)


def packed_bytes(linear: PlannedLinear, recipe: Recipe) -> int:
    """Bytes of a quantized weight: its planes, and its side branch in 16 bits: down [r, in], up [r + columns, out]."""
    rank = linear.decision.rank
    columns = recipe.outlier_columns if linear.decision.precision == Precision.W4A4 else 0
    return linear.plane_bytes + 2 * (rank * linear.in_features + (rank + columns) * linear.out_features)


@dataclass(frozen=True)
class ExpertPlan:
    """The plan of one expert.

    Attributes:
        linears: every linear, in module order.
        other_bytes: bytes of everything else (norms, tables, the patch embedding), which is copied.
    """

    linears: tuple[PlannedLinear, ...]
    other_bytes: int

    @property
    def decisions(self) -> list[Decision]:
        """The decisions alone, as the passes take them."""
        return [linear.decision for linear in self.linears]

    @property
    def bytes_before(self) -> int:
        """Bytes of the expert's weights in the model's dtype."""
        return self.other_bytes + sum(linear.bytes_before for linear in self.linears)

    @property
    def bytes_after(self) -> int:
        """Bytes of the expert's weights in the artifact, headers aside."""
        return self.other_bytes + sum(linear.bytes_after for linear in self.linears)


def make_plan(config: WanConfig, recipe: Recipe, dtype: torch.dtype = torch.bfloat16) -> ExpertPlan:
    """Decide the precision of every linear of one expert.

    Args:
        config: the transformer's config.
        recipe: what the blocks' linears become.
        dtype: dtype of the stored high-precision weights, for the sizes.

    Raises:
        Hif4Error: a glob of the recipe matches no linear of a block; its rank, outlier columns or rotation do not fit
            one; or its budget is less than 4-bit weights take.
    """
    shapes = parameter_shapes(config)
    paths = [name.removesuffix(".weight") for name in shapes if is_linear_weight(name)]
    _check_globs(recipe, [path for path in paths if BLOCK_PATTERN.match(path)])
    size = dtype.itemsize
    linears = []
    for path in paths:
        outputs, inputs = shapes[f"{path}.weight"]
        precision, reason = _decide(path, inputs, recipe)
        bias = outputs * size
        before = inputs * outputs * size + bias
        linear = PlannedLinear(Decision(path, precision, reason), inputs, outputs, before, before)
        linears.append(linear if precision == Precision.HIGH else _quantized(linear, bias, recipe))
    if recipe.average_bits is not None:
        _check_budget(recipe, recipe.average_bits, [linear for linear in linears if linear.decision.quantized])
    total = sum(math.prod(shape) for shape in shapes.values()) * size
    return ExpertPlan(tuple(linears), total - sum(linear.bytes_before for linear in linears))


def _quantized(linear: PlannedLinear, bias_bytes: int, recipe: Recipe) -> PlannedLinear:
    """With the recipe's rounding and side branch, and the bytes that planes and branch take."""
    _check_fit(linear, recipe)
    decision = replace(linear.decision, rank=recipe.rank, rounding=recipe.rounding)
    linear = replace(linear, decision=decision)
    return replace(linear, bytes_after=packed_bytes(linear, recipe) + bias_bytes)


def _check_fit(linear: PlannedLinear, recipe: Recipe) -> None:
    path, channels = linear.decision.path, linear.in_features
    if recipe.rank > min(channels, linear.out_features):
        raise Hif4Error(
            f"recipe {recipe.name}: rank {recipe.rank} is more than {path} has, a weight of "
            f"{linear.out_features} x {channels}."
        )
    if linear.decision.precision != Precision.W4A4:
        return
    if isinstance(recipe.hadamard, int) and recipe.hadamard and channels % recipe.hadamard:
        raise Hif4Error(
            f"recipe {recipe.name}: hadamard {recipe.hadamard} does not divide the {channels} input channels of "
            f'{path}; choose a width that does, or "largest".'
        )
    if recipe.outlier_columns > channels - UNIT:
        raise Hif4Error(
            f"recipe {recipe.name}: outlier_columns {recipe.outlier_columns} leaves less than {UNIT} of the {channels} "
            f"input channels of {path}; choose at most {channels - UNIT}."
        )


def _check_budget(recipe: Recipe, average_bits: float, linears: Sequence[PlannedLinear]) -> None:
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    used = 8 * sum(packed_bytes(linear, recipe) for linear in linears)
    if used > average_bits * weights:
        raise Hif4Error(
            f"recipe {recipe.name}: average_bits {average_bits:g} is less than the {used / weights:.2f} bits that "
            "4-bit weights and their side branches take; raise it, or lower rank and outlier_columns."
        )


def _decide(path: str, in_features: int, recipe: Recipe) -> tuple[str, str]:
    for prefix, reason in BOUNDARY_REASONS.items():
        if path == prefix or path.startswith(prefix + "."):
            return Precision.HIGH, reason
    if not BLOCK_PATTERN.match(path):
        return Precision.HIGH, "boundary: not inside a transformer block"
    for glob in recipe.keep_high:
        if fnmatchcase(path, glob):
            return Precision.HIGH, f"recipe {recipe.name} keeps {glob}"
    if in_features % UNIT:
        return Precision.HIGH, f"in_features {in_features} is not a multiple of {UNIT}"
    return recipe.precision, f"block linear, recipe {recipe.name}"


def _check_globs(recipe: Recipe, paths: Sequence[str]) -> None:
    for glob in recipe.keep_high:
        if not any(fnmatchcase(path, glob) for path in paths):
            raise Hif4Error(
                f"recipe {recipe.name}: keep_high {glob!r} matches no linear of a block; "
                f"they are called like {paths[0] if paths else 'blocks.0.attn1.to_q'}."
            )
