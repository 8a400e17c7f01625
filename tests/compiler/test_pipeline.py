import pytest

from hif4c.compiler.choose import Choices
from hif4c.compiler.models import WanConfig
from hif4c.compiler.pipeline import PASS_NAMES, run_passes
from hif4c.compiler.plan import make_plan
from hif4c.compiler.recipe import load_recipe
from hif4c.passes.verify import Stage, verify
from tests.support.checkpoints import VARIANTS, small_config


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recipe", ["rtn", "weight-only", "rotate"])
def test_what_each_pass_does_to_a_captured_model(variant, recipe, captures):
    """Two blocks of ten linears; in each, q, k and v read one input and the text's k and v another."""
    program = captures.variant(variant)
    config = WanConfig.from_dict(small_config(variant), "config.json")
    chosen = load_recipe(recipe)
    records = {record.name: record for record in run_passes(program, Choices(make_plan(config, chosen)), chosen)}
    assert tuple(records) == PASS_NAMES
    verify(program, Stage.FUSED)
    unchanged = {name for name, record in records.items() if not record.changed}
    expected = {
        "rtn": {"rotate_inputs"},
        "weight-only": {"rotate_inputs", "share_quantized_inputs", "fuse_norm_quantize"},
        "rotate": set(),
    }
    calibrated = {"fold_channel_shifts", "apply_channel_masks", "fold_channel_masks"}
    assert unchanged == calibrated | {"add_side_branches"} | expected[recipe]
    notes = {name: record.notes[0] for name, record in records.items()}
    assert notes["functionalize_rotary"] == "rewrote 4 rotary embeddings"  # q and k of each block
    assert records["choose_precision"].notes == ("6 linears high", f"20 linears {chosen.precision}")
    assert notes["pack_weights"] == "packed 20 weights"
    assert notes["fuse_activation"] == "fused 2 activations"
    assert notes["fuse_gated_residual"] == "fused 4 gated residuals and 2 residuals without a gate"
    # Three norms a block, the second without modulation, and norm_out, which a linear in high precision reads.
    assert notes["fuse_norm"] == "fused 5 norms with modulation and 2 without"
    if recipe != "weight-only":
        assert notes["fuse_norm_quantize"] == "fused 6 norms with the quantizer of their result"
        assert records["fuse_norm_quantize"].notes[1:] == ("1 not fused, what reads it does not quantize: norm_out",)
    assert notes["fuse_qk_norm_rotary"] == "fused 4 norms with a rotary embedding and 4 without"
    assert notes["lower_attention"] == "lowered 4 attentions"
    for name in ("fuse_gated_residual", "fuse_norm", "fuse_qk_norm_rotary", "lower_attention"):
        assert len(records[name].notes) == 1, records[name].notes  # nothing was left alone
    # 20 weights, and as inputs: q/k/v, out, cross q, the text (once for both blocks), out, ffn up, ffn down.
    if recipe != "weight-only":
        assert notes["share_quantized_inputs"] == f"40 quantize nodes became {20 + 2 * 6 + 1}"
    if recipe == "rotate":
        assert notes["rotate_inputs"] == "rotated the inputs of 20 linears by 64"
        assert {decision.hadamard for decision in program.decisions.values() if decision.quantized} == {64}
    nodes = [record.nodes for record in records.values()]
    assert nodes[-1] == len(program.graph.nodes)
    assert nodes[PASS_NAMES.index("fold_high_precision")] <= nodes[PASS_NAMES.index("fuse_activation")]
    assert all(record.seconds >= 0 for record in records.values())
