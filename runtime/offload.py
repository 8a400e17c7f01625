"""Run a program whose blocks do not fit the device together: two of them are there, one runs and the next one arrives.

A block is what the stored tensors called `blocks.N.` belong to. Everything else stays on the device. Weights come from
the mapped file; a thread of its own fetches the next block while one runs.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.graph import Graph, refs
from hif4c.runtime.slots import SLOTS, make_slots
from hif4c.runtime.stored_weights import StoredWeights

__all__ = ["OFFLOADS", "BlockOffload", "BlockStore", "block_of", "check_offload"]

OFFLOADS = ("none", "blocks")

_BLOCK = re.compile(r"blocks\.\d+\.")
_ALIGNMENT = 256  # what kernels expect of a tensor's address at most
# Operators whose result may share its memory with what they read: it is in use for as long as they are.
_VIEWS = frozenset(
    f"aten.{name}"
    for name in (
        "chunk.default", "contiguous.default", "expand.default", "flatten.using_ints", "permute.default",
        "reshape.default", "slice.Tensor", "split_with_sizes.default", "squeeze.dim", "to.dtype", "transpose.int",
        "unbind.int", "unflatten.int", "unsqueeze.default", "view.default",
    )
) | {"getitem"}  # fmt: skip


def check_offload(offload: str) -> None:
    """Raise Hif4Error for a policy that there is not."""
    if offload not in OFFLOADS:
        raise Hif4Error(f"offload={offload!r} is not known; choose {' or '.join(OFFLOADS)}.")


def block_of(name: str) -> str | None:
    """ "blocks.N." for a tensor of a block, else None."""
    found = _BLOCK.match(name)
    return found and found.group()


class BlockStore:
    """The blocks of an expert, and room for two of them on a device.

    Args:
        weights: all stored tensors, on the CPU.
        device: where blocks run.

    Attributes:
        names: the tensors that belong to blocks.
        resident: blocks that are on the device or on their way, now.
        peak: the most there have been.

    Raises:
        Hif4Error: there are no blocks.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self.blocks: dict[str, list[str]] = {}
        for name in weights:
            if (block := block_of(name)) is not None:
                self.blocks.setdefault(block, []).append(name)
        if not self.blocks:
            raise Hif4Error("the program has no tensors called blocks.N., so there is nothing to offload by blocks.")
        self.names = frozenset(name for names in self.blocks.values() for name in names)
        self.lock = threading.Lock()
        self.resident = self.peak = 0
        self._weights = weights
        self._places: dict[str, int] = {}
        size = 0
        for names in self.blocks.values():
            offset = 0
            for name in names:
                self._places[name] = offset
                offset += -(-weights[name].nbytes // _ALIGNMENT) * _ALIGNMENT
            size = max(size, offset)
        self.slots = make_slots(size, device)

    def fetch(self, block: str, slot: int) -> dict[str, torch.Tensor]:
        """Copy a block into a slot, which must be free; returns its tensors there. Runs in a thread of its own."""
        names = self.blocks[block]
        tensors = self.slots.fill(slot, [(self._places[name], self._weights[name]) for name in names])
        if isinstance(self._weights, StoredWeights):
            self._weights.release(names)
        return dict(zip(names, tensors, strict=True))


@dataclass(frozen=True)
class _Span:
    """A block in a program: its first and its last node, and the value numbers of its tensors."""

    block: str
    first: int
    last: int
    values: dict[str, int]


class BlockOffload:
    """Brings blocks to the device in the order in which a program needs them, as an executor's `Residency`.

    Raises:
        Hif4Error: the program uses more than two blocks at once.
    """

    def __init__(self, graph: Graph, store: BlockStore) -> None:
        self.names = store.names
        self._store = store
        self._spans = _spans(graph)
        for early, late in zip(self._spans, self._spans[SLOTS:], strict=False):
            if early.last >= late.first:
                raise Hif4Error(
                    f"the program still uses {early.block[:-1]} when {late.block[:-1]} begins, so it cannot run with "
                    "two blocks at a time; use offload='none'."
                )
        self._begins: dict[int, list[_Span]] = {}
        self._ends: dict[int, list[_Span]] = {}
        for span in self._spans:
            self._begins.setdefault(span.first, []).append(span)
            self._ends.setdefault(span.last, []).append(span)

    @contextmanager
    def call(self) -> Iterator[None]:
        """One call at a time: there is room for no more."""
        store = self._store
        with store.lock, ThreadPoolExecutor(1, "hif4c-offload") as pool:
            store.slots.begin()
            self._pool = pool
            self._free, self._waiting = list(range(SLOTS)), deque(self._spans)
            self._coming: dict[str, tuple[int, Future[dict[str, torch.Tensor]]]] = {}
            self._used: dict[str, int] = {}
            try:
                self._fetch_next()
                yield
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
                store.resident = 0

    def before(self, number: int, values: list[Any]) -> None:
        """Put the tensors of a block that begins into the value table."""
        for span in self._begins.get(number, ()):
            slot, future = self._coming.pop(span.block)
            tensors = future.result()
            self._store.slots.enter(slot)
            self._used[span.block] = slot
            for name, index in span.values.items():
                values[index] = tensors[name]

    def after(self, number: int, values: list[Any]) -> None:
        """Make room when a block has ended, and fetch the next one into it."""
        for span in self._ends.get(number, ()):
            for index in span.values.values():
                values[index] = None
            slot = self._used.pop(span.block)
            self._store.slots.leave(slot)
            self._store.resident -= 1
            self._free.append(slot)
        if number in self._ends:
            self._fetch_next()

    def _fetch_next(self) -> None:
        store = self._store
        while self._free and self._waiting:
            slot, span = self._free.pop(0), self._waiting.popleft()
            store.resident += 1
            store.peak = max(store.peak, store.resident)
            self._coming[span.block] = slot, self._pool.submit(store.fetch, span.block, slot)


def _spans(graph: Graph) -> list[_Span]:
    """The blocks in the order of their first use; what is a view of a block's tensor counts as the tensor."""
    first = len(graph.inputs)
    owner: dict[int, str] = {}
    values: dict[str, dict[str, int]] = {}
    for number, item in enumerate(graph.tensors):
        if (block := block_of(item.name)) is not None:
            owner[first + number] = block
            values.setdefault(block, {})[item.name] = first + number
    begin: dict[str, int] = {}
    end: dict[str, int] = {}
    for number, node in enumerate(graph.nodes):
        for ref in refs(node.args):
            if (block := owner.get(ref.index)) is not None:
                begin.setdefault(block, number)
                end[block] = number
                if node.target in _VIEWS:
                    owner[graph.first_node + number] = block
    for ref in graph.outputs:
        if ref.index in owner:
            end[owner[ref.index]] = len(graph.nodes)
    return [_Span(block, number, end[block], values[block]) for block, number in begin.items()]
