"""The stored form of one weight: masks, rotation, rounding, side branch; and of the tensors that stay whole."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.gptq import gptq
from hif4c.compiler.ranks import ALONE, Ranks
from hif4c.compiler.scale_search import search_scales
from hif4c.compiler.workers import in_order
from hif4c.passes.program import Program, TensorSource, inverse_mask
from hif4c.runtime.format import packed_shapes
from hif4c.runtime.rotation import block_hadamard

__all__ = [
    "InputStatistics",
    "PackedTensor",
    "Planes",
    "PreparedWeight",
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
BLOCK_ELEMENTS = 1 << 18
"""Elements of a weight that are in float32 at once: what is made of them stays in the cache of a core."""
MAPPED_ELEMENTS = 1 << 22
"""Elements of the checkpoint that are in this process's memory at once."""
FACTORED_ELEMENTS = 1 << 20
"""The same where products with few columns are taken."""
SEARCHED_ELEMENTS = 1 << 24
"""The same where scales are searched, which takes its own blocks of many rows and a few columns."""


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


@dataclass(frozen=True)
class PreparedWeight:
    """W [N, K] with its rows masked, in the numbers that the unquantized program computes with.

    It is made when rows of it are asked for: a whole one in float32 takes twice the memory of the checkpoint's.

    Attributes:
        tensor: the checkpoint's [N, K].
        dtype: what the unquantized program computes in.
        row_mask: [N] float32, None for none.
        release: called now and then behind blocks of rows: the checkpoint's memory of them is not needed for now.
    """

    tensor: torch.Tensor
    dtype: torch.dtype
    row_mask: torch.Tensor | None = None
    release: Callable[[], None] = lambda: None

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        return self.tensor.shape

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """Some rows [n, K], float32."""
        return self.exact(rows).float()

    def exact(self, rows: slice = slice(None)) -> torch.Tensor:
        """Some rows [n, K] in a dtype that holds them exactly; the checkpoint's own memory where nothing changes."""
        # Through the dtype that the unquantized model computes in: the same numbers that the Q/DQ program quantizes.
        weight = self.tensor[rows].to(self.dtype)
        return weight if self.row_mask is None else weight.float() * self.row_mask[rows, None]

    def blocks(self, elements: int = BLOCK_ELEMENTS) -> Iterator[slice]:
        """All rows, some of about so many elements at a time."""
        step = max(1, elements // self.shape[1])
        kept = 0
        for start in range(0, self.shape[0], step):
            yield slice(start, min(start + step, self.shape[0]))
            kept += step * self.shape[1]
            if kept >= MAPPED_ELEMENTS or start + step >= self.shape[0]:
                self.release()
                kept = 0


def prepared_weight(
    source: TensorSource, tensor: torch.Tensor, program: Program, release: Callable[[], None] = lambda: None
) -> PreparedWeight:
    """The weight of a packed tensor's source [N, K] as the unquantized program has it."""
    assert source.packed_from is not None
    row_mask = None if source.row_mask is None else program.masks[source.row_mask].float()
    return PreparedWeight(tensor, source.packed_from, row_mask, release)


def make_planes(
    source: TensorSource,
    tensor: torch.Tensor,
    program: Program,
    statistics: InputStatistics | None = None,
    release: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> Planes:
    """Pack a weight as `TensorSource` states: side branch, mask, rotation, rounding.

    Args:
        source: any of its planes.
        tensor: the checkpoint's [N, K].
        program: with the masks.
        statistics: of its input, for a rounding other than "nearest".
        release: as in `PreparedWeight`.
        ranks: share the rows for GPTQ; all of them make the same call.

    Raises:
        ValueError: the rounding needs statistics and there are none.
    """
    hessian = None if statistics is None else statistics.hessian
    if (source.rounding == "gptq" and hessian is None) or (source.rounding == "search" and statistics is None):
        raise ValueError(f"{source.source}: rounding {source.rounding} needs statistics of the input")
    weight = prepared_weight(source, tensor, program, release)
    mask = None if source.mask is None else program.masks[source.mask].float()
    inverse = None if mask is None else inverse_mask(mask)
    planes: Planes = {}
    up: list[torch.Tensor] = []
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None
    if source.rank:
        right, left = _low_rank(weight, inverse, source.rank)
        # Factors are stored in bf16 for what the branch reads, and what they lose stays in the residual.
        reads_raw = mask if mask is not None and not source.mask_folded else torch.ones(weight.shape[1])
        planes["down"] = (right * reads_raw).to(torch.bfloat16)
        up.append(left.to(torch.bfloat16))
        low_rank = up[0].float().T, planes["down"].float() * inverse_mask(reads_raw)
    if mask is not None and bool((mask == 0).any()):
        outliers = (mask == 0).nonzero()[:, 0]
        columns = [weight.exact(rows).index_select(1, outliers) for rows in weight.blocks()]
        up.append(torch.cat(columns).T.to(torch.bfloat16))
    if up:
        planes["up"] = torch.cat(up).contiguous()
    if source.rounding == "gptq" and statistics is not None and hessian is not None:
        rotated = _rotated(_whole(weight, inverse, low_rank), source.hadamard)
        damping = min(max(rotated.shape[1] / statistics.tokens, MIN_DAMPING), MAX_DAMPING)
        codes, scales = gptq(rotated, hessian, damping=damping, name=str(source.source), ranks=ranks)
        return {**planes, "codes": codes, "scales": scales}
    shapes = packed_shapes(weight.shape)
    codes, scales = (torch.empty(shape, dtype=torch.uint8) for shape in shapes)
    size = MAPPED_ELEMENTS if low_rank is None and weight.row_mask is None else BLOCK_ELEMENTS
    for rows in weight.blocks(SEARCHED_ELEMENTS if source.rounding == "search" else size):
        if statistics is not None and source.rounding == "search":
            residual = _residual(weight, rows, inverse, low_rank)
            found = search_scales(_rotated(residual, source.hadamard), statistics.energy)
        elif low_rank is None:
            found = torch.ops.hif4.quantize(weight.exact(rows), inverse, source.hadamard)
        else:
            found = torch.ops.hif4.quantize(_residual(weight, rows, inverse, low_rank), None, source.hadamard)
        codes[rows], scales[rows] = found
    return {**planes, "codes": codes, "scales": scales}


def _residual(
    weight: PreparedWeight,
    rows: slice,
    inverse: torch.Tensor | None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Rows [n, K] of the weight, float32, divided by the mask, less the product of its low-rank factors."""
    masked = weight[rows] if inverse is None else weight[rows] * inverse
    return masked if low_rank is None else masked - low_rank[0][rows] @ low_rank[1]


def _whole(
    weight: PreparedWeight, inverse: torch.Tensor | None, low_rank: tuple[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    """All rows of the residual, made in blocks so that nothing of their size is beside them."""
    result = torch.empty(weight.shape)
    for rows in weight.blocks():
        result[rows] = _residual(weight, rows, inverse, low_rank)
    return result


def _rotated(weight: torch.Tensor, width: int) -> torch.Tensor:
    return (block_hadamard(weight, width) if width > 1 else weight).contiguous()


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
    measure: Callable[[TensorSource, PreparedWeight, Planes], float | None] | None = None,
) -> Iterator[PackedTensor]:
    """The stored form of each group of tensors that are made from one checkpoint tensor, in order.

    Args:
        groups: the tensors, side by side those that have the same source.
        program: with the masks.
        checkpoint: every tensor is checked for NaN and infinity as it is read; its memory is given back when the next
            result is asked for. Read by several threads at a time, which also call the functions below.
        solved: planes that were made before (with a Hessian), by the name of the checkpoint's tensor.
        statistics: of a weight's input, for a rounding other than "nearest".
        measure: called with a plane's source, its weight and all its planes.

    Raises:
        Hif4Error: a weight is not finite.
    """

    def pack(sources: list[TensorSource]) -> PackedTensor:
        first = sources[0]
        if first.source is None:
            values = {source.name: source.value for source in sources if source.value is not None}
            return PackedTensor(None, values, None, 0, None)
        checkpoint.prefetch(first.source)
        tensor = checkpoint.read(first.source)
        digest = checkpoint.digest(first.source, tensor)
        if first.plane == "whole":
            whole = whole_tensor(first, program, checkpoint).to(stored_dtype(first, checkpoint))
            return PackedTensor(first.source, {first.name: whole}, digest, tensor.nbytes, None)
        release = functools.partial(checkpoint.release, first.source)
        planes = solved(first.source)
        if planes is None:
            known = None if first.rounding == "nearest" else statistics(first)
            planes = make_planes(first, tensor, program, known, release)
        stored = {source.name: planes[source.plane] for source in sources}
        sqnr = None if measure is None else measure(first, prepared_weight(first, tensor, program, release), planes)
        return PackedTensor(first.source, stored, digest, tensor.nbytes, sqnr)

    with contextlib.closing(in_order(pack, groups, lambda sources: _working_bytes(sources[0], checkpoint))) as made:
        for result in made:
            yield result
            if result.source is not None:
                checkpoint.release(result.source)  # a whole tensor is the mapped file itself where nothing changes


def _working_bytes(source: TensorSource, checkpoint: Checkpoint) -> int:
    """About what packing a tensor takes at its peak, its result included, beside what the checkpoint gives back."""
    if source.source is None:
        return 0
    elements = checkpoint.shape(source.source).numel()
    if source.plane == "whole":
        return 8 * elements if source.changed else 0
    return elements * 9 // 16 + (4 * SEARCHED_ELEMENTS if source.rounding == "search" else 16 * MAPPED_ELEMENTS)


def _low_rank(weight: PreparedWeight, inverse: torch.Tensor | None, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearly the best rank-r approximation left^T right of W / m [N, K]: right [r, K] and left [r, N], float32.

    By randomized SVD (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1); a full one of every weight
    of a large model would take hours. A generator of its own, with a fixed seed: several weights are worked on at once.
    """

    def times(right: torch.Tensor) -> torch.Tensor:
        blocks = weight.blocks(FACTORED_ELEMENTS)
        return torch.cat([_residual(weight, rows, inverse, None) @ right for rows in blocks])

    def transposed_times(left: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(weight.shape[1], left.shape[1])
        for rows in weight.blocks(FACTORED_ELEMENTS):
            total.addmm_(_residual(weight, rows, inverse, None).T, left[rows])
        return total

    width = min(rank + SVD_OVERSAMPLING, *weight.shape)
    sketch = torch.randn(weight.shape[1], width, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(times(sketch)).Q
    for _ in range(SVD_ITERATIONS):
        basis = torch.linalg.qr(times(torch.linalg.qr(transposed_times(basis)).Q)).Q
    v, values, u = torch.linalg.svd(transposed_times(basis), full_matrices=False)
    # Split evenly, so that both factors have like magnitudes in bf16.
    root = values[:rank].sqrt()
    return (v[:, :rank] * root).T.contiguous(), ((basis @ u[:rank].T) * root).T.contiguous()
