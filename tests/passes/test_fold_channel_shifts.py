import operator
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hif4c.compiler.emit import to_graph
from hif4c.compiler.planes import whole_tensor
from hif4c.passes.add_side_branches import add_side_branches
from hif4c.passes.apply_channel_masks import apply_channel_masks
from hif4c.passes.fold_channel_masks import fold_channel_masks
from hif4c.passes.fold_channel_shifts import fold_channel_shifts
from hif4c.passes.functionalize_rotary import functionalize_rotary
from hif4c.passes.fuse_activation import fuse_activation
from hif4c.passes.insert_qdq import insert_qdq
from hif4c.passes.lower_linears import lower_linears
from hif4c.passes.mark_boundaries import BLOCK_PATTERN, mark_boundaries
from hif4c.passes.pack_weights import pack_weights
from hif4c.passes.program import Decision, Precision, Program
from hif4c.passes.remove_noops import remove_noops
from hif4c.passes.rotate_inputs import rotate_inputs
from hif4c.passes.share_quantized_inputs import share_quantized_inputs
from hif4c.passes.verify import Stage, verify
from hif4c.runtime.executor import Executor
from tests.passes.builder import Builder, decide, draw, evaluate, state_of
from tests.support.checkpoints import VARIANTS

aten = torch.ops.aten
TEXT = "blocks.0.attn2.to_k"
PRODUCERS = {"attn1.to_out.0": "attn1.to_v.bias", "attn2.to_out.0": "attn2.to_v.bias", "attn2.to_q": "norm2.bias"}
ROWS = {0: "attn1.to_q", 3: "ffn.net.0.proj"}


def planned(captures, variant: str = "t2v", dtype: torch.dtype = torch.bfloat16, **exceptions: str) -> Program:
    """The small captured model with a decision for every linear, and a large random shift for every quantized input."""
    program = captures.variant(variant, dtype)
    for transform in (remove_noops, functionalize_rotary, mark_boundaries):
        transform(program)
    for node in program.linears():
        path = program.linear_path(node)
        chosen = Precision.W4A4 if BLOCK_PATTERN.match(path) else Precision.HIGH
        program.decisions[path] = Decision(path, exceptions.get(path.rpartition(".")[2], chosen), "test")
    return program


def assign_shifts(program: Program, seed: int = 7) -> dict[str, str]:
    """Linear's path -> name of its input's shift, for the inputs that any quantized linear reads."""
    generator = torch.Generator().manual_seed(seed)
    groups: dict[torch.fx.Node, str] = {}
    assignment = {}
    for node in program.linears():
        path = program.linear_path(node)
        if program.decisions[path].quantized:
            name = groups.setdefault(node.args[0], f"{path}.shift")
            assignment[path] = name
            if name not in program.shifts:
                program.shifts[name] = 3 * torch.randn(node.args[1].meta["val"].shape[1], generator=generator)
    return assignment


def evaluate_exactly(program: Program, state: dict[str, torch.Tensor], inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The program's result in exact arithmetic, with the shifts applied to a checkpoint in float64."""
    shifted = {name: value.double() for name, value in state.items()}
    plain = program.copy()
    for key, spec in program.tensors.items():
        if spec.source is None:
            continue
        if spec.input_shift is not None:
            weight = state[spec.source.removesuffix(".bias") + ".weight"].double()
            shifted[spec.source] = shifted[spec.source] + weight @ program.shifts[spec.input_shift].double()
        rows = shifted[spec.source].clone().view(-1, shifted[spec.source].shape[-1])
        for row, name in spec.row_shifts:
            rows[row] -= program.shifts[name].double()
            shifted[spec.source] = rows.view(spec.shape)
        plain.tensors[key] = replace(spec, packed_from=torch.float64, row_shifts=(), input_shift=None)
    (found,) = evaluate(plain, shifted, inputs)
    return found


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def moved(program: Program) -> tuple[dict[str, tuple[tuple[int, str], ...]], dict[str, str]]:
    """What is taken off which stored tensor, and which bias gives what back."""
    specs = list(program.tensors.values())
    return (
        {spec.name: spec.row_shifts for spec in specs if spec.row_shifts},
        {spec.name: spec.input_shift for spec in specs if spec.input_shift is not None},
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_shifted_in_a_wan_model_and_what_is_not(variant, captures):
    """With one timestep a sample and with one a token, the table is added and cut in different ways."""
    program = planned(captures, variant)
    before = draw(program)
    assignment = assign_shifts(program)
    result = fold_channel_shifts(program, assignment)
    verify(program, Stage.PLANNED)
    assert draw(program) == before  # the graph does not change, only what its tensors hold
    assert result.changed
    assert result.notes == [
        "shifted 4 inputs in modulation tables",
        "shifted 5 inputs in linears",  # the text's is the embedder's second linear
        "shifted 2 inputs in layer norms",
        "2 not shifted, the input is made by aten.gelu.default: blocks.0.ffn.net.2.shift and 1 more",
    ]
    taken, given = moved(program)
    expected = {"condition_embedder.text_embedder.linear_2.bias": ((0, f"{TEXT}.shift"),)}
    for block in ("blocks.0", "blocks.1"):
        expected[f"{block}.scale_shift_table"] = tuple((row, f"{block}.{path}.shift") for row, path in ROWS.items())
        expected |= {f"{block}.{bias}": ((0, f"{block}.{path}.shift"),) for path, bias in PRODUCERS.items()}
    assert taken == expected
    kept = ("blocks.0.ffn.net.2", "blocks.1.ffn.net.2")
    shifted = {path: name for path, name in assignment.items() if path not in kept}
    assert given == {f"{path}.bias": name for path, name in shifted.items()}
    assert {path: item.shift for path, item in program.decisions.items() if item.shift is not None} == shifted


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_function_stays_the_same(variant, captures, inputs):
    program = planned(captures, variant)
    state, sample = state_of(program), inputs(variant)
    expected = evaluate_exactly(program, state, sample)
    fold_channel_shifts(program, assign_shifts(program))
    # float64 rounds by 2^-53, and shifts of 3 cost two bits of it in some hundred operations.
    assert distance(evaluate_exactly(program, state, sample), expected) < 1e-12
    # What is taken off and not given back does not go unseen, whatever made the input.
    for name in ("blocks.1.norm2.bias", "blocks.0.attn1.to_v.bias", "blocks.1.scale_shift_table"):
        key = next(key for key, spec in program.tensors.items() if spec.name == name)
        spec = program.tensors[key]
        program.tensors[key] = replace(spec, row_shifts=())
        assert distance(evaluate_exactly(program, state, sample), expected) > 1e-3, name
        program.tensors[key] = spec


def test_as_it_is_stored_the_program_is_the_original(captures, inputs):
    """In float32, with the tensors that the compiler stores."""
    program = planned(captures, dtype=torch.float32)
    state = state_of(program)
    checkpoint = SimpleNamespace(read=state.__getitem__, release=lambda name: None)
    sample = [item.float() for item in inputs()]

    def run() -> torch.Tensor:
        tensors = {
            spec.name: spec.value if spec.source is None else whole_tensor(spec, program, checkpoint)
            for spec in program.tensors.values()
        }
        return Executor(to_graph(program), tensors, torch.device("cpu"))(*sample)[0]

    expected = run()
    fold_channel_shifts(program, assign_shifts(program))
    assert program.tensors["p_blocks_0_attn1_to_v_bias"].changed
    # 2^-24 a rounding; sums of up to 256 terms of size 3 and two blocks between.
    assert distance(run(), expected) < 1e-4


def test_with_masks_rotation_and_side_branches(captures, inputs):
    """A shift is taken off before the mask of the same rows, and the side branch reads the shifted input."""
    program = planned(captures)
    state, sample = state_of(program), inputs()
    expected = evaluate_exactly(program, state, sample)
    for path, decision in program.decisions.items():
        program.decisions[path] = replace(decision, rank=3 if decision.quantized else 0)
    assignment = assign_shifts(program)
    fold_channel_shifts(program, assignment)
    generator = torch.Generator().manual_seed(5)
    for name, shift in list(program.shifts.items()):
        program.masks[name] = 2.0 ** torch.randn(shift.shape, generator=generator)
        if name.endswith(("attn1.to_q.shift", "ffn.net.2.shift")):  # outlier columns
            program.masks[name][[3, 40]] = 0
    apply_channel_masks(program, assignment)
    rotate_inputs(program, 64)
    assert fold_channel_masks(program).notes[:2] == ["folded 2 masks into layer norms", "folded 4 masks into linears"]
    verify(program, Stage.PLANNED)
    bias = program.tensors["p_blocks_0_attn1_to_v_bias"]
    path = "blocks.0.attn1.to_out.0.shift"
    assert (bias.row_shifts, bias.row_mask, bias.input_shift) == (((0, path),), path, "blocks.0.attn1.to_q.shift")
    for transform in (insert_qdq, share_quantized_inputs, add_side_branches):
        transform(program)
        verify(program, Stage.QDQ)
    # The tolerance of `test_fold_channel_masks`, and the condition of the SVD.
    assert distance(evaluate_exactly(program, state, sample), expected) < 1e-10
    pack_weights(program)
    verify(program, Stage.PACKED)
    for transform in (lower_linears, fuse_activation):
        transform(program)
        verify(program, Stage.LOWERED)


@pytest.mark.parametrize("high", ["to_k", "to_q"])
def test_linears_in_high_precision_give_it_back_too(high, captures, inputs):
    """Some readers of an input are not quantized, and neither have masks nor ask for the shift."""
    program = planned(captures, **{high: Precision.HIGH})
    state, sample = state_of(program), inputs()
    expected = evaluate_exactly(program, state, sample)
    assignment = assign_shifts(program)
    assert f"blocks.0.attn1.{high}" not in assignment
    fold_channel_shifts(program, assignment)
    verify(program, Stage.PLANNED)
    shared = f"blocks.0.attn1.{'to_q' if high == 'to_k' else 'to_k'}.shift"
    assert program.decisions[f"blocks.0.attn1.{high}"].shift == shared
    assert moved(program)[1][f"blocks.0.attn1.{high}.bias"] == shared
    assert distance(evaluate_exactly(program, state, sample), expected) < 1e-12


# Hand-made programs: one attention, one norm or one modulated norm, as they are shifted, and with something odd.


def attention(bias=True, reader="", own_bias=True, named="blocks.0.to_out", **options) -> Program:
    """to_v -> value of an attention of 8 tokens and 4 heads of 16 channels -> to_out."""
    build = Builder(x=(2, 8, 64), q=(2, 4, 8, 16), mask=(8, 8))
    x, q, mask = build.inputs
    value = build.linear(x, "blocks.0.to_v", 64, bias=bias)
    value = build.call(aten.permute.default, build.call(aten.unflatten.int, value, 2, [4, -1]), [0, 2, 1, 3])
    more = [mask] if options.pop("masked", False) else []
    merged = build.call(aten.scaled_dot_product_attention.default, q, q, value, *more, **options)
    merged = build.call(aten.flatten.using_ints, build.call(aten.transpose.int, merged, 1, 2), 2, 3)
    outputs = [build.linear(merged, named, 64, bias=own_bias)]
    if reader == "bias":
        outputs.append(build.call(aten.silu.default, build.program.placeholder("t_blocks_0_to_out_bias")))
    elif reader == "linear without bias":
        outputs.append(build.linear(merged, "blocks.0.more", 64, bias=False))
    elif reader == "producer's bias":
        outputs.append(build.call(aten.silu.default, build.program.placeholder("t_blocks_0_to_v_bias")))
    elif reader:
        read = {"input": merged, "value": value}[reader]
        outputs.append(build.call(aten.silu.default, read))
    return finish(build, outputs)


def norm(bias=True, dtype=torch.float32) -> Program:
    """layer norm -> cast -> to_out."""
    build = Builder(x=(2, 8, 64))
    affine = [build.tensor("blocks.0.norm.weight", 64, dtype=dtype)]
    affine.append(build.tensor("blocks.0.norm.bias", 64, dtype=dtype) if bias else None)
    x = build.call(aten.to.dtype, build.inputs[0], dtype)
    x = build.call(aten.layer_norm.default, x, [64], *affine, 1e-6)
    return finish(build, [build.linear(build.call(aten.to.dtype, x, torch.bfloat16), "blocks.0.to_out", 16)])


def modulated(
    dtype=torch.float32, by_token=False, shape=(1, 2, 64), axis=-2, alphas=({}, {}), lift=None, twice="", reader=""
) -> Program:
    """(norm * (1 + scale) + shift) -> cast -> to_out, scale and shift from a table [1, 2, 64] plus time."""
    rows, width = shape[1:]
    tokens = 8 if (rows, width) in ((2, 64), (2, 1)) else 2
    build = Builder(x=(2, tokens, 64), time=(2, 8, rows, width) if by_token else (2, rows, width))
    x, time = build.inputs
    table = build.tensor("blocks.0.scale_shift_table", *(shape if lift is None else shape[1:]), dtype=dtype)
    lifted = build.call(aten.unsqueeze.default, table, lift or 0) if by_token or lift is not None else table
    total = build.call(aten.add.Tensor, time, lifted, **alphas[0])
    chunk = build.call(aten.chunk.default, total, 2, axis)
    shift, scale = (build.call(operator.getitem, chunk, index) for index in (0, 1))
    if by_token:
        shift, scale = (build.call(aten.squeeze.dim, row, 2) for row in (shift, scale))
    scaled = build.call(aten.mul.Tensor, build.call(aten.silu.default, x), build.call(aten.add.Tensor, scale, 1.0))
    x = build.call(aten.add.Tensor, scaled, shift, **alphas[1])
    sums = [build.call(aten.silu.default, {"row": shift, "total": total, "sum": x}[reader])] if reader else []
    if twice:
        again = build.call(operator.getitem, chunk, 0)
        sums.append(again if twice == "row" else build.call(aten.add.Tensor, again, scaled))
    x = build.call(aten.to.dtype, x, torch.bfloat16)
    outputs = [build.linear(x, "blocks.0.to_out", 16)]
    return finish(build, outputs + sums)


def finish(build: Builder, outputs: list[torch.fx.Node]) -> Program:
    program = build.finish(*outputs)
    decide(program)
    last = next(spec.shape[1] for spec in program.tensors.values() if spec.name == "blocks.0.to_out.weight")
    program.shifts = {"s": torch.linspace(-2, 5, last)}
    return program


def sample_of(program: Program) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(program.placeholder(name).meta["val"].shape, generator=generator, dtype=torch.float64)
        for name in program.inputs
    ]


@pytest.mark.parametrize(
    ("make", "change", "where"),
    [
        (attention, {}, {"blocks.0.to_v.bias": ((0, "s"),)}),
        (attention, {"is_causal": True, "dropout_p": 0.0}, {"blocks.0.to_v.bias": ((0, "s"),)}),
        (norm, {}, {"blocks.0.norm.bias": ((0, "s"),)}),
        (norm, {"dtype": torch.bfloat16}, {"blocks.0.norm.bias": ((0, "s"),)}),
        (modulated, {}, {"blocks.0.scale_shift_table": ((0, "s"),)}),
        (modulated, {"axis": 1}, {"blocks.0.scale_shift_table": ((0, "s"),)}),
        (modulated, {"by_token": True}, {"blocks.0.scale_shift_table": ((0, "s"),)}),
    ],
)
def test_shifted(make, change, where):
    program = make(**change)
    state, sample = state_of(program), sample_of(program)
    expected = evaluate_exactly(program, state, sample)
    assert fold_channel_shifts(program, {"blocks.0.to_out": "s"}).changed
    assert moved(program) == (where, {"blocks.0.to_out.bias": "s"})
    assert distance(evaluate_exactly(program, state, sample), expected) < 1e-13


OTHERS = "not only linears with a bias of their own read it"
CROWD = "others read the same values"
NO_BIAS = "what makes it has no bias of its own"
WEIGHTS = "the weights of the attention before it need not sum to one"
TABLE = "the modulation table is not in float32, so its other rows would be rounded again"
ADDED = "the input is made by aten.add.Tensor"


@pytest.mark.parametrize(
    ("make", "change", "reason"),
    [
        (attention, {"own_bias": False}, OTHERS),
        (attention, {"reader": "bias"}, OTHERS),
        (attention, {"reader": "linear without bias"}, OTHERS),
        (attention, {"reader": "input"}, OTHERS),
        (attention, {"reader": "value"}, CROWD),
        (attention, {"reader": "producer's bias"}, NO_BIAS),
        (attention, {"bias": False}, NO_BIAS),
        (attention, {"dropout_p": 0.1}, WEIGHTS),
        # A token that a mask keeps from all others gets zeros, with or without the offset.
        (attention, {"masked": True}, WEIGHTS),
        (norm, {"bias": False}, NO_BIAS),
        (modulated, {"dtype": torch.bfloat16}, TABLE),
        (modulated, {"alphas": ({}, {"alpha": 2})}, ADDED),
        (modulated, {"alphas": ({"alpha": 2}, {})}, ADDED),
        (modulated, {"shape": (1, 2, 128), "axis": -1}, ADDED),  # halves of the channels, not the two rows
        (modulated, {"shape": (1, 4, 64)}, ADDED),  # two rows a piece
        (modulated, {"shape": (1, 2, 1)}, ADDED),  # one number for all channels
        (modulated, {"shape": (2, 2, 64)}, ADDED),  # a table for every sample
        (modulated, {"lift": 1}, ADDED),  # its rows along the samples
        (modulated, {"twice": "row"}, ADDED),
        (modulated, {"twice": "sum"}, ADDED),
        (modulated, {"reader": "row"}, ADDED),
        (modulated, {"reader": "row", "by_token": True}, ADDED),
        (modulated, {"reader": "total"}, ADDED),
        (modulated, {"reader": "sum"}, ADDED),
    ],
)
def test_left_alone_with_a_reason(make, change, reason):
    program = make(**change)
    before, tensors, decisions = draw(program), dict(program.tensors), dict(program.decisions)
    result = fold_channel_shifts(program, {"blocks.0.to_out": "s"})
    assert not result.changed
    assert result.notes == [f"1 not shifted, {reason}: s"]
    assert (draw(program), program.tensors, program.decisions) == (before, tensors, decisions)


def test_a_bias_that_is_not_the_linears_own_is_none():
    """W s is made with the weight beside the bias in the checkpoint."""
    program = attention()
    key = "t_blocks_0_to_out_bias"
    program.tensors[key] = replace(program.tensors[key], name="blocks.0.other.bias", source="blocks.0.other.bias")
    assert fold_channel_shifts(program, {"blocks.0.to_out": "s"}).notes == [f"1 not shifted, {OTHERS}: s"]


def test_without_shifts_nothing_happens():
    program = attention()
    for nothing in (None, {}):
        result = fold_channel_shifts(program, nothing)
        assert (result.changed, result.notes) == (False, ["the recipe has no channel shifts"])


@pytest.mark.parametrize(
    ("assignment", "shift", "message"),
    [
        ({"blocks.9.to_out": "s"}, 64, r"linears that do not exist: \['blocks.9.to_out'\]"),
        ({"blocks.0.to_out": "t"}, 64, "blocks.0.to_out: no shift is called 't'"),
        ({"blocks.0.to_out": "s"}, 63, r"shift s has shape \[63\], not \[64\]"),
        ({"blocks.0.to_out": "s", "blocks.0.more": "u"}, 64, "more: its input is assigned two shifts, s and u"),
    ],
)
def test_assignments_that_cannot_be(assignment, shift, message):
    program = attention(reader="linear without bias")
    program.shifts = {"s": torch.zeros(shift), "u": torch.zeros(64)}
    tensors = dict(program.tensors)
    with pytest.raises(ValueError, match=message):
        fold_channel_shifts(program, assignment)
    assert program.tensors == tensors
