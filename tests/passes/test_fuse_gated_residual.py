import pytest
import torch

from hif4c.passes.fuse_gated_residual import fuse_gated_residual
from hif4c.passes.insert_qdq import insert_qdq
from hif4c.passes.lower_linears import lower_linears
from hif4c.passes.mark_boundaries import mark_boundaries
from hif4c.passes.pack_weights import pack_weights
from hif4c.passes.verify import Stage, verify
from tests.passes.builder import Builder, bind, decide, draw, targets

aten, hif4 = torch.ops.aten, torch.ops.hif4
PATH = "blocks.0.attn1.to_out.0"


def residual(precision="w4a4", gated=True, tokens=1, **change):
    """r + linear(x) * g as the transformer's block has it, or as `change` says."""
    build = Builder(x=(2, 6, 64), g=(2, tokens, 8), r=(2, 6, 8), v=(8,))
    x, g, r, v = build.inputs
    linear = build.linear(x, PATH, 8)
    wide, outputs = build.call(aten.to.dtype, r, torch.float32), []
    if gated:
        gate = build.call(aten.to.dtype, v if change.get("vector") else g, torch.float32)
        value = build.call(aten.to.dtype, linear, torch.float32) if change.get("cast") else linear
        if change.get("activation"):
            value = build.call(aten.silu.default, linear)
        value = build.call(aten.mul.Tensor, *((gate, value) if change.get("swap") else (value, gate)))
        operands = (value, wide) if change.get("swap") else (wide, value)
        if change.get("broadcast"):
            operands = (value, build.call(aten.to.dtype, v, torch.float32))
        total = build.call(aten.add.Tensor, *operands, **change.get("kwargs", {}))
        outputs.append(build.call(aten.to.dtype, total, torch.bfloat16))
        outputs += [value] if change.get("second_reader") else []
    else:
        outputs.append(build.call(aten.add.Tensor, r, linear))
        # What follows widens the rounded sum again.
        outputs.append(build.call(aten.to.dtype, outputs[0], torch.float32))
    program = build.finish(*outputs)
    mark_boundaries(program)
    decide(program, precision)
    insert_qdq(program)
    pack_weights(program)
    lower_linears(program)
    return program


@pytest.mark.parametrize("precision", ["w4a4", "w4a16"])
@pytest.mark.parametrize("change", [{}, {"cast": True}, {"swap": True}, {"tokens": 6}], ids=str)
def test_gate_and_residual_become_arguments(precision, change):
    program = residual(precision, **change)
    result = fuse_gated_residual(program)
    assert (result.changed, result.notes) == (True, ["fused 1 gated residuals and 0 residuals without a gate"])
    (linear,) = program.graph.output_node().args[0]
    names = [argument.name for argument in linear.target._schema.arguments]
    found = dict(zip(names, linear.args, strict=True))
    assert found["residual"].name == "r"  # before its cast
    assert found["gate"].target is aten.to.dtype
    assert found["dtype"] == linear.meta["val"].dtype == torch.bfloat16
    assert linear.target is (hif4.linear.default if precision == "w4a4" else hif4.linear_w4.default)
    assert next(reversed(linear.meta["nn_module_stack"].values()))[0] == PATH
    verify(program, Stage.FUSED)
    with pytest.raises(ValueError, match="is fused before the program is lowered"):
        verify(program, Stage.LOWERED)


def test_without_a_gate_the_rounded_sum_stays_rounded():
    program = residual(gated=False)
    result = fuse_gated_residual(program)
    assert result.notes == ["fused 0 gated residuals and 1 residuals without a gate"]
    total, wide = program.graph.output_node().args[0]
    assert (total.target, total.meta["val"].dtype) == (hif4.linear.default, torch.bfloat16)
    assert (wide.target, wide.args[0]) == (aten.to.dtype, total)
    assert total.args[9] is None
    assert total.args[10].name == "r"


def test_text(golden_text):
    program = residual(cast=True)
    before = draw(program)
    result = fuse_gated_residual(program)
    golden_text("fuse_gated_residual", f"{before}\n--- {result.notes[0]}\n\n{draw(program)}")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"precision": "high"}, "the linear before it is in high precision"),
        ({"second_reader": True}, "2 nodes read what is added"),
        ({"activation": True}, None),
        ({"vector": True}, "the factor is not a gate of float32 [B, 1 or T, N]"),
        ({"broadcast": True}, "what it is added to is not a tensor of its shape in 16 or 32 bits"),
        ({"kwargs": {"alpha": 2}}, "what it is added to is not a tensor of its shape in 16 or 32 bits"),
    ],
    ids=str,
)
def test_left_alone_with_a_reason(change, reason):
    program = residual(**change)
    before = draw(program)
    result = fuse_gated_residual(program)
    nothing = "fused 0 gated residuals and 0 residuals without a gate"
    notes = [nothing] if reason is None else [nothing, f"1 not fused, {reason}: {PATH}"]
    assert (result.changed, result.notes) == (False, notes)
    assert draw(program) == before


def test_a_second_run_changes_nothing():
    """The sum of two fused linears: the first is the residual stream, not something to be added."""
    program = residual()
    fuse_gated_residual(program)
    (linear,) = program.graph.output_node().args[0]
    with program.graph.inserting_before(program.graph.output_node()):
        more = program.call(aten.add.Tensor, (linear, program.placeholder("r")), like=linear)
    program.graph.output_node().args = ((more,),)
    result = fuse_gated_residual(program)
    assert (result.changed, len(result.notes)) == (False, 1)
    assert targets(program).count("aten.add.Tensor") == 1


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("precision", ["w4a4", "w4a16"])
def test_fused_numbers(precision, gated):
    """Product, gate and residual in fp32, rounded once: half an ulp of bf16 (2^-8) and some 70 roundings of fp32."""
    program = residual(precision, gated)
    fuse_gated_residual(program)
    generator = torch.Generator().manual_seed(1)
    state = {f"{PATH}.weight": torch.randn(8, 64, generator=generator).bfloat16() / 8}
    state[f"{PATH}.bias"] = torch.randn(8, generator=generator).bfloat16()
    x, g, r, v = (
        torch.randn(node, generator=generator).bfloat16() for node in ((2, 6, 64), (2, 1, 8), (2, 6, 8), (8,))
    )
    found = bind(program, state)(x, g, r, v)[0].double()
    decoded = hif4.dequantize(*hif4.quantize(state[f"{PATH}.weight"]), 64, torch.float64)
    a = x.double() if precision == "w4a16" else hif4.dequantize(*hif4.quantize(x), 64, torch.float64)
    bias, gate = state[f"{PATH}.bias"].double(), g.double() if gated else 1.0
    exact = r.double() + (a @ decoded.T + bias) * gate
    magnitude = r.double().abs() + (a.abs() @ decoded.T.abs() + bias.abs()) * (gate.abs() if gated else 1.0)
    assert ((found - exact).abs() <= 2.0**-8 * exact.abs() + 70 * 2.0**-24 * magnitude).all()
