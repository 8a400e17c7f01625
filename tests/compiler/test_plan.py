import pytest
import torch
from torch import nn

from hif4c.compiler.choose import Choices
from hif4c.compiler.locate import describe_model
from hif4c.compiler.models import WanConfig
from hif4c.compiler.pipeline import run_passes
from hif4c.compiler.plan import make_plan
from hif4c.compiler.recipe import Recipe, load_recipe
from hif4c.passes.program import Precision
from hif4c.runtime.errors import Hif4Error
from tests.support.checkpoints import build_transformer, small_config

BLOCK_LINEARS = {
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v",
    "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2",
}  # fmt: skip
BOUNDARY = {
    "condition_embedder.time_embedder.linear_1", "condition_embedder.time_embedder.linear_2",
    "condition_embedder.time_proj", "condition_embedder.text_embedder.linear_1",
    "condition_embedder.text_embedder.linear_2", "proj_out",
}  # fmt: skip


def small(**changes):
    return WanConfig.from_dict(small_config("t2v", **changes), "config.json")


def counts(plans):
    decisions = [decision for plan in plans for decision in plan.decisions]
    return (
        sum(decision.quantized for decision in decisions),
        sum(decision.precision == Precision.HIGH for decision in decisions),
    )


@pytest.mark.parametrize("name", ["Wan2.2-T2V-A14B", "Wan2.2-I2V-A14B"])
def test_a14b(name):
    description = describe_model(name)
    assert list(description.configs) == ["transformer", "transformer_2"]
    made = {config: make_plan(config, load_recipe("rtn")) for config in set(description.configs.values())}
    plans = [made[config] for config in description.configs.values()]
    assert counts(plans) == (800, 12)
    before, after = sum(plan.bytes_before for plan in plans), sum(plan.bytes_after for plan in plans)
    assert before == pytest.approx(2 * 28.6e9, rel=0.01)  # 14.3 billion parameters an expert, two bytes each
    assert after < 0.3 * before
    # 4.5 bits of 16 is the least that a quantized weight takes: nothing is counted as smaller than that.
    assert after > 4.5 / 16 * before


def test_ti2v_5b():
    (config,) = describe_model("Wan2.2-TI2V-5B").configs.values()
    plan = make_plan(config, load_recipe("rtn"))
    assert counts([plan]) == (300, 6)
    assert plan.bytes_before == pytest.approx(2 * 5.0e9, rel=0.02)
    assert plan.bytes_after < 0.3 * plan.bytes_before


def test_every_linear_has_one_decision_and_a_reason():
    model = build_transformer("t2v")
    plan = make_plan(small(), load_recipe("rtn"))
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert [linear.decision.path for linear in plan.linears] == list(linears)
    for linear in plan.linears:
        module = linears[linear.decision.path]
        assert (linear.in_features, linear.out_features) == (module.in_features, module.out_features)
        assert linear.decision.reason
    quantized = {decision.path for decision in plan.decisions if decision.quantized}
    assert quantized == {f"blocks.{block}.{name}" for block in range(2) for name in BLOCK_LINEARS}
    high = {decision.path: decision.reason for decision in plan.decisions if not decision.quantized}
    assert high.keys() == BOUNDARY
    assert all(reason.startswith("boundary: ") for reason in high.values())


def test_bytes():
    """Against the parameters themselves: 2 bytes each, but 4.5 bits for a quantized weight."""
    model = build_transformer("t2v")
    plan = make_plan(small(), load_recipe("rtn"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    quantized = sum(linear.in_features * linear.out_features for linear in plan.linears if linear.decision.quantized)
    assert quantized > parameters / 2
    assert plan.bytes_before == 2 * parameters
    assert plan.bytes_after == 2 * (parameters - quantized) + quantized * 9 // 16
    assert make_plan(small(), load_recipe("rtn"), torch.float32).bytes_before == 4 * parameters


def test_recipes_decide_the_precision():
    for name, precision in (("rtn", "w4a4"), ("rotate", "w4a4"), ("weight-only", "w4a16")):
        plan = make_plan(small(), load_recipe(name))
        found = {decision.precision for decision in plan.decisions if decision.quantized}
        assert found == {precision}
        assert any(decision.reason == f"block linear, recipe {name}" for decision in plan.decisions)


def test_a_recipe_keeps_linears():
    plan = make_plan(small(), Recipe("mine", keep_high=("blocks.0.*", "*.ffn.net.2")))
    kept = {decision.path: decision.reason for decision in plan.decisions if decision.reason.startswith("recipe")}
    assert len(kept) == 11
    assert kept["blocks.0.attn1.to_q"] == "recipe mine keeps blocks.0.*"
    assert kept["blocks.1.ffn.net.2"] == "recipe mine keeps *.ffn.net.2"
    assert counts([plan]) == (9, 17)


@pytest.mark.parametrize("glob", ["blocks.9.*", "ffn", "proj_out", "condition_embedder.*"])
def test_a_glob_that_matches_no_block_linear(glob):
    """A boundary is high precision already: to name one is a mistake, too."""
    with pytest.raises(Hif4Error, match="recipe mine: keep_high") as caught:
        make_plan(small(), Recipe("mine", keep_high=("blocks.0.*", glob)))
    assert repr(glob) in str(caught.value)
    assert "blocks.0.attn1.to_q" in str(caught.value)  # what they are called like


def test_input_channels_that_are_no_multiple_of_64():
    """3 heads of 32: the stream has 96 channels; only ffn.net.2, with 256, can be packed."""
    plan = make_plan(small(num_attention_heads=3), load_recipe("rtn"))
    quantized = {decision.path for decision in plan.decisions if decision.quantized}
    assert quantized == {"blocks.0.ffn.net.2", "blocks.1.ffn.net.2"}
    reasons = {decision.reason for decision in plan.decisions if "blocks" in decision.path and not decision.quantized}
    assert reasons == {"in_features 96 is not a multiple of 64"}
    assert all(linear.bytes_after == linear.bytes_before for linear in plan.linears if not linear.decision.quantized)


def test_side_branches_and_rounding():
    """Each quantized weight [N, K] gets down [r, K] and up [r + c, N] in 16 bits; what is kept high gets nothing."""
    recipe = Recipe("mine", rank=8, outlier_columns=3, rounding="gptq", keep_high=("*.ffn.net.2",))
    plan = make_plan(small(), recipe)
    plain = make_plan(small(), Recipe("plain", keep_high=recipe.keep_high))
    for linear, other in zip(plan.linears, plain.linears, strict=True):
        n, k = linear.out_features, linear.in_features
        branch = 2 * (8 * k + (8 + 3) * n) if linear.decision.quantized else 0
        assert linear.bytes_after == other.bytes_after + branch
        expected = (8, "gptq") if linear.decision.quantized else (0, "nearest")
        assert (linear.decision.rank, linear.decision.rounding) == expected
    # Without quantized activations there are no outlier columns.
    weight_only = make_plan(small(), Recipe("mine", activations="bf16", rank=8))
    linear = next(linear for linear in weight_only.linears if linear.decision.path == "blocks.0.attn1.to_q")
    assert linear.bytes_after == 128 * 128 * 9 // 16 + 2 * 128 + 2 * (8 * 128 + 8 * 128)


def test_largest_rank():
    ranks = {decision.rank for decision in make_plan(small(), Recipe("mine", rank=128)).decisions if decision.quantized}
    assert ranks == {128}
    with pytest.raises(
        Hif4Error, match=r"^recipe mine: rank 129 is more than blocks.0.attn1.to_q has, .* 128 x 128\.$"
    ):
        make_plan(small(), Recipe("mine", rank=129))


def test_a_rotation_that_does_not_divide_the_channels():
    """3 heads of 64 and 320 channels in the FFN: 64 divides both, 128 neither."""
    config = small(num_attention_heads=3, attention_head_dim=64, ffn_dim=320)
    make_plan(config, Recipe("mine", hadamard=64))
    make_plan(config, Recipe("mine", hadamard="largest"))
    with pytest.raises(Hif4Error) as caught:
        make_plan(config, Recipe("mine", hadamard=128))
    assert str(caught.value) == (
        "recipe mine: hadamard 128 does not divide the 192 input channels of blocks.0.attn1.to_q; choose a width that "
        'does, or "largest".'
    )
    kept = ("*attn*", "*.ffn.net.0.proj")
    with pytest.raises(Hif4Error, match=r"the 320 input channels of blocks\.0\.ffn\.net\.2"):
        make_plan(config, Recipe("mine", hadamard=128, keep_high=kept))
    make_plan(config, Recipe("mine", hadamard=128, keep_high=(*kept, "*.ffn.net.2")))


def test_the_rotation_pass_refuses_it_too(captures):
    """Where the plan was made for another recipe."""
    plan = make_plan(small(), Recipe("mine"))
    with pytest.raises(Hif4Error, match=r"attn1\.to_q has 128 input channels, which a rotation of width 256"):
        run_passes(captures.variant("t2v"), Choices(plan), Recipe("mine", hadamard=256))


def test_outlier_columns_leave_a_unit():
    make_plan(small(), Recipe("mine", outlier_columns=64))
    with pytest.raises(Hif4Error, match=r"outlier_columns 65 leaves less than 64 of the 128 .*; choose at most 64\.$"):
        make_plan(small(), Recipe("mine", outlier_columns=65))
