"""The program that the passes transform: one expert's graph and where each of its tensors comes from.

It is what `torch.export` captured, without the book-keeping of an ExportedProgram: the FX graph stays, the graph
signature becomes a table from placeholder to `TensorSource`. No weight is in memory; its source says how it is made.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import hif4c.runtime.ops  # noqa: F401  (registers torch.ops.hif4)

__all__ = [
    "Decision",
    "PassResult",
    "Precision",
    "Program",
    "TensorSource",
    "inverse_mask",
    "module_path",
    "outlier_columns",
    "plane_source",
]

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
        rank: of the low-rank branch in 16 bits beside the 4-bit product, 0 for none.
        rounding: how the weight is rounded: "nearest", "search" (each unit's scales) or "gptq".
        mask_folded: the input arrives multiplied by the mask already (`fold_channel_masks`).
        shift: name of the channel means [K] that the input arrives without (`fold_channel_shifts`), or None.
    """

    path: str
    precision: str
    reason: str
    mask: str | None = None
    hadamard: int = 0
    rank: int = 0
    rounding: str = "nearest"
    mask_folded: bool = False
    shift: str | None = None

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
        plane: "whole" (copied), "codes" / "scales" (of the packed HiF4 tensor), or "down" / "up" (of its side branch).
        mask: name of the channel mask m whose inverse multiplies the source's columns before packing.
        hadamard: block rotation of the source before packing, 0 for none.
        packed_from: for planes and row-masked tensors, the dtype in which the captured program reads the source.
        value: the tensor itself, for constants and masks.
        row_mask: name of a mask that multiplies the source's rows (a vector's entries), in float32 and before all else
            but the shifts.
        row_shifts: (row, name of a shift [D]) to take off rows of the source [..., D]; a vector is its row 0.
        input_shift: for a bias, name of the shift s [K] that its linear's input arrives without: W s is added first.
        rank: of the low-rank branch whose product is taken off the source before packing, 0 for none.
        rounding: of the packed weight, as in `Decision`.
        mask_folded: the branch reads x * m, not x, as in `Decision`.

    The planes of a weight W [N, K], already row-masked, with its channel mask m [K] (1 without one) and rotation R:

    - down [r, K] and the first r rows of up are the low-rank factors, in the coordinates of what the branch reads: x,
      or x * m where `mask_folded`; the columns of down where m is 0 are 0;
    - the other rows of up [r + c, N] are the c columns of W where m is 0, in order;
    - codes and scales pack ((W - up[:r]^T down) / m) R with 1/0 = 0, or (W / m - up[:r]^T down) R where `mask_folded`.
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
    row_mask: str | None = None
    rank: int = 0
    rounding: str = "nearest"
    mask_folded: bool = False
    row_shifts: tuple[tuple[int, str], ...] = ()
    input_shift: str | None = None

    @property
    def changed(self) -> bool:
        """Whether a whole tensor is stored with other numbers than the checkpoint's."""
        return self.row_mask is not None or bool(self.row_shifts) or self.input_shift is not None


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
        shifts: shift name -> channel means [K] float32; filled from a calibration.
    """

    graph: fx.Graph
    tensors: dict[str, TensorSource]
    inputs: list[str]
    fake_mode: FakeTensorMode
    symbols: dict[str, str] = field(default_factory=dict)
    decisions: dict[str, Decision] = field(default_factory=dict)
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    shifts: dict[str, torch.Tensor] = field(default_factory=dict)

    def copy(self) -> Program:
        """An independent program with the same fake mode; specs, masks and shifts are shared, as they never change."""
        return Program(
            copy.deepcopy(self.graph),
            dict(self.tensors),
            list(self.inputs),
            self.fake_mode,
            dict(self.symbols),
            dict(self.decisions),
            dict(self.masks),
            dict(self.shifts),
        )

    def placeholder(self, name: str) -> fx.Node:
        """Return the placeholder node called `name`."""
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.name == name:
                return node
        raise KeyError(f"no placeholder {name}")

    def linears(self) -> Iterator[fx.Node]:
        """Yield every `aten.linear` of the model in graph order; those of low-rank branches are not among them."""
        return (
            node
            for node in self.graph.nodes
            if node.op == "call_function" and node.target is LINEAR and not self._is_branch(node)
        )

    def _is_branch(self, linear: fx.Node) -> bool:
        weight = linear.args[1]
        spec = self.tensors.get(weight.name) if isinstance(weight, fx.Node) else None
        return spec is not None and spec.plane == "down"

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

    def unrounded(self, value: fx.Node) -> fx.Node:
        """A row-masked tensor before the cast that stands between it and a linear; any other value as it is."""
        if value.target is torch.ops.aten.to.dtype:
            stored = value.args[0]
            assert isinstance(stored, fx.Node)
            if stored.name in self.tensors and self.tensors[stored.name].row_mask is not None:
                return stored
        return value

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


def inverse_mask(mask: torch.Tensor) -> torch.Tensor:
    """What multiplies the weight's columns: 1/m in float32, and 0 where m is 0."""
    mask = mask.to(torch.float32)
    return torch.where(mask == 0, 0.0, 1.0 / mask)


def outlier_columns(program: Program, decision: Decision) -> torch.Tensor:
    """The input channels that a linear computes in its side branch, ascending int64: those where its mask is 0."""
    mask = torch.ones(0) if decision.mask is None else program.masks[decision.mask]
    return (mask == 0).nonzero().flatten()


def plane_source(
    spec: TensorSource, plane: str, dtype: torch.dtype, shape: tuple[int, ...], decision: Decision
) -> TensorSource:
    """The stored plane of a weight `spec`, with everything that making it from the checkpoint takes."""
    return replace(
        spec,
        name=f"{spec.name}.{plane}",
        dtype=dtype,
        shape=tuple(shape),
        plane=plane,
        mask=decision.mask,
        hadamard=decision.hadamard,
        packed_from=spec.packed_from or spec.dtype,
        rank=decision.rank,
        rounding=decision.rounding,
        mask_folded=decision.mask_folded,
    )


def _is_impure(node: fx.Node) -> bool:
    # Only user inputs, the output, and writes into a buffer that is still read must survive without users.
    return node.op in ("placeholder", "output") or node.target is torch.ops.aten.copy_.default
