import copy

import pytest
import torch

from hif4c.compiler.emit import to_graph
from hif4c.passes.functionalize_rotary import functionalize_rotary
from hif4c.passes.program import module_path
from hif4c.passes.verify import Stage, verify
from tests.passes.builder import Builder, draw, targets

aten = torch.ops.aten


def rotary_program(starts=(0, 1), step=2, extra_user=False):
    """out = empty_like(x); out[:, 0::2] = a; out[:, 1::2] = b."""
    build = Builder(x=(3, 8))
    (x,) = build.inputs
    halves = [build.call(aten.slice.Tensor, x, 1, start, None, step) for start in (0, 1)]
    wide = build.call(aten.to.dtype, halves[0], torch.float32)
    build.module = "blocks.0.attn1"
    buffer = build.call(aten.empty_like.default, x)
    for start, part in zip(starts, (wide, halves[1]), strict=True):
        view = build.call(aten.slice.Tensor, buffer, 1, start, None, step)
        copied = build.call(aten.copy_.default, view, part)
        if extra_user:
            return build.finish(build.call(aten.add.Tensor, copied, 1.0), halves[1])
    return build.finish(build.call(aten.mul.Tensor, buffer, 2.0))


def test_before_and_after(golden_text):
    program = rotary_program()
    before = draw(program)
    result = functionalize_rotary(program)
    golden_text("functionalize_rotary", f"{before}\n--- {result.notes[0]}\n\n{draw(program)}")


def test_becomes_a_stack_with_the_casts_of_the_writes(bound):
    program = rotary_program()
    result = functionalize_rotary(program)
    assert result.changed
    assert result.notes == ["rewrote 1 rotary embeddings"]
    assert "aten.copy_.default" not in targets(program)
    assert "aten.empty_like.default" not in targets(program)
    stacked = next(node for node in program.graph.nodes if node.target is aten.stack.default)
    assert module_path(stacked) == "blocks.0.attn1"
    verify(program, Stage.FUNCTIONAL)
    x = torch.randn(3, 8).bfloat16()
    assert torch.equal(bound(program, {})(x)[0], x * 2)  # each half back in its place


def test_order_of_the_writes_does_not_matter(bound):
    """First the odd elements, then the even ones: what is written decides the place, not when."""
    program = rotary_program(starts=(1, 0))
    assert functionalize_rotary(program).changed
    x = torch.randn(3, 8).bfloat16()
    swapped = torch.stack((x[:, 1::2], x[:, 0::2]), -1).flatten(-2)
    assert torch.equal(bound(program, {})(x)[0], swapped * 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: rotary_program(step=4),
        lambda: rotary_program(starts=(0, 0)),
        lambda: rotary_program(extra_user=True),
        lambda: other_dimension(),
    ],
    ids=["step", "twice", "read", "dimension"],
)
def test_other_writes_are_left_alone_with_a_reason(make):
    program = make()
    before = copy.deepcopy(targets(program))
    result = functionalize_rotary(program)
    assert not result.changed
    assert result.notes == [
        "rewrote 0 rotary embeddings",
        "empty_like_default: written in a way that is not a rotary embedding",
    ]
    assert targets(program) == before
    with pytest.raises(ValueError, match="writes into its argument"):
        verify(program, Stage.FUNCTIONAL)


def other_dimension():
    build = Builder(x=(8, 8))
    (x,) = build.inputs
    buffer = build.call(aten.empty_like.default, x)
    for start in (0, 1):
        view = build.call(aten.slice.Tensor, buffer, 0, start, None, 2)
        build.call(aten.copy_.default, view, build.call(aten.slice.Tensor, x, 0, start, None, 2))
    return build.finish(build.call(aten.mul.Tensor, buffer, 2.0))


def test_nothing_to_do():
    build = Builder(x=(2, 4))
    program = build.finish(build.call(aten.silu.default, build.inputs[0]))
    result = functionalize_rotary(program)
    assert not result.changed
    assert to_graph(program).nodes[0].target == "aten.silu.default"
