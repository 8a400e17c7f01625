"""Programs as graphs, in the JSON of Model Explorer.

The fields are those of `graph_builder.py` in the package ai-edge-model-explorer
(https://github.com/google-ai-edge/model-explorer, schema of 0.1.34), which needs not be installed to write them.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hif4c.compiler.amounts import format_bytes
from hif4c.compiler.stored_tensors import StoredTensors
from hif4c.runtime.artifact import Artifact, ExpertInfo
from hif4c.runtime.graph import DEVICE, DTYPE_NAMES, TARGETS, Graph, Node, Ref, TensorType, refs

__all__ = ["METRICS", "ExplorerProgram", "describe_programs"]

METRICS = ("bytes", "sqnr", "precision")
"""Node data: bytes of the stored tensors that a node reads, SQNR of a linear in dB, precision of a linear.

Model Explorer shows the last one that it opens.
"""

_PRECISIONS = {"hif4.linear": "w4a4", "hif4.linear_w4": "w4a16", "aten.linear.default": "high"}
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # what torch.export calls it
_TOLD_OF_LINEARS = (
    "reason", "mask", "mask_folded", "alpha", "shift", "hadamard", "rounding", "rank", "outlier_columns", "sqnr",
)  # fmt: skip


@dataclass(frozen=True)
class ExplorerProgram:
    """One program: a graph, and for each metric node id -> value."""

    graph: dict[str, Any]
    data: dict[str, dict[str, Any]]


def describe_programs(artifact: Artifact) -> list[ExplorerProgram]:
    """Every program of the artifact: of each expert the main one, and the one with bf16 activations where there is one.

    Graphs are called EXPERT or EXPERT.VARIANT; their nodes have the numbers that `hif4c inspect --graph` prints.

    Raises:
        Hif4Error: a program or a header is damaged.
    """
    programs = []
    for name in artifact.experts:
        stored = StoredTensors(artifact, name)
        for variant in (None, *artifact.variants(name)):
            programs.append(_Drawing(artifact, name, variant, stored).program())
    return programs


class _Drawing:
    """One program on its way to a graph."""

    def __init__(self, artifact: Artifact, expert: str, variant: str | None, stored: StoredTensors) -> None:
        self.artifact, self.variant, self.stored = artifact, variant, stored
        self.info: ExpertInfo = artifact.expert(expert)
        self.graph: Graph = artifact.graph(expert, variant)
        self.linears = {linear["path"]: linear for linear in self.info.linears}
        self.tensors = {len(self.graph.inputs) + i: item.name for i, item in enumerate(self.graph.tensors)}
        self.alone = Counter(_module(node) for node in self.graph.nodes if node.target != "getitem")
        self.places: dict[int, tuple[str, str]] = {}  # value -> id of its node, id of the node's output
        self.read: set[str] = set()  # stored tensors that have a reader already
        self.data: dict[str, dict[str, Any]] = {metric: {} for metric in METRICS}
        self.groups: dict[str, list[tuple[str, Any]]] = defaultdict(list)  # namespace -> (metric, value) of its nodes

    def program(self) -> ExplorerProgram:
        nodes = [self._input(number) for number in range(len(self.graph.inputs))]
        for number, node in enumerate(self.graph.nodes, self.graph.first_node):
            source = self._unpacked(node)
            if source is None:
                self.places[number] = (f"%{number}", "0")
                nodes.append(self._node(number, node))
            else:
                self.places[number] = source
        nodes.append(self._outputs())
        name = self.info.name if self.variant is None else f"{self.info.name}.{self.variant}"
        attributes = {"": {**self._about(), **self._group("")}}
        attributes |= {space: self._group(space) for space in sorted(self.groups) if space}
        return ExplorerProgram({"id": name, "nodes": nodes, "groupNodeAttributes": attributes}, self.data)

    def _unpacked(self, node: Node) -> tuple[str, str] | None:
        """Which output of which node a `getitem` is: its edges start there, and it needs no node of its own."""
        if node.target != "getitem" or len(node.args) != 2:
            return None
        source, index = node.args
        if not isinstance(source, Ref) or type(index) is not int or source.index not in self.places:
            return None
        place, output = self.places[source.index]
        several = source.index >= self.graph.first_node and isinstance(self._type(source.index), tuple)
        return (place, str(index)) if several and output == "0" and index >= 0 else None

    def _input(self, number: int) -> dict[str, Any]:
        item = self.graph.inputs[number]
        self.places[number] = (f"%{number}", "0")
        return {
            "id": f"%{number}",
            "label": item.name,
            "namespace": "",
            "attrs": _pairs({"input": item.name}),
            "incomingEdges": [],
            "outputsMetadata": _outputs_metadata(item.type, item.name),
        }

    def _node(self, number: int, node: Node) -> dict[str, Any]:
        edges: list[dict[str, Any]] = []
        tags: list[dict[str, Any]] = []
        attributes = {"value": f"%{number}", "operator": node.target, "module": node.module}
        for name, value in _named_arguments(node):
            if isinstance(value, Ref) and value.index in self.tensors:
                attributes[name] = self.stored.describe(self.tensors[value.index])
            elif isinstance(value, Ref):
                self._edge(value, name, edges, tags)
            else:
                for ref in refs(value):
                    self._edge(ref, name, edges, tags)
                if value is not None:
                    attributes[name] = self._text(value)
        module = _module(node)
        space = "sizes" if isinstance(node.type, str) else module.replace(".", "/")
        self._measure(f"%{number}", node, space)
        if (precision := self._precision(node)) and node.module in self.linears:
            about = _about_linear(self.linears[node.module], precision)
            attributes |= {name: value for name, value in about.items() if name not in attributes}
        return {
            "id": f"%{number}",
            "label": self._label(node, module),
            "namespace": space,
            "attrs": _pairs(attributes),
            "incomingEdges": edges,
            "inputsMetadata": tags,
            "outputsMetadata": _outputs_metadata(node.type),
        }

    def _label(self, node: Node, module: str) -> str:
        """The operator, after the module's name where it is all that the module does: its group is not drawn then."""
        operator = node.target.rpartition(".")[0] if node.target.startswith("aten.") else node.target
        if not module or self.alone[module] != 1:
            return operator
        parts = module.split(".")
        return f"{'.'.join(parts[-2:] if parts[-1].isdigit() else parts[-1:])}: {operator}"

    def _edge(self, ref: Ref, name: str, edges: list[dict[str, Any]], tags: list[dict[str, Any]]) -> None:
        if ref.index in self.tensors:
            return
        source, output = self.places[ref.index]
        position = str(len(edges))
        edges.append({"sourceNodeId": source, "sourceNodeOutputId": output, "targetNodeInputId": position})
        tags.append({"id": position, "attrs": _pairs({"__tensor_tag": name})})

    def _outputs(self) -> dict[str, Any]:
        edges: list[dict[str, Any]] = []
        tags: list[dict[str, Any]] = []
        for number, ref in enumerate(self.graph.outputs):
            self._edge(ref, f"result {number}", edges, tags)
        return {"id": "output", "label": "output", "namespace": "", "incomingEdges": edges, "inputsMetadata": tags}

    def _measure(self, place: str, node: Node, space: str) -> None:
        """Node data of one node, and the same for the groups that it lies in."""
        found: dict[str, Any] = {}
        linear = self.linears.get(node.module)
        if precision := self._precision(node):
            found["precision"] = precision
            # The SQNR was measured for what the main program does.
            if linear is not None and linear["precision"] == precision and linear.get("sqnr") is not None:
                found["sqnr"] = round(float(linear["sqnr"]), 2)
        names = {self.tensors[ref.index] for ref in refs([*node.args]) if ref.index in self.tensors} - self.read
        if names:
            self.read |= names
            found["bytes"] = sum(self.stored.nbytes(name) for name in names)
        for metric, value in found.items():
            self.data[metric][place] = value
            for group in _groups(space):
                self.groups[group].append((metric, value))

    def _precision(self, node: Node) -> str | None:
        """How a node computes a linear of the model; None for any other, the first half of a side branch among them."""
        weight = node.args[1] if len(node.args) > 1 else None
        name = self.tensors.get(weight.index, "") if isinstance(weight, Ref) else ""
        return None if name.endswith(".weight.down") else _PRECISIONS.get(node.target)

    def _group(self, space: str) -> dict[str, str]:
        """What is shown of a group: what its nodes multiply, read and reach."""
        values = {metric: [value for kind, value in self.groups[space] if kind == metric] for metric in METRICS}
        counts = Counter(values["precision"])
        found = {"precision": ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))} if counts else {}
        if values["sqnr"]:
            found["SQNR, dB"] = f"median {statistics.median(values['sqnr']):.1f}, lowest {min(values['sqnr']):.1f}"
        return {**found, "stored": format_bytes(sum(values["bytes"]))}

    def _about(self) -> dict[str, str]:
        ranges = self.info.bf16_timesteps
        when = ", ".join(f"{low:g} to {high:g}" for low, high in ranges) or "none"
        program = "all timesteps" if not ranges else f"all timesteps but {when}"
        return {
            "model": str(self.artifact.manifest["model"]["source"]),
            "expert": self.info.name,
            "recipe": str(self.info.recipe["name"]),
            "program": f"main, {program}" if self.variant is None else f"{self.variant} activations, timesteps {when}",
            "artifact": str(self.artifact.manifest["digest"]),
        }

    def _type(self, index: int) -> Any:
        return self.graph.nodes[index - self.graph.first_node].type

    def _text(self, value: Any) -> str:
        """An argument for people; sizes as their expressions."""
        if isinstance(value, Ref):
            if value.index in self.tensors:
                return self.tensors[value.index]
            kind = self._type(value.index) if value.index >= self.graph.first_node else None
            return kind if isinstance(kind, str) else f"%{value.index}"
        if isinstance(value, torch.dtype):
            return DTYPE_NAMES[value]
        if value is DEVICE:
            return "device"
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(self._text, value))}]"
        return str(value)


def _module(node: Node) -> str:
    return "" if node.module == _NO_MODULE else node.module


def _groups(space: str) -> Iterator[str]:
    """A namespace and those around it, the whole graph's "" last."""
    while space:
        yield space
        space = space.rpartition("/")[0]
    yield ""


def _named_arguments(node: Node) -> Iterator[tuple[str, Any]]:
    """(name, value) of every argument; names are the operator's own."""
    schema = getattr(TARGETS[node.target], "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    for position, value in enumerate(node.args):
        yield names[position] if position < len(names) else str(position), value
    yield from node.kwargs.items()


def _about_linear(linear: Mapping[str, Any], precision: str) -> dict[str, str]:
    """What the manifest says of a linear, where there is something to say."""
    found = {"precision": precision, "features": f"{linear['in_features']} to {linear['out_features']}"}
    for name in _TOLD_OF_LINEARS:
        value = linear.get(name)
        if value is not None and value is not False and value != 0:
            found[name] = f"{value:.2f} dB" if name == "sqnr" else str(value)
    return found


def _pairs(attributes: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in attributes.items() if value != ""]


def _outputs_metadata(kind: Any, name: str | None = None) -> list[dict[str, Any]]:
    """dtype and shape of each output; a size's expression."""
    items = kind if isinstance(kind, tuple) else () if kind is None else (kind,)
    tags = {} if name is None else {"tensor_name": name}
    found = []
    for number, item in enumerate(items):
        if isinstance(item, TensorType):
            about = {"dtype": item.dtype, "shape": f"[{', '.join(map(str, item.shape))}]"}
        else:
            about = {"size": str(item)}
        found.append({"id": str(number), "attrs": _pairs({**tags, **about})})
    return found
