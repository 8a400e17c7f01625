"""Take the channels' means off quantized inputs where that is free: in a bias before, and back in the bias behind."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from hif4c.passes.producers import LAYER_NORM, Producer, find_producer, some_paths
from hif4c.passes.program import LINEAR, PassResult, Program, TensorSource

__all__ = ["fold_channel_shifts"]

aten = torch.ops.aten


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
    - the bias of the linear whose output reaches x as the value of an attention, whose weights sum to one,
    - or the row of the modulation table that is the shift of the adaptive layer norm that makes x.

    Args:
        program: with `shifts` (name -> s [K] float32) from a calibration.
        shift_of: linear's module path -> name of its input's shift.

    Raises:
        ValueError: an unknown linear or shift, or a shift of the wrong length.
    """
    if not shift_of:
        return PassResult(False, ["the recipe has no channel shifts"])
    unknown = sorted(shift_of.keys() - program.decisions.keys())
    if unknown:
        raise ValueError(f"shifts are assigned to linears that do not exist: {unknown}")
    by_input: dict[fx.Node, str] = {}
    for node in program.linears():
        name = shift_of.get(program.linear_path(node))
        if name is not None:
            _check(program, node, name)
            by_input[node.args[0]] = name  # type: ignore[index]
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
    return bias if isinstance(bias, fx.Node) and _is_own(program, bias) else None


def _is_own(program: Program, tensor: fx.Node) -> bool:
    return tensor.name in program.tensors and len(tensor.users) == 1


def _find_site(program: Program, x: fx.Node) -> _Site | str:
    found = find_producer(x)
    if isinstance(found, Producer):
        bias = found.bias
        if bias is None or not _is_own(program, bias):
            return "what makes it has no bias of its own"
        return _Site(bias, 0, "layer norms" if found.node.target is LAYER_NORM else "linears")
    table = _modulation_row(program, x)
    return found if table is None else _Site(*table, "modulation tables")


def _modulation_row(program: Program, x: fx.Node) -> tuple[fx.Node, int] | None:
    """The table and its row that are added last in an adaptive layer norm, norm * (1 + scale) + shift.

    The table [..., rows, D] and the timestep's projection are added and cut into rows; nothing else may read the row.
    """
    total = _only_source(x, aten.to.dtype)
    if total.target is not aten.add.Tensor or total.kwargs:
        return None
    for operand in _node_arguments(total):
        row = _only_source(operand, aten.squeeze.dim)
        if row.target is not operator.getitem or len(row.users) > 1:
            continue
        (chunk,) = _node_arguments(row)
        if chunk.target is not aten.chunk.default:
            continue
        (modulation,) = _node_arguments(chunk)
        shape = modulation.meta["val"].shape
        if chunk.args[1:] != (shape[-2], len(shape) - 2) or modulation.target is not aten.add.Tensor:
            continue
        for addend in _node_arguments(modulation):
            table = _only_source(addend, aten.unsqueeze.default)
            # In float32, so that the other rows are not rounded again.
            if _is_own(program, table) and table.meta["val"].dtype == torch.float32:
                index = row.args[1]
                assert isinstance(index, int)
                return (table, index) if table.meta["val"].shape[-2:] == shape[-2:] else None
    return None


def _only_source(node: fx.Node, target: Any) -> fx.Node:
    """What a chain of calls of `target` starts from, as far as nothing else reads its links."""
    while node.target is target and len(node.all_input_nodes) == 1:
        source = node.all_input_nodes[0]
        if len(source.users) > 1:
            break
        node = source
    return node


def _node_arguments(node: fx.Node) -> list[fx.Node]:
    return [argument for argument in node.args if isinstance(argument, fx.Node)]
