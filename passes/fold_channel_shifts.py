"""Take the channels' means off quantized inputs where that is free: in a bias before, and back in the bias behind."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from hif4c.passes.producers import LAYER_NORM, find_producer, some_paths
from hif4c.passes.program import LINEAR, PassResult, Program, TensorSource

__all__ = ["fold_channel_shifts"]

aten = torch.ops.aten
ADD, CAST = aten.add.Tensor, aten.to.dtype


@dataclass(frozen=True)
class _Site:
    """The stored tensor that makes the input's offset, and its row (0 for a vector)."""

    tensor: fx.Node
    row: int
    kind: str


def fold_channel_shifts(program: Program, shift_of: Mapping[str, str] | None = None) -> PassResult:
    """Let inputs arrive as x - s, and let the linears that read them add W s to their biases: y stays what it was.

    A constant offset of a channel costs the format bits in every unit that it is in; without it the same codes hold the
    part that carries information (channel-wise shifting as in Outlier Suppression+, arXiv 2304.09145). Nothing is
    computed when the program runs: s is taken off

    - the bias of the affine layer norm that makes x,
    - the bias of the linear whose output is x, or reaches it as the value of an attention, whose weights sum to one,
    - or the row of the modulation table that is the shift of the adaptive layer norm that makes x.

    Args:
        program: with `shifts` (name -> s [K] float32) from a calibration.
        shift_of: linear's module path -> name of its input's shift.

    Raises:
        ValueError: an unknown linear or shift, a shift of the wrong length, or two shifts for one input.
    """
    if not shift_of:
        return PassResult(False, ["the recipe has no channel shifts"])
    unknown = sorted(shift_of.keys() - program.decisions.keys())
    if unknown:
        raise ValueError(f"shifts are assigned to linears that do not exist: {unknown}")
    by_input: dict[fx.Node, str] = {}
    for node in program.linears():
        path = program.linear_path(node)
        name = shift_of.get(path)
        if name is not None:
            _check(program, node, name)
            x = node.args[0]
            assert isinstance(x, fx.Node)
            if by_input.setdefault(x, name) != name:
                raise ValueError(f"{path}: its input is assigned two shifts, {by_input[x]} and {name}")
    folded: dict[str, int] = {}
    kept: dict[str, list[str]] = {}
    for x, name in by_input.items():
        readers = {node: _own_bias(program, node) for node in x.users if node.target is LINEAR and node.args[0] is x}
        biases = [bias for bias in readers.values() if bias is not None]
        if len(biases) != len(x.users):
            kept.setdefault("not only linears with a bias of their own read it", []).append(name)
            continue
        site = _find_site(program, x)
        if isinstance(site, str):
            kept.setdefault(site, []).append(name)
            continue
        spec = _spec(program, site.tensor)
        program.tensors[site.tensor.name] = replace(spec, row_shifts=(*spec.row_shifts, (site.row, name)))
        for bias in biases:
            program.tensors[bias.name] = replace(_spec(program, bias), input_shift=name)
        for path in map(program.linear_path, readers):
            program.decisions[path] = replace(program.decisions[path], shift=name)
        folded[site.kind] = folded.get(site.kind, 0) + 1
    notes = [f"shifted {count} inputs in {kind}" for kind, count in folded.items()]
    notes += [f"{len(names)} not shifted, {reason}: {some_paths(names)}" for reason, names in kept.items()]
    return PassResult(bool(folded), notes)


def _check(program: Program, node: fx.Node, name: str) -> None:
    if name not in program.shifts:
        raise ValueError(f"{program.linear_path(node)}: no shift is called {name!r}")
    features = node.args[1].meta["val"].shape[1]  # type: ignore[union-attr]
    if program.shifts[name].shape != (features,):
        raise ValueError(f"shift {name} has shape {list(program.shifts[name].shape)}, not [{features}]")


def _spec(program: Program, tensor: fx.Node) -> TensorSource:
    spec = program.tensors[tensor.name]
    return replace(spec, packed_from=spec.packed_from or spec.dtype)


def _own_bias(program: Program, linear: fx.Node) -> fx.Node | None:
    """The stored bias of a linear, None where it has none or shares it."""
    bias = linear.args[2] if len(linear.args) > 2 else None
    if not isinstance(bias, fx.Node) or not _is_own(program, bias):
        return None
    return bias if program.tensors[bias.name].source == f"{program.linear_path(linear)}.bias" else None


def _is_own(program: Program, tensor: fx.Node) -> bool:
    """Whether it is a tensor of the checkpoint that nothing else reads."""
    spec = program.tensors.get(tensor.name)
    return spec is not None and spec.source is not None and len(tensor.users) == 1


def _find_site(program: Program, x: fx.Node) -> _Site | str:
    """Where the shift of x can be taken off, or why nowhere."""
    found = find_producer(x)
    if isinstance(found, str):
        return _modulation_row(program, x) or found
    if found.bias is None or not _is_own(program, found.bias):
        return "what makes it has no bias of its own"
    if not found.keeps_offsets:
        return "the weights of the attention before it need not sum to one"
    return _Site(found.bias, 0, "layer norms" if found.node.target is LAYER_NORM else "linears")


def _modulation_row(program: Program, x: fx.Node) -> _Site | str | None:
    """The row of a table that is added last in an adaptive layer norm, norm * (1 + scale) + shift.

    The table [.., rows, D] and the timestep's projection are added and cut into rows. None where x is made otherwise.
    """
    total = x if x.target is not CAST else _behind(x.args[0], CAST)
    if total is None or total.target is not ADD or total.kwargs:
        return None
    for operand in _node_arguments(total):
        row = _behind(operand, aten.squeeze.dim)
        modulation = None if row is None else _whole_modulation(row)
        if row is None or modulation is None or modulation.meta["val"].shape[-1] != x.meta["val"].shape[-1]:
            continue
        for addend in _node_arguments(modulation):
            table = _behind(addend, aten.unsqueeze.default)
            if table is None or not _is_own(program, table):
                continue
            rows, width = modulation.meta["val"].shape[-2:]
            shapes = {tuple(node.meta["val"].shape[-2:]) for node in (addend, table)}
            if shapes != {(rows, width)} or table.meta["val"].numel() != rows * width:
                continue
            if table.meta["val"].dtype != torch.float32:
                return "the modulation table is not in float32, so its other rows would be rounded again"
            index = row.args[1]
            assert isinstance(index, int)
            return _Site(table, index, "modulation tables")
    return None


def _whole_modulation(row: fx.Node) -> fx.Node | None:
    """The sum [.., rows, D] that `row` is cut from, where no other reader of the sum sees that row."""
    if row.target is not operator.getitem:
        return None
    chunk, index = row.args
    assert isinstance(chunk, fx.Node)
    if chunk.target is not aten.chunk.default or len(chunk.args) != 3:
        return None
    modulation, count, axis = chunk.args
    assert isinstance(modulation, fx.Node)
    shape = modulation.meta["val"].shape
    cut = (count, axis % len(shape)) == (shape[-2], len(shape) - 2)  # type: ignore[operator]
    readers = [user for user in chunk.users if user.args[1] == index]
    alone = readers == [row] and len(modulation.users) == 1
    return modulation if cut and alone and modulation.target is ADD and not modulation.kwargs else None


def _behind(node: object, target: Any) -> fx.Node | None:
    """What a chain of calls of `target` starts from; None where something else reads a value of the chain."""
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if node.target is not target:
            return node
        node = node.args[0]
    return None


def _node_arguments(node: fx.Node) -> list[fx.Node]:
    return [argument for argument in node.args if isinstance(argument, fx.Node)]
