"""What follows the product of a linear, row by row: fused into a kernel, or computed by torch after one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

__all__ = ["Epilogue", "multiply", "row_blocks"]


@dataclass(frozen=True)
class Epilogue:
    """`residual + gate * activation(sum + side @ side_weight + bias)` for M rows, as `reference.linear` has it.

    side [M, S], side_weight [S, N]; gate fp32 [M / gate_rows, N], a row for `gate_rows` rows of the output; residual
    [M, N].
    """

    bias: torch.Tensor | None = None
    activation: str | None = None
    side: torch.Tensor | None = None
    side_weight: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    gate_rows: int = 1
    residual: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        bias: torch.Tensor | None,
        activation: str | None,
        side: torch.Tensor | None,
        side_weight: torch.Tensor | None,
        gate: torch.Tensor | None,
        residual: torch.Tensor | None,
    ) -> Epilogue:
        """From the arguments of `hif4::linear`, for an output of `shape` [..., N]."""
        n, lead, each = shape[-1], shape[:-1], 1
        if gate is not None:
            last = max((place + 1 for place, size in enumerate(gate.shape[:-1]) if size != 1), default=0)
            if gate.shape[:last] == lead[:last]:
                each = math.prod(lead[last:])
            else:
                gate = gate.expand(shape)
            gate = gate.reshape(-1, n)
        side = None if side is None else side.reshape(-1, side.shape[-1])
        residual = None if residual is None else residual.reshape(-1, n)
        return cls(bias, activation, side, side_weight, gate, each, residual)

    @property
    def fusible(self) -> bool:
        """Whether the kernels know such an epilogue; a backend may still have none for its dtypes."""
        ends_with_residual = self.gate is None or self.residual is not None
        return ends_with_residual and (self.side is None or self.side.dtype == torch.bfloat16)

    def rows(self, index: torch.Tensor) -> Epilogue:
        """Of the rows [r] of that index, each with a gate of its own."""
        side, residual = (None if item is None else item[index] for item in (self.side, self.residual))
        gate = None if self.gate is None else self.gate[index // self.gate_rows]
        return replace(self, side=side, residual=residual, gate=gate, gate_rows=1)

    def block(self, start: int, stop: int) -> Epilogue:
        """Of a block of `row_blocks`; copies nothing."""
        side, residual = (None if item is None else item[start:stop] for item in (self.side, self.residual))
        part = replace(self, side=side, residual=residual)
        if self.gate is None:
            return part
        first, last = start // self.gate_rows, (stop - 1) // self.gate_rows
        each = self.gate_rows if last > first else stop - start
        return replace(part, gate=self.gate[first : last + 1], gate_rows=each)

    def apply(self, acc: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """On fp32 products [M, N], which it may overwrite; returns `dtype`."""
        if self.side is not None and self.side_weight is not None:
            acc.add_(multiply(self.side, self.side_weight))
        if self.bias is not None:
            acc.add_(self.bias.float())
        if self.activation == "gelu_tanh":
            acc = torch.nn.functional.gelu(acc, approximate="tanh")
        if self.gate is not None:
            acc.view(-1, self.gate_rows, acc.shape[1]).mul_(self.gate[:, None])
        if self.residual is not None:
            acc.add_(self.residual)
        return acc.to(dtype)


def row_blocks(m: int, limit: int, epilogue: Epilogue) -> Iterator[tuple[int, int]]:
    """Cut m rows into blocks of at most `limit`: (start, stop) of each.

    Where there is more than one, none crosses from one gate row to another, unless every row has its own.
    """
    limit = max(1, limit) if limit < 128 else limit // 128 * 128
    if m <= limit:
        yield 0, m
        return
    each = epilogue.gate_rows if epilogue.gate is not None and epilogue.gate_rows > 1 else m
    for first in range(0, m, each):
        end = min(first + each, m)
        for start in range(first, end, limit):
            yield start, min(start + limit, end)


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b as fp32, of matrices in bf16 or fp16: the products are exact in fp32, also where TF32 is allowed."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())
