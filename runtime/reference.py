"""The portable linears in plain torch: the result that every other backend is checked against.

Symbols: M rows, K channels, N outputs, U units of 64 channels (see `hif4c.runtime.format`), S columns of a side branch.

Both linears end alike, in fp32: `activation(sum + bias)`, then `* gate`, then `residual +`, each rounded by itself, and
one cast. `gate` fp32 [..., N] broadcasts against the output; `residual` has the output's shape.
"""

from typing import Any

import torch

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import UNIT, check_input, check_planes, dequantize
from hif4c.runtime.rotation import block_hadamard

__all__ = ["ACTIVATIONS", "check_linear", "check_linear_w4", "linear", "linear_w4", "masked_and_rotated"]

ACTIVATIONS = ("gelu_tanh",)

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# Bounds on the blocks, in elements. Whatever the shape (a single row of K excepted): decoded activations 16 MB, decoded
# weight rows 8 MB, accumulator and unit products 4 MB each, and what decoding needs. 60 MB were seen in all.
_BLOCK_A = 1 << 22
_BLOCK_W = 1 << 21
_BLOCK_OUT = 1 << 20


def check_linear(
    codes: torch.Tensor,
    scales: torch.Tensor,
    w_codes: torch.Tensor,
    w_scales: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
    side: torch.Tensor | None = None,
    side_weight: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> None:
    """Raise Hif4Error unless the arguments of `linear` fit each other; looks at shapes and dtypes only."""
    check_planes(codes, scales, what="linear input")
    _check_weight(w_codes, w_scales, bias, activation, dtype)
    if codes.shape[-1] != w_codes.shape[-1]:
        raise Hif4Error(
            f"linear: the input has {codes.shape[-1] // (UNIT // 2)} units of {UNIT} channels, "
            f"the weight {w_codes.shape[-1] // (UNIT // 2)}."
        )
    _check_side(codes, w_codes.shape[0], side, side_weight)
    _check_gated_residual((*codes.shape[:-1], w_codes.shape[0]), gate, residual)


def check_linear_w4(
    x: torch.Tensor,
    w_codes: torch.Tensor,
    w_scales: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    hadamard: int,
    activation: str | None,
    dtype: torch.dtype,
    side: torch.Tensor | None = None,
    side_weight: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> None:
    """Raise Hif4Error unless the arguments of `linear_w4` fit each other; looks at shapes and dtypes only."""
    check_input(x, mask, hadamard)
    _check_weight(w_codes, w_scales, bias, activation, dtype)
    check_planes(w_codes, w_scales, x.shape[-1], what="linear_w4 weight")
    _check_side(x, w_codes.shape[0], side, side_weight)
    _check_gated_residual((*x.shape[:-1], w_codes.shape[0]), gate, residual)


def _check_weight(
    w_codes: torch.Tensor, w_scales: torch.Tensor, bias: torch.Tensor | None, activation: str | None, dtype: Any
) -> None:
    check_planes(w_codes, w_scales, what="linear weight")
    if w_codes.dim() != 2:
        raise Hif4Error(f"linear: weight codes must have shape [N, Kp/2], not {list(w_codes.shape)}.")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != w_codes.shape[0]):
        raise Hif4Error(f"linear: the bias must have shape [{w_codes.shape[0]}], not {list(bias.shape)}.")
    if activation is not None and activation not in ACTIVATIONS:
        raise Hif4Error(f"linear: unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}.")
    if dtype not in _FLOATS:
        raise Hif4Error(f"linear: the output must be bfloat16, float16 or float32, not {dtype}.")


def _check_side(data: torch.Tensor, n: Any, side: torch.Tensor | None, side_weight: torch.Tensor | None) -> None:
    """`data` is the linear's input, codes or values: its leading shape is that of the side branch."""
    if side is None and side_weight is None:
        return
    if side is None or side_weight is None:
        raise Hif4Error("linear: side and side_weight belong together; give both or neither.")
    if side.dtype not in _FLOATS or side.dtype != side_weight.dtype:
        raise Hif4Error(
            "linear: side and side_weight must be both bfloat16, both float16 or both float32, "
            f"not {side.dtype} and {side_weight.dtype}."
        )
    if side_weight.dim() != 2 or side_weight.shape[0] == 0 or side_weight.shape[1] != n:
        raise Hif4Error(
            f"linear: side_weight must have shape [S, {n}] with S of at least 1, not {list(side_weight.shape)}."
        )
    expected = (*data.shape[:-1], side_weight.shape[0])
    if side.dim() != len(expected) or any(a != b for a, b in zip(side.shape, expected, strict=True)):
        raise Hif4Error(f"linear: side must have shape {list(expected)}, not {list(side.shape)}.")


def _check_gated_residual(shape: tuple[Any, ...], gate: torch.Tensor | None, residual: torch.Tensor | None) -> None:
    """`shape` is the output's."""
    if gate is not None:
        fits = gate.dim() == len(shape) and all(a == b or a == 1 for a, b in zip(gate.shape, shape, strict=True))
        if gate.dtype != torch.float32 or not fits or gate.shape[-1] != shape[-1]:
            raise Hif4Error(
                f"linear: the gate must be float32 and broadcast to {list(shape)}, not {gate.dtype} {list(gate.shape)}."
            )
    if residual is not None and (
        residual.dim() != len(shape) or any(a != b for a, b in zip(residual.shape, shape, strict=True))
    ):
        raise Hif4Error(f"linear: the residual must have shape {list(shape)}, not {list(residual.shape)}.")


@torch.no_grad()
def linear(
    codes: torch.Tensor,
    scales: torch.Tensor,
    w_codes: torch.Tensor,
    w_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    dtype: torch.dtype = torch.float32,
    side: torch.Tensor | None = None,
    side_weight: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Product of two HiF4 tensors: `activation(sum over units of exact dot products + side branch + bias)`, cast once.

    codes [..., Kp/2] and scales [..., U, 4] of the input, w_codes [N, Kp/2] and w_scales [N, U, 4] of the weight, all
    uint8; bias [N] floating point or None; activation None or "gelu_tanh"; dtype bf16, fp16 or fp32. `side` [..., S]
    and `side_weight` [S, N], both bf16, both fp16 or both fp32, or None: what is computed beside the 4-bit product, a
    low-rank branch or channels kept out of it. Returns [..., N].

    The contract: in each unit the int32 dot product of the in-unit integers, times Ea*Eb/16; both exact in fp32. From
    an accumulator of 0, fp32 additions of the units in order, then of side[..., j] * side_weight[j] for j = 0 .. S-1
    (each product is rounded before it is added; of bf16 or fp16 it has 22 bits at most and is exact in fp32's range);
    then the bias, the activation, the gate, the residual, and one cast.
    Here a unit's dot product is an fp32 matmul of decoded values. Every term is an integer of at most 28*28 times
    Ea*Eb/16, so every partial sum is an integer of at most 64*784 < 2^24 (times a 6-bit significand shared by all, 22
    bits together): exact in whatever order and with whatever thread count the matmul adds. The result is therefore the
    same for every blocking, batch and thread count. A NaN unit makes its row or column NaN.

    Weights are decoded a few rows at a time; temporaries stay under about 64 MB, the output aside.
    Raises Hif4Error for planes, bias, activation, dtype or side branch that do not fit.
    """
    check_linear(codes, scales, w_codes, w_scales, bias, activation, dtype, side, side_weight, gate, residual)
    n, kp = w_codes.shape[0], w_codes.shape[1] * 2
    units = kp // UNIT
    flat_codes, flat_scales = codes.reshape(-1, kp // 2), scales.reshape(-1, units, 4)
    m = flat_codes.shape[0]
    flat_side = None if side is None else side.reshape(-1, side.shape[-1])
    flat_gate, flat_residual = _flat_gated_residual((*codes.shape[:-1], n), gate, residual)
    out = torch.empty((m, n), dtype=dtype, device=codes.device)
    step_m = max(1, _BLOCK_A // max(1, kp))
    step_n = max(1, min(_BLOCK_W // max(1, kp), _BLOCK_OUT // min(step_m, max(1, m))))
    with torch.autocast(codes.device.type, enabled=False):
        for i in range(0, m, step_m):
            rows = slice(i, i + step_m)
            a = dequantize(flat_codes[rows], flat_scales[rows], kp, torch.float32)
            for j in range(0, n, step_n):
                cols = slice(j, j + step_n)
                w = dequantize(w_codes[cols], w_scales[cols], kp, torch.float32)
                acc = _accumulate(a.view(-1, units, UNIT), w.view(-1, units, UNIT))
                if flat_side is not None and side_weight is not None:
                    _add_side(acc, flat_side[rows], side_weight[:, cols])
                out[rows, cols] = _finish(
                    acc, None if bias is None else bias[cols], activation,
                    None if flat_gate is None else flat_gate[rows, cols],
                    None if flat_residual is None else flat_residual[rows, cols],
                )  # fmt: skip
    return out.view(*codes.shape[:-1], n)


@torch.no_grad()
def linear_w4(
    x: torch.Tensor,
    w_codes: torch.Tensor,
    w_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    hadamard: int = 0,
    activation: str | None = None,
    dtype: torch.dtype = torch.float32,
    side: torch.Tensor | None = None,
    side_weight: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weight-only linear: `activation(rotate(x * mask) @ W^T + side branch + bias)`, W the decoded weight.

    x [..., K] bf16, fp16 or fp32, not quantized; w_codes [N, Kp/2] and w_scales [N, U, 4] uint8; bias [N] and mask [K]
    floating point or None; hadamard the rotation width (0 or 1: none); activation None or "gelu_tanh"; dtype bf16, fp16
    or fp32. `side` [..., S] and `side_weight` [S, N] as in `linear`. Returns [..., N].

    Mask and rotation are in fp32, and what they give is rounded to the dtype of x: matrix units take nothing wider, and
    no more is kept of any other activation. Matmul and epilogue are in fp32. The order of the matmul's additions is the
    backend's, so results agree to summation error, not to the bit, across batch sizes, threads and backends.
    Weights are decoded a few rows at a time; temporaries stay under about 64 MB, fp32 copies of x aside.
    Raises Hif4Error for tensors, activation or dtype that do not fit.
    """
    check_linear_w4(x, w_codes, w_scales, bias, mask, hadamard, activation, dtype, side, side_weight, gate, residual)
    k, n = x.shape[-1], w_codes.shape[0]
    with torch.autocast(x.device.type, enabled=False):
        y = masked_and_rotated(x.reshape(-1, k), mask, hadamard).float()
        flat_side = None if side is None else side.reshape(-1, side.shape[-1])
        flat_gate, flat_residual = _flat_gated_residual((*x.shape[:-1], n), gate, residual)
        out = torch.empty((y.shape[0], n), dtype=dtype, device=x.device)
        step = max(1, min(_BLOCK_W // max(1, k), _BLOCK_OUT // max(1, y.shape[0])))
        for j in range(0, n, step):
            cols = slice(j, j + step)
            w = dequantize(w_codes[cols], w_scales[cols], k, torch.float32)
            acc = torch.mm(y, w.t())
            if flat_side is not None and side_weight is not None:
                _add_side(acc, flat_side, side_weight[:, cols])
            out[:, cols] = _finish(
                acc, None if bias is None else bias[cols], activation,
                None if flat_gate is None else flat_gate[:, cols],
                None if flat_residual is None else flat_residual[:, cols],
            )  # fmt: skip
    return out.view(*x.shape[:-1], n)


def masked_and_rotated(x: torch.Tensor, mask: torch.Tensor | None, hadamard: int) -> torch.Tensor:
    """x [..., K] times mask [K], rotated, in fp32, and rounded to the dtype of x."""
    if mask is None and hadamard <= 1:
        return x
    y = x.float() if mask is None else x * mask.float()
    return (block_hadamard(y, hadamard) if hadamard > 1 else y).to(x.dtype)


def _accumulate(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Unit by unit, in order: the sum of a [m, U, 64] @ w [n, U, 64]^T over U, fp32 [m, n]."""
    acc = a.new_zeros((a.shape[0], w.shape[0]))
    a, w = a.transpose(0, 1), w.permute(1, 2, 0)
    # Several units a call, as each call to the BLAS wakes its threads. Not baddbmm: whether it adds the accumulator
    # before or after the products is up to the BLAS.
    step = max(1, _BLOCK_OUT // max(1, acc.numel()))
    for u in range(0, a.shape[0], step):
        for dot in torch.bmm(a[u : u + step], w[u : u + step]):
            acc.add_(dot)
    return acc


def _add_side(acc: torch.Tensor, side: torch.Tensor, side_weight: torch.Tensor) -> None:
    """Add side [m, S] times side_weight [S, n] to acc [m, n] in fp32, one j of S after the other."""
    side, side_weight = side.float(), side_weight.float()
    for j in range(side.shape[1]):
        acc.add_(side[:, j : j + 1] * side_weight[j])


def _flat_gated_residual(
    shape: tuple[int, ...], gate: torch.Tensor | None, residual: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gate and residual as [M, N]; the gate of one row for many stays a view of it where that is possible."""
    n = shape[-1]
    return (
        None if gate is None else gate.expand(shape).reshape(-1, n),
        None if residual is None else residual.reshape(-1, n),
    )


def _finish(
    acc: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Bias, activation, gate and residual on the fp32 accumulator [m, n]; the caller's store casts."""
    if bias is not None:
        acc.add_(bias.float())
    if activation == "gelu_tanh":
        acc = torch.nn.functional.gelu(acc, approximate="tanh")
    if gate is not None:
        acc = acc.mul_(gate)
    return acc if residual is None else acc.add_(residual)
