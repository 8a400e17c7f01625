"""Mark which part of the model every node belongs to: a transformer block, or a high-precision boundary."""

from __future__ import annotations

import re

from torch import fx

from hif4c.passes.program import PassResult, Program, module_path

__all__ = ["BLOCK_PATTERN", "mark_boundaries", "region"]

BLOCK_PATTERN = re.compile(r"blocks\.(\d+)(?:\.|$)")
"""Module paths of transformer blocks; group 1 is the block's number."""

REGION = "hif4c_region"


def mark_boundaries(program: Program) -> PassResult:
    """Write the region into `meta` of every call: "block N" inside `blocks.N`, else "boundary".

    The boundary holds patch, time and text embedding, the output norm and projection, and the rotary tables.
    """
    counts: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            match = BLOCK_PATTERN.match(module_path(node))
            node.meta[REGION] = f"block {match[1]}" if match else "boundary"
            kind = "block" if match else "boundary"
            counts[kind] = counts.get(kind, 0) + 1
    note = ", ".join(f"{count} nodes in {kind} regions" for kind, count in sorted(counts.items()))
    return PassResult(bool(counts), [note])


def region(node: fx.Node) -> str | None:
    """The region that `mark_boundaries` gave to a node, None before it ran and for nodes made after it."""
    return node.meta.get(REGION)
