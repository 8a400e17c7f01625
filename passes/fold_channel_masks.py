"""Multiply by a channel mask where it is free: in the affine layer norm or in the linear that makes the input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from hif4c.passes.producers import LAYER_NORM, find_producer, some_paths
from hif4c.passes.program import LINEAR, PassResult, Program

__all__ = ["fold_channel_masks"]

CAST = torch.ops.aten.to.dtype


@dataclass(frozen=True)
class _Site:
    """Where a mask goes: the layer norm or linear, and its stored weight and bias."""

    producer: fx.Node
    tensors: tuple[fx.Node, ...]


def fold_channel_masks(program: Program) -> PassResult:
    """Move masks from `hif4::quantize` into the rows of the weight and bias that make the quantized input.

    Two producers qualify: an affine `layer_norm` in float32, and a quantized linear whose output reaches the masked
    input as the value of an attention (which mixes tokens, never channels) through casts and head layout alone, with
    the order of channels kept. Nothing else may read a value on the way. The weight of the reading linears still gets
    1/m when it is packed.

    A row-masked weight or bias is read in float32, so that its product with the mask is not rounded on the way to the
    quantizer or to the fused linear's accumulator; until then a cast stands before the linear.
    """
    folded = {"layer norms": 0, "linears": 0}
    kept: dict[str, list[str]] = {}
    groups = _groups(program)
    for x, readers in groups.items():
        paths = [program.linear_path(node) for node in readers]
        site = _find_site(program, x, readers)
        if isinstance(site, str):
            kept.setdefault(site, []).append(paths[0])
            continue
        mask = program.decisions[paths[0]].mask
        for tensor in site.tensors:
            _mask_rows(program, tensor, site.producer, mask)
        for path in paths:
            program.decisions[path] = replace(program.decisions[path], mask_folded=True)
        folded["linears" if site.producer.target is LINEAR else "layer norms"] += 1
    if not groups:
        return PassResult(False, ["no input has a mask"])
    notes = [f"folded {count} masks into {kind}" for kind, count in folded.items()]
    notes += [f"{len(paths)} not folded, {reason}: {some_paths(paths)}" for reason, paths in kept.items()]
    return PassResult(any(folded.values()), notes)


def _groups(program: Program) -> dict[fx.Node, list[fx.Node]]:
    """Masked inputs, each with the linears that read it."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in program.linears():
        if program.decisions[program.linear_path(node)].mask is not None:
            assert isinstance(node.args[0], fx.Node)
            groups.setdefault(node.args[0], []).append(node)
    return groups


def _find_site(program: Program, x: fx.Node, readers: Sequence[fx.Node]) -> _Site | str:
    """Where the mask of x can go, or why it stays."""
    mask = program.masks[str(program.decisions[program.linear_path(readers[0])].mask)]
    if bool((mask == 0).any()):
        return "outlier columns need the input unmasked"
    producer = find_producer(x)
    if isinstance(producer, str):
        return producer
    if set(x.users) != set(readers):
        return "others read the same values"
    tensors = tuple(tensor for tensor in (producer.weight, producer.bias) if tensor is not None)
    if producer.node.target is LAYER_NORM:
        if producer.weight is None:
            return "the layer norm has no weight"
        if any(tensor.meta["val"].dtype != torch.float32 for tensor in tensors):
            return "the layer norm is not in float32"
    elif not program.decisions[program.linear_path(producer.node)].quantized:
        return "the linear before it is in high precision"
    if any(tensor.name not in program.tensors or len(tensor.users) > 1 for tensor in tensors):
        return "the weights before it are shared or computed"
    return _Site(producer.node, tensors)


def _mask_rows(program: Program, tensor: fx.Node, producer: fx.Node, mask: str | None) -> None:
    spec = program.tensors[tensor.name]
    program.tensors[tensor.name] = replace(
        spec, dtype=torch.float32, packed_from=spec.packed_from or spec.dtype, row_mask=mask
    )
    if spec.dtype == torch.float32:
        return
    with program.fake_mode:
        tensor.meta["val"] = torch.empty(spec.shape, dtype=torch.float32)
    with program.graph.inserting_before(producer):
        cast = program.call(CAST, (tensor, spec.dtype), like=producer)
    producer.replace_input_with(tensor, cast)
