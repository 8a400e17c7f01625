"""Parts of an exported model that can be run by themselves: each 4-bit linear with what prepares its input.

Found in the file by following its values from the stored weights, so that what runs is what stands in the file.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from hif4c.compiler import onnx_functions
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.golden import MASK, PLANES, SIDE
from hif4c.runtime.graph import Graph, Node, Ref

__all__ = [
    "CODES",
    "CUT",
    "SCALES",
    "LinearPart",
    "argument",
    "cut_model",
    "find_linears",
    "mask_of",
    "quantizer_of",
    "with_outputs",
]

CUT = "cut/"
"""Begins the name of an input that stands for a value of the whole model."""

CODES, SCALES = "/codes", "/scales"
"""End the names of the planes that are returned of a value."""

_AFTER = 3  # input of `Linear`: what is computed before the weight is decoded
_STANDARD = ("Add", "MatMul", "Mul", "Pad", "Squeeze")


@dataclass(frozen=True)
class LinearPart:
    """A 4-bit linear of a program, and the names of its values in the exported model.

    Attributes:
        node: the linear in the program.
        channels: K of what it reads.
        source: what it reads, before mask and rotation.
        rows: after them, [B, T, Kp]: what is quantized, or multiplied as it is.
        values: what is multiplied: the quantized values, or `rows`.
        side: what its side branch multiplies, None without one.
        result: the product with side branch and bias, before activation, gate and residual.
    """

    node: Node
    channels: int
    source: str
    rows: str
    values: str
    side: str | None
    result: str


def find_linears(model: ModelProto, graph: Graph) -> list[LinearPart]:
    """The 4-bit linears of a program in the model that it was exported to.

    Raises:
        Hif4Error: one of them is not there, or not as the program has it.
    """
    made = {name: node for node in model.graph.node for name in node.output}
    read: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            read.setdefault(name, []).append(node)
    channels = {
        item.name: item.type.tensor_type.shape.dim[-1].dim_value
        for item in (*model.graph.input, *model.graph.value_info)
        if item.type.tensor_type.shape.dim
    }
    by_weight = {node.input[1]: node for node in model.graph.node if _is(node, "Linear")}
    found = []
    for node in graph.nodes:
        if node.target in PLANES:
            weight = _tensor_name(graph, node.args[PLANES[node.target]])
            try:
                found.append(_follow(graph, node, by_weight[weight], made, read, channels))
            except (KeyError, IndexError, ValueError) as error:
                raise Hif4Error(
                    f"{node.module}: the .onnx file does not have the linear as the artifact's program has it "
                    f"({type(error).__name__}: {error}); export it again."
                ) from None
    return found


def quantizer_of(graph: Graph, node: Node) -> int | None:
    """Number of the node that quantizes the input of a 4-bit linear; None where nothing does."""
    if node.target != "hif4.linear":
        return None
    getitem = graph.nodes[node.args[0].index - graph.first_node]
    number: int = getitem.args[0].index - graph.first_node
    return number


def mask_of(graph: Graph, node: Node) -> tuple[Ref | None, int]:
    """Mask, and width of the rotation (0 or 1: none), of what a 4-bit linear reads."""
    number = quantizer_of(graph, node)
    reader = node if number is None else graph.nodes[number]
    at = MASK[reader.target]
    return argument(reader, at), argument(reader, at + 1) or 0


def argument(node: Node, position: int) -> Any:
    """An argument of a node, None where it is left out."""
    return node.args[position] if position < len(node.args) else None


def cut_model(
    model: ModelProto,
    cuts: Mapping[str, Sequence[int]],
    outputs: Collection[str],
    quantized: Collection[str] = (),
) -> ModelProto:
    """The nodes that compute `outputs`, with an input `CUT` + name in place of every value of `cuts`.

    Args:
        model: the whole model; its weights stay where they are.
        cuts: name -> shape of the values to be given, float32. With shapes that are known onnxruntime plans quickly.
        outputs: names of values that it returns, float32.
        quantized: names of values whose planes it returns as well, called name + `CODES` and name + `SCALES`.
    """
    planes = {name: (name + CODES, name + SCALES) for name in quantized}
    nodes = [*model.graph.node, *(onnx_functions.call("Quantize", [name], both) for name, both in planes.items())]
    wanted = {**dict.fromkeys(outputs, TensorProto.FLOAT)}
    wanted |= {name: TensorProto.UINT8 for both in planes.values() for name in both}
    kept = _upstream(nodes, wanted, cuts)
    read = {name for node in kept for name in node.input}
    functions = list(model.functions)
    opset = next(item.version for item in model.opset_import if not item.domain)
    known = {item.name for item in functions}
    functions += [item for item in onnx_functions.functions(opset, (), qdq=True) if item.name not in known]
    initializers = [item for item in model.graph.initializer if item.name in read]
    tables = onnx_functions.tables(["Quantize"]) if planes else {}
    there = {item.name for item in initializers}
    initializers += [numpy_helper.from_array(table, name) for name, table in tables.items() if name not in there]
    graph = helper.make_graph(
        kept,
        "parts",
        [item for item in model.graph.input if item.name in read]
        + [helper.make_tensor_value_info(CUT + name, TensorProto.FLOAT, shape) for name, shape in cuts.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in wanted.items()],
        initializers,
    )
    return helper.make_model(graph, functions=functions, opset_imports=model.opset_import, ir_version=model.ir_version)


def with_outputs(model: ModelProto, names: Collection[str]) -> ModelProto:
    """The model, which returns values of these names as well, float32."""
    more = ModelProto()
    more.CopyFrom(model)
    more.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    inner = [item for item in more.graph.value_info if item.name not in names]
    del more.graph.value_info[:]
    more.graph.value_info.extend(inner)
    return more


def _upstream(nodes: Sequence[NodeProto], wanted: Collection[str], cuts: Collection[str]) -> list[NodeProto]:
    """Copies of the nodes that `wanted` depends on, in order, which read the inputs that stand for cuts.

    A weight is decoded after the linear that comes before in the part, which need not be the one in the whole model.
    """
    made = {name: number for number, node in enumerate(nodes) for name in node.output}
    kept: dict[int, NodeProto] = {}
    waiting = [made[name] for name in wanted]
    while waiting:
        number = waiting.pop()
        if number in kept:
            continue
        node = kept[number] = NodeProto()
        node.CopyFrom(nodes[number])
        if _is(node, "Linear"):
            node.input[_AFTER] = node.input[0]
        for index, name in enumerate(node.input):
            if name in cuts:
                node.input[index] = CUT + name
            elif name in made:
                waiting.append(made[name])
    found = [kept[number] for number in sorted(kept)]
    linears = [node for node in found if _is(node, "Linear")]
    for before, node in itertools.pairwise(linears):
        node.input[_AFTER] = before.output[0]
    return found


def _follow(
    graph: Graph,
    node: Node,
    linear: NodeProto,
    made: dict[str, NodeProto],
    read: dict[str, list[NodeProto]],
    channels: dict[str, int],
) -> LinearPart:
    """The values around a linear of the file, as many steps as the program has."""
    values = rows = linear.input[0]
    if quantizer_of(graph, node) is not None:
        rows = _step_back(made, values, "QuantizeDequantize", "Dequantize")
        if _is(made[values], "Dequantize"):
            rows = _step_back(made, rows, "Quantize")
    mask, hadamard = mask_of(graph, node)
    source = rows
    if source in made and _is(made[source], "Pad"):
        source = made[source].input[0]
    if hadamard > 1:
        source = _step_back(made, source, onnx_functions.hadamard(hadamard))
    if mask is not None:
        source = _step_back(made, source, "Mul")
    result, side = linear.output[0], None
    if any(_is(follower, "Squeeze") for follower in read.get(result, ())):
        result = _step_on(read, result, "Squeeze")
    if argument(node, SIDE[node.target]) is not None:
        before, result = result, _step_on(read, result, "Add")
        (branch,) = (name for name in made[result].input if name != before)
        side = _step_back(made, branch, "MatMul")
    if argument(node, PLANES[node.target] + 2) is not None:
        result = _step_on(read, result, "Add")
    return LinearPart(node, channels[source], source, rows, values, side, result)


def _step_back(made: dict[str, NodeProto], name: str, *operators: str) -> str:
    """The first input of the node that makes a value, which is one of these."""
    if not any(_is(made[name], operator) for operator in operators):
        raise ValueError(f"{name!r} is made by {made[name].op_type}, not by {' or '.join(operators)}")
    first: str = made[name].input[0]
    return first


def _step_on(read: dict[str, list[NodeProto]], name: str, operator: str) -> str:
    """What the one node of this operator makes of a value."""
    (node,) = (node for node in read[name] if _is(node, operator))
    output: str = node.output[0]
    return output


def _is(node: NodeProto, operator: str) -> bool:
    domain = "" if operator in _STANDARD else onnx_functions.DOMAIN
    return bool(node.op_type == operator and node.domain == domain)


def _tensor_name(graph: Graph, argument: Ref) -> str:
    return graph.tensors[argument.index - len(graph.inputs)].name
