"""Products of HiF4 planes on a GPU: expansion into scratch, the kernels that can compute one, and the library's GEMM.

Symbols: M rows, Kp = U * 64 channels of U units, N outputs, R rows of either operand, S columns of a side branch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hif4c.runtime import format as hif4_format
from hif4c.runtime import reference
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.gpu.epilogue import Epilogue, multiply, row_blocks
from hif4c.runtime.gpu.launcher import Backend, Kernel, Value
from hif4c.runtime.gpu.tuning import Candidate, sample_rows

__all__ = ["Planes", "Product", "aligned", "aligned_rows"]

_SCALE_PADDING = 256  # as in `hif4c.runtime.gpu.kernels`: unit scales of R rows lie R rounded up to this apart
_ALIGNMENT = 16
_OUT_ELEMENTS = 1 << 25  # fp32 outputs of a library GEMM at once: 128 MB


@dataclass(frozen=True)
class Planes:
    """Aligned planes of R rows: codes uint8 [R, U * 32], scales uint8 [R, U, 4]."""

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def count(self) -> int:
        return self.codes.shape[0]

    @property
    def units(self) -> int:
        return self.scales.shape[1]

    @property
    def channels(self) -> int:
        return self.units * hif4_format.UNIT

    @property
    def code_words(self) -> torch.Tensor:
        """int32 [R, U * 8]."""
        return self.codes.view(torch.int32)

    @property
    def scale_words(self) -> torch.Tensor:
        """int32 [R, U]."""
        return self.scales.view(torch.int32).squeeze(-1)

    def rows(self, start: int, stop: int) -> Planes:
        if stop - start == self.count:
            return self
        return Planes(aligned(self.codes[start:stop]), aligned(self.scales[start:stop]))


@dataclass(frozen=True)
class Product:
    """One product to compute: `epilogue(input @ weight^T)` into `out` [M, N] of bf16, fp16 or fp32.

    The input is `planes`, or bf16 `x` [M, K] that is not quantized.
    """

    backend: Backend
    planes: Planes | None
    x: torch.Tensor | None
    weight: Planes
    epilogue: Epilogue
    out: torch.Tensor

    @property
    def description(self) -> str:
        """What the choice among its candidates may depend on, the number of rows aside."""
        (_, n), epilogue = self.out.shape, self.epilogue
        parts = [name for name in ("activation", "gate") if getattr(epilogue, name) is not None]
        for name in ("side", "residual"):  # binaries are built for one dtype of each
            if (tensor := getattr(epilogue, name)) is not None:
                parts.append(f"{name}:{str(tensor.dtype)[6:]}")
        what = "linear_w4" if self.planes is None else "linear"
        return f"{what} {str(self.out.dtype)[6:]} N={n} K={self.weight.channels} {'+'.join(parts) or 'plain'}"

    def candidates(self, chosen: str | None = None) -> Iterator[Candidate]:
        """Every way to compute it; each writes all of `out` and returns it.

        `chosen` is the name of one of them that is enough: kernels of another kind are not looked at.
        """
        kinds = [("linear_bf16", 0), ("linear_bf16", 1)]
        if self.planes is not None:
            kinds.insert(0, ("linear_int8", 0))
        for name, packed in kinds:
            if chosen is not None and chosen.split()[0] != name:
                continue
            for fused, dtype in self._targets():
                values, constants = self._arguments(name, packed, fused, dtype)
                kernels = self.backend.variants(name, self.out.device, values, constants)
                for kernel in kernels:
                    run = functools.partial(self._run, kernel, fused, values)
                    yield Candidate(f"{name} {kernel.variant}", run, "int8" if name == "linear_int8" else None)
                if kernels:
                    break
        yield Candidate("library", self._run_library)

    def disagrees(self, result: torch.Tensor) -> str | None:
        """What is wrong with a result, compared with the portable implementation on some of its rows."""
        index, expected = self._expected
        return _too_far(result[index].float(), expected, result.dtype)

    @functools.cached_property
    def _expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Some rows [r], and what is right there: fp32 [r, N]. Costs thousands of launches, so it is kept."""
        index = sample_rows(self.out.shape[0], self.out.device)
        epilogue = self.epilogue.rows(index)
        end: tuple[Any, ...] = (
            epilogue.activation, torch.float32, epilogue.side, epilogue.side_weight, epilogue.gate, epilogue.residual,
        )  # fmt: skip
        weight = (self.weight.codes, self.weight.scales, epilogue.bias)
        if self.planes is not None:
            return index, reference.linear(self.planes.codes[index], self.planes.scales[index], *weight, *end)
        assert self.x is not None
        return index, reference.linear_w4(self.x[index], *weight, None, 0, *end)

    def _targets(self) -> Iterator[tuple[Epilogue, torch.dtype]]:
        """What a kernel may compute, best first: everything, or fp32 sums that torch finishes."""
        if self.epilogue.fusible:
            yield self.epilogue, self.out.dtype
            if self.out.dtype != torch.float32:
                yield self.epilogue, torch.float32
        yield Epilogue(), torch.float32

    def _arguments(
        self, name: str, packed: int, fused: Epilogue, dtype: torch.dtype
    ) -> tuple[dict[str, Value], dict[str, int]]:
        """Arguments and constants of a kernel with that epilogue and output dtype.

        Operands and output are made when it runs: here they are empty tensors of the dtypes that they will have.
        """
        (m, n), device = self.out.shape, self.out.device

        def empty(dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(0, dtype=dtype, device=device)

        bias = torch.zeros(n, dtype=torch.float32, device=device) if fused.bias is None else fused.bias.float()
        gate = None if fused.gate is None else aligned_rows(fused.gate)
        if gate is None and fused.residual is not None:
            # The kernels add a residual to what is gated: 1 changes nothing.
            gate = torch.ones((1, n), dtype=torch.float32, device=device)
        values: dict[str, Value] = {
            "bias_ptr": aligned(bias),
            "gate_ptr": gate,
            "residual_ptr": None if fused.residual is None else aligned(fused.residual),
            "side_ptr": empty(torch.bfloat16) if fused.side is None else aligned(fused.side),
            "side_weight_ptr": empty(torch.bfloat16) if fused.side_weight is None else aligned(fused.side_weight),
            "out_ptr": empty(dtype),
            "M": m,
            "N": n,
            "U": self.weight.units,
            "S": 0 if fused.side is None else fused.side.shape[1],
            "gate_rows": max(1, fused.gate_rows),
            "gate_stride": 0 if gate is None or gate.shape[0] == 1 else gate.stride(0),
        }
        constants = {"GELU": int(fused.activation is not None), "GATE": int(gate is not None)}
        if name == "linear_int8":
            values |= {"values_ptr": empty(torch.int8), "weight_ptr": empty(torch.int8)}
            values |= {"value_scales_ptr": empty(torch.float32), "weight_scales_ptr": empty(torch.float32)}
            values |= {"value_stride": _padded(m), "weight_stride": _padded(n)}
        else:
            values |= {"values_ptr": empty(torch.bfloat16), "weight_scales_ptr": empty(torch.int32)}
            values |= {"weight_ptr": empty(torch.int32 if packed else torch.bfloat16)}
            constants["PACKED"] = packed
        return values, constants

    def _run(self, kernel: Kernel, fused: Epilogue, values: Mapping[str, Value]) -> torch.Tensor:
        """Expand the operands, launch, and apply what of the epilogue is not fused."""
        operands: dict[str, Value]
        if kernel.name == "linear_int8":
            assert self.planes is not None
            a, a_scales = self._expand_int8(self.planes)
            w, w_scales = self._expand_int8(self.weight)
            operands = {"values_ptr": a, "value_scales_ptr": a_scales, "weight_ptr": w, "weight_scales_ptr": w_scales}
        elif kernel.constants["PACKED"]:
            a = self._input_bf16(ordered=True)
            operands = {"values_ptr": a, "weight_ptr": self.weight.code_words}
            operands["weight_scales_ptr"] = self.weight.scale_words
        else:
            w, ordered = self._weight_bf16()
            operands = {"values_ptr": self._input_bf16(ordered), "weight_ptr": w}
            operands["weight_scales_ptr"] = self.weight.scale_words
        target = values["out_ptr"]
        assert isinstance(target, torch.Tensor)
        result = self.out if target.dtype == self.out.dtype else torch.empty_like(self.out, dtype=target.dtype)
        self.backend.launch(kernel, self.out.device, {**values, **operands, "out_ptr": result})
        if fused is not self.epilogue:
            result = self.epilogue.apply(result, self.out.dtype)
        return self.out if result is self.out else self.out.copy_(result)

    def _run_library(self) -> torch.Tensor:
        """Exact bf16 values and the library's GEMM with fp32 results, a block of rows at a time."""
        m, n = self.out.shape
        w, ordered = self._weight_bf16()
        a = self._input_bf16(ordered)
        for start, stop in row_blocks(m, _OUT_ELEMENTS // n, self.epilogue):
            products = multiply(a[start:stop], w.t())
            self.out[start:stop] = self.epilogue.block(start, stop).apply(products, self.out.dtype)
        return self.out

    def _input_bf16(self, ordered: bool) -> torch.Tensor:
        """The input as bf16 [M, Kp], its channels in the kernels' BF16_ORDER or in their own."""
        x = self.x
        if self.planes is not None:
            if ordered and (values := self._expand_bf16(self.planes)) is not None:
                return values
            x = hif4_format.dequantize(self.planes.codes, self.planes.scales, self.planes.channels, torch.bfloat16)
        assert x is not None
        channels = self.weight.channels
        if x.shape[1] != channels:
            x = torch.nn.functional.pad(x, (0, channels - x.shape[1]))
        if ordered:  # BF16_ORDER is 0, 4, 1, 5, 2, 6, 3, 7 in each run of 8
            x = x.reshape(x.shape[0], channels // 8, 2, 4).transpose(2, 3).reshape(x.shape[0], channels)
        return aligned(x)

    def _weight_bf16(self) -> tuple[torch.Tensor, bool]:
        """The weight as bf16 [N, Kp], and whether its channels are in BF16_ORDER."""
        if (values := self._expand_bf16(self.weight)) is not None:
            return values, True
        weight = self.weight
        return hif4_format.dequantize(weight.codes, weight.scales, weight.channels, torch.bfloat16), False

    def _expand_bf16(self, planes: Planes) -> torch.Tensor | None:
        """Exact bf16 [R, Kp] in BF16_ORDER; None where the backend has no kernel for it."""
        values = torch.empty((planes.count, planes.channels), dtype=torch.bfloat16, device=self.out.device)
        return values if self._expand("expand_bf16", planes, {"values_ptr": values.view(torch.int32)}) else None

    def _expand_int8(self, planes: Planes) -> tuple[torch.Tensor, torch.Tensor]:
        """In-unit integers int8 [R, Kp] in INT8_ORDER, and unit scales fp32 [U, R padded]."""
        stride = _padded(planes.count)
        values = torch.empty((planes.count, planes.channels), dtype=torch.int8, device=self.out.device)
        scales = torch.empty((planes.units, stride), dtype=torch.float32, device=self.out.device)
        words = values.view(torch.int32)
        outputs: dict[str, Value] = {"values_ptr": words, "value_scales_ptr": scales, "stride": stride}
        if not self._expand("expand_int8", planes, outputs):
            raise Hif4Error("linear_int8 has no expand_int8 beside it; compile the artifact again.")
        return values, scales

    def _expand(self, name: str, planes: Planes, outputs: Mapping[str, Value]) -> bool:
        """Launch the first variant that fits, and say whether there is one; its cost is small beside the product's."""
        values: dict[str, Value] = {
            "codes_ptr": planes.code_words, "scales_ptr": planes.scale_words, "R": planes.count, "U": planes.units,
            **outputs,
        }  # fmt: skip
        kernels = self.backend.variants(name, self.out.device, values, {})
        if kernels:
            self.backend.launch(kernels[0], self.out.device, values)
        return bool(kernels)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, and beginning where a 16-byte load may; the tensor itself when it is so already."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def aligned_rows(tensor: torch.Tensor) -> torch.Tensor:
    """[R, C] whose rows are contiguous and begin where 16-byte loads may; a view where it is so already."""
    stride = tensor.stride(0)
    fits = tensor.stride(1) == 1 and stride >= tensor.shape[1] and stride % _ALIGNMENT == 0
    return tensor if fits and tensor.data_ptr() % _ALIGNMENT == 0 else aligned(tensor)


def _padded(count: int) -> int:
    return -(-count // _SCALE_PADDING) * _SCALE_PADDING


def _too_far(result: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Compare results [r, N] with the portable ones, both fp32, the former once rounded to `dtype`.

    A wrong kernel is off by about the size of the results. Another order of fp32 additions is off by some 2^-24 times
    the sum of the magnitudes added, below 2^-10 of the results' root mean square unless almost all of them cancel.
    """
    rounding = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(dtype, 0.0)  # two roundings to `dtype`
    zero = expected.new_zeros(())
    size = expected.where(expected.isfinite(), zero).square().mean().sqrt()
    difference = (result - expected).abs()
    close = (difference <= rounding * expected.abs() + 2.0**-10 * size) | (result == expected)
    if bool((close | (result.isnan() & expected.isnan())).all()):
        return None
    worst = float(difference.where(difference.isfinite(), zero).max())
    return f"it differs from the portable implementation by up to {worst:.3g}, values being about {float(size):.3g}"
