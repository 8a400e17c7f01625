from dataclasses import replace

import torch

from hif4c.passes.insert_qdq import insert_qdq
from hif4c.passes.program import Precision, module_path
from hif4c.passes.verify import Stage, verify
from tests.passes.builder import Builder, decide, draw, targets

aten = torch.ops.aten


def feed_forward(precision=Precision.W4A4, **exceptions):
    build = Builder(x=(2, 64))
    build.module = "blocks.0.norm3"
    source = build.call(aten.silu.default, build.inputs[0])
    hidden = build.linear(source, "blocks.0.ffn.up", 128)
    program = build.finish(build.linear(hidden, "blocks.0.ffn.down", 64, bias=False))
    decide(program, precision, **exceptions)
    return program


def test_before_and_after(golden_text):
    program = feed_forward(down=Precision.W4A16)
    before = draw(program)
    result = insert_qdq(program)
    golden_text("insert_qdq", f"{before}\n--- {'; '.join(result.notes)}\n\n{draw(program)}")


def test_w4a4_quantizes_both_inputs_of_the_linear():
    program = feed_forward(down=Precision.HIGH)
    result = insert_qdq(program)
    assert result.changed
    assert result.notes == ["1 linears w4a4", "0 linears w4a16"]
    round_trip = ["hif4.quantize.default", "getitem", "getitem", "hif4.dequantize.default"]
    assert targets(program) == ["aten.silu.default", *round_trip, *round_trip, *["aten.linear.default"] * 2]
    up, down = program.linears()
    assert [item.target for item in up.args[:2]] == [torch.ops.hif4.dequantize.default] * 2
    assert program.linear_path(up) == "blocks.0.ffn.up"  # still found, through Q/DQ
    assert down.args[0] is up
    assert down.args[1].op == "placeholder"
    verify(program, Stage.QDQ)


def test_dequantize_restores_shape_and_dtype():
    program = feed_forward()
    insert_qdq(program)
    for node in program.graph.nodes:
        if node.target is torch.ops.hif4.dequantize.default:
            quantize = node.args[0].args[0]
            assert node.meta["val"].shape == quantize.args[0].meta["val"].shape
            assert node.meta["val"].dtype == quantize.args[0].meta["val"].dtype == node.args[3]


def test_new_nodes_belong_to_the_producer_and_to_the_linear():
    program = feed_forward(down=Precision.HIGH)
    insert_qdq(program)
    activation, weight = (node for node in program.graph.nodes if node.target is torch.ops.hif4.quantize.default)
    assert module_path(activation) == "blocks.0.norm3"
    assert module_path(weight) == "blocks.0.ffn.up"


def test_w4a16_leaves_the_input():
    program = feed_forward(Precision.W4A16)
    result = insert_qdq(program)
    assert result.notes == ["0 linears w4a4", "2 linears w4a16"]
    up, down = program.linears()
    assert up.args[0].target is aten.silu.default
    assert down.args[0] is up
    verify(program, Stage.QDQ)


def test_a_folded_mask_is_left_to_the_weight():
    program = feed_forward(down=Precision.HIGH)
    program.masks = {"m": torch.full((64,), 2.0)}
    path = "blocks.0.ffn.up"
    program.decisions[path] = replace(program.decisions[path], mask="m", mask_folded=True)
    insert_qdq(program)
    activation, weight = (node for node in program.graph.nodes if node.target is torch.ops.hif4.quantize.default)
    assert activation.args[1] is None
    assert program.tensors[weight.args[1].name].name == "m.inverse"
    assert "m" not in {spec.name for spec in program.tensors.values()}


def test_all_high_changes_nothing():
    program = feed_forward(Precision.HIGH)
    text = draw(program)
    assert not insert_qdq(program).changed
    assert draw(program) == text
