"""The operators on a GPU, from the kernels of a backend; what those do not cover goes to the portable implementation.

Symbols: M rows, K channels, U units of 64 channels, N outputs. Weights stay packed: both operands of a linear are
expanded into scratch that lives as long as the call, which costs little beside the product and keeps 4.5 bits a value
resident.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator

import torch

from hif4c.runtime import format as hif4_format
from hif4c.runtime import ops, reference, rows
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.gpu.epilogue import Epilogue, row_blocks
from hif4c.runtime.gpu.launcher import Backend, Kernel, Value
from hif4c.runtime.gpu.products import Planes, Product, aligned, aligned_rows
from hif4c.runtime.gpu.tuning import Candidate, Tuner, bucket, measure_on_device, sample_rows, tuning_directory
from hif4c.runtime.rotation import block_hadamard

__all__ = ["Operators"]

log = logging.getLogger(__name__)

_ROW_ELEMENTS = 1 << 28  # expanded activations at once: 256 MB as int8, 512 MB as bf16


class Operators:
    """The operators of one process on one kind of kernels.

    Args:
        backend: where kernels come from.
        tuner: makes a device's tuner; None for the usual one, with CUDA events and the user's cache directory.
    """

    def __init__(self, backend: Backend, tuner: Callable[[torch.device], Tuner] | None = None) -> None:
        self.backend = backend
        self._make_tuner = tuner or self._usual_tuner
        self._tuners: dict[torch.device, Tuner] = {}
        self._lock = threading.Lock()
        self._said: set[str] = set()

    @torch.no_grad()
    def quantize(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, hadamard: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `hif4c.runtime.format.quantize`, bit for bit."""
        hif4_format.check_input(x, mask, hadamard)
        device, k = _one_device(x, mask), x.shape[-1]
        m = x.numel() // k
        if m == 0 or not self.backend.serves(device):
            return hif4_format.quantize(x, mask, hadamard)
        codes_shape, scales_shape = hif4_format.packed_shapes(x.shape)
        codes = torch.empty(codes_shape, dtype=torch.uint8, device=device)
        scales = torch.empty(scales_shape, dtype=torch.uint8, device=device)
        kernels: list[Kernel] = []
        for flat, factors, width in _equal_inputs(x.reshape(m, k), mask, hadamard):
            kernels, values = self._quantizers(flat, factors, width, codes, scales)
            if kernels:
                break
        if not kernels:
            self._say_once(f"quantize of {_name(x.dtype)} with {k} channels")
            return hif4_format.quantize(x, mask, hadamard)

        def run(kernel: Kernel) -> torch.Tensor:
            self.backend.launch(kernel, device, values)
            return codes

        def disagrees(result: torch.Tensor) -> str | None:
            index = sample_rows(m, device)
            expected = hif4_format.quantize(flat[index], factors, width)
            found = (codes.view(m, -1)[index], scales.view(m, -1, hif4_format.SCALE_BYTES)[index])
            return (
                None
                if all(map(torch.equal, found, expected))
                else "it does not give the portable implementation's bits"
            )

        choices = [Candidate(item.variant, functools.partial(run, item)) for item in kernels]
        key = f"quantize {_name(flat.dtype)} K={k} hadamard={width} mask={factors is not None} M<={bucket(m)}"
        tuner = self._tuner(device)
        if tuner.known(key) is None and _captures(device):
            choices[0].run()
        else:
            tuner.choose(key, choices, disagrees, lambda: (codes.fill_(0xA5), scales.fill_(0xA5))).run()
        return codes, scales

    @torch.no_grad()
    def norm_quantize(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        eps: float,
        dtype: torch.dtype,
        mask: torch.Tensor | None = None,
        hadamard: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `hif4c.runtime.rows.norm_quantize`, up to the order of the sums in mean and variance.

        One kernel, or the norm in torch and then `quantize`, whichever is faster.
        """
        rows.check_norm(x, weight, bias, scale, shift, dtype)
        hif4_format.check_input(x, mask, hadamard)
        device, k = _one_device(x, weight, bias, scale, shift, mask), x.shape[-1]
        gains = _gains(x, weight, bias, scale, shift) if dtype == torch.bfloat16 else None

        def separate() -> tuple[torch.Tensor, torch.Tensor]:
            return self.quantize(rows.norm(x, weight, bias, scale, shift, eps, dtype), mask, hadamard)

        if x.numel() == 0 or gains is None or not self.backend.serves(device):
            return separate()
        codes_shape, scales_shape = hif4_format.packed_shapes(x.shape)
        planes = (
            torch.empty(codes_shape, dtype=torch.uint8, device=device),
            torch.empty(scales_shape, dtype=torch.uint8, device=device),
        )
        flat, (gain, shifts, gain_rows, offset) = aligned_rows(x.reshape(-1, k)), gains
        m, one = flat.shape[0], gain.shape[0] == 1
        values, constants = _quantize_arguments(
            flat, None if mask is None else aligned(mask.float()), hadamard, *planes
        )
        values |= {"gain_ptr": gain, "shift_ptr": shifts, "gain_rows": gain_rows, "offset": offset, "eps": float(eps)}
        values["gain_stride"] = 0 if one else gain.stride(0)
        kernels = self.backend.variants("norm_quantize", device, values, constants)
        if not kernels:
            return separate()

        def run(kernel: Kernel | None) -> torch.Tensor:
            if kernel is None:
                for plane, found in zip(planes, separate(), strict=True):
                    plane.copy_(found)
            else:
                self.backend.launch(kernel, device, values)
            return planes[0]

        def disagrees(result: torch.Tensor) -> str | None:
            index = sample_rows(m, device)
            chosen = index // gain_rows
            scaled = (gain[chosen] + (offset - 1), shifts[chosen])
            expected = rows.norm_quantize(flat[index], None, None, *scaled, eps, dtype, mask, hadamard)
            differ = (planes[0].view(m, -1)[index] != expected[0]).float().mean().item()
            # Sums in another order move one value in thousands to the next bf16, and few of these to the next code.
            return None if differ < 0.01 else f"{differ:.1%} of its codes are not those of the portable implementation"

        choices = [Candidate(item.variant, functools.partial(run, item)) for item in kernels]
        choices.append(Candidate("separate", functools.partial(run, None)))
        key = f"norm_quantize {_name(x.dtype)} K={k} hadamard={hadamard} mask={mask is not None} M<={bucket(m)}"
        tuner = self._tuner(device)
        chosen = tuner.known(key)
        if chosen == "separate":
            return separate()
        if chosen is None and _captures(device):
            choices[0].run()
        else:
            tuner.choose(key, choices, disagrees, lambda: [plane.fill_(0xA5) for plane in planes]).run()
        return planes

    @torch.no_grad()
    def linear(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        w_codes: torch.Tensor,
        w_scales: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        dtype: torch.dtype | None = None,
        side: torch.Tensor | None = None,
        side_weight: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `hif4c.runtime.reference.linear`, up to the order of the fp32 additions.

        Kernels on int8 matrix units add in the order of the contract; those on bf16 units and the library in theirs.
        """
        dtype = ops.output_dtype(bias, dtype)
        rest = (bias, activation, dtype, side, side_weight, gate, residual)
        reference.check_linear(codes, scales, w_codes, w_scales, *rest)
        device = _one_device(codes, scales, w_codes, w_scales, bias, side, side_weight, gate, residual)
        n, row = w_codes.shape
        m = codes.numel() // row if row else 0
        if m == 0 or n == 0 or not self.backend.serves(device):
            return reference.linear(codes, scales, w_codes, w_scales, *rest)
        shape = (*codes.shape[:-1], n)
        epilogue = Epilogue.of(shape, bias, activation, side, side_weight, gate, residual)
        planes = Planes(aligned(codes.reshape(m, row)), aligned(scales.reshape(m, -1, hif4_format.SCALE_BYTES)))
        weight = Planes(aligned(w_codes), aligned(w_scales))
        out = torch.empty((m, n), dtype=dtype, device=device)
        for start, stop in row_blocks(m, _ROW_ELEMENTS // weight.channels, epilogue):
            block = epilogue.block(start, stop)
            self._compute(Product(self.backend, planes.rows(start, stop), None, weight, block, out[start:stop]))
        return out.view(shape)

    @torch.no_grad()
    def linear_w4(
        self,
        x: torch.Tensor,
        w_codes: torch.Tensor,
        w_scales: torch.Tensor,
        bias: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        hadamard: int = 0,
        activation: str | None = None,
        dtype: torch.dtype | None = None,
        side: torch.Tensor | None = None,
        side_weight: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `hif4c.runtime.reference.linear_w4`; bf16 inputs run on bf16 matrix units, others portably."""
        dtype = dtype or x.dtype
        rest = (bias, mask, hadamard, activation, dtype, side, side_weight, gate, residual)
        reference.check_linear_w4(x, w_codes, w_scales, *rest)
        device = _one_device(x, w_codes, w_scales, bias, mask, side, side_weight, gate, residual)
        k, n, m = x.shape[-1], w_codes.shape[0], x.numel() // x.shape[-1]
        if m == 0 or n == 0 or x.dtype != torch.bfloat16 or not self.backend.serves(device):
            if x.dtype != torch.bfloat16:  # which bf16 matrix units do not take
                self._say_once(f"linear_w4 of {_name(x.dtype)}")
            return reference.linear_w4(x, w_codes, w_scales, *rest)
        shape = (*x.shape[:-1], n)
        epilogue = Epilogue.of(shape, bias, activation, side, side_weight, gate, residual)
        weight = Planes(aligned(w_codes), aligned(w_scales))
        flat, out = x.reshape(m, k), torch.empty((m, n), dtype=dtype, device=device)
        for start, stop in row_blocks(m, _ROW_ELEMENTS // weight.channels, epilogue):
            y = reference.masked_and_rotated(flat[start:stop], mask, hadamard)
            self._compute(Product(self.backend, None, y, weight, epilogue.block(start, stop), out[start:stop]))
        return out.view(shape)

    def _compute(self, product: Product) -> None:
        """In the fastest of the ways there are, which the first call for a shape finds out."""
        device = product.out.device
        tuner, key = self._tuner(device), f"{product.description} M<={bucket(product.out.shape[0])}"
        chosen, untimed = tuner.known(key), _captures(device)
        with torch.autocast(device.type, enabled=False):
            for candidate in product.candidates(chosen):
                if candidate.name == chosen or (chosen is None and untimed):
                    candidate.run()
                    return
            # NaN first: what a variant leaves unwritten must not pass for the work of the one before it.
            spoil = functools.partial(product.out.fill_, torch.nan)
            tuner.choose(key, list(product.candidates()), product.disagrees, spoil).run()

    def _quantizers(
        self,
        flat: torch.Tensor,
        mask: torch.Tensor | None,
        hadamard: int,
        codes: torch.Tensor,
        scales: torch.Tensor,
    ) -> tuple[list[Kernel], dict[str, Value]]:
        """The kernels that quantize these rows, and their arguments."""
        values, constants = _quantize_arguments(flat, mask, hadamard, codes, scales)
        return self.backend.variants("quantize", flat.device, values, constants), values

    def _tuner(self, device: torch.device) -> Tuner:
        with self._lock:
            if device not in self._tuners:
                self._tuners[device] = self._make_tuner(device)
            return self._tuners[device]

    def _usual_tuner(self, device: torch.device) -> Tuner:
        measure = functools.partial(measure_on_device, device)
        return Tuner(self.backend.identity(device), measure, tuning_directory())

    def _say_once(self, what: str) -> None:
        with self._lock:
            new = what not in self._said
            self._said.add(what)
        if new:
            log.warning("%s: there is no GPU kernel for it, so it runs on the slow portable implementation", what)


def _equal_inputs(
    x: torch.Tensor, mask: torch.Tensor | None, hadamard: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, int]]:
    """x [M, K], its mask fp32 and its rotation, then others that give the same planes and ask less of a kernel.

    What torch does here it does in the order and with the roundings of `hif4c.runtime.format.quantize`.
    """
    factors, k = None if mask is None else aligned(mask.float()), x.shape[1]
    yield aligned_rows(x), factors, hadamard
    if x.dtype == torch.float16:
        x = x.float()
        yield aligned_rows(x), factors, hadamard
    if hadamard > 1:
        if factors is None:
            yield aligned_rows(x), torch.ones(k, dtype=torch.float32, device=x.device), hadamard
        x = block_hadamard(x.float() if factors is None else x * factors, hadamard)
        factors = None
        yield x, None, 0
    if tail := -k % hif4_format.UNIT:
        x = torch.nn.functional.pad(x, (0, tail))
        yield x, None if factors is None else torch.nn.functional.pad(factors, (0, tail)), 0


def _quantize_arguments(
    flat: torch.Tensor, mask: torch.Tensor | None, hadamard: int, codes: torch.Tensor, scales: torch.Tensor
) -> tuple[dict[str, Value], dict[str, int]]:
    """Arguments and constants of a kernel that quantizes the rows [M, K]."""
    width = max(1, hadamard)
    values: dict[str, Value] = {
        "x_ptr": flat,
        "mask_ptr": mask,
        "codes_ptr": codes.view(torch.int32),
        "scales_ptr": scales.view(torch.int32),
        "M": flat.shape[0],
        "K": flat.shape[1],
        "x_stride": flat.stride(0),
    }
    return values, {"HAS_MASK": int(mask is not None), "HADAMARD": width, "LOG2_HADAMARD": width.bit_length() - 1}


def _gains(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, int, float] | None:
    """(gain, shift, rows of x for each of theirs, offset) of a norm `normalized * (gain + offset) + shift`, both fp32.

    None for a norm that has weights of its own and a modulation as well.
    """
    k = x.shape[-1]
    m = x.numel() // max(1, k)
    if scale is None or shift is None:
        own = x.new_ones(k, dtype=torch.float32) if weight is None else weight.float()
        added = x.new_zeros(k, dtype=torch.float32) if bias is None else bias.float()
        return aligned(own)[None], aligned(added)[None], m, 0.0
    if weight is not None or bias is not None:
        return None
    first, second = (Epilogue.of(x.shape, None, None, None, None, item, None) for item in (scale, shift))
    if first.gate is None or second.gate is None or first.gate_rows != second.gate_rows:
        return None
    gain, added, each = aligned_rows(first.gate), aligned_rows(second.gate), first.gate_rows
    if gain.stride(0) != added.stride(0):
        gain, added = gain.contiguous(), added.contiguous()
    return gain, added, each, 1.0


def _one_device(*tensors: torch.Tensor | None) -> torch.device:
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise Hif4Error(f"the tensors of one call are on {', '.join(sorted(map(str, devices)))}; move them to one.")
    return devices.pop()


def _captures(device: torch.device) -> bool:
    """Whether the current stream is recording a graph, when nothing can be timed or compared."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
