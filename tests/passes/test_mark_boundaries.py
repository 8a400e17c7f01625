import torch

from hif4c.passes.mark_boundaries import mark_boundaries, region
from tests.passes.builder import Builder

aten = torch.ops.aten


def test_every_call_gets_the_region_of_its_module():
    build = Builder(x=(2, 4))
    value = build.inputs[0]
    paths = ["patch_embedding", "blocks.0", "blocks.0.attn1.to_q", "blocks.12.ffn", "proj_out", "my.blocks.3", "blocks"]
    for path in paths:
        build.module = path
        value = build.call(aten.silu.default, value)
    program = build.finish(value)
    result = mark_boundaries(program)
    regions = [region(node) for node in program.graph.nodes if node.op == "call_function"]
    # Only a path that begins with blocks.N is a block.
    assert regions == ["boundary", "block 0", "block 0", "block 12", "boundary", "boundary", "boundary"]
    assert result.changed
    assert result.notes == ["4 nodes in boundary regions, 3 nodes in block regions"] or result.notes == [
        "3 nodes in block regions, 4 nodes in boundary regions"
    ]


def test_inputs_and_tensors_have_no_region():
    build = Builder(x=(2, 64))
    program = build.finish(build.linear(build.inputs[0], "blocks.0.ffn.net.2", 8))
    mark_boundaries(program)
    assert [region(node) for node in program.graph.nodes if node.op != "call_function"] == [None] * 4


def test_an_empty_program_does_not_change():
    build = Builder(x=(2, 4))
    assert not mark_boundaries(build.finish(build.inputs[0])).changed
