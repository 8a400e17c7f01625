"""An artifact's program as an ONNX model: `runtime.graph.Graph` to a ModelProto, without its stored tensors' data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from onnx import ModelProto, TensorProto, helper

from hif4c.compiler import onnx_functions
from hif4c.compiler.onnx_graph import ELEMENT_TYPES, OnnxGraph, Size, Tensor, computed, plain
from hif4c.compiler.onnx_operators import LOWERINGS
from hif4c.compiler.onnx_operators_hif4 import QUANTIZERS
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.graph import Graph, InputType, Node, Ref, TensorType, refs

__all__ = ["LoweredProgram", "lower_program"]

PRODUCER = "hif4c"


@dataclass(frozen=True)
class LoweredProgram:
    """A program as ONNX.

    Attributes:
        graph: nodes, types and constants.
        inputs: of the program, in float32 for narrower floats.
        outputs: names of what it returns.
        stored: the stored tensors that it reads, by the name of their initializer, as they are stored.
    """

    graph: OnnxGraph
    inputs: list[InputType]
    outputs: list[str]
    stored: list[InputType]

    @property
    def quantized(self) -> tuple[tuple[str, str], ...]:
        """For each quantizer: module path of the first linear that reads it, name of the value [B, T, Kp] read."""
        return tuple((module, value) for value, module in self.graph.quantized.items())

    def model(self, tensor: Callable[[InputType], TensorProto], metadata: Mapping[str, str]) -> ModelProto:
        """The whole model.

        Args:
            tensor: the initializer of a stored tensor, with its data or with the place where they are.
            metadata: key -> value of `metadata_props`.
        """
        g = self.graph
        outer = {*(item.name for item in self.inputs), *self.outputs}
        initializers = [*(tensor(item) for item in self.stored), *g.constant_tensors()]
        inner = [name for node in g.nodes for name in node.output if name and name not in outer and name in g.types]
        graph = helper.make_graph(
            g.nodes,
            "main",
            g.value_info([item.name for item in self.inputs]),
            g.value_info(self.outputs),
            initializers,
            value_info=g.value_info(inner),
        )
        opsets = [helper.make_opsetid("", g.opset)]
        if g.functions:
            opsets.append(helper.make_opsetid(onnx_functions.DOMAIN, 1))
        model = helper.make_model(
            graph,
            functions=_functions(g),
            opset_imports=opsets,
            producer_name=PRODUCER,
            ir_version=helper.find_min_ir_version_for(opsets[:1]),
        )
        helper.set_model_props(model, dict(metadata))
        return model


def lower_program(
    graph: Graph,
    *,
    opset: int,
    qdq: bool = False,
    stored: Mapping[str, str] | None = None,
    where: str = "the program",
) -> LoweredProgram:
    """Lower a program to ONNX.

    Floats are computed in float32 throughout: what the program does in bf16 or fp16 has no counterpart in
    onnxruntime's CPU operators, and a conversion between floats disappears. The only output is called "sample";
    several are "sample.0", "sample.1", ...

    Args:
        graph: the program.
        opset: of the default domain, in `onnx_functions.MIN_OPSET` to `MAX_OPSET`.
        qdq: keep quantizers and their decoding apart, with the planes between them.
        stored: name -> dtype in which a tensor is stored, where it is not the program's.
        where: what to call the program in errors.

    Raises:
        Hif4Error: an opset that is not supported, or a program that cannot be lowered.
    """
    onnx_functions.check_opset(opset)
    try:
        return _Lowering(graph, opset, qdq, stored or {}).program()
    except _LoweringError as error:
        raise Hif4Error(f"{where}: {error}; compile the artifact again.") from error


class _LoweringError(Exception):
    """Names the node."""


class _Lowering:
    def __init__(self, graph: Graph, opset: int, qdq: bool, stored: Mapping[str, str]) -> None:
        self.program_graph = graph
        self.qdq = qdq
        self.stored_dtypes = stored
        self.g = OnnxGraph(opset)
        self.used: dict[str, InputType] = {}
        self.values: list[Any] = []
        self.inputs: list[InputType] = []
        self.explicit = _explicit_planes(graph)

    def program(self) -> LoweredProgram:
        graph, g = self.program_graph, self.g
        for item in (*graph.inputs, *graph.tensors):
            g.reserve(item.name)
        for item in graph.inputs:
            kind = computed(item.type)
            g.types[item.name] = kind
            self.inputs.append(InputType(item.name, kind))
            self.values.append(Tensor(item.name, kind))
        self.values += graph.tensors  # read on demand
        for number, node in enumerate(graph.nodes):
            try:
                self.values.append(self._lower(graph.first_node + number, node))
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise _LoweringError(
                    f"{node.target} of {plain(node.module) or 'the model'} has no form in ONNX ({reason})"
                ) from error
        outputs = self._outputs()
        g.constants.update(onnx_functions.tables(g.functions))
        computed_tables = onnx_functions.table_nodes(g.functions)
        g.nodes[:0] = [node for node, _ in computed_tables]
        g.types.update({node.output[0]: TensorType("float32", shape) for node, shape in computed_tables})
        g.remove_unread(outputs)
        read = {name for node in g.nodes for name in node.input} | set(outputs)
        return LoweredProgram(g, self.inputs, outputs, [item for name, item in self.used.items() if name in read])

    def _lower(self, number: int, node: Node) -> Any:
        self.g.module = _module_name(node.module)
        args = [self._value(item) for item in node.args]
        options = {"planes": True} if node.target in QUANTIZERS and (self.qdq or number in self.explicit) else {}
        return LOWERINGS[node.target](self.g, node.type, *args, **node.kwargs, **options)

    def _value(self, argument: Any) -> Any:
        """An argument with values for references."""
        if isinstance(argument, (list, tuple)):
            return [self._value(item) for item in argument]
        if not isinstance(argument, Ref):
            return argument
        value = self.values[argument.index]
        return self._stored(value) if isinstance(value, InputType) else value

    def _stored(self, item: InputType) -> Tensor:
        """A stored tensor, converted once where it is stored in a narrower float."""
        dtype = self.stored_dtypes.get(item.name, item.type.dtype)
        kind = TensorType(dtype, item.type.shape)
        self.used.setdefault(item.name, InputType(item.name, kind))
        target = computed(item.type)
        if dtype == target.dtype:
            return Tensor(item.name, target)
        module, self.g.module = self.g.module, item.name
        found = self.g.add("Cast", [item.name], target, to=ELEMENT_TYPES[target.dtype])
        self.g.module = module
        return found

    def _outputs(self) -> list[str]:
        """Give the returned values their names."""
        g, refs_ = self.g, self.program_graph.outputs
        names = ["sample"] if len(refs_) == 1 else [f"sample.{index}" for index in range(len(refs_))]
        for name, ref in zip(names, refs_, strict=True):
            value = self._value(ref)
            if isinstance(value, Size):
                value = Tensor(g.shape_vector([value]), TensorType("int64", (1,)))
            if not isinstance(value, Tensor):
                raise _LoweringError("the program returns something that is not a tensor")
            g.reserve(name)
            if any(value.name in node.output for node in reversed(g.nodes)) and value.name not in names:
                g.rename(value.name, name)
                self.values = [Tensor(name, item.type) if item == value else item for item in self.values]
            else:
                g.nodes.append(helper.make_node("Identity", [value.name], [name], name=name))
                g.types[name] = value.type
        return names


def _explicit_planes(graph: Graph) -> set[int]:
    """Quantizers whose planes are read by more than linears and `dequantize`, or returned."""
    quantizers = {graph.first_node + number for number, node in enumerate(graph.nodes) if node.target in QUANTIZERS}
    planes: dict[int, int] = {}
    found = set()
    for number, node in enumerate(graph.nodes, graph.first_node):
        for place, argument in enumerate(node.args):
            for ref in refs(argument):
                if ref.index in quantizers:
                    if node.target == "getitem":
                        planes[number] = ref.index
                    else:
                        found.add(ref.index)
                elif ref.index in planes and (node.target not in ("hif4.linear", "hif4.dequantize") or place > 1):
                    found.add(planes[ref.index])
    found.update(planes[ref.index] for ref in graph.outputs if ref.index in planes)
    return found


def _functions(g: OnnxGraph) -> list[Any]:
    """The functions that are called, in a fixed order."""
    widths = _widths(g)
    every = {
        function.name: function
        for qdq in (False, True)
        for function in onnx_functions.functions(g.opset, widths, qdq=qdq)
    }
    return [function for name, function in every.items() if name in g.functions]


def _widths(g: OnnxGraph) -> list[int]:
    names = [re.fullmatch(r"Hadamard(\d+)", name) for name in sorted(g.functions)]
    return [int(match.group(1)) for match in names if match]


def _module_name(module: str) -> str:
    """How names of a module's nodes begin; what is outside of all modules belongs to the model."""
    return "model" if not module or module.startswith("_") else plain(module)
