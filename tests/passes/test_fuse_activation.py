import pytest
import torch

from hif4c.passes.fuse_activation import fuse_activation
from hif4c.passes.insert_qdq import insert_qdq
from hif4c.passes.lower_linears import lower_linears
from hif4c.passes.pack_weights import pack_weights
from tests.passes.builder import Builder, decide, draw, targets

aten = torch.ops.aten


def gelu_after_linear(precision="w4a4", approximate="tanh", second_reader=False):
    build = Builder(x=(2, 64))
    linear = build.linear(build.inputs[0], "blocks.0.ffn.net.0.proj", 8)
    build.module = "blocks.0.ffn.net.0"
    gelu = build.call(aten.gelu.default, linear, approximate=approximate)
    outputs = [build.call(aten.silu.default, gelu)]
    program = build.finish(*outputs, *([linear] if second_reader else []))
    decide(program, precision)
    insert_qdq(program)
    pack_weights(program)
    lower_linears(program)
    return program


@pytest.mark.parametrize(("precision", "position"), [("w4a4", 5), ("w4a16", 6)])
def test_fused(precision, position):
    program = gelu_after_linear(precision)
    result = fuse_activation(program)
    assert (result.changed, result.notes) == (True, ["fused 1 activations"])
    assert "aten.gelu.default" not in targets(program)
    linear, silu = list(program.graph.nodes)[-3:-1]
    assert linear.args[position] == "gelu_tanh"
    assert silu.args[0] is linear
    schema = linear.target._schema.arguments
    assert schema[position].name == "activation"


def test_text(golden_text):
    program = gelu_after_linear()
    before = draw(program)
    result = fuse_activation(program)
    golden_text("fuse_activation", f"{before}\n--- {result.notes[0]}\n\n{draw(program)}")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"precision": "high"}, "not fused, its input is not a 4-bit linear"),
        ({"approximate": "none"}, "not fused, it is not the tanh approximation"),
        ({"second_reader": True}, "not fused, 2 nodes read the linear's result"),
    ],
    ids=["high", "erf", "readers"],
)
def test_left_alone_with_a_reason(change, reason):
    program = gelu_after_linear(**change)
    before = draw(program)
    result = fuse_activation(program)
    assert (result.changed, result.notes) == (False, ["fused 0 activations", f"blocks.0.ffn.net.0: {reason}"])
    assert draw(program) == before


@pytest.mark.parametrize("precision", ["w4a4", "w4a16"])
def test_fused_numbers(precision, bound):
    """The fused node is GELU of the fp32 result, rounded once: within half an ulp of bf16 (2^-8) and fp32's errors.

    GELU's slope is at most 1.13, so 65 fp32 roundings of the sum become at most 65 * 1.13 * 2^-24 of the magnitudes.
    """
    program = gelu_after_linear(precision)
    fuse_activation(program)
    program.graph.output_node().args = ((list(program.graph.nodes)[-2].args[0],),)  # without the SiLU
    program.clean()
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(8, 64, generator=generator).bfloat16() / 8
    bias = torch.randn(8, generator=generator).bfloat16()
    x = torch.randn(2, 64, generator=generator).bfloat16()
    executor = bound(program, {"blocks.0.ffn.net.0.proj.weight": weight, "blocks.0.ffn.net.0.proj.bias": bias})
    found = executor(x)[0].double()
    quantized = torch.ops.hif4.dequantize(*torch.ops.hif4.quantize(weight), 64, torch.float64)
    a = x.double()
    if precision == "w4a4":
        a = torch.ops.hif4.dequantize(*torch.ops.hif4.quantize(x), 64, torch.float64)
    exact = torch.nn.functional.gelu(a @ quantized.T + bias.double(), approximate="tanh")
    magnitude = a.abs() @ quantized.T.abs() + bias.abs().double()
    assert ((found - exact).abs() <= 2.0**-8 * exact.abs() + 80 * 2.0**-24 * magnitude).all()
