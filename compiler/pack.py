"""Write an expert's tensors: read one from the checkpoint, make its stored form, append it, let it go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from hif4c.compiler.checkpoint import Checkpoint, Fingerprint
from hif4c.compiler.gptq import gptq
from hif4c.compiler.scale_search import search_scales
from hif4c.passes.program import Program, TensorSource, inverse_mask
from hif4c.runtime.format import quantize
from hif4c.runtime.rotation import block_hadamard
from hif4c.runtime.safetensors_stream import StreamingWriter, TensorSpec

__all__ = [
    "InputStatistics",
    "Planes",
    "make_planes",
    "prepared_weight",
    "stored_tensors",
    "whole_tensor",
    "write_weights",
]

Progress = Callable[[int], None]
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

SVD_OVERSAMPLING = 8
SVD_ITERATIONS = 4
SHIFTED_ROWS = 512
"""Rows of a weight that are in float64 at once."""


def stored_tensors(program: Program, checkpoint: Checkpoint) -> list[TensorSpec]:
    """Name, dtype and shape of every tensor of the weight file, in the program's order."""
    return [
        TensorSpec(source.name, _stored_dtype(source, checkpoint), source.shape) for source in program.tensors.values()
    ]


def write_weights(
    program: Program,
    checkpoint: Checkpoint,
    directory: Path,
    progress: Progress | None = None,
    *,
    solved: Callable[[str], Planes | None] = lambda source: None,
    statistics: Callable[[TensorSource], InputStatistics | None] = lambda source: None,
    on_planes: Callable[[TensorSource, Planes], None] = lambda source, planes: None,
) -> tuple[dict[str, tuple[int, str]], str]:
    """Write `weights*.safetensors`, one checkpoint tensor at a time.

    Args:
        program: a packed or lowered program.
        checkpoint: where its sources are; every tensor is checked for NaN and infinity as it is read.
        directory: existing; the files must not be there.
        progress: called with the bytes read from the checkpoint after every tensor.
        solved: planes that were made before (with a Hessian), by the name of the checkpoint's tensor.
        statistics: of a weight's input, for a rounding other than "nearest".
        on_planes: called with a plane's source and all planes of every packed weight.

    Returns:
        File name -> (bytes, sha256), and the fingerprint of the checkpoint's weights.

    Raises:
        Hif4Error: a weight is not finite, or the disk is full.
    """
    fingerprint = Fingerprint()
    specs = stored_tensors(program, checkpoint)
    dtypes = {spec.name: spec.dtype for spec in specs}
    with StreamingWriter(directory, specs) as writer:
        for sources in _by_checkpoint_tensor(program):
            name = sources[0].source
            if name is None:
                for source in sources:
                    assert source.value is not None
                    writer.write(source.name, source.value)
                continue
            tensor = checkpoint.read(name, validate=True)
            fingerprint.add(name, tensor)
            if sources[0].plane == "whole":
                whole = whole_tensor(sources[0], program, checkpoint)
                writer.write(sources[0].name, whole.to(dtypes[sources[0].name]))
            else:
                planes = solved(name)
                if planes is None:
                    known = None if sources[0].rounding == "nearest" else statistics(sources[0])
                    planes = make_planes(sources[0], tensor, program, known)
                for source in sources:
                    writer.write(source.name, planes[source.plane])
                on_planes(sources[0], planes)
            size = tensor.nbytes
            del tensor
            checkpoint.release(name)
            if progress is not None:
                progress(size)
    return dict(writer.files), fingerprint.hexdigest()


def _stored_dtype(source: TensorSource, checkpoint: Checkpoint) -> torch.dtype:
    """The program's dtype; but 16-bit tensors that are computed in float32 stay in 16 bits, which is exact."""
    if source.source is None or source.plane != "whole" or source.changed:
        return source.dtype
    found = checkpoint.dtype(source.source)
    return found if source.dtype == torch.float32 and found.itemsize < 4 else source.dtype


def _by_checkpoint_tensor(program: Program) -> Iterator[list[TensorSource]]:
    """The tensors in order, those made from one checkpoint tensor together (its planes stand side by side)."""
    group: list[TensorSource] = []
    for source in program.tensors.values():
        if group and (source.source is None or source.source != group[0].source):
            yield group
            group = []
        group.append(source)
    if group:
        yield group


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
