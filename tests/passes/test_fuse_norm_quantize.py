import operator

import pytest
import torch

from hif4c.passes.fuse_norm_quantize import fuse_norm_quantize
from tests.passes.builder import Builder, bind, draw, targets

aten, hif4 = torch.ops.aten, torch.ops.hif4
SHAPE = (2, 5, 128)


def quantized(masked=True, width=64, **change):
    """quantize(norm(x) ...), its planes, and what else reads the norm."""
    build = Builder(x=SHAPE)
    (x,) = build.inputs
    mask = build.constant("m", torch.linspace(0.5, 2, 128)) if masked else None
    build.module = "blocks.0.norm1"
    norm = build.call(hif4.norm.default, x, None, None, None, None, 1e-6, torch.bfloat16)
    outputs = []
    if not change.get("unquantized"):
        planes = build.call(hif4.quantize.default, norm, mask, width)
        outputs = [build.call(operator.getitem, planes, number) for number in (0, 1)]
    if change.get("second_quantizer"):
        outputs.append(build.call(operator.getitem, build.call(hif4.quantize.default, norm, None, 0), 0))
    if change.get("unquantized") or change.get("columns"):
        outputs.append(build.call(aten.silu.default, norm))
    program = build.finish(*outputs)
    program.clean()
    return program


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [0, 64])
def test_one_node_and_the_same_codes(masked, width):
    program = quantized(masked, width)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)).bfloat16() * 3 + 1
    expected = bind(program, {})(x)
    result = fuse_norm_quantize(program)
    assert (result.changed, result.notes) == (True, ["fused 1 norms with the quantizer of their result"])
    assert targets(program) == ["hif4.norm_quantize.default", "getitem", "getitem"]
    (fused,) = (node for node in program.graph.nodes if node.target is hif4.norm_quantize.default)
    names = [argument.name for argument in fused.target._schema.arguments]
    found = dict(zip(names, fused.args, strict=True))
    assert (found["hadamard"], found["mask"] is not None) == (width, masked)
    for codes, planes in zip(bind(program, {})(x), expected, strict=True):
        assert torch.equal(codes, planes)


def test_text(golden_text):
    program = quantized()
    before = draw(program)
    result = fuse_norm_quantize(program)
    golden_text("fuse_norm_quantize", f"{before}\n--- {result.notes[0]}\n\n{draw(program)}")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"columns": True}, "2 nodes read its result, not one quantizer"),
        ({"second_quantizer": True}, "2 nodes read its result, not one quantizer"),
        ({"unquantized": True}, "what reads it does not quantize"),
    ],
    ids=str,
)
def test_left_alone_with_a_reason(change, reason):
    program = quantized(**change)
    before = draw(program)
    result = fuse_norm_quantize(program)
    notes = ["fused 0 norms with the quantizer of their result", f"1 not fused, {reason}: blocks.0.norm1"]
    assert (result.changed, result.notes) == (False, notes)
    assert draw(program) == before
