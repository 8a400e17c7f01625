"""The stored form of one weight: masks, rotation, rounding, side branch; and of the tensors that stay whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.gptq import gptq
from hif4c.compiler.scale_search import search_scales
from hif4c.passes.program import Program, TensorSource, inverse_mask
from hif4c.runtime.format import quantize
from hif4c.runtime.rotation import block_hadamard
from hif4c.runtime.safetensors_stream import tensor_bytes

__all__ = [
    "InputStatistics",
    "PackedTensor",
    "Planes",
    "make_planes",
    "pack_tensors",
    "prepared_weight",
    "stored_dtype",
    "whole_tensor",
]

MIN_DAMPING, MAX_DAMPING = 0.01, 1.0
"""A Hessian of T tokens in K channels is damped by K/T within these: with few tokens GPTQ fits their noise."""


@dataclass(frozen=True)
class InputStatistics:
    """Second moments of a quantized input, masked and rotated.

    Attributes:
        energy: E[x^2] [K], or any multiple.
        tokens: how many were looked at.
        hessian: E[x x^T] [K, K], or any multiple; None where only the energy is known.
    """

    energy: torch.Tensor
    tokens: int
    hessian: torch.Tensor | None = None


Planes = dict[str, torch.Tensor]
"""What is stored of a packed weight: "codes" and "scales", and "down" and "up" where it has a side branch."""


@dataclass(frozen=True)
class PackedTensor:
    """What is stored of one checkpoint tensor.

    Attributes:
        source: its name in the checkpoint; None for a value of the program's own.
        stored: name in the weight file -> tensor, of the dtype that is stored there.
        digest: sha256 of the checkpoint tensor's bytes.
        nbytes: how many these are, 0 for a value of the program's own.
        sqnr: what `measure` said of it, None where it was not asked.
    """

    source: str | None
    stored: dict[str, torch.Tensor]
    digest: str | None
    nbytes: int
    sqnr: float | None


SVD_OVERSAMPLING = 8
SVD_ITERATIONS = 4
SHIFTED_ROWS = 512
"""Rows of a weight that are in float64 at once."""


def whole_tensor(source: TensorSource, program: Program, checkpoint: Checkpoint) -> torch.Tensor:
    """The stored form of a tensor that is not packed, in the order that `TensorSource` states."""
    assert source.source is not None
    tensor = checkpoint.read(source.source)
    if not source.changed:
        return tensor
    found = tensor.to(source.packed_from).float()
    if source.input_shift is not None:
        weight = f"{source.source.removesuffix('.bias')}.weight"
        shift = program.shifts[source.input_shift].double()
        # In float64: the sum has K terms, and the shift may be large.
        parts = checkpoint.read(weight).split(SHIFTED_ROWS)
        found = found + torch.cat([part.to(source.packed_from).double() @ shift for part in parts]).float()
        checkpoint.release(weight)
    if source.row_shifts:
        rows = found.reshape(-1, found.shape[-1]).clone()
        for row, name in source.row_shifts:
            rows[row] -= program.shifts[name]
        found = rows.view(found.shape)
    if source.row_mask is not None:
        found = found * program.masks[source.row_mask].float().view(-1, *[1] * (found.dim() - 1))
    return found


def prepared_weight(source: TensorSource, tensor: torch.Tensor, program: Program) -> torch.Tensor:
    """W [N, K] float32 with its rows masked, in the numbers that the unquantized program computes with."""
    # Through the dtype that the unquantized model computes in: the same numbers that the Q/DQ program quantizes.
    weight = tensor.to(source.packed_from).float()
    return weight if source.row_mask is None else weight * program.masks[source.row_mask].float()[:, None]


def make_planes(
    source: TensorSource, tensor: torch.Tensor, program: Program, statistics: InputStatistics | None = None
) -> Planes:
    """Pack a weight as `TensorSource` states: side branch, mask, rotation, rounding.

    Args:
        source: any of its planes.
        tensor: the checkpoint's [N, K].
        program: with the masks.
        statistics: of its input, for a rounding other than "nearest".

    Raises:
        ValueError: the rounding needs statistics and there are none.
    """
    weight = prepared_weight(source, tensor, program)
    mask = None if source.mask is None else program.masks[source.mask].float()
    masked = weight if mask is None else weight * inverse_mask(mask)
    planes: Planes = {}
    up: list[torch.Tensor] = []
    if source.rank:
        right, left = _low_rank(masked, source.rank)
        # Factors are stored in bf16 for what the branch reads, and what they lose stays in the residual.
        reads_raw = mask if mask is not None and not source.mask_folded else torch.ones(weight.shape[1])
        planes["down"] = (right * reads_raw).to(torch.bfloat16)
        up.append(left.to(torch.bfloat16))
        masked = masked - up[0].float().T @ (planes["down"].float() * inverse_mask(reads_raw))
    if mask is not None and bool((mask == 0).any()):
        up.append(weight[:, mask == 0].T.to(torch.bfloat16))
    if up:
        planes["up"] = torch.cat(up).contiguous()
    if source.rounding == "nearest":
        codes, scales = quantize(masked, None, source.hadamard)
    else:
        if statistics is None or (source.rounding == "gptq" and statistics.hessian is None):
            raise ValueError(f"{source.source}: rounding {source.rounding} needs statistics of the input")
        rotated = (block_hadamard(masked, source.hadamard) if source.hadamard > 1 else masked).contiguous()
        if source.rounding == "gptq" and statistics.hessian is not None:
            damping = min(max(rotated.shape[1] / statistics.tokens, MIN_DAMPING), MAX_DAMPING)
            codes, scales = gptq(rotated, statistics.hessian, damping=damping, name=str(source.source))
        else:
            codes, scales = search_scales(rotated, statistics.energy)
    return {**planes, "codes": codes, "scales": scales}


def stored_dtype(source: TensorSource, checkpoint: Checkpoint) -> torch.dtype:
    """The program's dtype; but 16-bit tensors that are computed in float32 stay in 16 bits, which is exact."""
    if source.source is None or source.plane != "whole" or source.changed:
        return source.dtype
    found = checkpoint.dtype(source.source)
    return found if source.dtype == torch.float32 and found.itemsize < 4 else source.dtype


def pack_tensors(
    groups: Sequence[list[TensorSource]],
    program: Program,
    checkpoint: Checkpoint,
    *,
    solved: Callable[[str], Planes | None] = lambda source: None,
    statistics: Callable[[TensorSource], InputStatistics | None] = lambda source: None,
    measure: Callable[[TensorSource, torch.Tensor, Planes], float | None] | None = None,
) -> Iterator[PackedTensor]:
    """The stored form of each group of tensors that are made from one checkpoint tensor, in order.

    Args:
        groups: the tensors, side by side those that have the same source.
        program: with the masks.
        checkpoint: every tensor is checked for NaN and infinity as it is read; its memory is given back when the next
            result is asked for.
        solved: planes that were made before (with a Hessian), by the name of the checkpoint's tensor.
        statistics: of a weight's input, for a rounding other than "nearest".
        measure: called with a plane's source, its prepared weight [N, K] float32 and all its planes.

    Raises:
        Hif4Error: a weight is not finite.
    """
    for sources in groups:
        first = sources[0]
        if first.source is None:
            values = {source.name: source.value for source in sources if source.value is not None}
            yield PackedTensor(None, values, None, 0, None)
            continue
        tensor = checkpoint.read(first.source, validate=True)
        sqnr = None
        if first.plane == "whole":
            whole = whole_tensor(first, program, checkpoint).to(stored_dtype(first, checkpoint))
            stored = {first.name: whole}
        else:
            planes = solved(first.source)
            if planes is None:
                known = None if first.rounding == "nearest" else statistics(first)
                planes = make_planes(first, tensor, program, known)
            stored = {source.name: planes[source.plane] for source in sources}
            if measure is not None:
                sqnr = measure(first, prepared_weight(first, tensor, program), planes)
        digest = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        yield PackedTensor(first.source, stored, digest, tensor.nbytes, sqnr)
        del tensor, stored
        checkpoint.release(first.source)


def _low_rank(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearly the best rank-r approximation left^T right of a weight [N, K]: right [r, K] and left [r, N], float32.

    By randomized SVD (Halko, Martinsson, Tropp, arXiv 0909.4061) with a fixed seed; a full one of every weight of a
    large model would take hours.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        width = min(rank + SVD_OVERSAMPLING, *weight.shape)
        u, values, v = torch.svd_lowrank(weight, q=width, niter=SVD_ITERATIONS)
    # Split evenly, so that both factors have like magnitudes in bf16.
    root = values[:rank].sqrt()
    return (v[:, :rank] * root).T.contiguous(), (u[:, :rank] * root).T.contiguous()
