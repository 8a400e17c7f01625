import pytest
import torch

from hif4c.passes.fuse_norm import fuse_norm
from tests.passes.builder import Builder, bind, draw, state_of, targets

aten, hif4 = torch.ops.aten, torch.ops.hif4
SHAPE = (2, 5, 24)


def normalized(tokens=1, modulated=True, affine=False, cast=True, **change):
    """to(layer_norm(float(x)) * (1 + scale) + shift) as AdaLN has it, or as `change` says."""
    build = Builder(x=SHAPE, scale=(2, tokens, 24), shift=(2, tokens, 24), row=(24,))
    x, scale, shift, row = build.inputs
    half, wide = torch.bfloat16, torch.float32
    weights = [build.tensor(f"norm.{name}", 24, dtype=wide) if affine else None for name in ("weight", "bias")]
    if change.get("narrow"):
        weights = [None, None]
    build.module = "blocks.0.norm1"
    source = x if change.get("narrow") else build.call(aten.to.dtype, x, wide)
    shape = [5, 24] if change.get("two_axes") else [24]
    norm = value = build.call(aten.layer_norm.default, source, shape, *weights, 1e-6, False)
    build.module = "blocks.0"
    if modulated:
        scale, shift = (build.call(aten.to.dtype, node, wide) for node in (row if change.get("row") else scale, shift))
        one = build.call(aten.add.Tensor, scale, change.get("one", 1))
        value = build.call(aten.mul.Tensor, *((one, norm) if change.get("swap") else (norm, one)))
        if change.get("no_shift"):
            value = build.call(aten.silu.default, value)
        else:
            value = build.call(aten.add.Tensor, *((shift, value) if change.get("swap") else (value, shift)))
    if cast:
        value = build.call(aten.to.dtype, value, half)
    program = build.finish(value, *([norm] if change.get("second_reader") else []))
    program.clean()
    return program


def draws():
    generator = torch.Generator().manual_seed(4)
    # Means far from zero and uneven channels, so that what is rounded where makes a difference.
    x = torch.randn(SHAPE, generator=generator) * torch.logspace(-2, 2, 24) + 3
    return x.bfloat16(), *(torch.randn(2, 1, 24, generator=generator).bfloat16() for _ in range(2)), torch.ones(24)


CASES = [
    {}, {"swap": True}, {"affine": True}, {"affine": True, "modulated": False}, {"modulated": False, "cast": False},
    {"cast": False}, {"one": 1.0},
]  # fmt: skip


@pytest.mark.parametrize("change", CASES, ids=str)
def test_one_node_and_the_same_bits(change):
    program = normalized(**change)
    state, inputs = state_of(program), draws()
    (expected,) = bind(program, state)(*inputs)
    result = fuse_norm(program)
    modulated = int(change.get("modulated", True))
    assert (result.changed, result.notes) == (
        True,
        [f"fused {modulated} norms with modulation and {1 - modulated} without"],
    )
    (norm,) = program.graph.output_node().args[0]
    assert norm.target is hif4.norm.default
    assert norm.args[0].name == "x"
    assert norm.args[6] == expected.dtype
    assert norm.meta["nn_module_stack"]["blocks.0.norm1"][0] == "blocks.0.norm1"
    # What is left are the casts of scale and shift.
    assert targets(program) == ["aten.to.dtype"] * (2 * modulated) + ["hif4.norm.default"]
    assert torch.equal(bind(program, state)(*inputs)[0], expected)


def test_a_modulation_for_each_token():
    program = normalized(tokens=5)
    x, scale, shift, row = draws()
    inputs = (x, scale * torch.arange(5.0).view(5, 1).bfloat16(), shift + torch.arange(5.0).view(5, 1).bfloat16(), row)
    (expected,) = bind(program, {})(*inputs)
    assert fuse_norm(program).changed
    assert torch.equal(bind(program, {})(*inputs)[0], expected)


def test_text(golden_text):
    program = normalized(affine=True)
    before = draw(program)
    result = fuse_norm(program)
    golden_text("fuse_norm", f"{before}\n--- {result.notes[0]}\n\n{draw(program)}")


OTHER = "what follows is not norm * (scale + 1) + shift"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"narrow": True}, "it is not in float32"),
        ({"two_axes": True}, "it normalizes more than the last axis"),
        ({"second_reader": True}, "2 nodes read its result"),
        ({"one": 2}, OTHER),
        ({"no_shift": True}, OTHER),
        ({"row": True}, "scale and shift are not float32 [B, 1 or T, C]"),
    ],
    ids=str,
)
def test_left_alone_with_a_reason(change, reason):
    program = normalized(**change)
    before = draw(program)
    result = fuse_norm(program)
    notes = ["fused 0 norms with modulation and 0 without", f"1 not fused, {reason}: blocks.0.norm1"]
    assert (result.changed, result.notes) == (False, notes)
    assert draw(program) == before
