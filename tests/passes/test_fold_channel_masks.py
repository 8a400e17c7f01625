from collections.abc import Callable

import pytest
import torch

from hif4c.passes.apply_channel_masks import apply_channel_masks
from hif4c.passes.fold_channel_masks import fold_channel_masks
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
from tests.passes.builder import Builder, bind, decide, draw, evaluate, state_of, targets

aten, hif4 = torch.ops.aten, torch.ops.hif4
FOLDED = ("attn1.to_out.0", "attn2.to_q", "attn2.to_out.0")


def assign_masks(program: Program, powers_of_two: bool = False) -> None:
    """A random mask for every masked input, both signs, named after its first reader."""
    generator = torch.Generator().manual_seed(5)
    groups: dict[torch.fx.Node, str] = {}
    assignment = {}
    for node in program.linears():
        path = program.linear_path(node)
        if program.decisions[path].quantized:
            name = groups.setdefault(node.args[0], f"{path}.mask")
            assignment[path] = name
            if name not in program.masks:
                exponents = torch.randn(node.args[1].meta["val"].shape[1], generator=generator) * 2
                sign = torch.where(torch.rand(exponents.shape, generator=generator) < 0.5, -1.0, 1.0)
                program.masks[name] = sign * 2.0 ** (exponents.round() if powers_of_two else exponents)
    apply_channel_masks(program, assignment)


@pytest.fixture
def wan(captures) -> Callable[..., Program]:
    """The small captured text-to-video model, planned: every linear of a block is W4A4 and has a mask."""

    def make(powers_of_two: bool = False, rotation: int = 0, **exceptions: str) -> Program:
        program = captures.variant("t2v")
        remove_noops(program)
        functionalize_rotary(program)
        mark_boundaries(program)
        for node in program.linears():
            path = program.linear_path(node)
            chosen = Precision.W4A4 if BLOCK_PATTERN.match(path) else Precision.HIGH
            program.decisions[path] = Decision(path, exceptions.get(path.rpartition(".")[2], chosen), "test")
        assign_masks(program, powers_of_two)
        rotate_inputs(program, rotation)
        return program

    return make


def quantized(program: Program) -> Program:
    insert_qdq(program)
    share_quantized_inputs(program)
    verify(program, Stage.QDQ)
    return program


def lowered(program: Program) -> Program:
    quantized(program)
    pack_weights(program)
    verify(program, Stage.PACKED)
    lower_linears(program)
    fuse_activation(program)
    verify(program, Stage.LOWERED)
    return program


def test_what_is_folded_in_a_wan_model_and_what_is_not(wan):
    program = wan()
    result = fold_channel_masks(program)
    verify(program, Stage.PLANNED)
    assert result.changed
    assert result.notes == [
        "folded 2 masks into layer norms",
        "folded 4 masks into linears",
        "4 not folded, the input is made by aten.add.Tensor: blocks.0.attn1.to_q and 3 more",
        "1 not folded, the linear before it is in high precision: blocks.0.attn2.to_k",
        "2 not folded, the input is made by aten.gelu.default: blocks.0.ffn.net.2 and 1 more",
    ]
    folded = [path for path, decision in program.decisions.items() if decision.mask_folded]
    assert sorted(folded) == sorted(f"blocks.{block}.{path}" for block in (0, 1) for path in FOLDED)
    rows = {spec.name: spec.row_mask for spec in program.tensors.values() if spec.row_mask is not None}
    names = {"norm2": "attn2.to_q", "attn1.to_v": "attn1.to_out.0", "attn2.to_v": "attn2.to_out.0"}
    assert rows == {
        f"blocks.{block}.{producer}.{kind}": f"blocks.{block}.{reader}.mask"
        for block in (0, 1)
        for producer, reader in names.items()
        for kind in ("weight", "bias")
    }


def test_the_function_stays_the_same(wan, inputs):
    """In exact arithmetic: as captured, with masks, and with masks folded, before and after Q/DQ."""
    program = wan(rotation=64)
    state, sample = state_of(program), inputs()
    (expected,) = evaluate(program, state, sample)

    def error(changed: Program) -> float:
        (found,) = evaluate(changed, state, sample)
        return float((found - expected).abs().max() / expected.abs().max())

    # Nothing rounds but float64, whose 2^-53 grows with the range of the masks (some 2^6 each way) and through the
    # norms and attentions of two blocks.
    assert error(quantized(wan(rotation=64))) < 1e-11
    fold_channel_masks(program)
    assert error(quantized(program)) < 1e-11
    # A mask that is on one side alone does not go unseen.
    masked = next(node for node in program.graph.nodes if node.target is hif4.quantize.default and node.args[1])
    masked.args = (masked.args[0], None, masked.args[2])
    assert error(program) > 1e-3


def activation_codes(program: Program, state, sample) -> dict[str, torch.Tensor]:
    """Codes of every quantized activation by the name of what is quantized, and the program's output."""
    executor = bind(program, state)
    values = executor.trace(*sample)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    found = {"output": values[-1]}
    for node, value in zip(calls, values, strict=True):
        if node.target is hif4.quantize.default and node.args[0].op == "call_function":
            found[node.args[0].name] = value[0]
    return found


def test_powers_of_two_change_no_code(wan, inputs):
    """Scaling by 2^k commutes with every rounding, so that each code and each bit of the output stays."""
    state = state_of(wan())
    sample = inputs()
    plain = wan(powers_of_two=True)
    folded = wan(powers_of_two=True)
    fold_channel_masks(folded)
    expected = activation_codes(quantized(plain), state, sample)
    found = activation_codes(quantized(folded), state, sample)
    assert found.keys() == expected.keys()
    assert len(found) > 12
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_powers_of_two_change_no_bit_of_the_fused_program(wan, inputs):
    state = state_of(wan())
    sample = inputs()
    plain = lowered(wan(powers_of_two=True, rotation=32))
    program = wan(powers_of_two=True, rotation=32)
    fold_channel_masks(program)
    folded = lowered(program)
    assert torch.equal(bind(folded, state)(*sample)[0], bind(plain, state)(*sample)[0])
    stays = [spec.name for spec in folded.tensors.values() if spec.name.endswith(".mask")]
    assert len([spec for spec in plain.tensors.values() if spec.name.endswith(".mask")]) == len(stays) + 6


def test_row_masked_tensors_are_rounded_once(wan):
    """The packed weight is made from the product in float32, and the fused linear reads the bias in float32."""
    program = wan()
    fold_channel_masks(program)
    lowered(program)
    specs = {spec.name: spec for spec in program.tensors.values()}
    path, mask = "blocks.0.attn1.to_v", "blocks.0.attn1.to_out.0.mask"
    for plane in ("codes", "scales"):
        spec = specs[f"{path}.weight.{plane}"]
        assert (spec.row_mask, spec.mask, spec.packed_from) == (mask, "blocks.0.attn1.to_q.mask", torch.bfloat16)
    bias = specs[f"{path}.bias"]
    assert (bias.row_mask, bias.dtype, bias.packed_from) == (mask, torch.float32, torch.bfloat16)
    (linear,) = program.placeholder("p_blocks_0_attn1_to_v_bias").users
    assert linear.target is hif4.linear.default
    assert linear.meta["val"].dtype == torch.bfloat16
    assert mask not in specs  # nothing multiplies by it when the program runs


def test_weight_only_linears_can_take_a_mask(wan, inputs):
    program = wan(to_v=Precision.W4A16)
    state = state_of(program)
    (expected,) = evaluate(program, state, inputs())
    assert "folded 4 masks into linears" in fold_channel_masks(program).notes
    (found,) = evaluate(quantized(program), state, inputs())
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-11
    lowered_program = wan(to_v=Precision.W4A16)
    fold_channel_masks(lowered_program)
    lowered(lowered_program)
    (linear,) = lowered_program.placeholder("p_blocks_0_attn1_to_v_bias").users
    assert linear.target is hif4.linear_w4.default


# Hand-made programs: one attention or one norm, as they are folded, and with something odd.


def call(target, *arguments):
    """A step of a hand-made program: (builder, node) -> node."""
    return lambda build, node: build.call(target, node, *arguments)


UNFLATTEN, FLATTEN = call(aten.unflatten.int, 2, [4, -1]), call(aten.flatten.using_ints, 2, 3)
HEADS_OUT, HEADS_IN = call(aten.permute.default, [0, 2, 1, 3]), call(aten.transpose.int, 1, 2)


def attention(
    split=(UNFLATTEN, HEADS_OUT), merge=(HEADS_IN, FLATTEN), to_v=Precision.W4A4, reader="", zero=False, **odd
) -> Program:
    """to_v -> value of an attention of 32 tokens and 4 heads of 32 channels -> to_out."""
    build = Builder(x=(2, 32, 128), q=(2, 4, 32, 32))
    x, q = build.inputs
    value = build.linear(x, "blocks.0.to_v", 128)
    for step in split:
        value = step(build, value)
    options = {"enable_gqa": True} if "gqa" in odd else {}
    key = value if "value_is_key" in odd else q
    merged = build.call(aten.scaled_dot_product_attention.default, q, key, value, **options)
    for step in merge:
        merged = step(build, merged)
    outputs = [build.linear(merged, "blocks.0.to_out", 64)]
    if reader == "high":
        outputs.append(build.linear(merged, "blocks.0.high", 64))
    elif reader:
        read = {"input": merged, "value": value, "bias": build.program.placeholder("t_blocks_0_to_v_bias")}[reader]
        outputs.append(build.call(aten.silu.default, read))
    program = build.finish(*outputs)
    decide(program, to_v=to_v, high=Precision.HIGH)
    program.masks = {"m": torch.linspace(0.0 if zero else 0.5, 2, 128)}
    apply_channel_masks(program, {"blocks.0.to_out": "m"})
    return program


def norm(affine=True, dtype=torch.float32, axes=1, between=None, reader=False) -> Program:
    """norm -> cast -> to_q."""
    build = Builder(x=(2, 4, 64))
    x = build.call(aten.to.dtype, build.inputs[0], dtype)
    shape = [4, 64][-axes:]
    affine_tensors = [build.tensor(f"blocks.0.norm2.{kind}", *shape, dtype=dtype) for kind in ("weight", "bias")]
    node = build.call(aten.layer_norm.default, x, shape, *(affine_tensors if affine else [None, None]), 1e-6)
    if between is not None:
        node = between(build, node)
    node = build.call(aten.to.dtype, node, torch.bfloat16)
    outputs = [build.linear(node, "blocks.0.to_q", 8)]
    if reader:
        outputs.append(build.call(aten.silu.default, affine_tensors[0]))
    program = build.finish(*outputs)
    program.clean()
    decide(program)
    program.masks = {"m": torch.linspace(0.5, 2, 64)}
    apply_channel_masks(program, {"blocks.0.to_q": "m"})
    return program


def test_text(golden_text):
    program = attention()
    before = draw(program)
    notes = "; ".join(fold_channel_masks(program).notes)
    after = draw(program)
    golden_text("fold_channel_masks", f"{before}\n--- {notes}\n\n{after}\n--- insert_qdq\n\n{draw(quantized(program))}")


CHANNELS = "the way from the producer changes the channels"
OTHERS = "others read the same values"


@pytest.mark.parametrize(
    ("make", "change", "reason"),
    [
        (attention, {"zero": True}, "outlier columns need the input unmasked"),
        (attention, {"to_v": Precision.HIGH}, "the linear before it is in high precision"),
        (attention, {"reader": "input"}, OTHERS),
        (attention, {"reader": "value"}, OTHERS),
        (attention, {"reader": "high"}, OTHERS),
        (attention, {"reader": "bias"}, "the weights before it are shared or computed"),
        (attention, {"value_is_key": True}, CHANNELS),
        (attention, {"gqa": True}, CHANNELS),
        # Every fourth channel makes a head; no reordering undoes it.
        (
            attention,
            {"split": (call(aten.unflatten.int, 2, [-1, 4]), call(aten.permute.default, [0, 3, 1, 2]))},
            CHANNELS,
        ),
        # Tokens stand where channels should, so that the attention mixes channels.
        (attention, {"split": (UNFLATTEN, call(aten.permute.default, [0, 2, 3, 1]))}, CHANNELS),
        # Heads and channels change places; tokens and heads are merged.
        (attention, {"merge": (call(aten.permute.default, [0, 2, 3, 1]), FLATTEN)}, CHANNELS),
        (attention, {"merge": (call(aten.transpose.int, 1, 3), FLATTEN)}, CHANNELS),
        (attention, {"merge": (HEADS_IN, FLATTEN, call(aten.silu.default))}, "the input is made by aten.silu.default"),
        (norm, {"affine": False}, "the layer norm has no weight"),
        (norm, {"dtype": torch.bfloat16}, "the layer norm is not in float32"),
        (norm, {"axes": 2}, CHANNELS),
        (norm, {"between": call(aten.add.Tensor, 1.0)}, "the input is made by aten.add.Tensor"),
        (norm, {"reader": True}, "the weights before it are shared or computed"),
    ],
)
def test_left_alone_with_a_reason(make, change, reason):
    program = make(**change)
    before, decisions = draw(program), dict(program.decisions)
    result = fold_channel_masks(program)
    assert not result.changed
    path = "blocks.0.to_out" if make is attention else "blocks.0.to_q"
    assert result.notes[2:] == [f"1 not folded, {reason}: {path}"]
    assert (draw(program), program.decisions) == (before, decisions)


@pytest.mark.parametrize(
    ("split", "merge"),
    [
        ((UNFLATTEN, HEADS_OUT), (HEADS_IN, FLATTEN)),
        ((UNFLATTEN, HEADS_IN), (HEADS_OUT, call(aten.flatten.using_ints, -2))),
        # Interleaved on the way in and on the way out.
        (
            (call(aten.unflatten.int, -1, [-1, 4]), call(aten.permute.default, [0, 3, 1, 2])),
            (call(aten.permute.default, [0, 2, 3, 1]), FLATTEN),
        ),
        # Batch and tokens merged and split again behind the attention.
        ((UNFLATTEN, HEADS_OUT), (HEADS_IN, call(aten.flatten.using_ints, 0, 1), call(aten.flatten.using_ints, 1))),
    ],
)
def test_layouts_that_keep_the_channels(split, merge):
    program = attention(split, merge)
    state = state_of(program)
    generator = torch.Generator().manual_seed(1)
    sample = [torch.randn(2, 32, 128, generator=generator), torch.randn(2, 4, 32, 32, generator=generator)]
    (expected,) = evaluate(program, state, sample)
    assert fold_channel_masks(program).changed
    (found,) = evaluate(quantized(program), state, sample)
    assert float((found - expected).abs().max()) < 1e-12 * float(expected.abs().max())


def test_a_norm_is_folded():
    program = norm()
    assert fold_channel_masks(program).notes == ["folded 1 masks into layer norms", "folded 0 masks into linears"]
    assert "aten.to.dtype" in targets(program)
    rows = {spec.name: (spec.row_mask, spec.dtype) for spec in program.tensors.values() if spec.row_mask is not None}
    assert rows == dict.fromkeys(("blocks.0.norm2.weight", "blocks.0.norm2.bias"), ("m", torch.float32))


def test_without_masks_nothing_happens():
    program = norm()
    decide(program)
    result = fold_channel_masks(program)
    assert (result.changed, result.notes) == (False, ["no input has a mask"])
