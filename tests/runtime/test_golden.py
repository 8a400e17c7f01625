import contextlib
from dataclasses import replace

import pytest
import torch

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.golden import (
    FLIP_MARGIN,
    LINEAR_ERROR,
    OPERATOR_ERROR,
    SIDE_ERROR,
    Replay,
    make_golden,
    relative_distance,
    replay,
)  # fmt: skip
from hif4c.runtime.graph import TARGETS, Graph, InputType, Ref, TensorType
from hif4c.runtime.transformer import CompiledTransformer, load

BLOCK_LINEARS = (
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v",
    "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2",
)  # fmt: skip
LINEARS = [f"blocks.{block}.{name}" for block in range(2) for name in BLOCK_LINEARS]


@pytest.fixture(scope="module")
def model(artifacts):
    return load(artifacts("t2v", "rtn"))


@pytest.fixture(scope="module")
def golden(model):
    return make_golden(model)


def test_distances():
    """Equal zeros are no distance, and nothing that is not finite is near anything."""
    zeros, ones = torch.zeros(3), torch.ones(3)
    assert relative_distance(zeros, zeros) == 0
    assert relative_distance(ones, zeros) == float("inf")
    assert relative_distance(1.5 * ones, ones) == 0.5
    assert relative_distance(ones * float("nan"), ones) == relative_distance(ones[:2], ones) == float("inf")


def with_tensors(model, change):
    """The same program on changed weights."""
    tensors = {
        item.name: value.clone() for item, value in zip(model.graph.tensors, model.executor.tensors, strict=True)
    }
    change(tensors)
    return CompiledTransformer(model.graph, tensors, model.config, model.dtype, model.expand_timesteps)


def test_where_it_was_made_it_is_equal_to_the_bit(model, golden):
    result = replay(model, golden)
    recorded = replace(result, operator_error=0.0, worst_operator="")
    assert recorded == Replay(0, len(LINEARS), 0.0, "", 0.0, float(golden["flip_distance"]))
    # Kernels round where their definitions round: what they add in another order is far below a wrong one.
    assert result.operator_error < OPERATOR_ERROR / 4
    assert result.identical
    assert result.passed
    assert 0 < result.flip_distance < 0.1


def test_it_is_the_same_every_time(model, golden):
    again = make_golden(model)
    assert again.keys() == golden.keys()
    for name, value in golden.items():
        assert torch.equal(again[name], value), name


def test_it_holds_one_call_one_quantized_row_and_every_linear_alone(model, golden):
    assert set(golden) == {
        "hidden_states", "timestep", "encoder_hidden_states", "sample", "flip_distance",
        "row", "row.codes", "row.scales", *(f"linear.{path}" for path in LINEARS),
    }  # fmt: skip
    assert golden["sample"].shape == golden["hidden_states"].shape
    assert torch.equal(
        model(golden["hidden_states"], golden["timestep"], golden["encoder_hidden_states"]).sample, golden["sample"]
    )
    codes, scales = torch.ops.hif4.quantize(golden["row"])
    assert torch.equal(codes, golden["row.codes"])
    assert torch.equal(scales, golden["row.scales"])
    for path in LINEARS:
        assert golden[f"linear.{path}"].dtype == torch.float32
        assert golden[f"linear.{path}"].abs().sum() > 0


@pytest.mark.parametrize(("recipe", "variant"), [("weight-only", "t2v"), ("rotate", "t2v"), ("rtn", "ti2v")])
def test_other_kinds_of_programs(recipe, variant, artifacts):
    """Without quantized activations, with a rotation, and with a timestep a token: all linears are replayed."""
    other = load(artifacts(variant, recipe))
    result = replay(other, make_golden(other))
    assert result.identical
    assert result.passed
    assert result.linears == len(LINEARS)


def test_last_bit_differences_pass(model, golden):
    """What another machine may do: here all inputs of the call move by an ulp, the very yardstick."""
    moved = dict(golden)
    moved["hidden_states"] = torch.nextafter(golden["hidden_states"], torch.tensor(-torch.inf).bfloat16())
    result = replay(model, moved)
    assert 0 < result.distance < FLIP_MARGIN * result.flip_distance
    assert result.passed
    assert not result.identical


def zero(codes):
    codes.zero_()


def flip_signs(codes):
    codes.bitwise_xor_(0x88)


def swap_nibbles(codes):
    codes.copy_((codes >> 4) | (codes << 4))


def swap_levels(scales):
    """E1_16 bits taken from the wrong byte."""
    scales.copy_(scales[..., [0, 1, 3, 2]])


def double_units(scales):
    scales[..., 0].add_(4)


def forget(bias):
    bias.zero_()


CHANGES = [
    ("weight.codes", zero), ("weight.codes", flip_signs), ("weight.codes", swap_nibbles),
    ("weight.scales", swap_levels), ("weight.scales", double_units), ("bias", forget),
]  # fmt: skip


@pytest.mark.parametrize("recipe", ["rtn", "weight-only"])
@pytest.mark.parametrize(("ending", "change"), CHANGES, ids=[change.__name__ for _, change in CHANGES])
def test_one_wrong_linear_of_all_does_not_pass_and_is_named(recipe, ending, change, artifacts):
    """Each of them, not one of N: the replay of the whole expert alone would let some through."""
    right = load(artifacts("t2v", recipe))
    expected = make_golden(right)
    for path in LINEARS:
        wrong = with_tensors(right, lambda tensors, path=path: change(tensors[f"{path}.{ending}"]))
        result = replay(wrong, expected)
        assert not result.passed, (path, result)
        assert result.worst == path
        assert result.linear_error > 1e-2


def test_one_wrong_code_is_noticed(model, golden):
    """The smallest damage there is: one weight of 16384, by one step."""

    def step(tensors):
        tensors["blocks.1.attn2.to_v.weight.codes"][5, 7] ^= 1

    result = replay(with_tensors(model, step), golden)
    assert result.worst == "blocks.1.attn2.to_v"
    assert not result.passed


@pytest.mark.parametrize("path", ["blocks.0.attn1.to_q", "blocks.1.ffn.net.0.proj"])
def test_a_nan_in_one_unit_does_not_pass(model, golden, path):
    name = f"{path}.weight.scales"
    result = replay(with_tensors(model, lambda tensors: tensors[name][0, 0, 0].fill_(0xFF)), golden)
    assert result.linear_error == result.distance == torch.inf
    assert result.worst == path
    assert not result.passed


def test_what_was_recorded_is_compared(model, golden):
    for name in ("row.codes", "row.scales"):
        changed = {**golden, name: golden[name].clone()}
        changed[name].view(-1)[0] ^= 1
        result = replay(model, changed)
        assert result.codes_differ == 1
        assert not result.passed
    name = "linear.blocks.0.ffn.net.2"
    result = replay(model, {**golden, name: golden[name] * (1 + 3 * LINEAR_ERROR)})
    assert result.worst == "blocks.0.ffn.net.2"
    assert not result.passed
    result = replay(model, {**golden, "sample": -golden["sample"]})
    assert result.distance == pytest.approx(2)
    assert not result.passed


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["sample", "linear.blocks.0.attn1.to_q"])
def test_nan_never_passes(model, golden, name, value):
    changed = {**golden, name: golden[name].clone()}
    changed[name].view(-1)[0] = value
    result = replay(model, changed)
    assert torch.inf in (result.distance, result.linear_error)
    assert not result.passed


def test_flip_distance_that_is_nan_does_not_pass(model, golden):
    changed = {**golden, "flip_distance": torch.tensor([torch.nan]), "sample": -golden["sample"]}
    assert not replay(model, changed).passed


def test_zeros_that_are_equal_are_equal(model):
    """A linear of zeros (an untrained output projection, say) has a norm of 0, which nothing may be divided by."""

    def clear(tensors):
        for ending in ("weight.codes", "bias"):
            tensors[f"blocks.0.ffn.net.2.{ending}"].zero_()

    cleared = with_tensors(model, clear)
    expected = make_golden(cleared)
    assert not expected["linear.blocks.0.ffn.net.2"].any()
    assert replay(cleared, expected).identical
    result = replay(model, {**expected, "sample": torch.zeros_like(expected["sample"])})
    assert result.linear_error == result.distance == torch.inf
    assert not result.passed


@pytest.mark.parametrize("name", ["proj_out.bias", "blocks.1.attn1.to_k.bias", "scale_shift_table"])
def test_an_expert_that_gives_nan_is_not_recorded(model, name):
    broken = with_tensors(model, lambda tensors: tensors[name].fill_(torch.nan))
    with pytest.raises(Hif4Error, match=r"gives NaN or infinite values on the golden inputs; check the checkpoint"):
        make_golden(broken)


def test_an_incomplete_golden_file(model, golden):
    for name in golden:
        with pytest.raises(Hif4Error, match=rf"the golden file lacks '{name}'"):
            replay(model, {key: value for key, value in golden.items() if key != name})


COLUMNS, RANK = [5, 0], 3


def with_branches(model):
    """The program with a side branch at every 4-bit linear: a low-rank part, and two columns that a mask takes out.

    Norms are taken out of the quantizers that they are fused with, as the branches read them too.
    """
    generator = torch.Generator().manual_seed(0)
    graph, old = model.graph, model.graph.first_node
    values = dict(zip((item.name for item in graph.tensors), model.executor.tensors, strict=True))
    for path in LINEARS:
        n, k = values[f"{path}.weight.codes"].shape[0], 2 * values[f"{path}.weight.codes"].shape[1]
        values[f"{path}.down"] = torch.randn(RANK, k, generator=generator).bfloat16() / 8
        values[f"{path}.up"] = torch.randn(RANK + len(COLUMNS), n, generator=generator).bfloat16() / 8
        values[f"{path}.columns"] = torch.tensor(COLUMNS)
        values[f"mask.{k}"] = torch.linspace(0.5, 2, k)
        values[f"mask.{k}"][COLUMNS] = 0
    tensors = [
        InputType(name, TensorType(str(value.dtype).removeprefix("torch."), tuple(value.shape)))
        for name, value in values.items()
    ]
    stored = {item.name: Ref(len(graph.inputs) + number) for number, item in enumerate(tensors)}
    nodes, moved, read = [], {}, {}

    def normalized(node):
        return TensorType("bfloat16", (*node.type[0].shape[:-1], 2 * node.type[0].shape[-1]))

    def node_of(ref):
        return graph.nodes[ref.index - old]

    def move(argument):
        if isinstance(argument, list):
            return [move(item) for item in argument]
        return moved.get(argument, argument) if isinstance(argument, Ref) else argument

    def add(target, *args, like):
        nodes.append(replace(like, target=target, args=args, kwargs={}))
        return Ref(len(graph.inputs) + len(tensors) + len(nodes) - 1)

    for number, node in enumerate(graph.nodes):
        args, path = [move(item) for item in node.args], node.module
        if node.target == "hif4.norm_quantize":
            args = [add("hif4.norm", *args[:7], like=replace(node, type=normalized(node))), *args[7:]]
            read[number] = args[0]
            node = replace(node, target="hif4.quantize")
        if node.target == "hif4.quantize":
            args[1] = stored[f"mask.{2 * node.type[0].shape[-1]}"]
        elif node.target in ("hif4.linear", "hif4.linear_w4"):
            quantizer = node_of(node.args[0]).args[0] if node.target == "hif4.linear" else None
            x = args[0] if quantizer is None else read.get(quantizer.index - old, move(node_of(quantizer).args[0]))
            down = add("aten.linear.default", x, stored[f"{path}.down"], like=node)
            chosen = add("aten.index_select.default", x, -1, stored[f"{path}.columns"], like=node)
            side = add("aten.cat.default", [down, chosen], -1, like=node)
            if node.target == "hif4.linear_w4":
                args[4] = stored[f"mask.{2 * values[f'{path}.weight.codes'].shape[1]}"]
            at = 7 if node.target == "hif4.linear" else 8
            args = [*args[:at], side, stored[f"{path}.up"], *args[at + 2 :]]
        nodes.append(replace(node, args=tuple(args)))
        moved[Ref(old + number)] = Ref(len(graph.inputs) + len(tensors) + len(nodes) - 1)
    program = Graph(graph.inputs, tensors, nodes, [moved[ref] for ref in graph.outputs])
    return CompiledTransformer(program, values, model.config, model.dtype, model.expand_timesteps)


@pytest.fixture(scope="module")
def branched(artifacts):
    return {recipe: with_branches(load(artifacts("t2v", recipe))) for recipe in ("rtn", "weight-only")}


@pytest.fixture(scope="module")
def branched_golden(branched):
    return {recipe: make_golden(model) for recipe, model in branched.items()}


@pytest.mark.parametrize("recipe", ["rtn", "weight-only"])
def test_linears_are_replayed_with_their_side_branches(recipe, branched, branched_golden):
    model, golden = branched[recipe], branched_golden[recipe]
    result = replay(model, golden)
    assert result.identical
    assert result.linears == len(LINEARS)
    named = {item.name: value for item, value in zip(model.graph.tensors, model.executor.tensors, strict=True)}
    for path in LINEARS:
        down, up = named[f"{path}.down"], named[f"{path}.up"]
        x = golden["row"][: down.shape[1]]
        side = golden[f"side.{path}"]
        assert torch.equal(side.flatten(), torch.cat([torch.nn.functional.linear(x, down), x[COLUMNS]]))
        mask = named[f"mask.{len(x)}"]
        planes, bias = (named[f"{path}.weight.codes"], named[f"{path}.weight.scales"]), named[f"{path}.bias"]
        if recipe == "rtn":
            planes = (*torch.ops.hif4.quantize(x, mask), *planes)
            expected = torch.ops.hif4.linear(*planes, bias, None, torch.float32, side.flatten(), up)
        else:
            args = (*planes, bias, mask, 0, None, torch.float32, side.flatten(), up)
            expected = torch.ops.hif4.linear_w4(x, *args)
        assert torch.equal(golden[f"linear.{path}"], expected)


@pytest.mark.parametrize("recipe", ["rtn", "weight-only"])
def test_a_wrong_side_branch_does_not_pass_and_is_named(recipe, branched, branched_golden):
    path = "blocks.1.attn2.to_k"
    for ending, change in (
        ("down", zero), ("up", zero), ("columns", lambda columns: columns.copy_(columns.flip(0))),
        ("down", lambda down: down.copy_(down.flip(0))), ("up", lambda up: up.mul_(1.01)),
    ):  # fmt: skip
        wrong = with_tensors(branched[recipe], lambda tensors, e=ending, c=change: c(tensors[f"{path}.{e}"]))
        result = replay(wrong, branched_golden[recipe])
        assert not result.passed, ending
        assert result.worst == path
        assert (result.side_error > SIDE_ERROR) == (ending != "up")


def test_a_side_branch_that_rounds_to_the_neighbour_passes(branched, branched_golden):
    """As on a machine that adds in another order: the linear is compared on the values that were recorded."""
    path, model = "blocks.0.ffn.net.2", branched["rtn"]
    (node,) = (node for node in model.graph.nodes if node.module == path and node.target == "hif4.linear")
    golden = dict(branched_golden["rtn"])
    own = golden[f"side.{path}"]
    golden[f"side.{path}"] = torch.nextafter(own, torch.full_like(own, torch.inf))
    up = model.executor.tensors[node.args[8].index - len(model.graph.inputs)].double()
    moved = (golden[f"side.{path}"].double() - own.double()).flatten() @ up
    assert moved.norm() > LINEAR_ERROR * golden[f"linear.{path}"].norm()  # it would not pass on its own values
    golden[f"linear.{path}"] = (golden[f"linear.{path}"] + moved).float()
    result = replay(model, golden)
    assert 0 < result.side_error <= SIDE_ERROR
    assert result.passed
    assert not result.identical


def test_a_golden_file_without_a_side_branch(branched, branched_golden):
    name = "side.blocks.0.attn1.to_q"
    golden = {key: value for key, value in branched_golden["rtn"].items() if key != name}
    with pytest.raises(Hif4Error, match=rf"the golden file lacks '{name}'"):
        replay(branched["rtn"], golden)


def test_a_side_branch_of_something_else_than_the_input(branched, branched_golden):
    """It cannot be replayed on a row."""
    model = branched["rtn"]
    first, second = (
        next(node for node in model.graph.nodes if node.module == path and node.target == "aten.linear.default")
        for path in ("blocks.0.attn1.to_q", "blocks.1.attn1.to_q")
    )
    nodes = [
        replace(node, args=(first.args[0], node.args[1])) if node is second else node for node in model.graph.nodes
    ]
    graph = Graph(model.graph.inputs, model.graph.tensors, nodes, model.graph.outputs)
    values = dict(zip((item.name for item in graph.tensors), model.executor.tensors, strict=True))
    other = CompiledTransformer(graph, values, model.config, model.dtype, model.expand_timesteps)
    with pytest.raises(Hif4Error, match="a side branch depends on more than its linear's input"):
        replay(other, branched_golden["rtn"])


HOSTILE = [
    torch.zeros(0), torch.zeros(1), torch.zeros(7, dtype=torch.uint8), torch.zeros(2, 3, 5, dtype=torch.int64),
    torch.full((1, 1, 1, 1, 1), torch.nan), torch.zeros(1, 16, 2, 6, 8, dtype=torch.bool), torch.tensor(3.0),
]  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE, ids=[f"{tuple(item.shape)} {item.dtype}" for item in HOSTILE])
def test_recorded_tensors_of_other_shapes_and_dtypes(model, golden, value):
    """A forged golden file is a failed check or one sentence, never a crash and never a pass."""
    for name in [*(name for name in golden if not name.startswith("linear.")), "linear.blocks.1.attn1.to_out.0"]:
        with contextlib.suppress(Hif4Error):
            result = replay(model, {**golden, name: value})
            assert not result.identical or name == "flip_distance", name
            assert not result.passed or name in ("timestep", "flip_distance"), (name, result)


def without(operator, *names):
    """The operator as a kernel computes it that forgets some of its arguments."""
    schema = operator.default._schema.arguments
    forgotten = [number for number, item in enumerate(schema) if item.name in names]

    def call(*arguments):
        return operator(*(None if number in forgotten else item for number, item in enumerate(arguments)))

    return call


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("linear", ["activation"]), ("linear", ["gate"]), ("linear", ["residual"]), ("rms_rotary", ["cos", "sin"]),
        ("norm_quantize", ["scale", "shift"]), ("norm_quantize", ["weight", "bias"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_operator_does_not_pass_and_is_named(target, names, model, golden, monkeypatch):
    """What is around the products of the linears; the distance of the whole expert would let most of it through."""
    monkeypatch.setitem(TARGETS, f"hif4.{target}", without(getattr(torch.ops.hif4, target), *names))
    result = replay(model.variant(None), golden)
    assert result.operator_error > OPERATOR_ERROR
    assert result.worst_operator.startswith(f"hif4.{target} of blocks.0")
    assert result.linear_error == 0
    assert not result.passed


def test_attention_that_forgets_a_key(model, golden, monkeypatch):
    def shorter(q, k, v):
        return torch.ops.hif4.attention(q, k[:, :, 1:], v[:, :, 1:])

    monkeypatch.setitem(TARGETS, "hif4.attention", shorter)
    result = replay(model.variant(None), golden)
    assert result.worst_operator.startswith("hif4.attention of blocks.0")
    assert not result.passed
