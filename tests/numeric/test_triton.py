"""The Triton kernels, computed by Triton's interpreter, against the portable implementation.

The interpreter is chosen when Triton is imported, which the rest of a test run has done already. So this file runs
itself in a second process, with TRITON_INTERPRET=1; a failure there is printed here. Layouts, matrix instructions and
approximate functions are the GPU's alone: tests/gpu has those.
"""

import os
import subprocess
import sys
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GOLDEN = Path(__file__).parents[1] / "data" / "hif4_golden.safetensors"
EPSILON = 2.0**-24  # relative error of one fp32 rounding

if not INTERPRETED:

    def test_in_the_interpreter() -> None:
        command = [sys.executable, "-m", "pytest", "--noconftest", "--tb=short", str(Path(__file__))]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        result = subprocess.run(
            command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert " passed" in result.stdout

else:
    from hif4c.runtime import reference
    from hif4c.runtime.format import dequantize, in_unit_integers, unit_scales
    from hif4c.runtime.format import quantize as portable_quantize
    from hif4c.runtime.gpu import kernels
    from hif4c.runtime.rows import norm_quantize as portable_norm

    Planes = tuple[torch.Tensor, torch.Tensor]
    with safe_open(GOLDEN, "pt") as file:
        SETS = {name: file.get_tensor(name) for name in file.keys() if name.endswith(".x")}  # noqa: SIM118

    def words(planes: Planes) -> Planes:
        """Planes of a matrix as the kernels see them."""
        codes, scales = planes
        return codes.view(torch.int32), scales.view(torch.int32).view(scales.shape[:2])

    def quantize(x: torch.Tensor, mask: torch.Tensor | None = None, width: int = 1) -> Planes:
        m, k = x.shape
        units = -(-k // 64)
        codes = torch.full((m, units * 8), -1, dtype=torch.int32)
        scales = torch.full((m, units), -1, dtype=torch.int32)
        block_m, block_u = (16, 4) if width <= 256 else (8, 16)
        grid = (-(-m // block_m), -(-units // block_u))
        constants = {"HAS_MASK": int(mask is not None), "HADAMARD": width, "LOG2_HADAMARD": width.bit_length() - 1}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy on units that hold NaN or Inf
            kernels.quantize[grid](
                x, x if mask is None else mask, codes, scales, m, k, x.stride(0),
                BLOCK_M=block_m, BLOCK_U=block_u, **constants,
            )  # fmt: skip
        return codes.view(torch.uint8), scales.view(torch.uint8).view(m, units, 4)

    def expand_int8(planes: Planes) -> tuple[torch.Tensor, torch.Tensor, int]:
        codes, scales = words(planes)
        r, units = scales.shape
        stride = -(-r // kernels.SCALE_PADDING) * kernels.SCALE_PADDING
        values = torch.full((r, units * 16), -1, dtype=torch.int32)
        unit_scales = torch.full((units, stride), 7.0)
        grid = (-(-r // 64), -(-units // 4))
        kernels.expand_int8[grid](codes, scales, values, unit_scales, r, units, stride, BLOCK_R=64, BLOCK_U=4)
        return values.view(torch.int8), unit_scales, stride

    def expand_bf16(planes: Planes) -> torch.Tensor:
        codes, scales = words(planes)
        r, units = scales.shape
        values = torch.full((r, units * 32), -1, dtype=torch.int32)
        grid = (-(-r // 64), -(-units // 4))
        kernels.expand_bf16[grid](codes, scales, values, r, units, BLOCK_R=64, BLOCK_U=4)
        return values.view(torch.bfloat16)

    def linear(
        kind: str,
        inputs: Planes,
        weight: Planes,
        bias: torch.Tensor | None = None,
        *,
        gelu: bool = False,
        gate: torch.Tensor | None = None,
        gate_rows: int = 1,
        residual: torch.Tensor | None = None,
        side: torch.Tensor | None = None,
        side_weight: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        tile: tuple[int, int] = (64, 128),
        magic: bool = True,
    ) -> torch.Tensor:
        """Of kind int8, bf16 or packed. One row more than there are is allocated, and has to stay as it was."""
        m, n, units = inputs[0].shape[0], weight[0].shape[0], weight[1].shape[1]
        out = torch.full((m + 1, n), 3.0, dtype=dtype)
        none = torch.zeros(n)
        bias = none if bias is None else bias
        s = 0 if side is None else side.shape[1]
        tail = (
            bias, none if gate is None else gate, out if residual is None else residual,
            none.bfloat16() if side is None else side, none.bfloat16() if side_weight is None else side_weight,
            out, m, n, units, s,
        )  # fmt: skip
        gate_stride = 0 if gate is None else gate.stride(0)
        constants = {"GELU": int(gelu), "GATE": int(gate is not None), "GROUP_M": 2}
        constants |= {"BLOCK_M": tile[0], "BLOCK_N": tile[1]}
        grid = (-(-m // tile[0]) * -(-n // tile[1]),)
        if kind == "int8":
            a, a_scales, a_stride = expand_int8(inputs)
            w, w_scales, w_stride = expand_int8(weight)
            kernels.linear_int8[grid](
                a, a_scales, w, w_scales, *tail, a_stride, w_stride, gate_rows, gate_stride, MAGIC=int(magic),
                **constants,
            )  # fmt: skip
        else:
            packed = kind == "packed"
            codes, scales = words(weight)
            w = codes if packed else expand_bf16(weight)
            kernels.linear_bf16[grid](
                expand_bf16(inputs), w, scales, *tail, gate_rows, gate_stride, PACKED=int(packed), **constants
            )
        assert (out[m] == 3.0).all()
        return out[:m]

    def make(*shape: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
        """Gaussian times 2^(spread * normal) for each channel, so that the order of additions matters."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator) * 2.0 ** (spread * torch.randn(shape[-1], generator=generator))

    def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
        """The same numbers, NaN where NaN is expected."""
        return torch.equal(found.isnan(), expected.isnan()) and torch.equal(
            found.nan_to_num(0.0), expected.nan_to_num(0.0)
        )

    def check_quantize(x: torch.Tensor, mask: torch.Tensor | None = None, width: int = 1) -> None:
        found, expected = quantize(x, mask, width), portable_quantize(x, mask, width)
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[0], expected[0])

    @pytest.mark.parametrize("name", sorted(SETS))
    def test_quantize_gives_the_portable_bits(name: str) -> None:
        x = SETS[name]
        check_quantize(x)
        mask = make(x.shape[1], seed=3, spread=0.0).abs() + 0.1
        check_quantize(x, mask, 64 if x.shape[1] % 64 == 0 else 8)

    @pytest.mark.parametrize(
        ("width", "dtype"),
        [
            *product((2, 4, 8, 16, 128, 256), (torch.bfloat16, torch.float32)),
            (512, torch.bfloat16),
            (1024, torch.bfloat16),
        ],
    )
    def test_quantize_rotates_in_the_order_of_the_contract(width: int, dtype: torch.dtype) -> None:
        x = make(5, max(width, 192) * 2, seed=width).to(dtype)
        check_quantize(x, None, width)
        check_quantize(x, torch.rand(x.shape[1]) + 0.5, width)

    def test_quantize_marks_units_that_are_not_finite() -> None:
        x = make(21, 200)
        x[0, 3], x[1, 70], x[2, 199] = torch.nan, torch.inf, -torch.inf
        x[3, :64] = -0.0
        check_quantize(x)
        assert (quantize(x)[1][:3, [0, 1, 3], 0].diagonal() == 0xFF).all()

    def test_quantize_reads_rows_of_a_wider_matrix() -> None:
        x = make(19, 300)[:, :72]
        check_quantize(x)

    @pytest.mark.parametrize("width", [1, 64])
    @pytest.mark.parametrize("affine", [False, True])
    def test_norm_quantize(width: int, affine: bool) -> None:
        """Sums are added in another order, so that a value next to a tie may round to another code; none did here."""
        batch, tokens, k = 3, 7, 320
        x = (make(batch, tokens, k, seed=13, spread=0.5) + 1.5).bfloat16()
        mask = make(k, seed=14, spread=0.0).abs() + 0.1 if width > 1 else None
        if affine:
            gain, shift = make(2, 1, k, seed=15, spread=0.0)
            offset, gain_rows, stride = 0.0, batch * tokens, 0
            expected = portable_norm(x, gain[0], shift[0], None, None, 1e-6, torch.bfloat16, mask, width)
        else:
            modulation = make(batch, 6, k, seed=16, spread=0.0)
            gain, shift = modulation[:, 1], modulation[:, 0]
            offset, gain_rows, stride = 1.0, tokens, modulation.stride(0)
            expected = portable_norm(x, None, None, gain[:, None], shift[:, None], 1e-6, torch.bfloat16, mask, width)
        codes, scales = torch.full((21, 40), -1, dtype=torch.int32), torch.full((21, 5), -1, dtype=torch.int32)
        kernels.norm_quantize[(3,)](
            x, gain, shift, x if mask is None else mask, codes, scales, 21, k, k, gain_rows, stride, offset, 1e-6,
            HAS_MASK=int(mask is not None), HADAMARD=width, LOG2_HADAMARD=width.bit_length() - 1, BLOCK_M=8, BLOCK_U=4,
        )  # fmt: skip
        found = (codes.view(torch.uint8), scales.view(torch.uint8).view(21, 5, 4))
        assert (found[0] != expected[0].view(21, -1)).float().mean() < 1e-3
        assert (found[1] != expected[1].view(21, 5, 4)).float().mean() < 1e-3

    @pytest.fixture(scope="module")
    def planes() -> Planes:
        """37 rows of 4 units, the last padded, one of them NaN."""
        x = make(37, 200, spread=4.0)
        x[3, 70] = torch.nan
        return portable_quantize(x)

    def test_expand_int8_gives_the_integers(planes: Planes) -> None:
        values, scales, _ = expand_int8(planes)
        expected = in_unit_integers(*planes).view(37, -1, 8)[..., list(kernels.INT8_ORDER)].view(37, -1)
        assert torch.equal(values, expected)
        assert same(scales[:, :37].t(), unit_scales(planes[1]))
        assert (scales[:, 37:] == 7.0).all()

    def test_expand_bf16_gives_the_values(planes: Planes) -> None:
        expected = dequantize(*planes, 256).view(37, -1, 8)[..., list(kernels.BF16_ORDER)].reshape(37, -1)
        found = expand_bf16(planes)
        assert same(found, expected)
        assert torch.equal(found.signbit() | found.isnan(), expected.signbit() | expected.isnan())

    @pytest.fixture(scope="module")
    def operands() -> tuple[Planes, Planes, torch.Tensor]:
        """90 rows, 112 outputs, 6 units: no dimension is a multiple of a tile. Sums of such spread are rounded."""
        inputs = portable_quantize(make(90, 328, spread=5.0))
        return inputs, portable_quantize(make(112, 328, seed=1, spread=5.0)), make(112, seed=2, spread=1.0)

    @pytest.mark.parametrize("magic", [True, False])
    def test_linear_int8_adds_exact_units_in_order(operands: tuple[Planes, Planes, torch.Tensor], magic: bool) -> None:
        inputs, weight, bias = operands
        expected = reference.linear(*inputs, *weight, bias)
        assert torch.equal(linear("int8", inputs, weight, bias, magic=magic), expected)
        # Were every sum exact, any order would do.
        exact = dequantize(*inputs, 384, torch.float64) @ dequantize(*weight, 384, torch.float64).t() + bias.double()
        assert (expected.double() != exact).any()

    @pytest.mark.parametrize("tile", [(128, 128), (128, 64), (64, 64)])
    def test_linear_int8_does_not_depend_on_the_tile(
        operands: tuple[Planes, Planes, torch.Tensor], tile: tuple[int, int]
    ) -> None:
        assert torch.equal(linear("int8", *operands, tile=tile), linear("int8", *operands))

    @pytest.mark.parametrize("kind", ["bf16", "packed"])
    def test_linear_bf16_is_within_summation_error(operands: tuple[Planes, Planes, torch.Tensor], kind: str) -> None:
        inputs, weight, bias = operands
        a, w = (dequantize(*item, 384, torch.float64) for item in (inputs, weight))
        exact = a @ w.t() + bias.double()
        # n additions in any order are off by at most (n - 1) roundings of the sum of magnitudes.
        bound = 384 * EPSILON * (a.abs() @ w.abs().t() + bias.double().abs())
        assert ((linear(kind, inputs, weight, bias).double() - exact).abs() <= bound).all()

    @pytest.mark.parametrize("kind", ["int8", "bf16", "packed"])
    def test_linear_spreads_nan_over_its_row_and_column(planes: Planes, kind: str) -> None:
        x = make(48, 200, seed=5)
        x[7, 0] = torch.nan
        found = linear(kind, planes, portable_quantize(x))
        assert found.isnan()[3].all()
        assert found.isnan()[:, 7].all()
        assert found.isnan().sum() == 48 + 37 - 1

    @pytest.mark.parametrize("kind", ["int8", "bf16", "packed"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_epilogues(operands: tuple[Planes, Planes, torch.Tensor], kind: str, dtype: torch.dtype) -> None:
        inputs, weight, bias = operands
        plain = linear(kind, inputs, weight, bias)
        assert torch.equal(linear(kind, inputs, weight, bias, dtype=dtype), plain.to(dtype))

        residual = make(90, 112, seed=6).bfloat16()
        modulation = make(3, 6, 112, seed=7)
        cases = [(modulation[:, 2], 30), (make(90, 6, 112, seed=8)[:, 1], 1), (modulation[:1, 0], 90)]
        for gate, rows in cases if dtype == torch.float32 else cases[:1]:
            options = {"gate": gate, "gate_rows": rows, "residual": residual, "dtype": dtype}
            expected = residual.float() + plain * gate.repeat_interleave(rows, 0)
            assert torch.equal(linear(kind, inputs, weight, bias, **options), expected.to(dtype))

    @pytest.mark.parametrize("kind", ["int8", "bf16"])
    def test_gelu(kind: str) -> None:
        inputs, weight = (portable_quantize(make(shape, 328, seed=11, spread=0.0) / 8) for shape in (60, 112))
        bias = torch.randn(112, generator=torch.Generator().manual_seed(12))
        plain = linear(kind, inputs, weight, bias)
        expected = torch.nn.functional.gelu(plain.double(), approximate="tanh")
        # Some 8 roundings of y / (1 + exp(-2u)); an error of the exponent counts |2u| times where exp(-2u) is large,
        # that is where the result is at most y * exp(-|2u|), and |2u| exp(-|2u|) is less than 1.
        bound = 16 * EPSILON * plain.double().abs()
        found = linear(kind, inputs, weight, bias, gelu=True)
        assert ((found.double() - expected).abs() <= bound).all()
        assert ((plain.abs() < 3) & (plain.abs() > 0.1)).float().mean() > 0.1

    @pytest.mark.parametrize("kind", ["int8", "bf16", "packed"])
    @pytest.mark.parametrize("width", [1, 16, 40])
    def test_side_branch(operands: tuple[Planes, Planes, torch.Tensor], kind: str, width: int) -> None:
        inputs, weight, bias = operands
        side, side_weight = make(90, width, seed=9).bfloat16(), make(width, 112, seed=10).bfloat16()
        plain = linear(kind, inputs, weight).double()
        product = side.double() @ side_weight.double() + bias.double()
        # The accumulator takes part in each of the additions.
        magnitude = plain.abs() + side.double().abs() @ side_weight.double().abs() + bias.double().abs()
        found = linear(kind, inputs, weight, bias, side=side, side_weight=side_weight)
        assert ((found.double() - plain - product).abs() <= (width + 1) * EPSILON * magnitude).all()

    def test_every_kernel_is_tested() -> None:
        source = Path(__file__).read_text()
        functions: list[Any] = [name for name in kernels.__all__ if hasattr(getattr(kernels, name), "arg_names")]
        assert functions
        assert all(f"kernels.{name}[" in source for name in functions)
