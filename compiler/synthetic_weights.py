"""Made-up values of a Wan transformer's parameters, whose activations have the sizes published of Wan2.2's.

Matched are the largest inputs of each kind of linear (A14B, high-noise expert, medians over blocks): attn1 q/k/v 9.9,
attn1 out 8.9, attn2 q 53.5, attn2 k/v 1.1, attn2 out 1.2, ffn.0 5.2; and what is known of their origin: one massive
channel of the residual stream, the same for every token, which the affine norm2 lets through and the modulated norms
mute. After 40 layers the residual stream is about twice what it was. Invented is everything else: the tails of the
weights (Student's t with 8 degrees of freedom), the spread of their rows and columns, the biases.

A value depends on the seed, the tensor's name in diffusers and its place in the tensor, and on nothing else: not on the
layout, the dtype, the number of layers, or which thread makes it when.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["synthetic_tensor"]

_CHUNK = 1 << 17  # values that are worked on at once: they stay in a core's cache
_LEVELS = 1 << 16
_TAIL = 8
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Matrix:
    """The sizes of a weight [out, in].

    Attributes:
        gain: standard deviation of the outputs for inputs of variance 1.
        rows: how far the rows' sizes are spread: standard deviation of their logarithms.
        columns: the same of the columns.
        steady: its outputs of the massive channel hardly depend on the timestep, or they would undo the muting.
    """

    gain: float
    rows: float = 0.3
    columns: float = 0.2
    steady: bool = False


_MATRICES = {
    "patch_embedding": _Matrix(1.0),
    "time_embedder.linear_1": _Matrix(1.0),
    "time_embedder.linear_2": _Matrix(0.4, steady=True),
    "time_proj": _Matrix(0.6, steady=True),
    "text_embedder.linear_1": _Matrix(1.0),
    "text_embedder.linear_2": _Matrix(0.25, rows=0.15),
    "attn1.to_q": _Matrix(1.0),
    "attn1.to_k": _Matrix(1.0),
    "attn1.to_v": _Matrix(1.0, rows=0.2),
    "attn1.to_out.0": _Matrix(1.0),
    "attn2.to_q": _Matrix(1.0),
    "attn2.to_k": _Matrix(1.0),
    "attn2.to_v": _Matrix(1.0),
    "attn2.to_out.0": _Matrix(1.0),
    "ffn.net.0.proj": _Matrix(1.0),
    "ffn.net.2": _Matrix(1.0),
    "proj_out": _Matrix(1.0),
}
_BIAS = 0.05
_NORM_SPREAD = 0.2
_QK_NORM = 1.5
# (shift, scale, gate) before self-attention, then before the feed-forward layer: standard deviations.
_MODULATION = (0.4, 0.4, 0.15, 0.08, 0.08, 0.15)
_OUT_MODULATION = (0.2, 0.2)
_MUTED = 0.08
"""What the modulated norms leave of the massive channel."""
_STEADY = 0.1
"""Size of what the timestep adds to the massive channel's modulation, beside that of the other channels."""
_MASSIVE = 53.5 / math.sqrt(5120)
"""Of the bound sqrt(width) of a normalized channel, the part that the massive one reaches."""


def synthetic_tensor(
    name: str, shape: tuple[int, ...], width: int, dtype: torch.dtype = torch.bfloat16, seed: str = "0"
) -> torch.Tensor:
    """The values of one parameter.

    Args:
        name: diffusers' name.
        shape: its shape.
        width: of the residual stream.
        dtype: what the values are rounded to.
        seed: any text.
    """
    module, _, leaf = name.rpartition(".")
    values = _Values(f"{seed}/{name}")
    massive = width // 3
    if leaf == "scale_shift_table":
        return _table(values, shape, massive).to(dtype)
    kind = next((item for key, item in _MATRICES.items() if module.endswith(key)), None)
    steady = slice(massive, None, width) if kind is not None and kind.steady else slice(0)
    if leaf == "bias":
        vector = _BIAS * values.draw("values", shape[0])
        vector[steady] *= _STEADY
        if module == "patch_embedding":
            # The other channels have variance 1.
            vector[massive] = math.sqrt(width * _MASSIVE**2 / (1 - _MASSIVE**2))
        return torch.from_numpy(vector).to(dtype)
    if kind is None:
        is_qk = module.endswith(("norm_q", "norm_k"))
        vector = (_QK_NORM if is_qk else 1.0) * np.exp(_NORM_SPREAD * values.draw("values", shape[0]))
        if not is_qk:
            vector[massive] = 1
        return torch.from_numpy(vector).to(dtype)
    return _matrix(values, kind, shape, dtype, steady)


class _Values:
    """Numbers of Student's t with variance 1, by the name of the tensor that they are for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def stream(self, part: str) -> np.random.SFC64:
        digest = hashlib.sha256(f"{self._name}/{part}".encode()).digest()
        return np.random.SFC64(int.from_bytes(digest[:16], "little"))

    def draw(self, part: str, count: int) -> Floats:
        return _draw(self.stream(part), count)


def _draw(stream: np.random.SFC64, count: int) -> Floats:
    # 16 random bits choose one of 65,536 quantiles: a table is faster than a formula, and bf16 has no more values.
    bits = stream.random_raw(-(-count // 4)).view(np.uint16)[:count]
    return _quantiles().take(bits, mode="wrap")


@cache
def _quantiles() -> Floats:
    from scipy.special import stdtrit

    chances = (np.arange(_LEVELS) + 0.5) / _LEVELS
    return (stdtrit(_TAIL, chances) * math.sqrt((_TAIL - 2) / _TAIL)).astype(np.float32)


def _matrix(values: _Values, kind: _Matrix, shape: tuple[int, ...], dtype: torch.dtype, steady: slice) -> torch.Tensor:
    rows, columns = shape[0], math.prod(shape[1:])
    row_sizes = np.exp(kind.rows * values.draw("rows", rows))
    row_sizes *= kind.gain / math.sqrt(columns)
    row_sizes[steady] *= _STEADY
    column_sizes = np.exp(kind.columns * values.draw("columns", columns))
    # Gain is meant for the whole, whatever the spread of the columns.
    column_sizes /= math.sqrt(float(np.square(column_sizes, dtype=np.float64).mean()))
    stream = values.stream("values")
    result = torch.empty((rows, columns), dtype=dtype)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        chunk = _draw(stream, (stop - start) * columns).reshape(-1, columns)
        chunk *= column_sizes
        chunk *= row_sizes[start:stop, None]
        result[start:stop] = torch.from_numpy(chunk)
    return result.view(shape)


def _table(values: _Values, shape: tuple[int, ...], massive: int) -> torch.Tensor:
    """Modulation [1, parts, width]: shift, scale (and gate, twice) a channel."""
    _, parts, width = shape
    sizes = _MODULATION if parts == len(_MODULATION) else _OUT_MODULATION
    table = values.draw("values", parts * width).reshape(parts, width)
    table *= np.array(sizes, dtype=np.float32)[:, None]
    table[:, massive] = 0
    for scale in range(1, parts, 3):
        table[scale, massive] = _MUTED - 1
    return torch.from_numpy(table)[None]
