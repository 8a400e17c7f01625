"""Fuse the norm of queries and keys, the split into heads and the rotary embedding into `hif4::rms_rotary`."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from hif4c.passes.matching import arguments, only_reader, other_operand, reasons
from hif4c.passes.program import PassResult, Program, module_path

__all__ = ["fuse_qk_norm_rotary"]

aten, hif4 = torch.ops.aten, torch.ops.hif4
ADD, SUB, MUL, CAST = aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.to.dtype


@dataclass(frozen=True)
class _Rotary:
    """The tables of an embedding, and the node that holds the embedded heads."""

    cos: fx.Node
    sin: fx.Node
    result: fx.Node


def fuse_qk_norm_rotary(program: Program) -> PassResult:
    """Fuse rms_norm, unflatten and, where it follows, the embedding as `functionalize_rotary` leaves it.

    Results stay bit for bit the same. The tables are every other column of stored ones: they are copied into one piece,
    once for all blocks.
    """
    embedded = plain = 0
    kept: dict[str, list[str]] = {}
    compact: dict[fx.Node, fx.Node] = {}
    for norm in list(program.graph.nodes):
        if norm.target is not aten.rms_norm.default:
            continue
        heads = _find_heads(norm)
        rotary = heads if isinstance(heads, str) else _find_rotary(heads)
        if isinstance(rotary, str):
            kept.setdefault(rotary, []).append(module_path(norm))
            continue
        assert isinstance(heads, fx.Node)
        given = arguments(norm)
        values = [given["input"], given["weight"], given["eps"], heads.meta["val"].shape[2]]
        result = heads
        if rotary is not None:
            values += [_compact(program, table, compact) for table in (rotary.cos, rotary.sin)]
            result = rotary.result
        with program.graph.inserting_before(result):
            fused = program.call(hif4.rms_rotary.default, values, like=norm)
        result.replace_all_uses_with(fused)
        embedded += rotary is not None
        plain += rotary is None
    program.clean()
    notes = [f"fused {embedded} norms with a rotary embedding and {plain} without", *reasons(kept)]
    return PassResult(bool(embedded or plain), notes)


def _find_heads(norm: fx.Node) -> fx.Node | str:
    """The split of a norm's result [B, T, H*D] into [B, T, H, D], or why there is none."""
    given, value = arguments(norm), norm.meta["val"]
    if value.dim() != 3 or len(given["normalized_shape"]) != 1 or value.dtype != given["input"].meta["val"].dtype:
        return "it is not a norm of [B, T, C] over C"
    if given["weight"] is None or given["eps"] is None:
        return "it has no weight or no epsilon"
    heads = only_reader(norm, aten.unflatten.int)
    if heads is None or heads.meta["val"].dim() != 4 or heads.args[1] not in (2, -1):
        return "what follows is not the split into heads alone"
    return heads


def _find_rotary(heads: fx.Node) -> _Rotary | str | None:
    """The embedding of heads [B, T, H, D] as stack([a*cos - b*sin, a*sin + b*cos], -1).flatten(-2).

    None where the heads are used as they are, a reason where something else becomes of their pairs.
    """
    pairs = only_reader(heads, aten.unflatten.int)
    if pairs is None:
        return None
    other = "what follows is not a rotary embedding of neighbours"
    halves = only_reader(pairs, aten.unbind.int)
    axis, sizes = pairs.args[1:]
    if halves is None or axis not in (3, -1) or list(sizes)[1:] != [2] or arguments(halves)["dim"] not in (4, -1):  # type: ignore[arg-type]
        return other
    parts = {user.args[1]: user for user in halves.users if user.target is operator.getitem}
    if set(parts) != {0, 1} or len(halves.users) != 2:
        return other
    products = {
        (half, table): product
        for half, part in parts.items()
        for product in part.users
        if product.target is MUL and (table := other_operand(product, part)) is not None
    }
    difference = next((reader for product in products.values() if (reader := only_reader(product, SUB))), None)
    if len(products) != 4 or difference is None or difference.kwargs:
        return other
    tables = {node: key for key, node in products.items()}
    (first, cos), (second, sin) = (tables.get(node, (None, None)) for node in difference.args)  # type: ignore[arg-type]
    if (first, second) != (0, 1) or {*products} != {(0, cos), (1, sin), (0, sin), (1, cos)}:
        return other
    assert isinstance(cos, fx.Node)
    assert isinstance(sin, fx.Node)
    total = only_reader(products[0, sin], ADD)
    if total is None or other_operand(total, products[0, sin]) is not products[1, cos]:
        return other
    if any(len(node.users) != 1 for node in products.values()):
        return other
    result = _find_result(difference, total, heads)
    if result is None:
        return other
    if not (_is_table(cos, heads) and _is_table(sin, heads)):
        return "the tables are not float32 [1, T, 1, D/2]"
    return _Rotary(cos, sin, result)


def _find_result(difference: fx.Node, total: fx.Node, heads: fx.Node) -> fx.Node | None:
    """The flattened stack of the two rounded halves, which nothing else reads."""
    parts = []
    for half in (difference, total):
        cast = only_reader(half, CAST)
        parts.append(half if cast is None else cast)
    stacked = only_reader(parts[0], aten.stack.default)
    if stacked is None or only_reader(parts[1]) is not stacked or stacked.args[1:] not in ((-1,), (4,)):
        return None
    result = only_reader(stacked, aten.flatten.using_ints)
    if list(stacked.args[0]) != parts or result is None:  # type: ignore[arg-type]
        return None
    value, wanted = result.meta["val"], heads.meta["val"]
    fits = value.dim() == 4 and value.dtype == wanted.dtype and bool(value.shape[3] == wanted.shape[3])
    return result if fits else None


def _is_table(table: fx.Node, heads: fx.Node) -> bool:
    value, wanted = table.meta["val"], heads.meta["val"]
    return (
        value.dtype == torch.float32
        and value.dim() == 4
        and bool(value.shape[0] == 1 and value.shape[2] == 1)
        and bool(value.shape[1] == wanted.shape[1])
        and bool(2 * value.shape[3] == wanted.shape[3])
    )


def _compact(program: Program, table: fx.Node, known: dict[fx.Node, fx.Node]) -> fx.Node:
    """A table in one piece."""
    if table not in known:
        with program.graph.inserting_after(table):
            known[table] = program.call(aten.contiguous.default, (table,), like=table)
    return known[table]
