"""The program that the passes transform: one expert's graph and where each of its tensors comes from.

It is what `torch.export` captured, without the book-keeping of an ExportedProgram: the FX graph stays, the graph
signature becomes a table from placeholder to `TensorSource`. No weight is in memory; its source says how it is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import hif4c.runtime.ops  # noqa: F401  (registers torch.ops.hif4)

__all__ = ["Decision", "PassResult", "Precision", "Program", "TensorSource", "module_path"]

LINEAR = torch.ops.aten.linear.default


class Precision:
    """How a linear is computed. The values are what plans, manifests and tables print."""

    W4A4 = "w4a4"
    W4A16 = "w4a16"
    HIGH = "high"


@dataclass(frozen=True)
class Decision:
    """What was decided for one linear, and why.

    Attributes:
        path: module path, for example `blocks.0.attn1.to_q`.
        precision: one of `Precision`.
        reason: one sentence for people.
        mask: name of the channel mask [K] shared by the linears that read the same input, or None.
        hadamard: width of the block rotation of the input, 0 for none.
    """

    path: str
    precision: str
    reason: str
    mask: str | None = None
    hadamard: int = 0

    @property
    def quantized(self) -> bool:
        """Whether the weight is stored in 4 bits."""
        return self.precision in (Precision.W4A4, Precision.W4A16)


@dataclass(frozen=True)
class TensorSource:
    """A tensor that the program reads and the artifact stores.

    Attributes:
        name: its name in the artifact's weight file.
        dtype: what the graph computes with. The file may hold a narrower dtype that converts exactly.
        shape: static shape.
        source: name of the checkpoint tensor it is made from, None for `value`.
        plane: "whole" (copied), or "codes" / "scales" (a plane of the packed HiF4 tensor).
        mask: name of the channel mask m whose inverse multiplies the source's columns before packing.
        hadamard: block rotation of the source before packing, 0 for none.
        packed_from: for a plane, the dtype in which the unquantized program reads the source.
        value: the tensor itself, for constants and masks.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: str | None = None
    plane: str = "whole"
    mask: str | None = None
    hadamard: int = 0
    packed_from: torch.dtype | None = None
    value: torch.Tensor | None = field(default=None, compare=False, repr=False)


@dataclass
class PassResult:
    """What a pass did: whether the program changed, and one note for each thing done or left alone."""

    changed: bool
    notes: list[str] = field(default_factory=list)


@dataclass
class Program:
    """One expert as a graph.

    Attributes:
        graph: FX graph; placeholders are the tensors of `tensors` followed by the user inputs, in order.
        tensors: placeholder name -> spec.
        inputs: names of the user inputs in call order.
        fake_mode: the mode that made every `meta["val"]`; new values must be made under it.
        symbols: symbolic size as printed by torch -> the name people read (b, f, h, w, text).
        decisions: module path of each linear -> decision; filled by `choose_precision`.
        masks: mask name -> m [K] float32; filled from a calibration.
    """

    graph: fx.Graph
    tensors: dict[str, TensorSource]
    inputs: list[str]
    fake_mode: FakeTensorMode
    symbols: dict[str, str] = field(default_factory=dict)
    decisions: dict[str, Decision] = field(default_factory=dict)
    masks: dict[str, torch.Tensor] = field(default_factory=dict)

    def placeholder(self, name: str) -> fx.Node:
        """Return the placeholder node called `name`."""
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.name == name:
                return node
        raise KeyError(f"no placeholder {name}")

    def linears(self) -> Iterator[fx.Node]:
        """Yield every `aten.linear` in graph order."""
        return (node for node in self.graph.nodes if node.op == "call_function" and node.target is LINEAR)

    def linear_path(self, node: fx.Node) -> str:
        """Module path of an `aten.linear`, from the name of the weight that it reads (through casts and Q/DQ)."""
        weight = node.args[1]
        while isinstance(weight, fx.Node) and weight.op == "call_function":
            weight = weight.args[0]
        assert isinstance(weight, fx.Node)
        source = self.tensors[weight.name].source
        if source is None or not source.endswith(".weight"):
            raise ValueError(f"{node.name} reads {weight.name}, which is not the weight of a module")
        return source.removesuffix(".weight")

    def add_tensor(self, spec: TensorSource, before: fx.Node) -> fx.Node:
        """Insert a placeholder for `spec` ahead of the placeholder `before`, with a fake value."""
        with self.graph.inserting_before(before):
            node = self.graph.placeholder("t_" + spec.name.replace(".", "_"))
        with self.fake_mode:
            node.meta["val"] = torch.empty(spec.shape, dtype=spec.dtype)
        self.tensors[node.name] = spec
        return node

    def call(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None, *, like: fx.Node) -> fx.Node:
        """Append a call at the graph's insertion point, with its fake value and the module path of `like`."""
        kwargs = kwargs or {}
        node = self.graph.call_function(target, tuple(args), kwargs)

        def value(arg: Any) -> Any:
            return fx.node.map_arg(arg, lambda n: n.meta["val"])

        with self.fake_mode:
            node.meta["val"] = target(*value(tuple(args)), **value(kwargs))
        if "nn_module_stack" in like.meta:
            node.meta["nn_module_stack"] = like.meta["nn_module_stack"]
        return node

    def clean(self) -> None:
        """Drop what nothing reads any more, tensors included, and check the graph's form."""
        self.graph.eliminate_dead_code(is_impure_node=_is_impure)
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and not node.users and node.name in self.tensors:
                del self.tensors[node.name]
                self.graph.erase_node(node)
        self.graph.lint()


def module_path(node: fx.Node) -> str:
    """Path of the module in which a node was traced, "" for the root."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""


def _is_impure(node: fx.Node) -> bool:
    # Only user inputs, the output, and writes into a buffer that is still read must survive without users.
    return node.op in ("placeholder", "output") or node.target is torch.ops.aten.copy_.default
