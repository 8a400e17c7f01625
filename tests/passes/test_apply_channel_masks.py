import operator

import pytest
import torch

from hif4c.passes.apply_channel_masks import apply_channel_masks
from hif4c.passes.insert_qdq import insert_qdq
from hif4c.passes.lower_linears import lower_linears
from hif4c.passes.pack_weights import pack_weights
from hif4c.passes.program import Precision, outlier_columns
from hif4c.runtime.format import dequantize, quantize
from tests.passes.builder import Builder, decide

PATHS = ("blocks.0.attn1.to_q", "blocks.0.attn1.to_k")


MASKS = {"m": torch.linspace(0.25, 4, 64)}


def masked_program(masks=MASKS):
    """q and k read one input of 64 channels."""
    build = Builder(x=(5, 64))
    outputs = [build.linear(build.inputs[0], path, 8) for path in PATHS]
    program = build.finish(*outputs)
    decide(program)
    program.masks = dict(masks)
    return program


def test_without_an_assignment_nothing_happens():
    program = masked_program()
    for assignment in (None, {}):
        result = apply_channel_masks(program, assignment)
        assert (result.changed, result.notes) == (False, ["the recipe has no channel masks"])


def test_the_decisions_carry_the_mask():
    program = masked_program()
    result = apply_channel_masks(program, dict.fromkeys(PATHS, "m"))
    assert (result.changed, result.notes) == (True, ["1 masks for 2 linears"])
    assert [program.decisions[path].mask for path in PATHS] == ["m", "m"]


@pytest.mark.parametrize(("precision", "kept"), [(Precision.W4A16, None), (Precision.HIGH, None)])
def test_only_quantized_inputs_are_masked(precision, kept):
    program = masked_program()
    decide(program, precision)
    assert not apply_channel_masks(program, dict.fromkeys(PATHS, "m")).changed
    assert program.decisions[PATHS[0]].mask is kept


def test_errors():
    with pytest.raises(ValueError, match=r"mask m has shape \[32\], but blocks.0.attn1.to_q has 64 input channels"):
        apply_channel_masks(masked_program({"m": torch.ones(32)}), dict.fromkeys(PATHS, "m"))
    for bad in (torch.inf, torch.nan, 1e-40):
        mask = torch.ones(64)
        mask[3] = bad
        with pytest.raises(ValueError, match="mask m has values that are not finite, or whose inverses are not"):
            apply_channel_masks(masked_program({"m": mask}), dict.fromkeys(PATHS, "m"))
    with pytest.raises(ValueError, match="mask m is zero everywhere"):
        apply_channel_masks(masked_program({"m": torch.zeros(64)}), dict.fromkeys(PATHS, "m"))
    with pytest.raises(ValueError, match=r"linears that do not exist: \['blocks.9.x'\]"):
        apply_channel_masks(masked_program(), {"blocks.9.x": "m"})
    masks = {"m": torch.ones(64), "other": torch.full((64,), 2.0)}
    with pytest.raises(ValueError, match="to_k reads the same input as other linears but has another mask: other"):
        apply_channel_masks(masked_program(masks), {PATHS[0]: "m", PATHS[1]: "other"})
    with pytest.raises(ValueError, match="no mask is called 'absent'"):
        apply_channel_masks(masked_program(), dict.fromkeys(PATHS, "absent"))


def test_zeros_and_signs_are_allowed():
    """Zeros leave channels out on both sides; a sign is on both sides, too."""
    mask = torch.linspace(-1, 1, 64)
    mask[10:12] = 0
    program = masked_program({"m": mask})
    apply_channel_masks(program, dict.fromkeys(PATHS, "m"))
    insert_qdq(program)
    values = {spec.name: spec.value for spec in program.tensors.values() if spec.value is not None}
    assert torch.equal(values["m"], mask)
    inverse = values["m.inverse"]
    assert torch.equal(inverse == 0, mask == 0)
    assert torch.equal(inverse[mask != 0], 1.0 / mask[mask != 0])
    assert torch.equal(outlier_columns(program, program.decisions[PATHS[0]]), torch.tensor([10, 11]))


def test_masked_numbers(bound):
    """Q/DQ and fused program against the definition: x*m and W/m are what is quantized.

    Of 64 products in fp32, each exact, at most 63 additions and the bias round: 64 * 2^-24 of the sum of magnitudes;
    then each rounds once to bf16, by at most half an ulp (2^-8 of the value).
    """
    program = masked_program()
    apply_channel_masks(program, dict.fromkeys(PATHS, "m"))
    insert_qdq(program)
    generator = torch.Generator().manual_seed(0)
    state = {
        spec.name: torch.randn(spec.shape, generator=generator).bfloat16()
        for spec in program.tensors.values()
        if spec.source is not None
    }
    x = torch.randn(5, 64, generator=generator).bfloat16()
    mask = program.masks["m"]
    qdq = bound(program, state)(x)
    pack_weights(program)
    lower_linears(program)
    assert [spec.mask for spec in program.tensors.values() if spec.plane == "codes"] == ["m", "m"]
    fused = bound(program, state)(x)
    for path, unfused_output, fused_output in zip(PATHS, qdq, fused, strict=True):
        a, w = (
            dequantize(*quantize(value, factor), 64, torch.float64)
            for value, factor in ((x, mask), (state[f"{path}.weight"], 1.0 / mask))
        )
        bias = state[f"{path}.bias"].double()
        exact = a @ w.T + bias
        bound_on_error = 64 * 2.0**-24 * (a.abs() @ w.T.abs() + bias.abs()) + 2.0**-8 * exact.abs()
        assert ((unfused_output.double() - exact).abs() <= bound_on_error).all()
        assert ((fused_output.double() - exact).abs() <= bound_on_error).all()
        # The mask matters: without it the same weights give something else, by more than rounding.
        plain = (
            dequantize(*quantize(x), 64, torch.float64)
            @ dequantize(*quantize(state[f"{path}.weight"]), 64, torch.float64).T
            + bias
        )
        assert ((plain - exact).abs() > bound_on_error).any()


def test_one_mask_one_quantize_input():
    """Both linears read the same mask tensor, which is stored once."""
    program = masked_program()
    apply_channel_masks(program, dict.fromkeys(PATHS, "m"))
    insert_qdq(program)
    quantizes = [node for node in program.graph.nodes if node.target is torch.ops.hif4.quantize.default]
    assert len({node.args[1] for node in quantizes if node.args[0].name == "x"}) == 1
    assert sorted(spec.name for spec in program.tensors.values() if spec.source is None) == ["m", "m.inverse"]
    assert all(node.args[1] in (0, 1) for node in program.graph.nodes if node.target is operator.getitem)
