"""Q/DQ program against fused program: what the passes may change is the order of additions and where is rounded."""

import pytest
import torch

from hif4c.compiler.choose import Choices
from hif4c.compiler.emit import to_graph
from hif4c.compiler.models import WanConfig
from hif4c.compiler.pipeline import run_passes
from hif4c.compiler.plan import make_plan
from hif4c.compiler.recipe import load_recipe
from hif4c.runtime.graph import Ref, decode, encode
from tests.support import checkpoints
from tests.support.checkpoints import small_config

pytestmark = pytest.mark.usefixtures("portable")

BF16 = 2.0**-8
"""Relative error of one rounding to bf16."""
FP32 = 2.0**-24


@pytest.fixture(scope="module")
def transformed(captures):
    """(variant, recipe, last pass, dtype) -> program; made once, so not to be changed."""
    programs = {}

    def get(*arguments):
        if arguments not in programs:
            programs[arguments] = transform(captures, *arguments)
        return programs[arguments]

    return get


def transform(captures, variant="t2v", recipe="rtn", stop_after=None, dtype=torch.bfloat16):
    program = captures.variant(variant, dtype)
    config = WanConfig.from_dict(small_config(variant), "config.json")
    chosen = load_recipe(recipe)
    run_passes(program, Choices(make_plan(config, chosen)), chosen, stop_after=stop_after)
    return program


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


class Trace:
    """A program's values on one input, and how to look arguments up in them."""

    def __init__(self, executor, *sample):
        self.graph = executor.graph
        self.values = [*sample, *executor.tensors, *executor.trace(*sample)]

    def of(self, argument):
        return self.values[argument.index] if isinstance(argument, Ref) else argument

    def by_module(self, target):
        return {node.module: node for node in self.graph.nodes if node.target == target}

    def result(self, node):
        return self.values[self.graph.first_node + next(i for i, item in enumerate(self.graph.nodes) if item is node)]

    def maker(self, ref):
        return self.graph.nodes[ref.index - self.graph.first_node]


@pytest.mark.parametrize(
    ("variant", "recipe"),
    [
        ("t2v", "rtn"),
        ("t2v", "weight-only"),
        ("t2v", "rotate"),
        ("i2v", "rtn"),
        ("ti2v", "rtn"),
        ("ti2v", "weight-only"),
    ],
)
def test_every_linear_agrees_on_equal_inputs(variant, recipe, transformed, models, bound, inputs):
    """Each fused node without gate and residual, fed with the very input that the Q/DQ program's linear read.

    y is a sum of K products, each exact in fp32 (6 bits times 6 or 8), and a bias: whatever the order, the error is at
    most (K + 1) * 2^-24 of the magnitudes' sum, on both sides; then each side rounds once to bf16. Rotated weight-only
    inputs do not occur. Where GELU is fused, the Q/DQ program rounds y to bf16 as well, and GELU's slope is below 1.13.
    """
    state = models[variant].experts["transformer"].state_dict()
    sample = inputs(variant, 1, 2, 4, 6, 5)
    unfused = Trace(bound(transformed(variant, recipe, "share_quantized_inputs"), state), *sample)
    fused = Trace(bound(transformed(variant, recipe), state), *sample)
    name = "hif4.linear_w4" if recipe == "weight-only" else "hif4.linear"
    linears, gelus = unfused.by_module("aten.linear.default"), unfused.by_module("aten.gelu.default")
    found = fused.by_module(name)
    assert len(found) == 20
    largest = 0.0
    for path, node in found.items():
        reference = linears[path]
        source = unfused.maker(reference.args[0])
        a, w = (unfused.of(argument).double() for argument in reference.args[:2])
        bias = unfused.of(reference.args[2]).double()
        if name == "hif4.linear":
            assert source.target == "hif4.dequantize"
            planes = [unfused.of(argument) for argument in source.args[:2]]
            stored, activation = node.args[2:4], node.args[5]
            y = torch.ops.hif4.linear(*planes, *map(fused.of, node.args[2:9]))
        else:
            stored, activation = node.args[1:3], node.args[6]
            y = torch.ops.hif4.linear_w4(unfused.of(reference.args[0]), *map(fused.of, node.args[1:10]))
        # The planes that an artifact stores are those that the Q/DQ program makes from the weight.
        weight = unfused.maker(reference.args[1])
        for argument, plane in zip(weight.args[:2], stored, strict=True):
            assert torch.equal(unfused.of(argument), fused.of(plane)), path
        expected = unfused.result(reference)
        magnitude = a.abs() @ w.abs().T + bias.abs()
        summation = 2 * (a.shape[-1] + 1) * FP32 * magnitude
        rounding = BF16 * (expected.double().abs() + y.double().abs())
        if activation is not None:
            (gelu,) = (item for item in gelus.values() if item.args[0] == refer_to(unfused, reference))
            rounding = 1.13 * BF16 * expected.double().abs()
            expected = unfused.result(gelu)
            rounding += BF16 * (expected.double().abs() + y.double().abs())
            summation *= 1.13
        assert y.dtype == expected.dtype == torch.bfloat16
        difference = (y.double() - expected.double()).abs()
        # BF16 is a bound relative to the exact value; to the rounded one it is larger by at most 1 / (1 - 2^-8).
        allowed = (rounding + summation) * 1.01
        largest = max(largest, float((difference / allowed).max()))
        assert (difference <= allowed).all(), f"{path}: {float((difference / allowed).max())} of what is allowed"
    assert largest > 0  # GELU at least rounds elsewhere


def refer_to(trace, node):
    return Ref(trace.graph.first_node + next(i for i, item in enumerate(trace.graph.nodes) if item is node))


@pytest.mark.parametrize("recipe", ["weight-only", "rtn", "rotate"])
def test_in_float32_the_whole_programs_agree(recipe, transformed, bound, inputs):
    """Captured in fp32, only the order of fp32 additions differs: a relative error of 1e-5 at the very most.

    A linear's sum of at most 256 terms is off by sqrt(256) * 2^-24 = 1e-6 of its size if errors add up like random
    ones; the ten linears of each of two blocks contribute in turn. About 2e-7 was seen. A wrong operand is off by 1e-1.
    Codes of quantized activations could flip, but only for values within 1e-6 of a boundary between two codes: none
    did on this input, and one would show here as about 1e-3.
    """
    state = checkpoints.build_transformer("t2v").state_dict()
    video, timestep, text = inputs("t2v")
    sample = (video.float(), timestep, text.float())
    outputs = [
        bound(transformed("t2v", recipe, stop, torch.float32), state)(*sample)[0]
        for stop in ("share_quantized_inputs", None, "mark_boundaries")
    ]
    unfused, fused, unquantized = outputs
    assert relative(fused, unfused) < 1e-5
    assert relative(fused, unquantized) > 1e-2  # and something was quantized


@pytest.mark.parametrize(
    ("variant", "recipe"), [("t2v", "weight-only"), ("t2v", "rtn"), ("i2v", "rtn"), ("ti2v", "rtn")]
)
def test_in_bf16_fusing_moves_the_output_less_than_a_last_bit(recipe, variant, transformed, models, bound, inputs):
    """The yardstick: how far the output moves when every input value moves by one bf16 ulp.

    Fusing GELU and three residuals leaves out four roundings to bf16 a block, that is, it moves eight of the program's
    intermediate tensors by at most half an ulp each, most of them small beside the residual stream that they are added
    to; a change of the input by one ulp moves one tensor by a whole ulp and goes through all layers. With
    quantized activations both flip codes behind them, and are larger by the same factor. So twice the yardstick is
    generous, and a wrong scale, mask or bias (1e-1 and more) is far outside.
    """
    state = models[variant].experts["transformer"].state_dict()
    sample = inputs(variant)
    unfused = bound(transformed(variant, recipe, "share_quantized_inputs"), state)
    fused = bound(transformed(variant, recipe), state)
    expected = unfused(*sample)[0]
    moved = torch.nextafter(sample[0], torch.full_like(sample[0], torch.inf))
    yardstick = relative(unfused(moved, *sample[1:])[0], expected)
    distance = relative(fused(*sample)[0], expected)
    message = f"{variant} {recipe}: fused is {distance:.2e} away, one ulp of the input {yardstick:.2e}"
    print(message)  # noqa: T201 - a measurement, shown with -s
    assert 0 < distance < 2 * yardstick, message
    assert yardstick < 0.1, message


def test_packing_folding_and_fusing_change_no_bit(transformed, models, bound, inputs):
    """They only move work from run time to compile time, and into operators that round where the program did.

    But for the residuals: what is added is no longer rounded to bf16 first.
    """
    state = models["t2v"].experts["transformer"].state_dict()
    sample = inputs("t2v")
    names = (
        "insert_qdq", "share_quantized_inputs", "pack_weights", "fuse_activation", "fold_high_precision",
        "fuse_gated_residual", "fuse_norm", "fuse_norm_quantize", "fuse_qk_norm_rotary", None,
    )  # fmt: skip
    outputs = {name: bound(transformed("t2v", "rtn", name), state)(*sample)[0] for name in names}
    assert torch.equal(outputs["insert_qdq"], outputs["share_quantized_inputs"])
    assert torch.equal(outputs["share_quantized_inputs"], outputs["pack_weights"])
    assert torch.equal(outputs["fuse_activation"], outputs["fold_high_precision"])
    assert not torch.equal(outputs["fold_high_precision"], outputs["fuse_gated_residual"])
    for name in ("fuse_norm", "fuse_norm_quantize", "fuse_qk_norm_rotary", None):
        assert torch.equal(outputs["fuse_gated_residual"], outputs[name]), name


@pytest.mark.parametrize("stage", ["insert_qdq", "share_quantized_inputs", "pack_weights", "lower_linears", None])
def test_graphs_of_every_stage_survive_the_file(stage, transformed):
    graph = to_graph(transformed("t2v", "rtn", stage))
    data = encode(graph)
    assert decode(data, "graph.json") == graph
    assert b"0x" not in data  # no address of an object
    assert b"/" not in data  # no path of a file


def test_the_file_reads_well(transformed):
    graph = to_graph(transformed())
    types = {item.name: str(item.type) for item in graph.inputs}
    assert types == {
        "hidden_states": "bfloat16[b, 16, f, 2*h, 2*w]",
        "timestep": "float32[b]",
        "encoder_hidden_states": "bfloat16[b, text, 64]",
    }
    (output,) = graph.outputs
    assert str(graph.nodes[output.index - graph.first_node].type) == "bfloat16[b, 16, f, 2*h, 2*w]"
    linears = [node.module for node in graph.nodes if node.target == "hif4.linear"]
    assert len(set(linears)) == 20
    assert all(path.startswith("blocks.") for path in linears)
    assert all(len(line) < 400 for line in encode(graph).decode().splitlines())
