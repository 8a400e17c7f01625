"""The native weight-only linear against fp64 and the portable one, on every instruction set that this machine has."""

from collections.abc import Callable, Iterator

import pytest
import torch

from hif4c.runtime import format as hif4_format
from hif4c.runtime import reference
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.native import registry
from hif4c.runtime.native.bindings import Library
from hif4c.runtime.native.build import find_compiler, find_library
from hif4c.runtime.native.linear_w4_bindings import NativeLinearW4

try:
    find_compiler()
except Hif4Error as error:
    pytest.skip(f"native kernels cannot be built: {error}", allow_module_level=True)

ROUNDING = 2.0**-24  # the largest relative error of one fp32 rounding
LOW = torch.bfloat16
FLOATS = (torch.float32, LOW, torch.float16)
# Few rows have kernels of their own, whole groups are of 8, whole tiles of 16 and 48 columns.
SHAPES = ((1, 64, 16), (2, 200, 50), (3, 70, 97), (8, 1536, 33), (9, 64, 48), (70, 1000, 130), (600, 130, 49))

Product = Callable[..., torch.Tensor]


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(find_library())


@pytest.fixture(scope="module")
def products(library: Library) -> list[Product]:
    """The linear on each instruction set of this processor, with and without products of bf16 pairs."""
    linear = NativeLinearW4(library)

    def forced(number: int, bf16: bool) -> Product:
        return lambda *arguments, **options: linear(*arguments, **options, instruction_set=number, bf16=bf16)

    numbers = range(library.instruction_set + 1)
    return [forced(number, False) for number in numbers] + [forced(library.instruction_set, True)]


@pytest.fixture
def enabled() -> Iterator[None]:
    before = registry.is_enabled()
    registry.enable()
    yield
    if not before:
        registry.disable()


def make(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(*shape: int, seed: int = 0, largest: int = 4) -> torch.Tensor:
    """Whole numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()


def coarse_weight(n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Planes of any codes and micro-exponents, with level-1 scales of 1/2 to 3.5: multiples of 1/32 of at most 24.5.

    So the sum of 1,600 products with whole numbers up to 4 is below 2^24 of its steps: exact in fp32 in any order.
    """
    generator = torch.Generator().manual_seed(seed)
    units = -(-k // 64)
    codes = torch.randint(0, 256, (n, units * 32), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 256, (n, units, 4), dtype=torch.uint8, generator=generator)
    scales[..., 0] = torch.randint(47 * 4, 50 * 4, (n, units), dtype=torch.uint8, generator=generator)
    return codes, scales


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal, and NaN in the same places; 0.0 equals -0.0."""
    return found.dtype == expected.dtype and torch.equal(found.isnan(), expected.isnan()) and torch.equal(
        found.nan_to_num(0.0, 1e38, -1e38), expected.nan_to_num(0.0, 1e38, -1e38)
    )  # fmt: skip


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_sums_are_those_of_fp64(products: list[Product], m: int, k: int, n: int):
    weight = hif4_format.quantize(make(n, k, seed=1) * 2.0 ** make(k, seed=2))
    decoded = hif4_format.dequantize(*weight, k, torch.float64)
    for dtype in FLOATS:
        x = make(m, k).to(dtype)
        exact, terms = x.double() @ decoded.t(), x.double().abs() @ decoded.abs().t()
        for product in products:
            found = product(x, *weight, dtype=torch.float32)
            # k products, each rounded at most once, and as many additions; 1 % for products of errors.
            assert ((found.double() - exact).abs() <= 1.01 * (k + 1) * ROUNDING * terms).all()


@pytest.mark.parametrize(("m", "k", "n"), [(5, 1600, 49), (17, 1600, 50), (300, 200, 97)])
def test_what_follows_the_sums_is_the_portable_one(products: list[Product], m: int, k: int, n: int):
    """On sums that are exact in any order, so that every bit is determined."""
    x, weight, bias = whole(m, k), coarse_weight(n, k), make(n, seed=1)
    side, side_weight = make(m, 5, seed=2).to(LOW), make(5, n, seed=3).to(LOW)
    gate, residual = make(1, n, seed=4), 100 * make(m, n, seed=5)
    exact = x.double() @ hif4_format.dequantize(*weight, k, torch.float64).t()
    inputs = (x, x.to(LOW), x.half())
    for product in products:
        for value in inputs:
            assert torch.equal(product(value, *weight, dtype=torch.float32).double(), exact)
    for number, options in enumerate((
        {"bias": bias},
        {"bias": bias.to(LOW), "residual": residual},
        {"side": side, "side_weight": side_weight, "gate": gate},
        {"gate": gate, "residual": residual.to(LOW), "side": side.half(), "side_weight": side_weight.half()},
        {"bias": bias, "gate": gate.expand(m, n), "residual": residual.half()},
    )):  # fmt: skip
        for dtype in FLOATS:
            expected = reference.linear_w4(x, *weight, dtype=dtype, **options)
            for product in products:
                assert same(product(inputs[number % 3], *weight, dtype=dtype, **options), expected)
    gelu = {"bias": bias, "activation": "gelu_tanh", "dtype": torch.float32}
    before, expected = exact.float() + bias, reference.linear_w4(x, *weight, **gelu)
    for product in products:
        # Each evaluates the sigmoid or tanh with an error of some last places of a factor that is at most 1.
        assert ((product(x, *weight, **gelu) - expected).abs() <= 8 * ROUNDING * before.abs()).all()


def test_every_scale_and_code_decodes_exactly(products: list[Product]):
    """The product with unit vectors is the decoded weight: every E6M2, NaN too, and codes at random."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (256, 32), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 256, (256, 1, 4), dtype=torch.uint8, generator=generator)
    scales[:, 0, 0] = torch.arange(256, dtype=torch.uint8)
    decoded = hif4_format.dequantize(codes, scales, 64, torch.float32).t()
    assert decoded[:, 255].isnan().all()
    for dtype in (torch.float32, LOW):
        unit_vectors = torch.eye(64, dtype=dtype)
        for product in products:
            assert same(product(unit_vectors, codes, scales, dtype=torch.float32), decoded)
            for rows in (1, 2, 3, 8):  # the kernels for few rows
                parts = [product(part, codes, scales, dtype=torch.float32) for part in unit_vectors.split(rows)]
                assert same(torch.cat(parts), decoded)


@pytest.mark.parametrize("width", [0, 4, 64, 256])
@pytest.mark.parametrize("m", [3, 20])
def test_mask_and_rotation_round_once_to_the_input_s_dtype(products: list[Product], m: int, width: int):
    k, n = 1280, 50
    weight, mask = hif4_format.quantize(make(n, k, seed=1)), make(k, seed=2)
    for dtype in FLOATS:
        x = make(m, k, seed=3).to(dtype)
        for factors in (None, mask, mask.to(LOW)):
            before = reference.masked_and_rotated(x, factors, width)
            for product in products:
                found = product(x, *weight, mask=factors, hadamard=width, dtype=torch.float32)
                assert same(found, product(before, *weight, dtype=torch.float32))


def test_threads_change_no_bit(library: Library):
    weight, bias = hif4_format.quantize(make(130, 640, seed=1)), make(130, seed=2)
    alone = Library(library.path)
    alone.parallel = None  # threads of its own
    threads = torch.get_num_threads()
    try:
        for m in (3, 700):
            x = make(m, 640).to(LOW)
            torch.set_num_threads(1)
            expected = NativeLinearW4(library)(x, *weight, bias, dtype=LOW)
            for count in (2, 5):
                torch.set_num_threads(count)
                for owner in (library, alone):
                    assert same(NativeLinearW4(owner)(x, *weight, bias, dtype=LOW), expected)
    finally:
        torch.set_num_threads(threads)


def test_values_that_are_not_finite_or_tiny(products: list[Product]):
    k, n = 128, 20
    weight = hif4_format.quantize(make(n, k, seed=1))
    decoded = hif4_format.dequantize(*weight, k, torch.float64)
    x = make(12, k)
    x[1, 5], x[2, 127], x[3, 0], x[11, 64] = torch.nan, torch.inf, -torch.inf, torch.nan
    tiny = make(12, k).to(LOW) * 2.0**-127
    assert ((tiny != 0) & (tiny.abs() < 2.0**-126)).any()
    exact, terms = tiny.double() @ decoded.t(), tiny.double().abs() @ decoded.abs().t()
    for product in products:
        for rows in (slice(0, 4), slice(0, 12)):
            for value in (x[rows], x[rows].to(LOW)):
                found = product(value, *weight, dtype=torch.float32)
                expected = reference.linear_w4(value, *weight, dtype=torch.float32)
                assert torch.equal(found.isnan(), expected.isnan())
                assert torch.equal(found == torch.inf, expected == torch.inf)
                assert torch.equal(found == -torch.inf, expected == -torch.inf)
            # Products of bf16 pairs take what is below 2^-126 for zero, inputs and sums, at each of k steps.
            lost = k * 2.0**-126 * (decoded.abs().sum(-1) + 1)
            found = product(tiny[rows], *weight, dtype=torch.float32)
            assert ((found.double() - exact[rows]).abs() <= 1.01 * (k + 1) * ROUNDING * terms[rows] + lost).all()


def test_views_shapes_and_what_is_empty(products: list[Product]):
    n, k = 40, 192
    codes, scales = coarse_weight(2 * n, k)
    planes, bias = (codes[::2], scales[::2]), make(2 * n)[::2]
    x = whole(6, 8, 2 * k).transpose(0, 1)[:, ::2, ::2].to(LOW)  # [8, 3, k]
    residual = make(3, 8, n).transpose(0, 1)
    assert not x.is_contiguous()
    for product in products:
        for gate in (make(8, 1, n), make(8, 3, n), make(1, 1, n), make(1, 3, n), make(8, 1, 2 * n)[..., ::2]):
            options = {"gate": gate, "residual": residual, "dtype": LOW}
            expected = reference.linear_w4(x, *planes, bias, **options)
            assert same(product(x, *planes, bias, **options), expected)
        assert same(product(x[0, 0], *planes, dtype=LOW), reference.linear_w4(x[0, 0], *planes, dtype=LOW))
        assert product(x[:0], *planes, dtype=LOW).shape == (0, 3, n)
        assert product(x, codes[:0], scales[:0], dtype=LOW).shape == (8, 3, 0)


def test_what_does_not_fit_is_refused(library: Library):
    linear, weight = NativeLinearW4(library), coarse_weight(8, 64)
    with pytest.raises(Hif4Error, match="has no kernels for 99"):
        linear(torch.ones(2, 64), *weight, instruction_set=99)
    with pytest.raises(Hif4Error, match="cannot hold"):
        linear(torch.ones(2, 65), *weight)
    with pytest.raises(Hif4Error, match="bias must have shape"):
        linear(torch.ones(2, 64), *weight, torch.ones(3))


@pytest.mark.usefixtures("enabled")
def test_the_operator_is_the_native_kernel(library: Library):
    x, weight, bias = make(2, 5, 128).to(LOW), hif4_format.quantize(make(20, 128, seed=1)), make(20, seed=2)
    found = torch.ops.hif4.linear_w4(x, *weight, bias, None, 64, "gelu_tanh")
    assert found.dtype == LOW
    assert same(found, NativeLinearW4(library)(x, *weight, bias, None, 64, "gelu_tanh", LOW))
    torch.library.opcheck(torch.ops.hif4.linear_w4.default, (x, *weight, bias, make(128), 64))
