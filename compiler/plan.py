"""The plan: one decision and its reason for every linear, from the config alone. Nothing expensive is run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from hif4c.compiler.capture import build_transformer
from hif4c.compiler.models import WanConfig
from hif4c.compiler.recipe import Recipe
from hif4c.passes.mark_boundaries import BLOCK_PATTERN
from hif4c.passes.program import Decision, Precision
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import UNIT, packed_shapes

__all__ = ["ExpertPlan", "PlannedLinear", "branch_bytes", "make_plan"]

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


def branch_bytes(linear: PlannedLinear, rank: int, columns: int) -> int:
    """Bytes of a side branch in bf16: down [rank, in], up [rank + columns, out]."""
    return 2 * (rank * linear.in_features + (rank + columns) * linear.out_features)


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
        config: the transformer's config; the module is built from it without weights.
        recipe: what the blocks' linears become.
        dtype: dtype of the stored high-precision weights, for the sizes.

    Raises:
        Hif4Error: a glob of the recipe matches no linear of a block.
    """
    model = build_transformer(config, dtype)
    paths = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    _check_globs(recipe, [path for path in paths if BLOCK_PATTERN.match(path)])
    size = dtype.itemsize
    linears = []
    for path, module in paths.items():
        precision, reason = _decide(path, module.in_features, recipe)
        bias = 0 if module.bias is None else module.bias.numel() * size
        before = module.weight.numel() * size + bias
        linear = PlannedLinear(
            Decision(path, precision, reason), module.in_features, module.out_features, before, before
        )
        linears.append(linear if precision == Precision.HIGH else _quantized(linear, bias, recipe))
    total = sum(parameter.numel() for parameter in model.parameters()) * size
    return ExpertPlan(tuple(linears), total - sum(linear.bytes_before for linear in linears))


def _quantized(linear: PlannedLinear, bias_bytes: int, recipe: Recipe) -> PlannedLinear:
    """With the recipe's rounding and side branch, and the bytes that planes and branch take."""
    if recipe.rank > min(linear.in_features, linear.out_features):
        raise Hif4Error(
            f"recipe {recipe.name}: rank {recipe.rank} is more than {linear.decision.path} has, a weight of "
            f"{linear.out_features} x {linear.in_features}."
        )
    decision = replace(linear.decision, rank=recipe.rank, rounding=recipe.rounding)
    columns = recipe.outlier_columns if decision.precision == Precision.W4A4 else 0
    after = linear.plane_bytes + branch_bytes(linear, recipe.rank, columns) + bias_bytes
    return replace(linear, decision=decision, bytes_after=after)


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
