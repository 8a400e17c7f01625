import operator

import pytest
import torch

from hif4c.passes.fuse_qk_norm_rotary import fuse_qk_norm_rotary
from tests.passes.builder import Builder, bind, draw, state_of, targets

aten, hif4 = torch.ops.aten, torch.ops.hif4
TOKENS, HEADS, WIDTH = 6, 3, 8


def embedded(rotary=True, norms=1, dtype=torch.bfloat16, **change):
    """rms_norm, heads and the embedding of q (and k) as `functionalize_rotary` leaves it, or as `change` says."""
    names = ("q", "k")[:norms]
    build = Builder(**dict.fromkeys(names, (2, TOKENS, HEADS * WIDTH)))
    shape = (1, 1 if change.get("table") else TOKENS, 1, WIDTH)
    angles = torch.linspace(-3, 3, shape[1] * WIDTH).view(shape)
    tables = [build.constant(name, value) for name, value in (("cos", angles.cos()), ("sin", angles.sin()))]
    build.module = "blocks.0.attn1"
    last = torch.iinfo(torch.int64).max
    cos, sin = (build.call(aten.slice.Tensor, table, 3, number, last, 2) for number, table in enumerate(tables))
    outputs = []
    for name, x in zip(names, build.inputs, strict=True):
        build.module = f"blocks.0.attn1.norm_{name}"
        weight = None if change.get("bare") else build.tensor(f"norm_{name}.weight", HEADS * WIDTH)
        norm = build.call(aten.rms_norm.default, x, [HEADS * WIDTH], weight, 1e-6)
        build.module = "blocks.0.attn1"
        heads = build.call(aten.unflatten.int, norm, 2, [HEADS, -1])
        outputs += [norm] if change.get("norm_reader") else []
        if rotary:
            outputs.append(_embed(build, heads, cos, sin, dtype, change))
        else:
            outputs.append(build.call(aten.permute.default, heads, [0, 2, 1, 3]))
    return build.finish(*outputs)


def _embed(build, heads, cos, sin, dtype, change):
    pairs = build.call(aten.unflatten.int, heads, -1, [2, -1] if change.get("halves") else [-1, 2])
    halves = build.call(aten.unbind.int, pairs, -2 if change.get("halves") else -1)
    first, second = (build.call(operator.getitem, halves, number) for number in (0, 1))
    minus = aten.add.Tensor if change.get("plus") else aten.sub.Tensor
    even = build.call(minus, *(build.call(aten.mul.Tensor, *item) for item in ((first, cos), (second, sin))))
    crossed = ((first, cos), (second, sin)) if change.get("uncrossed") else ((first, sin), (second, cos))
    odd = build.call(aten.add.Tensor, *(build.call(aten.mul.Tensor, *item) for item in crossed))
    parts = [build.call(aten.to.dtype, half, dtype) for half in (even, odd)]
    stacked = build.call(aten.stack.default, parts[::-1] if change.get("order") else parts, -1)
    return build.call(aten.flatten.using_ints, stacked, -2)


def draws(norms=1):
    generator = torch.Generator().manual_seed(6)
    return [torch.randn(2, TOKENS, HEADS * WIDTH, generator=generator).bfloat16() * 3 for _ in range(norms)]


def test_one_node_and_the_same_bits():
    program = embedded(norms=2)
    state, inputs = state_of(program), draws(2)
    expected = bind(program, state)(*inputs)
    result = fuse_qk_norm_rotary(program)
    assert (result.changed, result.notes) == (True, ["fused 2 norms with a rotary embedding and 0 without"])
    # The tables are made compact once for both.
    assert sorted(targets(program)) == sorted(
        ["aten.slice.Tensor", "aten.contiguous.default"] * 2 + ["hif4.rms_rotary.default"] * 2
    )
    for found, value in zip(bind(program, state)(*inputs), expected, strict=True):
        assert torch.equal(found, value)
        assert found.dtype == value.dtype


def test_without_an_embedding():
    program = embedded(rotary=False)
    state, inputs = state_of(program), draws()
    (expected,) = bind(program, state)(*inputs)
    result = fuse_qk_norm_rotary(program)
    assert result.notes == ["fused 0 norms with a rotary embedding and 1 without"]
    assert targets(program) == ["hif4.rms_rotary.default", "aten.permute.default"]
    assert torch.equal(bind(program, state)(*inputs)[0], expected)


def test_text(golden_text):
    program = embedded()
    before = draw(program)
    result = fuse_qk_norm_rotary(program)
    golden_text("fuse_qk_norm_rotary", f"{before}\n--- {result.notes[0]}\n\n{draw(program)}")


OTHER = "what follows is not a rotary embedding of neighbours"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bare": True}, "it has no weight or no epsilon"),
        ({"norm_reader": True}, "what follows is not the split into heads alone"),
        ({"halves": True}, OTHER),
        ({"plus": True}, OTHER),
        ({"uncrossed": True}, OTHER),
        ({"order": True}, OTHER),
        ({"dtype": torch.float32}, OTHER),
        ({"table": True}, "the tables are not float32 [1, T, 1, D/2]"),
    ],
    ids=str,
)
def test_left_alone_with_a_reason(change, reason):
    program = embedded(**change)
    before = draw(program)
    result = fuse_qk_norm_rotary(program)
    notes = ["fused 0 norms with a rotary embedding and 0 without", f"1 not fused, {reason}: blocks.0.attn1.norm_q"]
    assert (result.changed, result.notes) == (False, notes)
    assert draw(program) == before
