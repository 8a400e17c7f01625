import torch

from hif4c.passes.fold_high_precision import fold_high_precision
from tests.passes.builder import Builder, draw, targets

aten = torch.ops.aten


def frequencies():
    """cos(t * exp(arange(4) / -2)) as the timestep embedding computes it, and silu(x) twice."""
    build = Builder(x=(2, 4))
    (x,) = build.inputs
    build.module = "condition_embedder.timesteps_proj"
    count = build.call(aten.arange.start, 0, 4, dtype=torch.float32, device=torch.device("cpu"))
    table = build.call(aten.exp.default, build.call(aten.div.Tensor, count, -2.0))
    angle = build.call(aten.mul.Tensor, x, table)
    build.module = "blocks.0"
    first = build.call(aten.silu.default, x)
    second = build.call(aten.silu.default, x)
    return build.finish(angle, build.call(aten.add.Tensor, first, second))


def test_constants_are_computed_and_equal_nodes_merged(bound, golden_text):
    program = frequencies()
    x = torch.randn(2, 4).bfloat16()
    expected = bound(program, {})(x)
    before = draw(program)
    result = fold_high_precision(program)
    assert (result.changed, result.notes) == (True, ["folded 3 nodes into 1 constants, merged 1"])
    assert targets(program) == ["aten.mul.Tensor", "aten.silu.default", "aten.add.Tensor"]
    for found, value in zip(bound(program, {})(x), expected, strict=True):
        assert torch.equal(found, value)
        assert found.dtype == value.dtype
    (spec,) = program.tensors.values()
    assert spec.name == "condition_embedder.timesteps_proj.exp_default"
    assert spec.source is None
    assert torch.equal(spec.value, torch.exp(torch.arange(4, dtype=torch.float32) / -2.0))
    golden_text("fold_high_precision", f"{before}\n--- {result.notes[0]}\n\n{draw(program)}")


def test_nothing_to_fold():
    build = Builder(x=(2, 4))
    weight = build.tensor("norm.weight", 4)
    program = build.finish(build.call(aten.mul.Tensor, build.inputs[0], weight))
    text = draw(program)
    assert not fold_high_precision(program).changed  # a parameter is not a constant of the program
    assert draw(program) == text


def test_a_second_run_changes_nothing():
    program = frequencies()
    fold_high_precision(program)
    assert not fold_high_precision(program).changed
