"""Every operator that a program may use: in torch, and as ONNX in onnxruntime, at two sets of sizes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from hif4c.compiler import onnx_functions
from hif4c.compiler.onnx_functions import MAX_OPSET, MIN_OPSET
from hif4c.compiler.onnx_lowering import lower_program
from hif4c.compiler.onnx_operators import LOWERINGS
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.executor import Executor
from hif4c.runtime.graph import DEVICE, TARGETS, Graph, InputType, Node, Ref, TensorType
from tests.support.small_programs import SIZES, SmallProgram, Spec

FLOAT, BF16, INT, BYTE = torch.float32, torch.bfloat16, torch.int64, torch.uint8
END = 2**63 - 1
K = 72
"""Channels of the 4-bit cases; the second unit is padded."""


def spec(*shape: int | str, dtype: torch.dtype = FLOAT) -> Spec:
    return Spec(shape, dtype)


PLANES = {"w": spec(24, 64, dtype=BYTE), "s": spec(24, 2, 4, dtype=BYTE)}
"""A weight of 24 x 72."""
LINEAR = {
    **PLANES, "bias": spec(24), "mask": spec(K), "down": spec(8, K, dtype=BF16), "up": spec(8, 24, dtype=BF16),
    "gate": spec(1, 1, 24),
}  # fmt: skip
QUANTIZED = {"q": ("hif4.quantize", "%x"), "c": ("getitem", "%q", 0), "d": ("getitem", "%q", 1)}
NORM = {"weight": spec(K), "bias": spec(K)}
MODULATED = {"x": spec("b", "t", K), "scale": spec("b", 1, K), "shift": spec("b", 1, K)}


def one(target: str, inputs: dict[str, Spec], *arguments: Any, **tensors: Spec) -> SmallProgram:
    """A program of one call."""
    return SmallProgram(inputs, {"out": (target, *arguments)}, tensors)


X, XT = {"x": spec("b", "t")}, {"x": spec("b", "t", 8)}
QKV = {"q": spec("b", 2, "t", 8), "k": spec("b", 2, "h", 8), "v": spec("b", 2, "h", 8)}
CASES: dict[str, SmallProgram] = {
    "aten.add.Tensor": one("aten.add.Tensor", {**X, "y": spec("t")}, "%x", "%y"),
    "aten.add.Tensor: alpha": one("aten.add.Tensor", X, "%x", "%w", {"alpha": 3}, w=spec(1)),
    "aten.add.Tensor: integers and a number": one("aten.add.Tensor", {"x": spec("b", dtype=INT)}, "%x", 2),
    "aten.add.Tensor: integers and floats": one("aten.add.Tensor", {"x": spec("b", dtype=INT)}, "%x", "%w", w=spec(1)),
    "aten.sub.Tensor": one("aten.sub.Tensor", {**X, "y": spec("b", 1)}, "%x", "%y", {"alpha": 2}),
    "aten.mul.Tensor": one("aten.mul.Tensor", X, "%x", "%x"),
    "aten.mul.Tensor: a size": SmallProgram(
        X, {"n": ("aten.sym_size.int", "%x", 1), "y": ("aten.mul.Tensor", "%x", "%n")}
    ),
    "aten.div.Tensor": one("aten.div.Tensor", X, "%x", 3.0),
    "aten.div.Tensor: integers": one("aten.div.Tensor", {"x": spec("b", dtype=INT)}, "%x", 3),
    "aten.arange.start": SmallProgram(
        X,
        {
            "n": ("aten.sym_size.int", "%x", 1),
            "y": ("aten.arange.start", 1, "%n", {"dtype": FLOAT, "device": DEVICE}),
            "z": ("aten.arange.start", 2, "%n", {"device": DEVICE}),
        },
        outputs=("y", "z"),
    ),
    "aten.arange.start: numbers": SmallProgram(
        {"x": spec("b", 4)},
        {"r": ("aten.arange.start", 0, 4, {"dtype": FLOAT, "device": DEVICE}), "y": ("aten.add.Tensor", "%x", "%r")},
    ),
    "aten.cat.default": one("aten.cat.default", {**X, "y": spec("b", 4)}, ["%x", "%y"], -1),
    "aten.stack.default": one("aten.stack.default", {**X, "y": spec("b", "t")}, ["%x", "%y"], -1),
    "aten.chunk.default": SmallProgram(
        {"x": spec("b", 7, "t")},
        {"c": ("aten.chunk.default", "%x", 3, 1), "y": ("getitem", "%c", 2), "z": ("getitem", "%c", 0)},
        outputs=("y", "z"),
    ),
    "aten.chunk.default: one, and of a dynamic size": SmallProgram(
        {"x": spec("h", 7)},
        {
            "c": ("aten.chunk.default", "%x", 1), "y": ("getitem", "%c", 0),
            "e": ("aten.chunk.default", "%x", 2), "z": ("getitem", "%e", 1),
        },
        outputs=("y", "z"),
    ),
    "aten.split_with_sizes.default": SmallProgram(
        XT,
        {
            "p": ("aten.split_with_sizes.default", "%x", [3, 5], -1),
            "y": ("getitem", "%p", 0), "z": ("getitem", "%p", 1),
        },
        outputs=("y", "z"),
    ),
    "aten.unbind.int": SmallProgram(
        {"x": spec("b", 2, "t")},
        {"p": ("aten.unbind.int", "%x", 1), "y": ("getitem", "%p", 1), "z": ("getitem", "%p", 0)},
        outputs=("y", "z"),
    ),
    "aten.contiguous.default": one("aten.contiguous.default", X, "%x"),
    "aten.conv3d.default": one(
        "aten.conv3d.default", {"x": spec("b", 4, "t", "h", "h")}, "%x", "%w", "%c", [1, 2, 2],
        w=spec(8, 4, 1, 2, 2), c=spec(8),
    ),
    "aten.conv3d.default: padded, in groups": one(
        "aten.conv3d.default", {"x": spec("b", 4, "t", "h", "h")}, "%x", "%w", None, [1], [1], [1], 2,
        w=spec(8, 2, 3, 3, 3),
    ),
    "aten.cos.default": one("aten.cos.default", X, "%x"),
    "aten.sin.default": one("aten.sin.default", X, "%x"),
    "aten.exp.default": one("aten.exp.default", X, "%x"),
    "aten.expand.default": SmallProgram(
        {"x": spec("b", 1, 1), "y": spec("t", "h")},
        {
            "t": ("aten.sym_size.int", "%y", 0),
            "h": ("aten.sym_size.int", "%y", 1),
            "z": ("aten.expand.default", "%x", [-1, "%t", "%h"]),
        },
    ),
    "aten.expand.default: a new dimension": one("aten.expand.default", {"x": spec("t", 1)}, "%x", [4, -1, 2]),
    "aten.flatten.using_ints": one("aten.flatten.using_ints", {"x": spec("b", 2, "t", "h", 3)}, "%x", 2, 3),
    "aten.flatten.using_ints: between dynamic sizes": one(
        "aten.flatten.using_ints", {"x": spec("b", "t", 2, "h")}, "%x", 1, 2
    ),
    "aten.flatten.using_ints: all": one("aten.flatten.using_ints", X, "%x"),
    "aten.unflatten.int": one("aten.unflatten.int", XT, "%x", -1, [4, -1]),
    "aten.unflatten.int: before a dynamic size": one("aten.unflatten.int", {"x": spec(6, "t")}, "%x", 0, [2, -1]),
    "aten.reshape.default": SmallProgram(
        {"x": spec("b", "t", "h", 2)},
        {
            "t": ("aten.sym_size.int", "%x", 1),
            "h": ("aten.sym_size.int", "%x", 2),
            "th": ("size.mul", "%t", "%h"),
            "half": ("size.floordiv", "%h", 2),
            "y": ("aten.reshape.default", "%x", [1, "%th", -1, 2]),
            "z": ("aten.reshape.default", "%x", [-1, "%half", 2, "%t", 2]),
        },
        outputs=("y", "z"),
    ),
    "aten.view.default": SmallProgram(
        {"x": spec("t", 4)}, {"n": ("aten.sym_size.int", "%x", 0), "y": ("aten.view.default", "%x", ["%n", 1, 1, -1])}
    ),
    "size.mul": SmallProgram(
        {"x": spec("b", 6)},
        {
            "n": ("aten.sym_size.int", "%x", 1),
            "m": ("size.mul", "%n", 4),
            "k": ("size.floordiv", "%m", 8),
            "y": ("aten.reshape.default", "%x", [-1, "%k"]),
        },
    ),
    "size.floordiv": SmallProgram(
        {"x": spec("h", 6)},
        {
            "n": ("aten.sym_size.int", "%x", 0),
            "half": ("size.floordiv", "%n", 2),
            "y": ("aten.slice.Tensor", "%x", 0, "%half", END),
        },
    ),
    "aten.gelu.default": one("aten.gelu.default", X, "%x"),
    "aten.gelu.default: tanh": one("aten.gelu.default", X, "%x", {"approximate": "tanh"}),
    "aten.silu.default": one("aten.silu.default", X, "%x"),
    "aten.index_select.default": one(
        "aten.index_select.default", {**XT, "i": spec("t", dtype=INT)}, "%x", -1, "%i"
    ),
    "aten.layer_norm.default": one(
        "aten.layer_norm.default", XT, "%x", [8], "%w", "%c", 1e-6, w=spec(8), c=spec(8)
    ),
    "aten.layer_norm.default: plain": one("aten.layer_norm.default", {"x": spec("b", 4, 8)}, "%x", [4, 8]),
    "aten.rms_norm.default": one("aten.rms_norm.default", XT, "%x", [8], "%w", 1e-6, w=spec(8)),
    "aten.rms_norm.default: the default for eps": SmallProgram(
        XT, {"small": ("aten.mul.Tensor", "%x", 1e-4), "y": ("aten.rms_norm.default", "%small", [8])}
    ),
    "aten.linear.default": one("aten.linear.default", XT, "%x", "%w", "%c", w=spec(5, 8), c=spec(5)),
    "aten.linear.default: rows": one(
        "aten.linear.default", {"x": spec("b", 8)}, "%x", "%w", "%c", w=spec(5, 8), c=spec(5)
    ),
    "aten.linear.default: no bias": one("aten.linear.default", XT, "%x", "%w", w=spec(5, 8)),
    "aten.matmul.default": one("aten.matmul.default", {**XT, "y": spec(8, "h")}, "%x", "%y"),
    "aten.permute.default": one("aten.permute.default", {"x": spec("b", "t", "h", 2)}, "%x", [0, 2, 1, -1]),
    "aten.transpose.int": one("aten.transpose.int", XT, "%x", 0, -1),
    "aten.scaled_dot_product_attention.default": one(
        "aten.scaled_dot_product_attention.default", QKV, "%q", "%k", "%v"
    ),
    "aten.scaled_dot_product_attention.default: mask and scale": one(
        "aten.scaled_dot_product_attention.default", {**QKV, "m": spec("t", "h")}, "%q", "%k", "%v", "%m",
        {"scale": 0.3},
    ),
    "aten.slice.Tensor": SmallProgram(
        {"x": spec("b", "t", 8), "n": spec(2, "b")},
        {
            "b": ("aten.sym_size.int", "%n", 1),
            "u": ("aten.slice.Tensor", "%x", 0, None, "%b"),
            "v": ("aten.slice.Tensor", "%x", 2, 1, END, 2),
            "y": ("aten.slice.Tensor", "%x", 1, 1, -1),
            "z": ("aten.slice.Tensor", "%x", -1, 0, "%b"),
        },
        outputs=("u", "v", "y", "z"),
    ),
    "aten.squeeze.dim": SmallProgram(
        {"x": spec("b", 1, 4)},
        {"y": ("aten.squeeze.dim", "%x", 1), "z": ("aten.squeeze.dim", "%x", -1)},
        outputs=("y", "z"),
    ),
    "aten.unsqueeze.default": SmallProgram(
        X, {"y": ("aten.unsqueeze.default", "%x", -1), "z": ("aten.unsqueeze.default", "%x", 0)}, outputs=("y", "z")
    ),
    "aten.sym_size.int": SmallProgram(
        {"x": spec("b", "t", 4)},
        {"t": ("aten.sym_size.int", "%x", -2), "y": ("aten.mul.Tensor", "%x", "%t")},
    ),
    "aten.to.dtype": SmallProgram(
        X,
        {"y": ("aten.to.dtype", "%x", INT), "z": ("aten.to.dtype", "%y", FLOAT)},
        outputs=("y", "z"),
    ),
    "getitem": SmallProgram(
        XT, {"p": ("aten.chunk.default", "%x", 2, -1), "a": ("getitem", "%p", 1), "y": ("aten.exp.default", "%a")}
    ),
    "hif4.quantize": SmallProgram({"x": spec("b", "t", K)}, QUANTIZED, outputs=("c", "d")),
    "hif4.quantize: rows, mask and rotation": SmallProgram(
        {"x": spec("t", K)},
        {**QUANTIZED, "q": ("hif4.quantize", "%x", "%mask", 8)},
        {"mask": spec(K)},
        outputs=("c", "d"),
    ),
    "hif4.dequantize": SmallProgram(
        {"x": spec("b", "t", K)}, {**QUANTIZED, "y": ("hif4.dequantize", "%c", "%d", K, {"dtype": FLOAT})}
    ),
    "hif4.dequantize: stored planes": SmallProgram(
        {"x": spec("b", 24)},
        {"v": ("hif4.dequantize", "%w", "%s", K, FLOAT), "y": ("aten.matmul.default", "%x", "%v")},
        PLANES,
        outputs=("v", "y"),
    ),
    "hif4.linear": SmallProgram(
        {"x": spec("b", "t", K)}, {**QUANTIZED, "y": ("hif4.linear", "%c", "%d", "%w", "%s")}, PLANES
    ),
    "hif4.linear: all around it": SmallProgram(
        {"x": spec("b", "t", K, dtype=BF16), "residual": spec("b", "t", 24)},
        {
            **QUANTIZED,
            "side": ("aten.linear.default", "%x", "%down"),
            "y": (
                "hif4.linear", "%c", "%d", "%w", "%s", "%bias", "gelu_tanh", FLOAT, "%side", "%up", "%gate", "%residual"
            ),
        },
        LINEAR,
    ),
    "hif4.linear: two that read rows, one that reads planes": SmallProgram(
        {"x": spec("t", K)},
        {
            **QUANTIZED,
            "y": ("hif4.linear", "%c", "%d", "%w", "%s"),
            "z": ("hif4.linear", "%c", "%d", "%w", "%s", "%bias"),
        },
        LINEAR,
        outputs=("y", "z", "c"),
    ),
    "hif4.linear_w4": SmallProgram(
        {"x": spec("t", K)}, {"y": ("hif4.linear_w4", "%x", "%w", "%s")}, PLANES
    ),
    "hif4.linear_w4: all around it": SmallProgram(
        {"x": spec("b", "t", K), "residual": spec("b", "t", 24)},
        {
            "n": ("aten.to.dtype", "%x", BF16),
            "side": ("aten.linear.default", "%n", "%down"),
            "y": (
                "hif4.linear_w4", "%x", "%w", "%s", "%bias", "%mask", 8, "gelu_tanh", FLOAT, "%side", "%up", "%gate",
                "%residual",
            ),
        },
        LINEAR,
    ),
    "hif4.norm": SmallProgram(
        MODULATED, {"y": ("hif4.norm", "%x", "%weight", "%bias", "%scale", "%shift", 1e-6, FLOAT)}, NORM
    ),
    "hif4.norm: plain": SmallProgram(XT, {"y": ("hif4.norm", "%x", None, None, None, None, 1e-6, FLOAT)}),
    "hif4.norm_quantize": SmallProgram(
        MODULATED,
        {
            **QUANTIZED,
            "q": ("hif4.norm_quantize", "%x", None, None, "%scale", "%shift", 1e-6, FLOAT, "%weight", 8),
            "y": ("hif4.dequantize", "%c", "%d", K, FLOAT),
        },
        NORM,
    ),
    "hif4.rms_rotary": SmallProgram(
        {"x": spec("b", "t", 24), "cos": spec(1, "t", 1, 6), "sin": spec(1, "t", 1, 6)},
        {"y": ("hif4.rms_rotary", "%x", "%w", 1e-6, 2, "%cos", "%sin")},
        {"w": spec(24)},
    ),
    "hif4.rms_rotary: no position": SmallProgram(
        {"x": spec("b", "t", 24)}, {"y": ("hif4.rms_rotary", "%x", "%w", 1e-6, 2)}, {"w": spec(24)}
    ),
    "hif4.attention": one("hif4.attention", QKV, "%q", "%k", "%v"),
}  # fmt: skip
# Up to 128 products of numbers near 1 are added in float32 in another order: each addition is off by 2^-24 of a partial
# sum of some 11 (the root of 128), together sqrt(128) * 11 * 2^-24 = 7e-6.
TOLERANCE = 1e-5
BF16_TOLERANCE = 2.0**-7
"""Relative, of a side branch that torch rounds to bf16 and ONNX does not."""


def as_tensor(item: InputType, value: torch.Tensor) -> TensorProto:
    """A stored tensor with its data."""
    if value.dtype == BF16:
        data = value.view(torch.uint8).numpy().tobytes()
        return helper.make_tensor(item.name, TensorProto.BFLOAT16, value.shape, data, raw=True)
    return numpy_helper.from_array(value.numpy(), item.name)


def to_model(program: SmallProgram, graph: Graph | None = None, **options: Any) -> ModelProto:
    """The model, after ONNX's own checks."""
    _, tensors = program.values(SIZES[0])
    lowered = lower_program(graph or program.graph(), **{"opset": MAX_OPSET, **options})
    model = lowered.model(lambda item: as_tensor(item, tensors[item.name]), {})
    onnx.checker.check_model(model, full_check=True)
    return model


def run_model(model: ModelProto, feeds: dict[str, torch.Tensor]) -> list[Any]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = {item.name for item in session.get_inputs()}
    return session.run(None, {name: value.numpy() for name, value in feeds.items() if name in wanted})


def test_every_operator_has_a_lowering_and_a_case() -> None:
    assert set(LOWERINGS) == set(TARGETS)
    assert {name.partition(":")[0] for name in CASES} == set(TARGETS)
    assert all(name.partition(":")[0] in {call[0] for call in case.calls.values()} for name, case in CASES.items())


@pytest.mark.parametrize(
    ("name", "opset", "qdq"),
    [
        *((name, MAX_OPSET, False) for name in CASES),
        *((name, MIN_OPSET, True) for name in CASES if name.startswith(("hif4.", "aten.rms", "aten.scaled"))),
    ],
)
def test_operators(name: str, opset: int, qdq: bool, portable: None) -> None:
    program = CASES[name]
    graph = program.graph()
    model = to_model(program, graph, opset=opset, qdq=qdq)
    for sizes in SIZES:
        inputs, tensors = program.values(sizes)
        expected = Executor(graph, tensors, torch.device("cpu"))(*inputs.values())
        found = run_model(
            model, {key: value.float() if value.dtype == BF16 else value for key, value in inputs.items()}
        )
        assert len(found) == len(expected)
        for have, want in zip(found, expected, strict=True):
            assert have.shape == tuple(want.shape)
            want = want.numpy() if want.dtype != BF16 else want.float().numpy()
            assert have.dtype == want.dtype
            if want.dtype in (np.int64, np.uint8):
                np.testing.assert_array_equal(have, want)
                continue
            largest = np.abs(want).max()
            near = (BF16_TOLERANCE if "side" in program.calls else TOLERANCE) * max(1.0, largest)
            # A quantizer turns the last bit of its input into a step of a code, now and then.
            allowed = 0.01 if name.startswith("hif4.norm_quantize") else 0.0
            assert np.mean(np.abs(have - want) > near) <= allowed


def lower(program: SmallProgram, **options: Any) -> list[Any]:
    """The nodes of a program."""
    return list(lower_program(program.graph(), **{"opset": MAX_OPSET, **options}).graph.nodes)


def test_every_value_has_its_type_and_nodes_their_module() -> None:
    model = to_model(CASES["hif4.linear: all around it"])
    typed = {item.name: item.type.tensor_type for item in (*model.graph.value_info, *model.graph.output)}
    assert {name for node in model.graph.node for name in node.output} == set(typed)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert all(name.startswith(("blocks.0.part/", "down/", "up/", "hif4.")) for name in names)
    (values,) = (node.output[0] for node in model.graph.node if node.op_type == "QuantizeDequantize")
    assert [dim.dim_param or dim.dim_value for dim in typed[values].shape.dim] == ["b", "t", 128]
    assert [item.name for item in model.graph.output] == ["sample"]


def test_readers_share_what_is_quantized_and_equal_nodes_are_one() -> None:
    program = CASES["hif4.linear: two that read rows, one that reads planes"]
    one_plane = SmallProgram(program.inputs, program.calls, program.tensors, ("y", "z"))
    for qdq, kinds in ((False, ["QuantizeDequantize"]), (True, ["Quantize", "Dequantize"])):
        lowered = lower_program(one_plane.graph(), opset=MAX_OPSET, qdq=qdq)
        calls = [node for node in lowered.graph.nodes if node.domain == "hif4"]
        assert [node.op_type for node in calls] == [*kinds, "Linear", "Linear"]
        ((module, value),) = lowered.quantized
        assert module == "blocks.0.part"
        assert all(node.input[0] == value for node in calls[-2:])
        assert calls[-1].input[3] == calls[-2].output[0]  # its weight is decoded after the product before it
        assert calls[-2].input[3] == value
        assert [node.op_type for node in lowered.graph.nodes].count("Pad") == 1


def test_a_stored_tensor_is_widened_once() -> None:
    """Whether the program or the file has it in 16 bits; float32 is read as it is."""
    calls = {"a": ("aten.mul.Tensor", "%x", "%w"), "y": ("aten.add.Tensor", "%a", "%w")}
    narrow = SmallProgram(XT, calls, {"w": spec(8, dtype=BF16)})
    wide = SmallProgram(XT, calls, {"w": spec(8)})
    assert [node.op_type for node in lower(narrow)] == ["Cast", "Mul", "Add"]
    assert [node.op_type for node in lower(wide)] == ["Mul", "Add"]
    assert [node.op_type for node in lower(wide, stored={"w": "bfloat16"})] == ["Cast", "Mul", "Add"]
    (stored,) = lower_program(wide.graph(), opset=MAX_OPSET, stored={"w": "bfloat16"}).stored
    assert stored == InputType("w", TensorType("bfloat16", (8,)))


def test_shapes_that_types_tell_are_constants() -> None:
    """No Shape is computed where sizes can be copied or inferred."""
    for name in ("aten.view.default", "aten.unflatten.int", "aten.flatten.using_ints: all", "size.mul"):
        assert [node.op_type for node in lower(CASES[name])] == ["Reshape"], name


def test_what_nothing_reads_is_left_out() -> None:
    program = SmallProgram(X, {"u": ("aten.mul.Tensor", "%x", "%w"), "y": ("aten.exp.default", "%x")}, {"w": spec(1)})
    lowered = lower_program(program.graph(), opset=MAX_OPSET)
    assert [node.op_type for node in lowered.graph.nodes] == ["Exp"]
    assert lowered.stored == []
    assert lowered.graph.constants == {}


def test_functions_and_tables_are_those_that_are_called() -> None:
    model = to_model(CASES["hif4.linear_w4: all around it"])
    assert [function.name for function in model.functions] == ["Linear", "Hadamard8"]
    assert {item.domain: item.version for item in model.opset_import} == {"": MAX_OPSET, "hif4": 1}
    tables = set(onnx_functions.tables(["Linear", "Hadamard8"]))
    assert {item.name for item in model.graph.initializer if item.name.startswith("hif4.")} == tables
    plain = to_model(CASES["aten.exp.default"])
    assert not plain.functions
    assert [item.domain for item in plain.opset_import] == [""]


def test_names_from_an_artifact_cannot_collide_or_break() -> None:
    """A tensor called like a node or a constant, and modules that no protobuf string could hold."""
    program = SmallProgram(
        X,
        {"y": ("aten.mul.Tensor", "%x", "%blocks.0.part/Add"), "z": ("aten.add.Tensor", "%y", 2.0)},
        {"blocks.0.part/Add": spec(1), "constant/float32[2.0].": spec(1), "sample": spec(1)},
    )
    graph = program.graph()
    model = to_model(program, graph)
    inputs, tensors = program.values(SIZES[0])
    (expected,) = Executor(graph, tensors, torch.device("cpu"))(*inputs.values())
    (found,) = run_model(model, inputs)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)
    graph.nodes = [Node(n.target, n.args, n.kwargs, "a\ud800\nb", n.type) for n in graph.nodes]
    assert {node.name.partition("/")[0] for node in to_model(program, graph).graph.node} == {"a??b"}


def damaged(name: str, change: Callable[[list[Any]], Any]) -> Graph:
    """A case whose last node's arguments were changed."""
    graph = CASES[name].graph()
    node = graph.nodes[-1]
    arguments = list(node.args)
    change(arguments)
    graph.nodes[-1] = Node(node.target, tuple(arguments), node.kwargs, node.module, node.type)
    return graph


@pytest.mark.parametrize(
    ("graph", "sentence"),
    [
        (damaged("aten.permute.default", lambda args: args.pop()), "aten.permute.default of blocks.0.part has no form"),
        (damaged("aten.permute.default", lambda args: args[1].append(9)), "IndexError: dimension 9"),
        (damaged("aten.exp.default", lambda args: args.__setitem__(0, 3)), "aten.exp.default"),
        (damaged("hif4.linear_w4", lambda args: args.__setitem__(2, Ref(1))), "a 4-bit weight that does not fit"),
        (damaged("hif4.linear_w4: all around it", lambda args: args.__setitem__(5, 48)), "48 is not a power of two"),
        (damaged("hif4.linear_w4: all around it", lambda args: args.__setitem__(6, "relu")), "activation 'relu'"),
    ],
)
def test_a_program_that_makes_no_sense(graph: Graph, sentence: str) -> None:
    with pytest.raises(Hif4Error, match=sentence):
        lower_program(graph, opset=MAX_OPSET, where="out.hif4/transformer")


def test_an_opset_that_is_not_supported() -> None:
    for opset in (MIN_OPSET - 1, MAX_OPSET + 1):
        with pytest.raises(Hif4Error, match=rf"opset {opset} is not supported; choose one from {MIN_OPSET} to"):
            lower_program(CASES["aten.exp.default"].graph(), opset=opset)
