"""What makes a quantized input: the layer norm or linear whose channels arrive there, in order and unmixed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hif4c.passes.program import LINEAR

__all__ = ["LAYER_NORM", "Producer", "find_producer", "some_paths"]

aten = torch.ops.aten
LAYER_NORM = aten.layer_norm.default
ATTENTION = aten.scaled_dot_product_attention.default
VALUE, MASK, DROPOUT = 2, 3, 4
"""Positions among the arguments of the attention."""


@dataclass(frozen=True)
class Producer:
    """A layer norm or linear.

    Attributes:
        node: the call.
        weight, bias: what it reads, None where it has none.
        keeps_offsets: whether a constant that is added to one of its channels arrives as the same constant.
    """

    node: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    keeps_offsets: bool


def find_producer(x: fx.Node) -> Producer | str:
    """Walk from x through casts, head layout and the value of an attention; why there is none, else.

    An attention mixes tokens, never channels. Nothing else may read a value on the way.
    """
    chain = [x]
    while chain[-1].target in TRACKS:
        source = chain[-1].args[VALUE if chain[-1].target is ATTENTION else 0]
        assert isinstance(source, fx.Node)
        chain.append(source)
    producer = chain[-1]
    if producer.target not in (LAYER_NORM, LINEAR):
        made_by = str(producer.target) if producer.op == "call_function" else "the caller"
        return f"the input is made by {made_by}"
    if any(len(node.users) > 1 for node in chain[1:]):
        return "others read the same values"
    if not _keeps_channels(chain[::-1]):
        return "the way from the producer changes the channels"
    first = 2 if producer.target is LAYER_NORM else 1
    weight, bias = (*producer.args[first : first + 2], None, None)[:2]
    return Producer(
        producer,
        weight if isinstance(weight, fx.Node) else None,
        bias if isinstance(bias, fx.Node) else None,
        keeps_offsets=all(_sums_to_one(node) for node in chain if node.target is ATTENTION),
    )


def _sums_to_one(attention: fx.Node) -> bool:
    """Whether the weights of every token do: not under dropout, nor for a token that a mask keeps from all others."""
    given = dict(enumerate(attention.args))
    mask = given.get(MASK, attention.kwargs.get("attn_mask"))
    dropout = given.get(DROPOUT, attention.kwargs.get("dropout_p"))
    return mask is None and not dropout


def _keeps_channels(chain: Sequence[fx.Node]) -> bool:
    """Whether the channels of the first node are, in order, the last axis of the last node."""
    axes = [chain[0].meta["val"].dim() - 1]
    if chain[0].target is LAYER_NORM and len(chain[0].args[1]) != 1:  # type: ignore[arg-type]
        return False
    for source, node in itertools.pairwise(chain):
        moved = TRACKS[node.target](node, node.args, source.meta["val"].dim(), axes)
        if moved is None:
            return False
        axes = moved
    return axes == [chain[-1].meta["val"].dim() - 1]


# Each tracker takes (node, its arguments, rank of its input, axes that hold the channels, major first) and returns the
# axes behind the node, None where the channels do not stay apart or in order.
Axes = list[int]
Tracker = Callable[[fx.Node, tuple[Any, ...], int, Axes], Axes | None]


def _track_cast(node: fx.Node, args: tuple[Any, ...], rank: int, axes: Axes) -> Axes | None:
    return axes if node.meta["val"].dtype.is_floating_point else None


def _track_unflatten(node: fx.Node, args: tuple[Any, ...], rank: int, axes: Axes) -> Axes | None:
    axis, parts = args[1] % rank, len(args[2])
    found: Axes = []
    for item in axes:
        found += range(axis, axis + parts) if item == axis else [item + (parts - 1 if item > axis else 0)]
    return found


def _track_flatten(node: fx.Node, args: tuple[Any, ...], rank: int, axes: Axes) -> Axes | None:
    first = args[1] if len(args) > 1 else 0
    last = args[2] if len(args) > 2 else -1
    merged = list(range(first % rank, last % rank + 1))
    if not set(merged) & set(axes):
        return [item - (len(merged) - 1 if item > merged[0] else 0) for item in axes]
    # Only axes that hold channels, in the order in which they count.
    start = axes.index(merged[0]) if merged[0] in axes else len(axes)
    if axes[start : start + len(merged)] != merged:
        return None
    kept = axes[: start + 1] + axes[start + len(merged) :]
    return [item - (len(merged) - 1 if item > merged[0] else 0) for item in kept]


def _track_permute(node: fx.Node, args: tuple[Any, ...], rank: int, axes: Axes) -> Axes | None:
    order = [axis % rank for axis in args[1]]
    return [order.index(axis) for axis in axes]


def _track_transpose(node: fx.Node, args: tuple[Any, ...], rank: int, axes: Axes) -> Axes | None:
    first, second = args[1] % rank, args[2] % rank
    swapped = {first: second, second: first}
    return [swapped.get(axis, axis) for axis in axes]


def _track_attention(node: fx.Node, args: tuple[Any, ...], rank: int, axes: Axes) -> Axes | None:
    """Every channel of the value is averaged over tokens (axis -2) by itself; heads must not be broadcast."""
    value = args[VALUE]
    if value in args[:VALUE] or node.kwargs.get("enable_gqa"):
        return None
    before, after = value.meta["val"].shape, node.meta["val"].shape
    if rank - 2 in axes or any(before[axis] != after[axis] for axis in axes):
        return None
    return axes


TRACKS: dict[Any, Tracker] = {
    aten.to.dtype: _track_cast,
    aten.unflatten.int: _track_unflatten,
    aten.flatten.using_ints: _track_flatten,
    aten.permute.default: _track_permute,
    aten.transpose.int: _track_transpose,
    ATTENTION: _track_attention,
}
"""What may stand between a producer and the masked input."""


def some_paths(paths: Sequence[str]) -> str:
    """The first of several, for a note."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
