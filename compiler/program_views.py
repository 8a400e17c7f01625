"""A program by region, as plain data for drawings and comparisons: what 40 equal blocks hold is the same structure.

A region is a transformer block (`blocks.N`) or everything outside the blocks (`outside`). Inside a block, names are
relative to it and its values are numbered on their own, so that equal blocks give equal structures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hif4c.passes.mark_boundaries import BLOCK_PATTERN
from hif4c.runtime.graph import DEVICE, DTYPE_NAMES, Graph, InputType, Node, Ref, refs

__all__ = ["OUTSIDE", "InputView", "NodeDetails", "NodeView", "Structure", "region_of", "relative", "view_regions"]

OUTSIDE = "outside"


@dataclass(frozen=True)
class NodeView:
    """One call of a region.

    Attributes:
        name: of its value, "%7"; a node keeps its name from pass to pass.
        target: operator, as graph.json names it.
        label: its short name, "linear".
        module: path of its module, relative to the block.
        type: of its value, "bfloat16[b, f*h*w, 128]"; "" for none.
        args: its arguments as text.
        precision: "w4a4", "w4a16", "high" (a product in 16 bits or more) or "none" (not a product, not a quantizer).
        marks: what the plan says about this linear, "" for other nodes and before there is a plan.
        reads: the stored tensors among its arguments, with dtype and shape and how they are made.
        inputs: names of the values from outside the region among its arguments.
    """

    name: str
    target: str
    label: str
    module: str
    type: str
    args: str
    precision: str
    marks: str
    reads: tuple[str, ...]
    inputs: tuple[str, ...]

    @property
    def line(self) -> str:
        """The node as a line of text."""
        kind = f" : {self.type}" if self.type else ""
        marks = f"  # {self.marks}" if self.marks else ""
        return f"{self.name} = {self.target}({self.args}){kind}{marks}"


@dataclass(frozen=True)
class InputView:
    """A value that a region reads: an input of the program, or made in another region.

    Attributes:
        name: as it stands in `NodeView.args`: "timestep", "outside%12", "previous%81" (of the block before).
        type: its dtype and shape.
        made_by: module and operator, "" for an input of the program.
    """

    name: str
    type: str
    made_by: str


@dataclass(frozen=True)
class Structure:
    """What a region holds: nodes in order of execution, edges between them (positions; from, to), and its inputs."""

    nodes: tuple[NodeView, ...]
    edges: tuple[tuple[int, int], ...]
    inputs: tuple[InputView, ...]


@dataclass(frozen=True)
class NodeDetails:
    """What a graph does not say about a node: see `NodeView`.

    Attributes:
        number: of its value inside its region.
        precision: as in `NodeView`.
        marks: as in `NodeView`, with full names.
    """

    number: int
    precision: str
    marks: str = ""


def region_of(module: str) -> str:
    """The region of a module path."""
    match = BLOCK_PATTERN.match(module)
    return OUTSIDE if match is None else f"blocks.{match[1]}"


def relative(name: str, region: str) -> str:
    """A module path or tensor name as it is called inside a region."""
    return "" if name == region else name.removeprefix(f"{region}.")


def view_regions(
    graph: Graph, details: Sequence[NodeDetails], made: Mapping[str, tuple[str, ...]]
) -> dict[str, Structure]:
    """Split a program into its regions.

    Args:
        graph: the program.
        details: of each node.
        made: stored tensor's name -> how it is made of the checkpoint's, with full names; may lack tensors.

    Returns:
        Region -> structure, blocks in order behind "outside".
    """
    view = _View(graph, details, made)
    members: dict[str, list[int]] = {OUTSIDE: []}
    for index, region in enumerate(view.regions):
        members.setdefault(region, []).append(index)
    order = sorted(members, key=lambda region: -1 if region == OUTSIDE else int(region.removeprefix("blocks.")))
    return {region: view.structure(region, members[region]) for region in order}


class _View:
    def __init__(self, graph: Graph, details: Sequence[NodeDetails], made: Mapping[str, tuple[str, ...]]) -> None:
        self.graph, self.details, self.made = graph, details, made
        self.first = graph.first_node
        self.regions = [region_of(node.module) for node in graph.nodes]

    def structure(self, region: str, members: Sequence[int]) -> Structure:
        position = {index: place for place, index in enumerate(members)}
        edges: dict[tuple[int, int], None] = {}
        inputs: dict[str, InputView] = {}
        nodes = []
        for place, index in enumerate(members):
            node = self.graph.nodes[index]
            reads: dict[str, None] = {}
            foreign: dict[str, None] = {}
            for ref in refs(node.args):
                source = ref.index - self.first
                if source in position:
                    edges[position[source], place] = None
                elif len(self.graph.inputs) <= ref.index < self.first:
                    reads[self._tensor(ref.index, region)] = None
                else:
                    name = self._name(ref, region)
                    foreign[name] = None
                    inputs.setdefault(name, self._input(ref.index, name))
            nodes.append(self._node(index, node, region, tuple(reads), tuple(foreign)))
        return Structure(tuple(nodes), tuple(edges), tuple(inputs.values()))

    def _node(self, index: int, node: Node, region: str, reads: tuple[str, ...], inputs: tuple[str, ...]) -> NodeView:
        details = self.details[index]
        args = [self._argument(value, region) for value in node.args]
        args += [f"{name}={self._argument(value, region)}" for name, value in node.kwargs.items()]
        return NodeView(
            f"%{details.number}",
            node.target,
            short(node.target),
            relative(node.module, region),
            _type(node),
            ", ".join(args),
            details.precision,
            details.marks.replace(f"{region}.", ""),
            reads,
            inputs,
        )

    def _named(self, index: int) -> InputType:
        inputs = self.graph.inputs
        return inputs[index] if index < len(inputs) else self.graph.tensors[index - len(inputs)]

    def _tensor(self, index: int, region: str) -> str:
        item = self._named(index)
        made = "".join(f"; {step}" for step in self.made.get(item.name, ()))
        return f"{relative(item.name, region)}: {item.type}{made.replace(f'{region}.', '')}"

    def _input(self, index: int, name: str) -> InputView:
        if index < self.first:
            return InputView(name, str(self._named(index).type), "")
        node = self.graph.nodes[index - self.first]
        # The block before is this block's in all but its number.
        module = relative(node.module, self.regions[index - self.first]) if name.startswith("previous") else node.module
        return InputView(name, _type(node), f"{module} {short(node.target)}".strip())

    def _name(self, ref: Ref, region: str) -> str:
        """A value as a region calls it."""
        if ref.index < self.first:
            return relative(self._named(ref.index).name, region)
        index = ref.index - self.first
        source, number = self.regions[index], self.details[index].number
        if source == region:
            return f"%{number}"
        if region != OUTSIDE and source == f"blocks.{int(region.removeprefix('blocks.')) - 1}":
            return f"previous%{number}"
        return f"{source}%{number}"

    def _argument(self, value: Any, region: str) -> str:
        if isinstance(value, Ref):
            return self._name(value, region)
        if isinstance(value, torch.dtype):
            return DTYPE_NAMES.get(value, str(value))
        if value is DEVICE:
            return "device"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(self._argument(item, region) for item in value) + "]"
        return repr(value)


def short(target: str) -> str:
    """An operator without its namespace and overload."""
    parts = target.split(".")
    return parts[1] if len(parts) > 1 else target


def _type(node: Node) -> str:
    if node.type is None:
        return ""
    if isinstance(node.type, tuple):
        return "(" + ", ".join(map(str, node.type)) + ")"
    return str(node.type)
