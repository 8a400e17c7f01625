import torch

from hif4c.passes.insert_qdq import insert_qdq
from hif4c.passes.program import Decision
from hif4c.passes.share_quantized_inputs import share_equal_nodes, share_quantized_inputs
from tests.passes.builder import Builder, decide, draw, targets

aten = torch.ops.aten


def attention():
    """q and k of one input, v of another."""
    build = Builder(x=(2, 64), text=(3, 64))
    x, text = build.inputs
    outputs = [build.linear(x, f"blocks.0.{name}", 8) for name in ("to_q", "to_k")]
    outputs.append(build.linear(text, "blocks.0.to_v", 8))
    program = build.finish(*outputs)
    decide(program)
    return program


def quantizes(program):
    return [node for node in program.graph.nodes if node.target is torch.ops.hif4.quantize.default]


def test_one_quantize_an_input(golden_text):
    program = attention()
    insert_qdq(program)
    before = draw(program)
    result = share_quantized_inputs(program)
    assert result.changed
    assert result.notes == ["6 quantize nodes became 5"]
    q, k, v = program.linears()
    assert q.args[0] is k.args[0]
    assert q.args[0] is not v.args[0]
    assert len({node.args[1] for node in program.linears()}) == 3  # weights are never merged
    golden_text("share_quantized_inputs", f"{before}\n--- {result.notes[0]}\n\n{draw(program)}")


def test_different_masks_and_rotations_are_not_shared():
    for change in ({"mask": "m"}, {"hadamard": 64}):
        program = attention()
        program.masks = {"m": torch.full((64,), 2.0)}
        old = program.decisions["blocks.0.to_k"]
        program.decisions["blocks.0.to_k"] = Decision(old.path, old.precision, old.reason, **change)
        insert_qdq(program)
        result = share_quantized_inputs(program)
        assert (result.changed, result.notes) == (False, ["6 quantize nodes became 6"])


def test_nothing_quantized_nothing_shared():
    program = attention()
    decide(program, "high")
    insert_qdq(program)
    assert not share_quantized_inputs(program).changed
    assert targets(program) == ["aten.linear.default"] * 3


def test_equal_arguments_of_different_types_are_different():
    build = Builder(x=(2, 4))
    (x,) = build.inputs
    values = [build.call(aten.mul.Tensor, x, factor) for factor in (1, 1.0, True, 1)]
    program = build.finish(*values)
    assert share_equal_nodes(program) == 1
    assert len(targets(program)) == 3


def test_only_the_given_targets_are_merged():
    build = Builder(x=(2, 4))
    (x,) = build.inputs
    program = build.finish(*[build.call(aten.silu.default, x) for _ in range(2)])
    assert share_equal_nodes(program, (aten.mul.Tensor,)) == 0
    assert share_equal_nodes(program) == 1
