from dataclasses import replace

import pytest
import torch

from hif4c.passes.add_side_branches import add_side_branches
from hif4c.passes.apply_channel_masks import apply_channel_masks
from hif4c.passes.fold_channel_masks import fold_channel_masks
from hif4c.passes.functionalize_rotary import functionalize_rotary
from hif4c.passes.fuse_activation import fuse_activation
from hif4c.passes.insert_qdq import insert_qdq
from hif4c.passes.lower_linears import lower_linears
from hif4c.passes.mark_boundaries import mark_boundaries
from hif4c.passes.pack_weights import pack_weights
from hif4c.passes.program import Decision, Precision, Program, module_path
from hif4c.passes.relax_activations import relax_activations
from hif4c.passes.remove_noops import remove_noops
from hif4c.passes.rotate_inputs import rotate_inputs
from hif4c.passes.share_quantized_inputs import share_quantized_inputs
from hif4c.passes.verify import Stage, verify
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import dequantize, quantize
from tests.passes.builder import Builder, bind, decide, draw, evaluate, state_of, stored, targets

aten, hif4 = torch.ops.aten, torch.ops.hif4
Q, K, UP = "blocks.0.to_q", "blocks.0.to_k", "blocks.0.ffn.up"
OUTLIERS = [3, 70]


def planned(rank: int = 0, outliers: bool = False, rotation: int = 0, dtype=torch.bfloat16, **exceptions) -> Program:
    """norm -> to_q, to_k and ffn.up -> GELU, all of one input of 128 channels."""
    build = Builder(x=(5, 128))
    build.module = "blocks.0.norm3"
    x = build.call(aten.to.dtype, build.call(aten.silu.default, build.inputs[0]), dtype)
    outputs = [build.linear(x, Q, 24), build.linear(x, K, 24, bias=False)]
    build.module = "blocks.0.ffn"
    outputs.append(build.call(aten.gelu.default, build.linear(x, UP, 40), approximate="tanh"))
    program = build.finish(*outputs)
    mark_boundaries(program)
    decide(program, **exceptions)
    for path, item in program.decisions.items():
        program.decisions[path] = replace(item, rank=rank if item.quantized else 0)
    mask = 2.0 ** torch.linspace(-2, 2, 128)
    mask[7] *= -1
    if outliers:
        mask[OUTLIERS] = 0
    program.masks = {"m": mask}
    apply_channel_masks(program, dict.fromkeys((Q, K, UP), "m"))
    rotate_inputs(program, rotation)
    verify(program, Stage.PLANNED)
    return program


def with_branches(program: Program) -> Program:
    for transform in (insert_qdq, share_quantized_inputs, add_side_branches):
        transform(program)
        verify(program, Stage.QDQ)
    return program


def fused(program: Program) -> Program:
    pack_weights(program)
    verify(program, Stage.PACKED)
    for transform in (lower_linears, fuse_activation):
        transform(program)
        verify(program, Stage.LOWERED)
    return program


def sample(seed: int = 3) -> torch.Tensor:
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(seed))
    x[:, OUTLIERS] = x[:, OUTLIERS].abs() * 30  # positive, so that SiLU keeps them
    return x.bfloat16()


def test_text(golden_text):
    program = planned(rank=2, outliers=True, to_k=Precision.HIGH, up=Precision.HIGH)
    insert_qdq(program)
    share_quantized_inputs(program)
    before = draw(program)
    notes = "; ".join(add_side_branches(program).notes)
    after = draw(program)
    golden_text("add_side_branches", f"{before}\n--- {notes}\n\n{after}\n--- lower_linears\n\n{draw(fused(program))}")


def test_without_rank_and_outliers_nothing_happens():
    program = planned()
    insert_qdq(program)
    before = draw(program)
    result = add_side_branches(program)
    assert (result.changed, result.notes) == (False, ["the recipe has no side branches"])
    assert draw(program) == before


@pytest.mark.parametrize("rotation", [0, 64])
@pytest.mark.parametrize(("rank", "outliers"), [(4, False), (0, True), (4, True), (24, True)])
def test_the_function_stays_the_same(rank, outliers, rotation):
    """In exact arithmetic the residual, the low-rank part and the outlier columns are the linear again."""
    program = planned(rank, outliers, rotation, to_k=Precision.W4A16)
    state, x = state_of(program), [sample().double()]
    expected = evaluate(program, state, x)
    with_branches(program)
    assert targets(program).count("aten.matmul.default") == (3 if rank else 2)
    for found, exact in zip(evaluate(program, state, x), expected, strict=True):
        # float64 rounds by 2^-53, and masks and SVD have a condition of some 2^4.
        assert float((found - exact).abs().max() / exact.abs().max()) < 1e-13
    # Without its branch a linear is something else.
    add = next(node for node in program.graph.nodes if node.target is aten.add.Tensor)
    add.replace_all_uses_with(add.args[0])
    found = evaluate(program, state, x)[0]
    assert float((found - expected[0]).abs().max() / expected[0].abs().max()) > 1e-2


def test_a_folded_mask_changes_what_the_branch_reads():
    """x arrives as x * m, and so the low-rank factor is in these coordinates."""
    build = Builder(x=(5, 64))
    x = build.call(aten.to.dtype, build.inputs[0], torch.float32)
    affine = [build.tensor(f"blocks.0.norm2.{kind}", 64, dtype=torch.float32) for kind in ("weight", "bias")]
    x = build.call(aten.to.dtype, build.call(aten.layer_norm.default, x, [64], *affine, 1e-6), torch.bfloat16)
    program = build.finish(build.linear(x, Q, 32))
    decide(program)
    program.decisions[Q] = replace(program.decisions[Q], rank=5)
    state = state_of(program)
    inputs = [torch.randn(5, 64, generator=torch.Generator().manual_seed(4)).double()]
    (expected,) = evaluate(program, state, inputs)
    program.masks = {"m": torch.linspace(0.25, 4, 64)}
    apply_channel_masks(program, {Q: "m"})
    assert fold_channel_masks(program).changed
    with_branches(program)
    (found,) = evaluate(program, state, inputs)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-13
    pack_weights(program)
    planes = {spec.plane: spec for spec in program.tensors.values() if spec.source == f"{Q}.weight"}
    assert {(spec.mask, spec.mask_folded, spec.rank) for spec in planes.values()} == {("m", True, 5)}


def test_one_selection_of_columns_for_all_readers():
    program = with_branches(planned(outliers=True))
    selections = [node for node in program.graph.nodes if node.target is aten.index_select.default]
    assert len(selections) == 1
    source, axis, columns = selections[0].args
    assert (source.target, axis) == (aten.to.dtype, -1)
    assert module_path(selections[0]) == "blocks.0.norm3"
    spec = program.tensors[columns.name]
    assert (spec.name, spec.dtype, spec.shape) == ("m.columns", torch.int64, (2,))
    assert torch.equal(spec.value, torch.tensor(OUTLIERS))
    assert "aten.cat.default" not in targets(program)


def test_two_inputs_with_one_mask_share_the_columns():
    build = Builder(x=(5, 128), y=(5, 128))
    program = build.finish(*[build.linear(x, path, 8) for x, path in zip(build.inputs, (Q, K), strict=True)])
    decide(program)
    mask = torch.ones(128)
    mask[OUTLIERS] = 0
    program.masks = {"m": mask}
    apply_channel_masks(program, dict.fromkeys((Q, K), "m"))
    with_branches(program)
    assert targets(program).count("aten.index_select.default") == 2
    assert [spec.name for spec in program.tensors.values()].count("m.columns") == 1


def test_planes_of_the_branch():
    program = with_branches(planned(rank=4, outliers=True, rotation=64))
    pack_weights(program)
    order = [spec for spec in program.tensors.values() if spec.source == f"{UP}.weight"]
    assert [spec.plane for spec in order] == ["codes", "scales", "down", "up"]
    names = [spec.name for spec in program.tensors.values()]
    first = names.index(order[0].name)
    assert names[first : first + 4] == [f"{UP}.weight.{spec.plane}" for spec in order]  # side by side
    assert [(spec.dtype, spec.shape) for spec in order[2:]] == [(torch.bfloat16, (4, 128)), (torch.bfloat16, (6, 40))]
    for spec in order:
        assert (spec.mask, spec.hadamard, spec.rank, spec.packed_from) == ("m", 64, 4, torch.bfloat16)
    placeholders = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    first = placeholders.index(f"t_{order[0].name}".replace(".", "_"))
    assert placeholders[first : first + 4] == [f"t_{spec.name}".replace(".", "_") for spec in order]


def test_one_node_with_its_activation():
    program = fused(with_branches(planned(rank=4, outliers=True, to_k=Precision.W4A16)))
    linears = [node for node in program.graph.nodes if node.target is hif4.linear.default]
    (weight_only,) = (node for node in program.graph.nodes if node.target is hif4.linear_w4.default)
    assert [module_path(node) for node in linears] == [Q, UP]
    assert [node.args[5] for node in linears] == [None, "gelu_tanh"]
    names = [argument.name for argument in hif4.linear.default._schema.arguments]
    for node in linears:
        arguments = dict(zip(names, node.args, strict=False))
        assert arguments["side"].target is aten.cat.default
        assert program.tensors[arguments["side_weight"].name].name == f"{module_path(node)}.weight.up"
    names = [argument.name for argument in hif4.linear_w4.default._schema.arguments]
    arguments = dict(zip(names, weight_only.args, strict=False))
    assert arguments["side"].target is aten.linear.default  # no mask, no outliers
    assert program.tensors[arguments["side_weight"].name].shape == (4, 24)
    for left in ("aten.add.Tensor", "aten.matmul.default", "aten.gelu.default"):
        assert left not in targets(program)


@pytest.mark.parametrize(("rank", "outliers"), [(4, False), (0, True), (4, True)])
def test_fused_numbers(rank, outliers):
    """The fused nodes against their definition in float64, on the planes that are stored.

    At most 2 units, 6 columns of the branch and the bias are added in fp32: 10 roundings of the magnitudes. The low-
    rank input is a bf16 linear, which is taken as it is. GELU's slope is at most 1.13; the result rounds to bf16 once.
    """
    program = fused(with_branches(planned(rank, outliers, rotation=64)))
    state, x = state_of(planned()), sample()
    tensors, found = stored(program, state), bind(program, state)(x)
    hidden = torch.nn.functional.silu(x)
    mask = program.masks["m"]
    for path, y in zip((Q, K, UP), found, strict=True):
        planes = {plane: tensors.get(f"{path}.weight.{plane}") for plane in ("codes", "scales", "down", "up")}
        a = dequantize(*quantize(hidden, mask, 64), 128, torch.float64)
        w = dequantize(planes["codes"], planes["scales"], 128, torch.float64)
        sides = [torch.nn.functional.linear(hidden, planes["down"])] if rank else []
        sides += [hidden[:, OUTLIERS]] if outliers else []
        side, up = torch.cat(sides, -1).double(), planes["up"].double()
        bias = tensors.get(f"{path}.bias", torch.zeros(1)).double()
        exact, magnitude = a @ w.T + side @ up + bias, a.abs() @ w.abs().T + side.abs() @ up.abs() + bias.abs()
        if path == UP:
            exact = torch.nn.functional.gelu(exact, approximate="tanh")
        assert ((y.double() - exact).abs() <= 2.0**-8 * exact.abs() + 12 * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize("precision", [Precision.W4A4, Precision.W4A16])
def test_the_fused_program_is_the_one_before(precision):
    """add(linear, matmul) rounds the two terms and the sum to bf16, the fused node the sum: 2.5 ulps of the terms."""
    program = with_branches(planned(rank=4, outliers=precision == Precision.W4A4, precision=precision))
    state, x = state_of(planned()), sample()
    pack_weights(program)
    before = bind(program, state)(x)[:2]
    after = bind(fused(program), state)(x)[:2]
    for unfused, one in zip(before, after, strict=True):
        scale = unfused.double().abs().max() + one.double().abs().max()
        assert float((unfused.double() - one.double()).abs().max() / scale) < 2.5 * 2.0**-8


def test_outlier_columns_remove_their_error():
    """What branches are for: 30 times larger channels in 4 bits, and beside them in 16 bits."""
    state = state_of(planned())
    x = sample()
    errors = []
    exact = evaluate(planned(), state, [x.double()])[0]
    for outliers in (False, True):
        program = planned(outliers=outliers)
        found = bind(fused(with_branches(program)), state)(x)[0].double()
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[1] < 0.5 * errors[0]


def test_branches_stay_when_activations_are_relaxed():
    program = fused(with_branches(planned(rank=4, outliers=True, rotation=64)))
    tensors, state, x = dict(program.tensors), state_of(planned()), sample()
    (exact, *_), (quantized, *_) = evaluate(planned(), state, [x.double()]), bind(program, state)(x)
    relax_activations(program)
    verify(program, Stage.LOWERED)
    assert program.tensors == tensors
    assert targets(program).count("hif4.linear_w4.default") == 3
    # Of two errors of one size, that of the weight is left: about sqrt(1/2).
    (found, *_) = bind(program, state)(x)
    assert float((found - exact).norm()) < 0.9 * float((quantized - exact).norm())


def test_a_captured_model_with_dynamic_sizes(captures, inputs):
    """Every block linear with a low-rank part, half of the inputs with outlier columns, the other masks folded."""
    program = captures.variant("t2v")
    for transform in (remove_noops, functionalize_rotary, mark_boundaries):
        transform(program)
    for node in program.linears():
        path = program.linear_path(node)
        block = path.startswith("blocks.")
        program.decisions[path] = Decision(path, "w4a4" if block else "high", "test", rank=3 if block else 0)
    state, assignment = state_of(program), {}
    for node in program.linears():
        path = program.linear_path(node)
        if program.decisions[path].quantized:
            name = assignment[path] = node.args[0].name
            mask = torch.linspace(0.5, 2, node.args[1].meta["val"].shape[1])
            mask[::40] = 1.0 if node.args[0].target is aten.flatten.using_ints else 0.0
            program.masks[name] = mask
    (expected,) = evaluate(program, state, inputs())
    apply_channel_masks(program, assignment)
    rotate_inputs(program, "largest")
    assert "folded 4 masks into linears" in fold_channel_masks(program).notes
    with_branches(program)
    (found,) = evaluate(program, state, inputs())
    # float64 through the norms and attentions of two blocks.
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-11
    (sample_4bit,) = bind(fused(program), state)(*inputs())
    assert float((sample_4bit.double() - expected).norm() / expected.norm()) < 0.5


def test_errors():
    program = planned(rank=25)
    insert_qdq(program)
    with pytest.raises(Hif4Error, match=r"^blocks.0.to_q has a weight of 24 x 128, .* a rank of at most 24\.$"):
        add_side_branches(program)
    program = planned(rank=2, dtype=torch.float32)
    insert_qdq(program)
    with pytest.raises(ValueError, match=r"to_q: a side branch reads bf16 or fp16, not torch\.float32"):
        add_side_branches(program)


def test_the_linears_of_branches_are_not_the_models():
    program = with_branches(planned(rank=2))
    assert targets(program).count("aten.linear.default") == 6
    assert [program.linear_path(node) for node in program.linears()] == [Q, K, UP]
