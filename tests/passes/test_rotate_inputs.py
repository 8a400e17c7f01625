from dataclasses import replace

import pytest
import torch

from hif4c.passes.insert_qdq import insert_qdq
from hif4c.passes.lower_linears import lower_linears
from hif4c.passes.pack_weights import pack_weights
from hif4c.passes.program import Precision
from hif4c.passes.rotate_inputs import rotate_inputs
from hif4c.runtime.errors import Hif4Error
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


def test_one_width_for_all():
    program = program_of(128, 192)
    result = rotate_inputs(program, 64)
    assert (result.changed, result.notes) == (True, ["rotated the inputs of 2 linears by 64"])
    assert [item.hadamard for item in program.decisions.values()] == [64, 64]


def test_the_largest_width_of_each():
    program = program_of(128, 192, 5120, 13824, 75)
    result = rotate_inputs(program, "largest")
    assert result.changed
    assert [item.hadamard for item in program.decisions.values()] == [128, 64, 1024, 512, 0]
    assert result.notes == [f"rotated the inputs of 1 linears by {width}" for width in (64, 128, 512, 1024)]


@pytest.mark.parametrize(
    ("channels", "width", "message"),
    [
        (
            (128, 192),
            128,
            "blocks.1.to_q has 192 input channels, which a rotation of width 128 does not divide; "
            'set hadamard to a power of two from 2 to 64 or "largest".',
        ),
        (
            (75,),
            64,
            "blocks.0.to_q has 75 input channels, which a rotation of width 64 does not divide; "
            'set hadamard to "largest".',
        ),
    ],
)
def test_a_width_that_does_not_divide_is_refused(channels, width, message):
    with pytest.raises(Hif4Error) as caught:
        rotate_inputs(program_of(*channels), width)
    assert str(caught.value) == message


def test_only_w4a4_linears_must_fit():
    program = program_of(128, 192)
    path = "blocks.1.to_q"
    program.decisions[path] = replace(program.decisions[path], precision=Precision.W4A16)
    assert rotate_inputs(program, 128).notes == ["rotated the inputs of 1 linears by 128"]


@pytest.mark.parametrize("precision", [Precision.HIGH, Precision.W4A16])
def test_unquantized_inputs_are_not_rotated(precision):
    program = program_of(64)
    decide(program, precision)
    assert not rotate_inputs(program, 64).changed


@pytest.mark.parametrize("width", [1, 3, 48, 2048, -64, "widest"])
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
