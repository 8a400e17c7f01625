"""What recipes leave of synthetic layers: output SQNR on tokens that were held out, at the widths of a real model.

Each layer goes the way that a compile takes: `choose` decides mask, shift and rotation from the sketch and the rows of
the calibration tokens, `make_planes` packs the weight with their Hessian, the shipped kernels compute the output. What
is missing is the rest of the model: nothing stands before a layer, so its mask is never folded, and what a recipe
decides among layers or steps (`average_bits`, `bf16_layers`, `bf16_steps`, `keep_high`) is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from hif4c.compiler.calibration import ExpertCalibration, Group
from hif4c.compiler.calibration_writer import MAX_ROWS
from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.choose import Choices, choose, rotation_width
from hif4c.compiler.linear_error import linear_sqnr
from hif4c.compiler.masks import rotated, round_trip
from hif4c.compiler.models import WanConfig
from hif4c.compiler.output_error import error_energy
from hif4c.compiler.plan import ExpertPlan, PlannedLinear, packed_bytes
from hif4c.compiler.planes import InputStatistics, Planes, make_planes
from hif4c.compiler.recipe import Recipe
from hif4c.compiler.scale_search import search_scales
from hif4c.compiler.sketch import ChannelSketch
from hif4c.compiler.synthetic import synthetic_layer
from hif4c.passes.program import Decision, Precision, Program, TensorSource, inverse_mask, plane_source
from hif4c.runtime.format import dequantize, packed_shapes, quantize

__all__ = ["LayerFigures", "RecipeFigures", "RoundingFigures", "SyntheticLayer", "layers_of", "measure_layer"]

PATHS: Mapping[str, str] = {
    "attn1.q": "blocks.0.attn1.to_q",
    "attn1.out": "blocks.0.attn1.to_out.0",
    "attn2.q": "blocks.0.attn2.to_q",
    "attn2.out": "blocks.0.attn2.to_out.0",
    "ffn.0": "blocks.0.ffn.net.0.proj",
    "ffn.2": "blocks.0.ffn.net.2",
}
"""Kind of layer -> where it stands in a model."""

ROWS = 2048
"""Tokens that a Hessian is summed over at once."""


@dataclass(frozen=True)
class SyntheticLayer:
    """A linear of a model: its kind (of `synthetic.KINDS`) and its sizes."""

    kind: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class RoundingFigures:
    """A rounding beside plain rounding, on the objective that it minimises over the calibration tokens.

    Attributes:
        gain: how much less noise it leaves in all, in dB.
        worse: outputs for which it leaves more.
    """

    gain: float
    worse: int


@dataclass(frozen=True)
class RecipeFigures:
    """One recipe on one layer.

    Attributes:
        recipe: its name.
        sqnr: of the output on held-out tokens, in dB.
        bits: that a weight of the model's layer takes, side branch included.
        alpha: exponent of its mask, None without one.
        rounding: of a recipe with GPTQ and no side branch: "search", on the energy of the channels, and "gptq", on the
            Hessian; empty for others.
    """

    recipe: str
    sqnr: float
    bits: float
    alpha: float | None = None
    rounding: Mapping[str, RoundingFigures] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerFigures:
    """Recipes on one layer: calibrated on `tokens`, measured on `held_out` others and on `outputs` of its outputs."""

    layer: SyntheticLayer
    outputs: int
    tokens: int
    held_out: int
    seed: int
    recipes: tuple[RecipeFigures, ...]


def layers_of(config: WanConfig) -> tuple[SyntheticLayer, ...]:
    """One layer of every kind, with the sizes of a model, in the order of a block."""
    width, inner = config.inner_dim, config.ffn_dim
    sizes = {"ffn.0": (width, inner), "ffn.2": (inner, width)}
    return tuple(SyntheticLayer(kind, *sizes.get(kind, (width, width))) for kind in PATHS)


def measure_layer(
    layer: SyntheticLayer,
    recipes: Sequence[Recipe],
    *,
    outputs: int,
    tokens: int,
    held_out: int,
    seed: int = 0,
    progress: Callable[[int], None] = lambda count: None,
) -> LayerFigures:
    """Measure recipes on one layer; all of them see the same weight and tokens.

    With GPTQ, up to 16 K^2 bytes are in memory beside some copies of the tokens: 3 GB for K = 13824.

    Args:
        layer: what to make up.
        recipes: what to compare.
        outputs: how many are measured, evenly spaced; only a low-rank branch is made from the whole weight.
        tokens: that the recipes are calibrated on; a multiple of 16 keeps the calls of attn2.out apart.
        held_out: tokens of the same distribution that they are measured on.
        seed: of everything.
        progress: called with 1 after every recipe.
    """
    if not 0 < outputs <= layer.out_features:
        raise ValueError(f"{outputs} outputs of a layer that has {layer.out_features}")
    x, weight = synthetic_layer(layer.kind, tokens + held_out, layer.in_features, layer.out_features, seed)
    rows = torch.arange(outputs) * layer.out_features // outputs
    bench = _Bench(layer, weight, rows, _Input(PATHS[layer.kind], x[:tokens]), x[tokens:])
    figures = []
    for recipe in recipes:
        figures.append(bench.measure(recipe))
        progress(1)
    return LayerFigures(layer, outputs, tokens, held_out, seed, tuple(figures))


class _Input:
    """What `choose` asks of a calibration: one input, read by one linear."""

    name = "synthetic"

    def __init__(self, path: str, x: torch.Tensor) -> None:
        self.x = x
        self.groups = {path: Group((path,), x.shape[1])}
        self._sketch = ChannelSketch(x.shape[1], 1)
        self._sketch.update(x, 0)
        kept = min(len(x), MAX_ROWS)
        self._rows = x[torch.arange(kept) * len(x) // kept]

    def sketch(self, group: str) -> ChannelSketch:
        return self._sketch

    def rows(self, group: str) -> torch.Tensor:
        return self._rows


@dataclass(frozen=True)
class _Weights:
    """What `choose` asks of a checkpoint: one weight."""

    weight: torch.Tensor

    def read(self, name: str) -> torch.Tensor:
        return self.weight

    def prefetch(self, name: str) -> None:
        pass

    def release(self, name: str) -> None:
        pass


@dataclass(frozen=True)
class _Bench:
    """A layer with its calibration tokens, and the outputs and tokens that it is measured on."""

    layer: SyntheticLayer
    weight: torch.Tensor
    rows: torch.Tensor
    known: _Input
    held_out: torch.Tensor

    @property
    def path(self) -> str:
        return PATHS[self.layer.kind]

    @property
    def some(self) -> torch.Tensor:
        """The rows of the weight that are measured."""
        return self.weight[self.rows]

    def measure(self, recipe: Recipe) -> RecipeFigures:
        recipe = replace(recipe, average_bits=None, bf16_layers=0.0, bf16_steps=0.0, keep_high=())
        linear = self._planned(recipe)
        choices = choose(
            ExpertPlan((linear,), 0),
            recipe,
            cast(ExpertCalibration, self.known),
            cast(Checkpoint, _Weights(self.weight)),
        )
        decision = _decided(choices, recipe, self.layer.in_features)
        mask = None if decision.mask is None else choices.masks[decision.mask]
        shift = None if decision.shift is None else choices.shifts[decision.shift]
        statistics = None if decision.rounding == "nearest" else self._statistics(decision, mask, shift)
        planes = self._pack(decision, choices, statistics)
        sqnr = linear_sqnr(decision, self.held_out.float(), self.some.float(), planes, mask, shift)
        weights = self.layer.in_features * self.layer.out_features
        return RecipeFigures(
            recipe.name,
            sqnr,
            8 * packed_bytes(replace(linear, decision=decision), recipe) / weights,
            None if decision.mask is None else choices.alphas[decision.mask],
            self._compare(decision, mask, planes, statistics),
        )

    def _planned(self, recipe: Recipe) -> PlannedLinear:
        decision = Decision(self.path, recipe.precision, "synthetic", rank=recipe.rank, rounding=recipe.rounding)
        size = 2 * self.layer.in_features * self.layer.out_features
        return PlannedLinear(decision, self.layer.in_features, self.layer.out_features, size, size)

    def _statistics(self, decision: Decision, mask: torch.Tensor | None, shift: torch.Tensor | None) -> InputStatistics:
        """As a compile gathers them: GPTQ's from all tokens, as the weight meets them; others' from the rows."""
        if decision.rounding != "gptq":
            rows = _without(self.known.rows(self.path), shift)
            return InputStatistics(rotated(rows, mask, decision.hadamard).square().mean(0), len(rows))
        meet = round_trip if decision.precision == Precision.W4A4 else rotated
        channels = self.layer.in_features
        total = torch.zeros(channels, channels)
        for part in self.known.x.split(ROWS):
            met = meet(_without(part, shift), mask, decision.hadamard)
            total.addmm_(met.T, met)
        return InputStatistics(total.diagonal(), len(self.known.x), total)

    def _pack(self, decision: Decision, choices: Choices, statistics: InputStatistics | None) -> Planes:
        """Planes of the measured outputs; rows are rounded each by itself, but share a low-rank branch's factors."""
        tensor = self.weight if decision.rank else self.some
        name, shape = f"{self.path}.weight", tuple(tensor.shape)
        spec = TensorSource(name, tensor.dtype, shape, source=name)
        source = plane_source(spec, "codes", torch.uint8, packed_shapes(shape)[0], decision)
        program = Program(fx.Graph(), {}, [], FakeTensorMode(), masks=dict(choices.masks))
        planes = make_planes(source, tensor, program, statistics)
        if decision.rank:
            planes |= {plane: planes[plane][self.rows] for plane in ("codes", "scales")}
            planes["up"] = planes["up"][:, self.rows].contiguous()
        return planes

    def _compare(
        self, decision: Decision, mask: torch.Tensor | None, planes: Planes, statistics: InputStatistics | None
    ) -> dict[str, RoundingFigures]:
        """The roundings of the weight that was rounded by GPTQ, each with plain rounding."""
        if statistics is None or statistics.hessian is None or "up" in planes:
            return {}
        hessian = statistics.hessian
        inverse = None if mask is None else inverse_mask(mask)
        target = rotated(self.some, inverse, decision.hadamard).contiguous()
        plain = quantize(target)
        searched = search_scales(target, statistics.energy)
        found = planes["codes"], planes["scales"]
        energy = statistics.energy.double()
        return {
            "search": _beside(*(_channel_error(target, item, energy) for item in (searched, plain))),
            "gptq": _beside(*(error_energy(target, item, hessian) for item in (found, plain))),
        }


def _decided(choices: Choices, recipe: Recipe, channels: int) -> Decision:
    """The one linear's decision, as the passes complete it."""
    decision = choices.plan.linears[0].decision
    width = rotation_width(recipe, channels) if decision.precision == Precision.W4A4 else 0
    return replace(
        decision,
        mask=choices.mask_of.get(decision.path),
        shift=choices.shift_of.get(decision.path),
        hadamard=width,
    )


def _without(x: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    """x - shift as it reaches the linear, rounded to bf16; float32."""
    return x.float() if shift is None else (x.float() - shift).to(torch.bfloat16).float()


def _channel_error(
    target: torch.Tensor, planes: tuple[torch.Tensor, torch.Tensor], energy: torch.Tensor
) -> torch.Tensor:
    """The objective of the scale search of every row, fp64 [N]."""
    error = target.double() - dequantize(*planes, target.shape[1], torch.float64)
    return error.square() @ energy


def _beside(found: torch.Tensor, plain: torch.Tensor) -> RoundingFigures:
    gain = math.inf if not float(found.sum()) else 10 * math.log10(float(plain.sum() / found.sum()))
    return RoundingFigures(gain, int((found > plain).sum()))
