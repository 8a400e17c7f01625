import pytest
import torch

from hif4c.passes.lower_attention import lower_attention
from tests.passes.builder import Builder, bind, draw, targets

aten = torch.ops.aten
SHAPE = (2, 3, 5, 8)


def attended(heads=3, width=8, *args, **kwargs):
    build = Builder(q=SHAPE, k=(2, heads, 7, 8), v=(2, heads, 7, width), m=(2, 3, 5, 7))
    build.module = "blocks.0.attn1"
    args = [build.inputs[3] if item == "mask" else item for item in args]
    y = build.call(aten.scaled_dot_product_attention.default, *build.inputs[:3], *args, **kwargs)
    return build.finish(build.call(aten.permute.default, y, [0, 2, 1, 3]))


@pytest.mark.parametrize("args", [(), (None, 0.0, False)], ids=str)
def test_lowered_with_the_same_bits(args):
    program = attended(3, 8, *args)
    inputs = [torch.randn(node.meta["val"].shape).bfloat16() for node in list(program.graph.nodes)[:4]]
    (expected,) = bind(program, {})(*inputs)
    result = lower_attention(program)
    assert (result.changed, result.notes) == (True, ["lowered 1 attentions"])
    assert targets(program) == ["hif4.attention.default", "aten.permute.default"]
    assert torch.equal(bind(program, {})(*inputs)[0], expected)


def test_text(golden_text):
    program = attended()
    before = draw(program)
    result = lower_attention(program)
    golden_text("lower_attention", f"{before}\n--- {result.notes[0]}\n\n{draw(program)}")


@pytest.mark.parametrize(
    ("args", "kwargs", "reason"),
    [
        ((3, 8, "mask"), {}, "it has attn_mask"),
        ((3, 8, None, 0.5), {}, "it has dropout_p"),
        ((3, 8, None, 0.0, True), {}, "it has is_causal"),
        ((), {"scale": 0.5}, "it has scale"),
        ((1,), {"enable_gqa": True}, "it has enable_gqa"),
        ((3, 16), {}, "it is not of [B, H, T, D] to [B, H, S, D]"),
    ],
    ids=str,
)
def test_left_alone_with_a_reason(args, kwargs, reason):
    program = attended(*args, **kwargs)
    before = draw(program)
    result = lower_attention(program)
    notes = ["lowered 0 attentions", f"1 not fused, {reason}: blocks.0.attn1"]
    assert (result.changed, result.notes) == (False, notes)
    assert draw(program) == before
