import operator

import pytest
import torch

from hif4c.passes.apply_channel_masks import apply_channel_masks
from hif4c.passes.fuse_activation import fuse_activation
from hif4c.passes.fuse_gated_residual import fuse_gated_residual
from hif4c.passes.fuse_norm import fuse_norm
from hif4c.passes.fuse_norm_quantize import fuse_norm_quantize
from hif4c.passes.insert_qdq import insert_qdq
from hif4c.passes.lower_linears import lower_linears
from hif4c.passes.mark_boundaries import mark_boundaries
from hif4c.passes.pack_weights import pack_weights
from hif4c.passes.program import Decision, Precision, Program, TensorSource, module_path
from hif4c.passes.relax_activations import relax_activations
from hif4c.passes.rotate_inputs import rotate_inputs
from hif4c.passes.share_quantized_inputs import share_quantized_inputs
from hif4c.passes.verify import Stage, verify
from hif4c.runtime.reference import masked_and_rotated
from tests.passes.builder import Builder, decide, draw, targets

aten, hif4 = torch.ops.aten, torch.ops.hif4
PATHS = ("blocks.0.to_q", "blocks.0.to_k", "blocks.0.ffn.net.0.proj")


def lowered(width: int = 0, masked: bool = False, **exceptions: str) -> Program:
    """q and k of one input, and a linear with GELU behind them; w4a4 but for the exceptions."""
    build = Builder(x=(2, 128))
    q = build.linear(build.inputs[0], PATHS[0], 64)
    k = build.linear(build.inputs[0], PATHS[1], 64, bias=False)
    build.module = "blocks.0.ffn.net.0"
    hidden = build.linear(build.call(aten.add.Tensor, q, k), PATHS[2], 8)
    program = build.finish(build.call(aten.gelu.default, hidden, approximate="tanh"))
    mark_boundaries(program)
    decide(program, **exceptions)
    if masked:
        program.masks = {"m": torch.linspace(0.5, 2.0, 128)}
        apply_channel_masks(program, dict.fromkeys(PATHS[:2], "m"))
    rotate_inputs(program, width)
    for transform in (insert_qdq, share_quantized_inputs, pack_weights, lower_linears, fuse_activation):
        transform(program)
    verify(program, Stage.LOWERED)
    return program


def calls(program: Program, target: object) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if node.target is target]


def test_text(golden_text):
    program = lowered(width=64, masked=True)
    before = draw(program)
    result = relax_activations(program)
    assert (result.changed, result.notes) == (True, ["3 hif4::linear to hif4::linear_w4, 2 quantizers dropped"])
    golden_text("relax_activations", f"{before}\n--- {result.notes[0]}\n\n{draw(program)}")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [0, 64])
def test_every_argument_is_where_the_operator_has_it(width, masked):
    program = lowered(width, masked)
    inputs = [node.args[0].args[0] for node in (linear.args[0] for linear in calls(program, hif4.linear.default))]
    before = [(node.args, node.meta["val"], module_path(node)) for node in calls(program, hif4.linear.default)]
    relax_activations(program)
    names = [argument.name for argument in hif4.linear_w4.default._schema.arguments]
    assert len(calls(program, hif4.linear_w4.default)) == 3
    for node, x, (args, value, path) in zip(calls(program, hif4.linear_w4.default), inputs, before, strict=True):
        found = dict(zip(names, node.args, strict=False))
        assert found["x"] is x
        assert (found["w_codes"], found["w_scales"], found["bias"]) == args[2:5]
        assert (found["activation"], found["dtype"]) == (args[5], torch.bfloat16)
        assert found["hadamard"] == width
        assert (found["mask"] is not None) == (masked and path != PATHS[2])
        assert found["mask"] is None or program.tensors[found["mask"].name].name == "m"
        assert (node.meta["val"].shape, node.meta["val"].dtype) == (value.shape, value.dtype)
        assert module_path(node) == path
    assert calls(program, hif4.linear_w4.default)[2].args[6] == "gelu_tanh"
    assert not calls(program, hif4.quantize.default)
    assert not calls(program, operator.getitem)


def test_the_weight_file_stays_and_the_program_verifies():
    program = lowered(64, masked=True)
    tensors, decisions = dict(program.tensors), dict(program.decisions)
    relax_activations(program)
    assert list(program.tensors.items()) == list(tensors.items())
    assert set(program.decisions) == set(decisions)
    for path, before in decisions.items():
        after = program.decisions[path]
        assert (before.precision, after.precision) == (Precision.W4A4, Precision.W4A16)
        assert (after.mask, after.hadamard, after.reason) == (before.mask, before.hadamard, before.reason)
    verify(program, Stage.LOWERED)


def test_the_other_linears_are_left_alone():
    program = lowered(to_k=Precision.W4A16, proj=Precision.HIGH)
    decisions = dict(program.decisions)
    result = relax_activations(program)
    assert result.notes == ["1 hif4::linear to hif4::linear_w4, 1 quantizers dropped"]
    assert targets(program).count("hif4.linear_w4.default") == 2
    assert targets(program).count("aten.linear.default") == 1
    assert [program.decisions[path] for path in PATHS[1:]] == [decisions[path] for path in PATHS[1:]]
    verify(program, Stage.LOWERED)
    before = draw(program)
    again = relax_activations(program)
    assert (again.changed, again.notes) == (False, ["0 hif4::linear to hif4::linear_w4, 0 quantizers dropped"])
    assert draw(program) == before


def test_an_output_dtype_that_is_left_out_stays_what_it_was():
    """None means the bias's dtype for one operator and that of x for the other; without a bias they differ."""
    program = lowered()
    linear = calls(program, hif4.linear.default)[1]
    linear.args = linear.args[:4]
    linear.meta["val"] = linear.meta["val"].float()
    relax_activations(program)
    relaxed = calls(program, hif4.linear_w4.default)[1]
    assert relaxed.args[3:8] == (None, None, 0, None, torch.float32)
    assert relaxed.meta["val"].dtype == torch.float32


def test_a_quantizer_without_mask_and_rotation_may_leave_them_out():
    program = lowered()
    for quantizer in calls(program, hif4.quantize.default):
        quantizer.args = quantizer.args[:1]
    relax_activations(program)
    assert [node.args[4:6] for node in calls(program, hif4.linear_w4.default)] == [(None, 0)] * 3


def swap_planes(linear):
    linear.args = (linear.args[1], linear.args[0], *linear.args[2:])


def take_planes_of_two(linear):
    other = next(node for node in linear.graph.nodes if node.target is hif4.linear.default and node is not linear)
    linear.args = (linear.args[0], other.args[1], *linear.args[2:])


def take_stored_planes(linear):
    linear.args = (*linear.args[2:4], *linear.args[2:])


@pytest.mark.parametrize("change", [swap_planes, take_planes_of_two, take_stored_planes])
def test_planes_that_are_not_those_of_one_quantizer(change):
    program = lowered()
    change(calls(program, hif4.linear.default)[2])
    with pytest.raises(ValueError, match="does not read the two planes of one quantizer"):
        relax_activations(program)


def test_a_weight_file_that_would_change_is_refused():
    """A stored tensor that only an unused node reads would disappear with that node."""
    build = Builder(x=(2, 64))
    extra = build.tensor("extra", 64)
    build.call(aten.add.Tensor, build.inputs[0], extra)
    program = build.finish(build.inputs[0])
    with pytest.raises(ValueError, match=r"no longer reads \['t_extra'\]"):
        relax_activations(program)


def with_side_branch(program: Program) -> None:
    """Give q two extra input channels, as its input times a stored [128, 2], and their stored weight [2, 64]."""
    linear = calls(program, hif4.linear.default)[0]
    down, up = (
        program.add_tensor(TensorSource(name, torch.bfloat16, shape, source=name), program.placeholder("x"))
        for name, shape in (("down", (128, 2)), ("up", (2, 64)))
    )
    with program.graph.inserting_before(linear):
        side = program.call(aten.matmul.default, (program.placeholder("x"), down), like=linear)
    linear.args = (*linear.args, side, up)


def test_the_side_branch_is_carried_over():
    program = lowered(64)
    with_side_branch(program)
    side = calls(program, hif4.linear.default)[0].args[7:]
    tensors = dict(program.tensors)
    relax_activations(program)
    first, second, _ = calls(program, hif4.linear_w4.default)
    assert first.args[8:] == side
    assert [item.name for item in hif4.linear_w4.default._schema.arguments[8:10]] == ["side", "side_weight"]
    assert len(second.args) == 8
    assert program.tensors == tensors


@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize(("width", "masked"), [(0, False), (64, False), (0, True), (64, True)])
def test_relaxed_numbers(width, masked, side, bound):
    """The exact product of the masked and rotated input, rounded to bf16, with the packed weight.

    fp32 rounds each product and sum (129 times) and the side branch twice more; the output is rounded to bf16 once.
    """
    program = lowered(width, masked)
    if side:
        with_side_branch(program)
    relax_activations(program)
    program.graph.output_node().args = (tuple(calls(program, hif4.linear_w4.default)[:2]),)
    program.clean()
    generator = torch.Generator().manual_seed(3)
    state = {f"{path}.weight": torch.randn(64, 128, generator=generator).bfloat16() / 8 for path in PATHS[:2]}
    state[f"{PATHS[0]}.bias"] = torch.randn(64, generator=generator).bfloat16()
    state |= {"down": torch.randn(128, 2, generator=generator).bfloat16() / 8}
    state |= {"up": torch.randn(2, 64, generator=generator).bfloat16()}
    x = torch.randn(2, 128, generator=generator).bfloat16()
    found = bound(program, state)(x)
    mask = program.masks["m"] if masked else torch.ones(128)
    rotation = torch.block_diag(*[sylvester(width or 1)] * (128 // (width or 1)))
    scaled = (x.double() * mask.double()) @ rotation
    # What mask and rotation give is rounded to bf16: half an ulp, 2^-8, beside a few roundings of float32.
    read = masked_and_rotated(x, mask if masked else None, width).double()
    assert ((read - scaled).abs() <= 2.0**-8 * scaled.abs() + 2.0**-20 * x.double().abs().sum()).all()
    for path, y in zip(PATHS[:2], found, strict=True):
        weight = state[f"{path}.weight"]
        terms = [state[f"{path}.bias"].double().expand(1, 2, 64)] if path == PATHS[0] else []
        if side and path == PATHS[0]:
            terms.append((x @ state["down"]).double().T[:, :, None] * state["up"].double()[:, None, :])
        terms = torch.cat(terms) if terms else torch.zeros(1, 2, 64, dtype=torch.float64)
        extra = terms.sum(0)
        decoded = hif4.dequantize(*hif4.quantize(weight, 1.0 / mask, width), 128, torch.float64)
        exact = read @ decoded.T + extra
        magnitude = read.abs() @ decoded.abs().T + terms.abs().sum(0)
        assert ((y.double() - exact).abs() <= 2.0**-8 * exact.abs() + 140 * 2.0**-24 * magnitude).all()
        # Rounding a Gaussian weight to HiF4 costs some 0.09; a wrong mask or rotation would leave no agreement at all.
        unquantized = x.double() @ weight.double().T + extra
        assert float((y.double() - unquantized).norm() / unquantized.norm()) < 0.15


def sylvester(width: int) -> torch.Tensor:
    """The orthonormal Hadamard matrix of a width that is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / width**0.5


def test_norms_come_back_and_epilogues_stay(bound):
    """Two linears read one norm that is fused with its quantizer; one of them adds to the residual stream."""
    build = Builder(x=(2, 3, 128), g=(2, 1, 128), r=(2, 3, 128))
    x, g, r = build.inputs
    build.module = "blocks.0.norm1"
    wide = build.call(aten.to.dtype, x, torch.float32)
    norm = build.call(aten.layer_norm.default, wide, [128], None, None, 1e-6, False)
    build.module = "blocks.0"
    norm = build.call(aten.to.dtype, norm, torch.bfloat16)
    q, k = (build.linear(norm, path, 128) for path in PATHS[:2])
    gated = build.call(aten.mul.Tensor, k, build.call(aten.to.dtype, g, torch.float32))
    total = build.call(aten.add.Tensor, build.call(aten.to.dtype, r, torch.float32), gated)
    program = build.finish(q, build.call(aten.to.dtype, total, torch.bfloat16))
    mark_boundaries(program)
    decide(program)
    program.masks = {"m": torch.linspace(0.5, 2.0, 128)}
    apply_channel_masks(program, dict.fromkeys(PATHS[:2], "m"))
    rotate_inputs(program, 64)
    passes = (insert_qdq, share_quantized_inputs, pack_weights, lower_linears)
    for transform in (*passes, fuse_gated_residual, fuse_norm, fuse_norm_quantize):
        assert transform(program).changed
    before = [node.args for node in calls(program, hif4.linear.default)]
    tensors = dict(program.tensors)
    assert relax_activations(program).notes == ["2 hif4::linear to hif4::linear_w4, 1 quantizers dropped"]
    verify(program, Stage.FUSED)
    assert program.tensors == tensors
    (norm,) = calls(program, hif4.norm.default)
    assert not calls(program, hif4.norm_quantize.default)
    for node, given in zip(calls(program, hif4.linear_w4.default), before, strict=True):
        assert node.args[0] is norm
        assert (program.tensors[node.args[4].name].name, node.args[5]) == ("m", 64)
        assert node.args[8:] == given[7:]
    names = [item.name for item in hif4.linear_w4.default._schema.arguments]
    found = dict(zip(names, calls(program, hif4.linear_w4.default)[1].args, strict=True))
    assert (found["gate"].target, found["residual"].name) == (aten.to.dtype, "r")
    generator = torch.Generator().manual_seed(8)
    state = {f"{path}.weight": torch.randn(128, 128, generator=generator).bfloat16() / 11 for path in PATHS[:2]}
    state |= {f"{path}.bias": torch.randn(128, generator=generator).bfloat16() for path in PATHS[:2]}
    inputs = [torch.randn(shape, generator=generator).bfloat16() for shape in ((2, 3, 128), (2, 1, 128), (2, 3, 128))]
    _, found = bound(program, state)(*inputs)
    normal = torch.nn.functional.layer_norm(inputs[0].double(), (128,), eps=1e-6)
    y = normal @ state[f"{PATHS[1]}.weight"].double().T + state[f"{PATHS[1]}.bias"].double()
    # As above: a Gaussian weight in HiF4 costs some 0.09.
    assert float((found.double() - inputs[2].double() - inputs[1].double() * y).norm() / (inputs[1] * y).norm()) < 0.15


def test_decisions_are_replaced_not_changed():
    """The program that the copy was made of shares the decisions."""
    program = lowered()
    shared = dict(program.decisions)
    relax_activations(program)
    assert all(decision == Decision(path, "w4a4", "w4a4 for the test") for path, decision in shared.items())
