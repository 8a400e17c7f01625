import pytest
import torch

from hif4c.passes.insert_qdq import insert_qdq
from hif4c.passes.lower_linears import lower_linears
from hif4c.passes.mark_boundaries import mark_boundaries
from hif4c.passes.pack_weights import pack_weights
from hif4c.passes.program import Precision, module_path
from hif4c.passes.verify import Stage, verify
from tests.passes.builder import Builder, decide, draw, targets


def packed_linear(precision=Precision.W4A4, bias=True):
    build = Builder(x=(2, 64))
    output = build.linear(build.inputs[0], "blocks.0.to_q", 8, bias)
    program = build.finish(build.call(torch.ops.aten.silu.default, output))
    mark_boundaries(program)
    decide(program, precision)
    insert_qdq(program)
    pack_weights(program)
    return program


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("precision", "name", "bias_at"), [("w4a4", "hif4.linear.default", 4), ("w4a16", "hif4.linear_w4.default", 3)]
)
def test_one_fused_node(precision, name, bias_at, bias):
    program = packed_linear(precision, bias)
    result = lower_linears(program)
    assert result.changed
    assert targets(program)[-2:] == [name, "aten.silu.default"]
    assert "hif4.dequantize.default" not in targets(program)
    assert "aten.linear.default" not in targets(program)
    fused, after = list(program.graph.nodes)[-3:-1]
    assert after.args[0] is fused
    assert module_path(fused) == "blocks.0.to_q"
    assert fused.meta["val"].dtype == torch.bfloat16
    planes = [node.name for node in fused.args if isinstance(node, torch.fx.Node) and node.name in program.tensors]
    expected = ["weight_codes", "weight_scales", *(["bias"] if bias else [])]
    assert planes == [f"t_blocks_0_to_q_{item}" for item in expected]
    assert (fused.args[bias_at] is not None) == bias
    verify(program, Stage.LOWERED)


def test_text_of_both_kinds(golden_text):
    text = "".join(
        f"--- {lower_linears(program).notes}\n\n{draw(program)}\n"
        for program in (packed_linear(Precision.W4A4), packed_linear(Precision.W4A16))
    )
    golden_text("lower_linears", text)


def test_a_high_precision_linear_stays():
    program = packed_linear(Precision.HIGH)
    before = draw(program)
    result = lower_linears(program)
    assert (result.changed, result.notes) == (False, ["0 hif4::linear", "0 hif4::linear_w4"])
    assert draw(program) == before
