import contextlib

import pytest
import torch

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.golden import FLIP_MARGIN, LINEAR_ERROR, Replay, make_golden, replay
from hif4c.runtime.transformer import CompiledTransformer, load

BLOCK_LINEARS = (
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v",
    "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2",
)  # fmt: skip
LINEARS = [f"blocks.{block}.{name}" for block in range(2) for name in BLOCK_LINEARS]


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
    assert result == Replay(0, len(LINEARS), 0.0, "", 0.0, float(golden["flip_distance"]))
    assert result.identical
    assert result.passed
    assert 0 < result.flip_distance < 0.1


def test_it_is_the_same_every_time(model, golden):
    again = make_golden(model)
    assert again.keys() == golden.keys()
    for name, value in golden.items():
        assert torch.equal(again[name], value), name


def test_it_holds_one_call_one_quantized_row_and_every_linear_alone(model, golden):
    assert set(golden) == {
        "hidden_states", "timestep", "encoder_hidden_states", "sample", "flip_distance",
        "row", "row.codes", "row.scales", *(f"linear.{path}" for path in LINEARS),
    }  # fmt: skip
    assert golden["sample"].shape == golden["hidden_states"].shape
    assert torch.equal(
        model(golden["hidden_states"], golden["timestep"], golden["encoder_hidden_states"]).sample, golden["sample"]
    )
    codes, scales = torch.ops.hif4.quantize(golden["row"])
    assert torch.equal(codes, golden["row.codes"])
    assert torch.equal(scales, golden["row.scales"])
    for path in LINEARS:
        assert golden[f"linear.{path}"].dtype == torch.float32
        assert golden[f"linear.{path}"].abs().sum() > 0


@pytest.mark.parametrize(("recipe", "variant"), [("weight-only", "t2v"), ("rotate", "t2v"), ("rtn", "ti2v")])
def test_other_kinds_of_programs(recipe, variant, artifacts):
    """Without quantized activations, with a rotation, and with a timestep a token: all linears are replayed."""
    other = load(artifacts(variant, recipe))
    result = replay(other, make_golden(other))
    assert result.identical
    assert result.passed
    assert result.linears == len(LINEARS)


def test_last_bit_differences_pass(model, golden):
    """What another machine may do: here all inputs of the call move by an ulp, the very yardstick."""
    moved = dict(golden)
    moved["hidden_states"] = torch.nextafter(golden["hidden_states"], torch.tensor(-torch.inf).bfloat16())
    result = replay(model, moved)
    assert 0 < result.distance < FLIP_MARGIN * result.flip_distance
    assert result.passed
    assert not result.identical


def zero(codes):
    codes.zero_()


def flip_signs(codes):
    codes.bitwise_xor_(0x88)


def swap_nibbles(codes):
    codes.copy_((codes >> 4) | (codes << 4))


def swap_levels(scales):
    """E1_16 bits taken from the wrong byte."""
    scales.copy_(scales[..., [0, 1, 3, 2]])


def double_units(scales):
    scales[..., 0].add_(4)


def forget(bias):
    bias.zero_()


CHANGES = [
    ("weight.codes", zero), ("weight.codes", flip_signs), ("weight.codes", swap_nibbles),
    ("weight.scales", swap_levels), ("weight.scales", double_units), ("bias", forget),
]  # fmt: skip


@pytest.mark.parametrize("recipe", ["rtn", "weight-only"])
@pytest.mark.parametrize(("ending", "change"), CHANGES, ids=[change.__name__ for _, change in CHANGES])
def test_one_wrong_linear_of_all_does_not_pass_and_is_named(recipe, ending, change, artifacts):
    """Each of them, not one of N: the replay of the whole expert alone would let some through."""
    right = load(artifacts("t2v", recipe))
    expected = make_golden(right)
    for path in LINEARS:
        wrong = with_tensors(right, lambda tensors, path=path: change(tensors[f"{path}.{ending}"]))
        result = replay(wrong, expected)
        assert not result.passed, (path, result)
        assert result.worst == path
        assert result.linear_error > 1e-2


def test_one_wrong_code_is_noticed(model, golden):
    """The smallest damage there is: one weight of 16384, by one step."""

    def step(tensors):
        tensors["blocks.1.attn2.to_v.weight.codes"][5, 7] ^= 1

    result = replay(with_tensors(model, step), golden)
    assert result.worst == "blocks.1.attn2.to_v"
    assert not result.passed


@pytest.mark.parametrize("path", ["blocks.0.attn1.to_q", "blocks.1.ffn.net.0.proj"])
def test_a_nan_in_one_unit_does_not_pass(model, golden, path):
    name = f"{path}.weight.scales"
    result = replay(with_tensors(model, lambda tensors: tensors[name][0, 0, 0].fill_(0xFF)), golden)
    assert result.linear_error == result.distance == torch.inf
    assert result.worst == path
    assert not result.passed


def test_what_was_recorded_is_compared(model, golden):
    for name in ("row.codes", "row.scales"):
        changed = {**golden, name: golden[name].clone()}
        changed[name].view(-1)[0] ^= 1
        result = replay(model, changed)
        assert result.codes_differ == 1
        assert not result.passed
    name = "linear.blocks.0.ffn.net.2"
    result = replay(model, {**golden, name: golden[name] * (1 + 3 * LINEAR_ERROR)})
    assert result.worst == "blocks.0.ffn.net.2"
    assert not result.passed
    result = replay(model, {**golden, "sample": -golden["sample"]})
    assert result.distance == pytest.approx(2)
    assert not result.passed


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["sample", "linear.blocks.0.attn1.to_q"])
def test_nan_never_passes(model, golden, name, value):
    changed = {**golden, name: golden[name].clone()}
    changed[name].view(-1)[0] = value
    result = replay(model, changed)
    assert torch.inf in (result.distance, result.linear_error)
    assert not result.passed


def test_flip_distance_that_is_nan_does_not_pass(model, golden):
    changed = {**golden, "flip_distance": torch.tensor([torch.nan]), "sample": -golden["sample"]}
    assert not replay(model, changed).passed


def test_zeros_that_are_equal_are_equal(model):
    """A linear of zeros (an untrained output projection, say) has a norm of 0, which nothing may be divided by."""

    def clear(tensors):
        for ending in ("weight.codes", "bias"):
            tensors[f"blocks.0.ffn.net.2.{ending}"].zero_()

    cleared = with_tensors(model, clear)
    expected = make_golden(cleared)
    assert not expected["linear.blocks.0.ffn.net.2"].any()
    assert replay(cleared, expected).identical
    result = replay(model, {**expected, "sample": torch.zeros_like(expected["sample"])})
    assert result.linear_error == result.distance == torch.inf
    assert not result.passed


@pytest.mark.parametrize("name", ["proj_out.bias", "blocks.1.attn1.to_k.bias", "scale_shift_table"])
def test_an_expert_that_gives_nan_is_not_recorded(model, name):
    broken = with_tensors(model, lambda tensors: tensors[name].fill_(torch.nan))
    with pytest.raises(Hif4Error, match=r"gives NaN or infinite values on the golden inputs; check the checkpoint"):
        make_golden(broken)


def test_an_incomplete_golden_file(model, golden):
    for name in golden:
        with pytest.raises(Hif4Error, match=rf"the golden file lacks '{name}'"):
            replay(model, {key: value for key, value in golden.items() if key != name})


HOSTILE = [
    torch.zeros(0), torch.zeros(1), torch.zeros(7, dtype=torch.uint8), torch.zeros(2, 3, 5, dtype=torch.int64),
    torch.full((1, 1, 1, 1, 1), torch.nan), torch.zeros(1, 16, 2, 6, 8, dtype=torch.bool), torch.tensor(3.0),
]  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE, ids=[f"{tuple(item.shape)} {item.dtype}" for item in HOSTILE])
def test_recorded_tensors_of_other_shapes_and_dtypes(model, golden, value):
    """A forged golden file is a failed check or one sentence, never a crash and never a pass."""
    for name in [*(name for name in golden if not name.startswith("linear.")), "linear.blocks.1.attn1.to_out.0"]:
        with contextlib.suppress(Hif4Error):
            result = replay(model, {**golden, name: value})
            assert not result.identical or name == "flip_distance", name
            assert not result.passed or name in ("timestep", "flip_distance"), (name, result)
