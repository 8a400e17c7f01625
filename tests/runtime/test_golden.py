import copy

import pytest
import torch

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.golden import FLIP_MARGIN, Replay, make_golden, replay
from hif4c.runtime.transformer import CompiledTransformer, load


@pytest.fixture(scope="module")
def model(artifacts):
    return load(artifacts("t2v", "rtn"))


@pytest.fixture(scope="module")
def golden(model):
    return make_golden(model)


def with_tensors(model, change):
    """The same program on changed weights."""
    tensors = {
        item.name: value.clone() for item, value in zip(model.graph.tensors, model.executor.tensors, strict=True)
    }
    change(tensors)
    return CompiledTransformer(model.graph, tensors, model.config, model.dtype, model.expand_timesteps)


def test_where_it_was_made_it_is_equal_to_the_bit(model, golden):
    result = replay(model, golden)
    assert result == Replay(0, 0.0, 0.0, float(golden["flip_distance"]))
    assert result.passed
    assert 0 < result.flip_distance < 0.1


def test_it_is_the_same_every_time(model, golden):
    again = make_golden(model)
    assert again.keys() == golden.keys()
    for name, value in golden.items():
        assert torch.equal(again[name], value), name


def test_it_holds_one_linear_and_one_call(model, golden):
    assert set(golden) == {
        "hidden_states", "timestep", "encoder_hidden_states", "sample", "flip_distance",
        "linear.input", "linear.codes", "linear.scales", "linear.output",
    }  # fmt: skip
    assert golden["sample"].shape == golden["hidden_states"].shape
    assert torch.equal(
        model(golden["hidden_states"], golden["timestep"], golden["encoder_hidden_states"]).sample, golden["sample"]
    )
    codes, scales = torch.ops.hif4.quantize(golden["linear.input"])
    assert torch.equal(codes, golden["linear.codes"])
    assert torch.equal(scales, golden["linear.scales"])


@pytest.mark.parametrize(("recipe", "variant"), [("weight-only", "t2v"), ("rtn", "ti2v")])
def test_other_kinds_of_programs(recipe, variant, artifacts):
    """Without quantized activations there are no codes to compare; with expanded timesteps there is one a token."""
    other = load(artifacts(variant, recipe))
    made = make_golden(other)
    assert ("linear.codes" in made) == (recipe == "rtn")
    assert replay(other, made).passed
    if recipe == "weight-only":
        assert replay(other, made).linear_error is None


def test_last_bit_differences_pass(model, golden):
    """What another machine may do: here all inputs of the call move by an ulp, the very yardstick."""
    moved = dict(golden)
    moved["hidden_states"] = torch.nextafter(golden["hidden_states"], torch.tensor(-torch.inf).bfloat16())
    result = replay(model, moved)
    assert 0 < result.distance < FLIP_MARGIN * result.flip_distance
    assert result.passed


def swap_nibbles(codes):
    codes.copy_((codes >> 4) | (codes << 4))


def swap_levels(scales):
    """E1_16 bits taken from the wrong byte."""
    scales.copy_(scales[..., [0, 1, 3, 2]])


def double_units(scales):
    scales[..., 0].add_(4)


def forget(bias):
    bias.zero_()


@pytest.mark.parametrize(
    ("ending", "change"),
    [("codes", swap_nibbles), ("scales", swap_levels), ("scales", double_units), ("bias", forget)],
)
def test_kernels_that_read_the_planes_wrongly_do_not_pass(model, golden, ending, change):
    """What a wrong kernel does, it does to every linear. (One wrong matrix of a few hundred is for the hashes.)"""

    def break_all(tensors):
        for name, value in tensors.items():
            if name.startswith("blocks.") and name.endswith(ending):
                change(value)

    result = replay(with_tensors(model, break_all), golden)
    assert not result.passed, result
    assert result.linear_error > 1e-2


def test_a_nan_in_one_unit_does_not_pass(model, golden):
    name = "blocks.1.ffn.net.0.proj.weight.scales"
    result = replay(with_tensors(model, lambda tensors: tensors[name][0, 0, 0].fill_(0xFF)), golden)
    assert result.distance == 1.0
    assert not result.passed


def test_a_wrong_code_or_output_of_the_linear_does_not_pass(model, golden):
    for name, field in (("linear.codes", "codes_differ"), ("linear.scales", "codes_differ")):
        changed = {**golden, name: golden[name].clone()}
        changed[name].view(-1)[0] ^= 1
        result = replay(model, changed)
        assert getattr(result, field) == 1
        assert not result.passed
    changed = {**golden, "linear.output": golden["linear.output"] * 1.01}
    assert replay(model, changed).linear_error > 1e-3
    assert not replay(model, changed).passed


def test_nan_never_passes(model, golden):
    changed = copy.copy(golden)
    changed["sample"] = golden["sample"].clone()
    changed["sample"].view(-1)[0] = torch.nan
    assert replay(model, changed).distance == 1.0
    assert not replay(model, changed).passed


def test_an_incomplete_golden_file(model, golden):
    for name in golden:
        with pytest.raises(Hif4Error, match=rf"the golden file lacks '{name}'"):
            replay(model, {key: value for key, value in golden.items() if key != name})
