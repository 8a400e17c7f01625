"""One linear in several number formats on this machine: time, quantization included, and error of the 4-bit product.

Symbols: M rows, K inputs, N outputs. Weights and input are random; what is in them changes no timing here.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from hif4c.compiler.bench_timing import Timing, take_turns
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import dequantize, quantize

__all__ = ["FORMATS", "HIF4", "W4A16", "LinearFigures", "check_formats", "measure_linear", "relative_error"]

HIF4, W4A16 = "hif4", "hif4-w4a16"
BASELINE = "bf16"
_QUANTIZE, _QUANTIZE_TORCH = "quantize", "quantize in torch"

FORMATS: Mapping[str, str] = {
    "fp32": "torch, fp32",
    BASELINE: "torch, bf16 weights and input",
    "int8": "torch.ao.quantization.quantize_dynamic: int8 weights, input quantized a tensor; fp32 in and out",
    "torchao-int8": "torchao, int8 weights, input quantized row by row; bf16 in and out, eager",
    "torchao-int4": "torchao, int4 weights in groups of 32, int8 input; bf16 in and out, eager (x86: dequantizes)",
    HIF4: "4-bit weights and input; bf16 in and out",
    W4A16: "4-bit weights, bf16 input; bf16 in and out",
}
"""What can be timed, by name."""

_ERROR_ROWS, _ERROR_OUTPUTS = 64, 512
"""At most so many rows and outputs are computed again in fp64."""


@dataclass(frozen=True)
class LinearFigures:
    """One shape with one number of threads.

    Attributes:
        m: rows.
        k: inputs.
        n: outputs.
        threads: of torch.
        timings: format -> seconds; the quantization of the input is part of each that has one.
        quantize: seconds of `hif4::quantize` alone, a part of "hif4".
        quantize_torch: of the same in plain torch; None where it was not timed.
        error: of the W4A4 product in fp32 against fp64 on the same codes, see `relative_error`.
        missing: format -> why it was not timed.
    """

    m: int
    k: int
    n: int
    threads: int
    timings: dict[str, Timing]
    quantize: Timing | None
    quantize_torch: Timing | None
    error: float | None
    missing: dict[str, str] = field(default_factory=dict)

    def ratio(self, name: str, to: str = HIF4, *, minimum: bool = False) -> float | None:
        """How many times as long as `to` a format takes; None where one of them was not timed."""
        if name not in self.timings or to not in self.timings:
            return None
        one, other = self.timings[name], self.timings[to]
        return one.minimum / other.minimum if minimum else one.median / other.median

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        ratios = {name: self.ratio(name) for name in self.timings if name != HIF4 and HIF4 in self.timings}
        return {**asdict(self), "ratios": ratios}


def check_formats(names: Sequence[str]) -> None:
    """Raise Hif4Error for a format that there is not."""
    for name in names:
        if name not in FORMATS:
            raise Hif4Error(f"format {name!r} is not known; choose from {', '.join(FORMATS)}.")


def measure_linear(
    m: int, k: int, n: int, formats: Sequence[str], *, seconds: float, repetitions: int
) -> LinearFigures:
    """Time y = x W^T + b in several formats, which take turns.

    Args:
        m: rows of x.
        k: inputs; must be a multiple of 64 for the 4-bit formats (Hif4Error).
        n: outputs.
        formats: of `FORMATS`.
        seconds: how long to go on after the least number of rounds.
        repetitions: that number.
    """
    check_formats(formats)
    if k % 64:
        raise Hif4Error(f"a linear of {k} inputs: 4-bit ones take a multiple of 64; choose another shape.")
    generator = torch.Generator().manual_seed(0)
    # Units of 64 channels of different sizes: with equal ones sums in fp32 are exact, and there is no error to see.
    sizes = torch.exp2(torch.randint(-6, 7, (k // 64,), generator=generator)).repeat_interleave(64)
    x = torch.randn(m, k, generator=generator) * sizes
    linear = nn.Linear(k, n, device="meta").to_empty(device="cpu").requires_grad_(False)
    linear.weight.normal_(0, k**-0.5, generator=generator)
    linear.bias.normal_(generator=generator)
    calls: dict[str, Callable[[], Any]] = {}
    missing: dict[str, str] = {}
    with torch.inference_mode():
        for name in formats:
            try:
                call = _BUILDERS[name](linear, x)
                call()
            except _UnavailableError as reason:
                missing[name] = str(reason)
            except Exception as reason:  # noqa: BLE001 - another package's: it is shown, and the others go on
                missing[name] = f"{type(reason).__name__}: {str(reason).strip().partition(chr(10))[0]}"
            else:
                calls[name] = call
        if HIF4 in calls:
            x16 = x.bfloat16()
            calls[_QUANTIZE] = lambda: torch.ops.hif4.quantize(x16)
            calls[_QUANTIZE_TORCH] = lambda: quantize(x16)
        timings = take_turns(calls, repetitions=repetitions, seconds=seconds)
        error = _error_of(linear, x) if HIF4 in calls else None
    alone, portable = timings.pop(_QUANTIZE, None), timings.pop(_QUANTIZE_TORCH, None)
    return LinearFigures(m, k, n, torch.get_num_threads(), timings, alone, portable, error, missing)


def relative_error(
    y: torch.Tensor,
    planes: tuple[torch.Tensor, torch.Tensor],
    weight: tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor,
    k: int,
) -> float:
    """Norm of the error of a product over the norm of the product, against fp64 on the same codes.

    Args:
        y: [M, N], what is judged.
        planes: codes and scales of x [M, K].
        weight: of the weight [N, K].
        bias: [N].
        k: K.
    """
    rows, outputs = _some(y.shape[0], _ERROR_ROWS), _some(y.shape[1], _ERROR_OUTPUTS)
    a, b = (
        dequantize(codes[chosen], scales[chosen], k, torch.float64)
        for (codes, scales), chosen in ((planes, rows), (weight, outputs))
    )
    exact = a @ b.t() + bias[outputs].double()
    return float((y[rows][:, outputs].double() - exact).norm() / exact.norm())


def _error_of(linear: nn.Linear, x: torch.Tensor) -> float:
    """Of the kernel that is timed, with its result not rounded to bf16."""
    planes, weight, bias = torch.ops.hif4.quantize(x.bfloat16()), quantize(linear.weight), linear.bias.bfloat16()
    y = torch.ops.hif4.linear(*planes, *weight, bias, None, torch.float32)
    return relative_error(y, planes, weight, bias, x.shape[1])


def _some(count: int, most: int) -> torch.Tensor:
    """At most so many of the indices 0..count-1, evenly spaced."""
    taken = min(count, most)
    return torch.arange(taken) * count // taken


class _UnavailableError(Exception):
    """A format that this installation does not have; the message says what to do."""


def _torch(dtype: torch.dtype) -> Callable[[nn.Linear, torch.Tensor], Callable[[], Any]]:
    def build(linear: nn.Linear, x: torch.Tensor) -> Callable[[], Any]:
        x, weight, bias = x.to(dtype), linear.weight.to(dtype), linear.bias.to(dtype)
        return lambda: nn.functional.linear(x, weight, bias)

    return build


def _int8(linear: nn.Linear, x: torch.Tensor) -> Callable[[], Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import quantize_dynamic

        module = quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)
    return lambda: module(x)


def _torchao(config: Callable[[Any], Any]) -> Callable[[nn.Linear, torch.Tensor], Callable[[], Any]]:
    def build(linear: nn.Linear, x: torch.Tensor) -> Callable[[], Any]:
        if importlib.util.find_spec("torchao") is None:
            raise _UnavailableError("torchao is not installed; pip install 'hif4c[bench]'")
        # It announces on import which of its libraries for GPUs it cannot load.
        logging.getLogger("torchao").setLevel(logging.CRITICAL)
        logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
        from torchao import quantization

        module = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, device="meta"))
        # A copy: its weight is replaced.
        module[0].weight = nn.Parameter(linear.weight.bfloat16(), requires_grad=False)
        module[0].bias = nn.Parameter(linear.bias.bfloat16(), requires_grad=False)
        quantization.quantize_(module, config(quantization))
        x16 = x.bfloat16()
        return lambda: module(x16)

    return build


def _hif4(linear: nn.Linear, x: torch.Tensor) -> Callable[[], Any]:
    planes, x16, bias = quantize(linear.weight), x.bfloat16(), linear.bias.bfloat16()
    hif4 = torch.ops.hif4
    return lambda: hif4.linear(*hif4.quantize(x16), *planes, bias)


def _w4a16(linear: nn.Linear, x: torch.Tensor) -> Callable[[], Any]:
    planes, x16, bias = quantize(linear.weight), x.bfloat16(), linear.bias.bfloat16()
    return lambda: torch.ops.hif4.linear_w4(x16, *planes, bias)


_BUILDERS: Mapping[str, Callable[[nn.Linear, torch.Tensor], Callable[[], Any]]] = {
    "fp32": _torch(torch.float32),
    BASELINE: _torch(torch.bfloat16),
    "int8": _int8,
    # set_inductor_config would change how this process compiles.
    "torchao-int8": _torchao(lambda ao: ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)),
    "torchao-int4": _torchao(
        lambda ao: ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4)  # type: ignore[attr-defined]
    ),
    HIF4: _hif4,
    W4A16: _w4a16,
}
