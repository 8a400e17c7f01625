import torch

from hif4c.passes.program import module_path
from hif4c.passes.remove_noops import remove_noops
from tests.passes.builder import Builder, draw, targets

aten = torch.ops.aten


def noisy_program():
    build = Builder(x=(2, 4))
    (x,) = build.inputs
    build.call(aten._assert_tensor_metadata.default, x, None, None, torch.bfloat16)
    dropped = build.call(aten.dropout.default, x, 0.5, False)
    same = build.call(aten.to.dtype, dropped, torch.bfloat16)
    wide = build.call(aten.to.dtype, same, torch.float32)
    scale = build.tensor("norm.weight", 4, dtype=torch.float32)
    product = build.call(aten.mul.Tensor, wide, scale)
    build.module = "blocks.0.norm"
    narrow = build.call(aten.type_as.default, product, x)
    return build.finish(narrow)


def test_before_and_after(golden_text):
    program = noisy_program()
    before = draw(program)
    result = remove_noops(program)
    golden_text("remove_noops", f"{before}\n--- {result.notes[0]}\n\n{draw(program)}")


def test_removes_what_does_nothing_and_rewires():
    program = noisy_program()
    result = remove_noops(program)
    assert result.changed
    assert result.notes == ["removed 3 no-ops, rewrote 1 casts"]
    assert targets(program) == ["aten.to.dtype", "aten.mul.Tensor", "aten.to.dtype"]
    wide, _, narrow = (node for node in program.graph.nodes if node.op == "call_function")
    assert wide.args[0].name == "x"  # past the dropout and the cast to its own dtype
    assert narrow.args[1] == torch.bfloat16
    assert module_path(narrow) == "blocks.0.norm"


def test_a_second_run_changes_nothing():
    program = noisy_program()
    remove_noops(program)
    text = draw(program)
    result = remove_noops(program)
    assert not result.changed
    assert draw(program) == text


def test_a_dropout_of_training_stays():
    build = Builder(x=(2, 4))
    program = build.finish(build.call(aten.dropout.default, build.inputs[0], 0.5, True))
    assert not remove_noops(program).changed
    assert targets(program) == ["aten.dropout.default"]


def test_type_as_no_longer_keeps_its_model_alive():
    build = Builder(x=(2, 4))
    model = build.tensor("unused", 4, dtype=torch.float32)
    program = build.finish(build.call(aten.type_as.default, build.inputs[0], model))
    remove_noops(program)
    assert program.tensors == {}
    assert [node.name for node in program.graph.nodes if node.op == "placeholder"] == ["x"]
