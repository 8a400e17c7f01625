import math
from dataclasses import replace

import pytest
import torch

from hif4c.compiler import synthetic_ladder
from hif4c.compiler.masks import channel_mask
from hif4c.compiler.models import load_builtin
from hif4c.compiler.recipe import Recipe, builtin_recipes
from hif4c.compiler.sketch import ChannelSketch
from hif4c.compiler.synthetic import KINDS, synthetic_layer
from hif4c.compiler.synthetic_ladder import LayerFigures, SyntheticLayer, layers_of, measure_layer
from hif4c.runtime.format import dequantize, quantize
from hif4c.runtime.rotation import block_hadamard

WIDTH, OUT, TOKENS, HELD_OUT = 256, 128, 1024, 512
RECIPES = builtin_recipes()
CALIBRATED = [name for name, recipe in RECIPES.items() if recipe.needs_calibration]


def measure(kind: str, *recipes: Recipe, outputs: int = OUT, seed: int = 0) -> LayerFigures:
    return measure_layer(
        SyntheticLayer(kind, WIDTH, OUT), recipes, outputs=outputs, tokens=TOKENS, held_out=HELD_OUT, seed=seed
    )


@pytest.fixture(scope="module")
def figures() -> dict[str, LayerFigures]:
    return {kind: measure(kind, *RECIPES.values()) for kind in KINDS}


def round_trip(x: torch.Tensor) -> torch.Tensor:
    return dequantize(*quantize(x.contiguous()), x.shape[1], torch.float64)


def sqnr_of(x: torch.Tensor, weight: torch.Tensor, expected: torch.Tensor) -> float:
    """Of both operands rounded to HiF4, in dB, in fp64."""
    noise = round_trip(x) @ round_trip(weight).T - expected
    return 10 * math.log10(float(expected.square().sum() / noise.square().sum()))


@pytest.mark.parametrize("kind", KINDS)
def test_every_recipe_has_its_figures(figures: dict[str, LayerFigures], kind: str):
    found = {item.recipe: item for item in figures[kind].recipes}
    assert found.keys() == RECIPES.keys()
    for name, item in found.items():
        # HiF4 rounds a Gaussian operand to some 21 dB; nothing here does worse than two such roundings and an outlier
        # in a unit of the input, or better than an input all whose energy lies in a constant.
        assert 12 < item.sqnr < 50
        branch = RECIPES[name].rank * 16 * (1 / WIDTH + 1 / OUT)
        assert item.bits == pytest.approx(4.5 + branch)
        assert item.rounding.keys() == ({"search", "gptq"} if RECIPES[name].rounding == "gptq" else set())


def test_what_is_calibrated_helps_where_one_channel_is_massive(figures: dict[str, LayerFigures]):
    found = {item.recipe: item.sqnr for item in figures["attn2.q"].recipes}
    for name in CALIBRATED:
        assert found[name] > found["rtn"] + 2  # measured: 3.2 or more
    assert found["best"] > max(found["smooth-max"], found["tail-aware"], found["rotate"]) + 2  # measured: 10


@pytest.mark.parametrize("kind", KINDS)
def test_no_rounding_is_worse_than_plain_on_its_objective(figures: dict[str, LayerFigures], kind: str):
    for item in figures[kind].recipes:
        for figure in item.rounding.values():
            assert figure.worse == 0
            assert figure.gain > 0.3  # measured: .5 or more by the search, 2 or more by GPTQ


def test_a_figure_is_of_held_out_tokens_and_spaced_outputs():
    """By formulas of their own, in fp64: the kernels add the same products in fp32."""
    x, weight = (item.float() for item in synthetic_layer("attn2.q", TOKENS + HELD_OUT, WIDTH, OUT, 3))
    known, held_out, some = x[:TOKENS], x[TOKENS:], weight[::4].contiguous()
    sketch = ChannelSketch(WIDTH, 1)
    sketch.update(known, 0)
    mask, _ = channel_mask(sketch.percentile(99), weight.abs().amax(0), 0.25)
    # As many rows as a calibration keeps.
    mean = known[:: TOKENS // 256].mean(0)
    centred = (held_out - mean).bfloat16().float()
    expected = held_out.double() @ some.double().T
    without = expected - mean.double() @ some.double().T
    wanted = {
        Recipe("plain"): sqnr_of(held_out, some, expected),
        Recipe("mask", mask_percentile=99.0, alpha=0.25): sqnr_of(held_out * mask, some / mask, expected),
        Recipe("rotation", hadamard=64): sqnr_of(block_hadamard(held_out, 64), block_hadamard(some, 64), expected),
        # The bias gives the mean's product back, so noise is what it was and the signal is the whole output.
        Recipe("shift", shift=True): sqnr_of(centred, some, without)
        + 10 * math.log10(float(expected.square().sum() / without.square().sum())),
    }
    found = measure("attn2.q", *wanted, outputs=OUT // 4, seed=3).recipes
    for item, value in zip(found, wanted.values(), strict=True):
        assert item.sqnr == pytest.approx(value, abs=0.01)


def test_the_input_of_ffn_2_cannot_be_shifted():
    plain, shifted = measure("ffn.2", Recipe("plain"), Recipe("shift", shift=True)).recipes
    assert shifted.sqnr == plain.sqnr


def test_a_branch_is_that_of_the_whole_weight(monkeypatch: pytest.MonkeyPatch):
    """Rank 16 of some rows alone would take off more of them than it does of a layer."""
    packed = []

    def make_planes(source, tensor, program, statistics):
        packed.append(len(tensor))
        return original(source, tensor, program, statistics)

    original = synthetic_ladder.make_planes
    monkeypatch.setattr(synthetic_ladder, "make_planes", make_planes)
    recipe = Recipe("branch", rank=16)
    whole, some = (measure("attn1.q", recipe, outputs=count).recipes[0] for count in (OUT, 8))
    measure("attn1.q", Recipe("plain"), outputs=8)
    assert packed == [OUT, OUT, 8]
    assert some.sqnr == pytest.approx(whole.sqnr, abs=1)  # 8 outputs are as good as all
    assert some.bits == whole.bits


def test_what_is_decided_among_layers_or_steps_is_left_out():
    plain = Recipe("plain", mask_percentile=99.9)
    budgets = replace(
        plain, bf16_layers=1.0, bf16_steps=0.5, average_bits=16.0, keep_high=("blocks.0.*",), name="budgets"
    )
    first, second = measure("attn1.q", plain, budgets).recipes
    assert replace(second, recipe="plain") == first


def test_scale_search_by_the_energy_of_the_input():
    plain, searched = measure("ffn.0", Recipe("plain"), Recipe("search", rounding="search")).recipes
    assert searched.sqnr > plain.sqnr + 0.2  # measured: .5; the input's rounding is half of the noise


def test_layers_have_the_sizes_of_the_model():
    layers = layers_of(next(iter(load_builtin("Wan2.2-T2V-A14B").experts.values())))
    assert [(item.kind, item.in_features, item.out_features) for item in layers] == [
        ("attn1.q", 5120, 5120), ("attn1.out", 5120, 5120), ("attn2.q", 5120, 5120), ("attn2.out", 5120, 5120),
        ("ffn.0", 5120, 13824), ("ffn.2", 13824, 5120),
    ]  # fmt: skip
    assert {item.kind for item in layers} == set(KINDS)


def test_more_outputs_than_there_are():
    with pytest.raises(ValueError, match="129 outputs of a layer that has 128"):
        measure("attn1.q", Recipe("plain"), outputs=OUT + 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_rounding_is_worse_at_the_width_of_a14b(kind: str):
    layer = SyntheticLayer(kind, 5120, 64)
    found = measure_layer(layer, [RECIPES["gptq"], RECIPES["best"]], outputs=64, tokens=1024, held_out=512)
    for item in found.recipes:
        assert {name: figure.worse for name, figure in item.rounding.items()} == {"search": 0, "gptq": 0}
        assert item.rounding["search"].gain > 0.3
        assert item.rounding["gptq"].gain > 3  # fewer tokens than channels: most errors can hide
