"""The native norms and rotary embedding against fp64, against the portable ones, and against each other."""

from collections.abc import Iterator

import pytest
import torch

from hif4c.runtime import format as hif4_format
from hif4c.runtime import rows as portable
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.native import registry
from hif4c.runtime.native.bindings import Library
from hif4c.runtime.native.build import find_compiler, find_library
from hif4c.runtime.native.row_bindings import RowKernels

try:
    find_compiler()
except Hif4Error as error:
    pytest.skip(f"native kernels cannot be built: {error}", allow_module_level=True)

ROUNDING = 2.0**-24  # the largest relative error of one fp32 rounding
LOW = torch.bfloat16
FLOATS = (torch.float32, LOW, torch.float16)
# Whole vectors, whole partial sums and neither; rows shorter than a vector.
CHANNELS = (1, 3, 16, 63, 64, 65, 200, 1536)


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(find_library())


@pytest.fixture
def rows(library: Library) -> RowKernels:
    return library.rows


@pytest.fixture
def sets(library: Library) -> range:
    """The instruction sets of this processor."""
    return range(library.instruction_set + 1)


@pytest.fixture
def enabled() -> Iterator[None]:
    before = registry.is_enabled()
    registry.enable()
    yield
    if not before:
        registry.disable()


def make(*shape: int, seed: int = 0, spread: float = 1.0, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + torch.randn(*shape, generator=generator) * 2.0 ** (
        spread * torch.randn(shape[-1], generator=generator)
    )


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit patterns; a NaN is a NaN whatever its payload."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    if not torch.equal(found.isnan(), expected.isnan()):
        return False
    kind = torch.int32 if found.dtype == torch.float32 else torch.int16
    return torch.equal(found.nan_to_num(0.0).view(kind), expected.nan_to_num(0.0).view(kind))


def modulation(samples: int, tokens: int, c: int) -> tuple[torch.Tensor, torch.Tensor]:
    return make(samples, tokens, c, seed=1, spread=0.5), make(samples, tokens, c, seed=2, spread=0.5)


def arguments(name: str, c: int) -> tuple[torch.Tensor | None, ...]:
    """Weight, bias, scale and shift for x of [2, 5, c]."""
    weight, bias = make(c, seed=3, spread=0.5), make(c, seed=4, spread=0.5)
    return {
        "plain": (None, None, None, None),
        "affine": (weight, bias, None, None),
        "weight": (weight, None, None, None),
        "sample": (None, None, *modulation(2, 1, c)),
        "token": (weight.to(LOW), bias, *modulation(2, 5, c)),
        "one": (None, bias, *modulation(1, 1, c)),
    }[name]


ARGUMENTS = ("plain", "affine", "weight", "sample", "token", "one")


def exact_norm(x, weight, bias, scale, shift, eps):
    """In fp64: the norm, the magnitudes that were added up in it, and what a normalized value is multiplied by."""
    d = x.double() - x.double().mean(-1, keepdim=True)
    y = d / (d.square().mean(-1, keepdim=True) + eps).sqrt()
    terms, gain = y.abs(), torch.ones_like(y)
    if weight is not None:
        y, terms, gain = y * weight.double(), terms * weight.double().abs(), gain * weight.double().abs()
    if bias is not None:
        y, terms = y + bias.double(), terms + bias.double().abs()
    if scale is not None:
        factor = scale.double() + 1
        y, terms, gain = y * factor, terms * factor.abs(), gain * factor.abs()
        y, terms = y + shift.double(), terms + shift.double().abs()
    return y, terms, gain


@pytest.mark.parametrize("c", CHANNELS)
@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_norm_is_that_of_fp64(rows: RowKernels, sets: range, name: str, c: int, mean: float):
    x = make(2, 5, c, mean=mean)
    others = arguments(name, c)
    exact, terms, gain = exact_norm(x, *others, 1e-6)
    # A partial sum has n terms. Relative: the deviation and its product with 1/sigma round 3 times, 1/sigma once and
    # by half the n + 3 of the squares' sum, and there are 5 more operations. Absolute: the mean is known to n + 2
    # roundings of mean |d|, which is at most sigma. 1 % for products of errors.
    n = -(-c // 64)
    bound = 1.01 * ROUNDING * ((9 + (n + 3) / 2) * terms + (n + 2) * gain)
    found = rows.norm(x, *others, 1e-6, torch.float32)
    assert ((found.double() - exact).abs() <= bound).all()
    for dtype in FLOATS:
        assert same(rows.norm(x, *others, 1e-6, dtype), found.to(dtype))
    for forced in sets:
        assert same(rows.norm(x, *others, 1e-6, torch.float32, forced), found)
        low = x.to(LOW)
        assert same(rows.norm(low, *others, 1e-6, LOW, forced), rows.norm(low.float(), *others, 1e-6, LOW))


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.5])
def test_eps_is_added_to_the_variance(rows: RowKernels, eps: float):
    x = 0.01 * make(2, 5, 200)
    exact, terms, gain = exact_norm(x, None, None, None, None, eps)
    found = rows.norm(x, None, None, None, None, eps, torch.float32)
    assert ((found.double() - exact).abs() <= 16 * ROUNDING * (terms + gain)).all()
    flat = torch.full((1, 1, 200), 3.3)
    assert (rows.norm(flat, None, None, None, None, eps, torch.float32).abs() <= 1e-3).all()


@pytest.mark.parametrize(("name", "width"), [("plain", 0), ("affine", 4), ("sample", 64), ("token", 64), ("one", 0)])
def test_norm_quantize_is_quantize_of_norm(rows: RowKernels, sets: range, name: str, width: int):
    """Bit for bit of the same kernels; from the portable ones units differ only where the norm's rounding does."""
    for c in (64, 192, 200, 1536):
        if width and c % width:
            continue
        x, others, mask = make(2, 5, c, mean=1.0).to(LOW), arguments(name, c), make(c, seed=9)
        for dtype in FLOATS:
            y = rows.norm(x, *others, 1e-6, dtype)
            for factors in (None, mask):
                expected = hif4_format.quantize(y, factors, width)
                for forced in sets:
                    found = rows.norm_quantize(x, *others, 1e-6, dtype, factors, width, forced)
                    assert all(map(torch.equal, found, expected))
        codes, scales = portable.norm_quantize(x, *others, 1e-6, LOW, mask, width)
        found = rows.norm_quantize(x, *others, 1e-6, LOW, mask, width)
        y, torchs = rows.norm(x, *others, 1e-6, LOW), portable.norm(x, *others, 1e-6, LOW)
        flips = y != torchs
        # Both are some 10 fp32 roundings from the exact norm, and bf16 has 2^16 of them between its values: about 2e-4
        # of the elements are expected to round to the other side, more where the shift cancels the norm.
        assert flips.float().mean() < 5e-3
        units = -(-c // 64)
        flipped = torch.nn.functional.pad(flips, (0, units * 64 - c)).unflatten(-1, (units, 64)).any(-1)
        other = (codes.unflatten(-1, (units, 32)) != found[0].unflatten(-1, (units, 32))).any(-1)
        other |= (scales != found[1]).any(-1)
        assert not (other & ~flipped).any()


def test_rows_with_nan_and_infinity(rows: RowKernels, sets: range):
    x = make(1, 6, 130)
    x[0, 1, 5], x[0, 2, 129], x[0, 3, 0], x[0, 4] = torch.nan, torch.inf, -torch.inf, 0.0
    x[0, 5, 128] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # rounding must not carry over
    for value in (x, x.to(LOW)):
        for dtype in FLOATS:
            expected = portable.norm(value, None, None, None, None, 1e-6, dtype)
            assert expected[0, [1, 2, 3, 5]].isnan().all()
            for forced in sets:
                found = rows.norm(value, None, None, None, None, 1e-6, dtype, forced)
                assert torch.equal(found.isnan(), expected.isnan())
                assert (found[0, 4] == 0).all()
                planes = rows.norm_quantize(value, None, None, None, None, 1e-6, dtype, None, 0, forced)
                assert (planes[1][0, [1, 2, 3, 5], :, 0] == hif4_format.NAN_E6M2).all()
                assert (planes[1][0, [0, 4], :, 0] != hif4_format.NAN_E6M2).all()


@pytest.mark.parametrize("kind", [torch.nan, torch.inf, -torch.inf])
def test_quantize_marks_the_unit_of_a_value_that_is_not_finite(rows: RowKernels, sets: range, kind: float):
    x = make(40, 40 * 64)
    x[torch.arange(40), torch.arange(40) * 64 + torch.arange(40)] = kind
    for value in (x, x.to(LOW)):
        expected = hif4_format.quantize(value)
        assert (expected[1][..., 0] == hif4_format.NAN_E6M2).sum() == 40
        for forced in sets:
            assert all(map(torch.equal, rows.quantize(value, None, 0, forced), expected))


@pytest.mark.parametrize("width", [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
def test_quantize_after_every_rotation(rows: RowKernels, sets: range, width: int):
    for k in (width, 3 * width):  # also what fills no unit, and more than 16 units
        mask = make(k, seed=1)
        for dtype in FLOATS:
            x = make(7, k, spread=3.0).clamp(-6e4, 6e4).to(dtype)
            for factors in (None, mask):
                expected = hif4_format.quantize(x, factors, width)
                for forced in sets:
                    assert all(map(torch.equal, rows.quantize(x, factors, width, forced), expected))


@pytest.mark.parametrize("k", [1, 15, 16, 64, 100, 200])
def test_dequantize_every_scale_and_code(rows: RowKernels, sets: range, k: int):
    """Bit for bit, the sign of zeros too."""
    generator = torch.Generator().manual_seed(k)
    units = -(-k // 64)
    codes = torch.randint(0, 256, (4, 256, units * 32), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 256, (4, 256, units, 4), dtype=torch.uint8, generator=generator)
    scales[..., 0] = torch.arange(256, dtype=torch.uint8)[:, None]
    for planes in ((codes, scales), (codes[::2, 1::3], scales[::2, 1::3]), (codes[0, 3], scales[0, 3]),
                   (codes[:0], scales[:0])):  # fmt: skip
        for dtype in (*FLOATS, torch.float64):
            expected = hif4_format.dequantize(*planes, k, dtype)
            for forced in sets:
                found = rows.dequantize(*planes, k, dtype, forced)
                assert found.dtype == dtype
                assert torch.equal(found.isnan(), expected.isnan())
                assert torch.equal(found.nan_to_num(0.0), expected.nan_to_num(0.0))
                assert torch.equal(found.signbit() & ~found.isnan(), expected.signbit() & ~expected.isnan())


def tables(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As in the model: every second column of tables that have each angle twice."""
    angle = make(1, tokens, 1, width // 2, seed=7).repeat_interleave(2, -1)
    return angle.cos()[..., 0::2], angle.sin()[..., 1::2]


@pytest.mark.parametrize(("heads", "width"), [(1, 2), (3, 16), (5, 10), (12, 128), (2, 66)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_rms_rotary_is_that_of_the_model(rows: RowKernels, sets: range, heads: int, width: int, dtype: torch.dtype):
    c = heads * width
    x, (cos, sin) = make(2, 5, c).to(dtype), tables(5, width)
    for weight in (make(c, seed=3), make(c, seed=3).to(dtype)):
        y = rows.rms_rotary(x, weight, 1e-6, heads)
        assert y.shape == (2, 5, heads, width)
        exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
        # Relative: two products, 1 / root and half of its sum of squares, n terms; then the rounding to the dtype
        # (fp16: and half its smallest number).
        last = {torch.float32: 0.0, LOW: 2.0**-8, torch.float16: 2.0**-11}[dtype]
        bound = exact.abs() * (ROUNDING * (4 + (-(-c // 64) + 1) / 2) + last) * 1.01 + 2.0**-25 * (
            dtype == torch.float16
        )
        assert ((y.flatten(2).double() - exact).abs() <= bound).all()
        first, second = y[..., 0::2], y[..., 1::2]
        expected = torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2).to(dtype)
        found = rows.rms_rotary(x, weight, 1e-6, heads, cos, sin)
        assert same(found, expected)
        for forced in sets:
            assert same(rows.rms_rotary(x, weight, 1e-6, heads, cos, sin, forced), found)
            assert same(rows.rms_rotary(x, weight, 1e-6, heads, instruction_set=forced), y)
        torchs = portable.rms_rotary(x, weight, 1e-6, heads)
        assert (y != torchs).float().mean() <= (1.0 if dtype == torch.float32 else 5e-3)  # as of the norm above


def test_views_shapes_and_what_is_empty(rows: RowKernels, sets: range):
    x = make(6, 4, 256).transpose(0, 1)[:, ::2, ::2]
    scale, shift = (factor[..., ::2] for factor in modulation(4, 1, 256))
    expected = rows.norm(x.contiguous(), None, None, scale.contiguous(), shift.contiguous(), 1e-6, LOW)
    slices = (make(4, 6, 128, seed=1)[:, :1], make(4, 6, 128, seed=2)[:, 3:4])
    for forced in sets:
        assert same(rows.norm(x, make(256)[::2], None, scale, shift, 1e-6, LOW, forced),
                    rows.norm(x, make(256)[::2].clone(), None, scale, shift, 1e-6, LOW))  # fmt: skip
        assert same(rows.norm(x, None, None, scale, shift, 1e-6, LOW, forced), expected)
        assert same(
            rows.norm(x, None, None, *slices, 1e-6, LOW, forced),
            rows.norm(x, None, None, *(factor.expand(4, 3, 128).clone() for factor in slices), 1e-6, LOW),
        )
        one = rows.norm(x[0], None, None, scale[0], shift[0], 1e-6, LOW, forced)
        assert same(one, expected[0])
        deep = rows.norm(x[None], None, None, scale[None], shift[None], 1e-6, LOW, forced)
        assert same(deep, expected[None])
    cos, sin = tables(3, 16)
    expected = rows.rms_rotary(x.contiguous(), make(128), 1e-6, 8, cos.contiguous(), sin.contiguous())
    assert same(rows.rms_rotary(x, make(256)[::2], 1e-6, 8, cos, sin),
                rows.rms_rotary(x.contiguous(), make(256)[::2].clone(), 1e-6, 8, cos, sin))  # fmt: skip
    assert same(rows.rms_rotary(x, make(128), 1e-6, 8, cos, sin), expected)
    empty = torch.empty(2, 0, 128)
    assert rows.norm(empty, None, None, None, None, 1e-6, LOW).shape == (2, 0, 128)
    assert rows.norm_quantize(empty, None, None, None, None, 1e-6, LOW)[1].shape == (2, 0, 2, 4)
    assert rows.rms_rotary(empty, make(128), 1e-6, 4).shape == (2, 0, 4, 32)


def test_threads_change_no_bit(library: Library, sets: range):
    x, (scale, shift), (cos, sin) = make(2, 150, 640).to(LOW), modulation(2, 150, 640), tables(150, 64)
    weight = make(640, seed=3)

    def all_of(rows: RowKernels, forced: int) -> tuple[torch.Tensor, ...]:
        norm = (x, None, None, scale, shift, 1e-6, LOW)
        return (
            rows.norm(*norm, forced),
            *rows.norm_quantize(*norm, weight, 64, forced),
            rows.rms_rotary(x, weight, 1e-6, 10, cos, sin, forced),
            *rows.quantize(x, weight, 64, forced),
        )

    expected = all_of(library.rows, 0)
    alone = Library(library.path)
    alone.parallel = None  # threads of its own
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for forced in sets:
                for found in (all_of(library.rows, forced), all_of(alone.rows, forced)):
                    assert all(map(torch.equal, found, expected))
    finally:
        torch.set_num_threads(threads)


def test_what_does_not_fit_is_refused(rows: RowKernels):
    x, weight = make(2, 5, 64), make(64)
    for wrong, match in (
        (lambda: rows.norm(x, weight[:3], None, None, None, 1e-6, LOW), "weight must have shape"),
        (lambda: rows.norm(x, None, None, x, None, 1e-6, LOW), "belong together"),
        (lambda: rows.norm(x.double(), None, None, None, None, 1e-6, LOW), "floating point"),
        (lambda: rows.norm_quantize(x, None, None, None, None, 1e-6, LOW, weight[:3]), "mask must have shape"),
        (lambda: rows.norm_quantize(x, None, None, None, None, 1e-6, LOW, None, 128), "does not divide"),
        (lambda: rows.rms_rotary(x, weight, 1e-6, 5), "heads of D"),
        (lambda: rows.norm(x, None, None, None, None, 1e-6, LOW, 99), "no kernels for 99"),
        (lambda: rows.rms_rotary(x, weight, 1e-6, 4, instruction_set=99), "no kernels for 99"),
    ):
        with pytest.raises(Hif4Error, match=match):
            wrong()


@pytest.mark.usefixtures("enabled")
def test_the_operators_are_the_native_kernels(rows: RowKernels):
    x, (scale, shift), weight, (cos, sin) = make(2, 5, 64, mean=3.0), modulation(2, 1, 64), make(64), tables(5, 16)
    norm = (x, weight, None, scale, shift, 1e-6, torch.float32)
    assert same(torch.ops.hif4.norm(*norm), rows.norm(*norm))
    assert not same(torch.ops.hif4.norm(*norm), portable.norm(*norm))
    planes = torch.ops.hif4.norm_quantize(*norm, weight, 16)
    assert same(torch.ops.hif4.dequantize(*planes, 64), hif4_format.dequantize(*planes, 64))
    assert all(map(torch.equal, planes, rows.norm_quantize(*norm, weight, 16)))
    rotary = (x, weight, 1e-6, 4, cos, sin)
    assert same(torch.ops.hif4.rms_rotary(*rotary), rows.rms_rotary(*rotary))
    torch.library.opcheck(torch.ops.hif4.norm.default, norm)
    torch.library.opcheck(torch.ops.hif4.norm_quantize.default, (*norm, None, 16))
    torch.library.opcheck(torch.ops.hif4.rms_rotary.default, rotary)
