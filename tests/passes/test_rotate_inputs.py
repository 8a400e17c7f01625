import pytest
import torch

from hif4c.passes.insert_qdq import insert_qdq
from hif4c.passes.lower_linears import lower_linears
from hif4c.passes.pack_weights import pack_weights
from hif4c.passes.program import Precision
from hif4c.passes.rotate_inputs import rotate_inputs
from hif4c.runtime.format import dequantize, quantize
from tests.passes.builder import Builder, decide


def program_of(*widths):
    """One linear for each number of input channels."""
    build = Builder(**{f"x{i}": (5, width) for i, width in enumerate(widths)})
    outputs = [build.linear(x, f"blocks.{i}.to_q", 8) for i, x in enumerate(build.inputs)]
    program = build.finish(*outputs)
    decide(program)
    return program


def test_width_zero_is_no_rotation():
    program = program_of(64)
    result = rotate_inputs(program, 0)
    assert (result.changed, result.notes) == (False, ["the recipe has no rotation"])
    assert program.decisions["blocks.0.to_q"].hadamard == 0


def test_rotates_what_the_width_divides_and_says_what_not():
    program = program_of(128, 192)
    result = rotate_inputs(program, 128)
    assert result.changed
    assert result.notes == [
        "rotated the inputs of 1 linears by 128",
        "blocks.1.to_q: not rotated, 128 does not divide its 192 input channels",
    ]
    assert [item.hadamard for item in program.decisions.values()] == [128, 0]


@pytest.mark.parametrize("precision", [Precision.HIGH, Precision.W4A16])
def test_unquantized_inputs_are_not_rotated(precision):
    program = program_of(64)
    decide(program, precision)
    assert not rotate_inputs(program, 64).changed


@pytest.mark.parametrize("width", [1, 3, 48, 2048, -64])
def test_bad_widths(width):
    with pytest.raises(ValueError, match=f"rotation width {width} is not a power of two in"):
        rotate_inputs(program_of(64), width)


def test_rotated_numbers(bound):
    """Q/DQ and fused program against the definition. 128 exact products: at most 128 roundings of fp32, one to bf16."""
    program = program_of(128)
    rotate_inputs(program, 64)
    insert_qdq(program)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(8, 128, generator=generator).bfloat16()
    state = {"blocks.0.to_q.weight": weight, "blocks.0.to_q.bias": torch.randn(8, generator=generator).bfloat16()}
    x = torch.randn(5, 128, generator=generator).bfloat16()
    x[:, 7] *= 50  # an outlier channel, what a rotation is for
    a, w = (dequantize(*quantize(value, None, 64), 128, torch.float64) for value in (x, weight))
    bias = state["blocks.0.to_q.bias"].double()
    exact = a @ w.T + bias
    tolerance = 128 * 2.0**-24 * (a.abs() @ w.T.abs() + bias.abs()) + 2.0**-8 * exact.abs()
    unfused = bound(program, state)(x)[0]
    pack_weights(program)
    assert {spec.hadamard for spec in program.tensors.values() if spec.plane != "whole"} == {64}
    lower_linears(program)
    fused = bound(program, state)(x)[0]
    assert ((unfused.double() - exact).abs() <= tolerance).all()
    assert ((fused.double() - exact).abs() <= tolerance).all()
    # Rotated on both sides, the result is that of the unrotated linear up to the error of the format; on one side
    # alone it would be unrelated (relative error around sqrt 2).
    original = x.double() @ weight.double().T + bias
    assert (fused.double() - original).norm() / original.norm() < 0.3
