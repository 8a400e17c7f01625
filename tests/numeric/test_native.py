"""The native CPU kernels against the portable ones: the same bits, on every instruction set that this machine has."""

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from hif4c.runtime import format as portable
from hif4c.runtime import reference
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.native import registry
from hif4c.runtime.native.bindings import INSTRUCTION_SETS, Library
from hif4c.runtime.native.build import find_compiler, find_library
from hif4c.runtime.native.linear_bindings import LinearKernel
from hif4c.runtime.native.row_bindings import RowKernels

try:
    find_compiler()
except Hif4Error as error:
    pytest.skip(f"native kernels cannot be built: {error}", allow_module_level=True)

GOLDEN = Path(__file__).parents[1] / "data" / "hif4_golden.safetensors"
SETS = range(len(INSTRUCTION_SETS))
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
COUNT = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(find_library())


@pytest.fixture(params=SETS, ids=INSTRUCTION_SETS)
def forced(request: pytest.FixtureRequest, library: Library) -> int:
    """Each instruction set in turn, skipped where the processor lacks it."""
    if request.param > library.instruction_set:
        pytest.skip(f"this processor has no {INSTRUCTION_SETS[request.param]}")
    return request.param


@pytest.fixture
def enabled() -> Iterator[None]:
    """The native kernels behind torch.ops.hif4; the earlier choice is put back."""
    before = registry.is_enabled()
    registry.enable()
    yield
    if not before:
        registry.disable()


def make(*shape: int, seed: int = 0, spread: float = 4.0) -> torch.Tensor:
    """Gaussian times 2^(spread * normal) for each channel, so that the order of additions and every exponent matter."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * 2.0 ** (spread * torch.randn(shape[-1], generator=generator))


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit patterns, -0.0 told from 0.0; a NaN is a NaN whatever its payload."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    if not torch.equal(found.isnan(), expected.isnan()):
        return False
    kind = torch.int32 if found.dtype == torch.float32 else torch.int16
    return torch.equal(found.nan_to_num(0.0).view(kind), expected.nan_to_num(0.0).view(kind))


def check_quantize(library: Library, forced: int, x: torch.Tensor, mask: torch.Tensor | None = None, width: int = 0):
    codes, scales = library.quantize(x, mask, width, forced)
    expected_codes, expected_scales = portable.quantize(x, mask, width)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(codes, expected_codes)


def check_linear(library: Library, sets: Iterable[int], m: int, k: int, n: int, seed: int = 0, nan: bool = False):
    x, w, bias = make(m, k, seed=seed), make(n, k, seed=seed + 1), make(n, seed=seed + 2)
    if nan:
        x[m // 2, k // 2] = torch.nan
        w[n // 3, k - 1] = torch.inf
    planes = (*portable.quantize(x), *portable.quantize(w))
    exact = reference.linear(*planes)
    for forced in sets:
        assert same(library.linear(*planes, instruction_set=forced), exact)
        for dtype in FLOATS:
            found = library.linear(*planes, bias, None, dtype, instruction_set=forced)
            assert same(found, (exact + bias).to(dtype))


def branch(m: int, n: int, width: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """A side branch whose terms are about as large as a 4-bit product of Gaussians."""
    return 5 * make(m, width, seed=m, spread=1.0).to(dtype), make(width, n, seed=n, spread=1.0).to(dtype)


def golden_names() -> list[str]:
    with safe_open(GOLDEN, "pt") as file:
        return sorted(key for key in file.keys() if key.endswith(".x"))  # noqa: SIM118


def test_every_golden_set(library: Library, forced: int):
    with safe_open(GOLDEN, "pt") as file:
        for name in golden_names():
            x, y = file.get_tensor(name), file.get_tensor(name.removesuffix("x") + "y")
            check_quantize(library, forced, x)
            planes = library.quantize(x, instruction_set=forced)
            assert same(portable.dequantize(*planes, x.shape[-1]), y), name
            product = (*planes, planes[0].flatten(0, -2)[:70], planes[1].flatten(0, -3)[:70])
            assert same(library.linear(*product, instruction_set=forced), reference.linear(*product)), name


@COUNT
@given(
    st.integers(0, 40), st.integers(1, 40), st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128, 1024]), st.booleans(),
    st.sampled_from(FLOATS), st.integers(0, 2**31), st.floats(0, 30),
)  # fmt: skip
def test_quantize_is_the_portable_one(library_of, rows, blocks, width, masked, dtype, seed, spread):
    k = width * blocks if width * blocks <= 5000 else width
    x = make(rows, k, seed=seed, spread=spread).clamp(-6e4, 6e4).to(dtype)
    mask = make(k, seed=seed + 1, spread=1.0) if masked else None
    for forced in range(library_of.instruction_set + 1):
        check_quantize(library_of, forced, x, mask, width)


@pytest.fixture(scope="module")
def library_of() -> Library:  # hypothesis wants fixtures that live longer than an example
    return Library(find_library())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 300), st.integers(1, 700), st.integers(1, 120), st.integers(0, 2**31), st.booleans())
def test_linear_is_the_portable_one(library_of, m, k, n, seed, nan):
    check_linear(library_of, range(library_of.instruction_set + 1), m, k, n, seed, nan and m > 0)


@pytest.mark.parametrize("m", [*range(1, 10), 15, 16, 17, 63, 300])
def test_every_small_number_of_rows(library: Library, forced: int, m: int):
    check_linear(library, [forced], m, 200, 50, nan=m % 2 == 1)


@pytest.mark.parametrize(("m", "k", "n"), [(600, 64, 49), (1100, 1100, 17), (9, 13824, 33), (2, 6500, 130)])
def test_shapes_that_take_several_blocks(library: Library, m: int, k: int, n: int):
    check_linear(library, [library.instruction_set], m, k, n)


def test_gelu_is_exact_to_a_few_roundings(library: Library, forced: int):
    """GELU is x / (1 + e), e = exp(-2u), and one rounding is eps = 2^-24, relative.

    The exponent has six roundings, its constants' among them: 6 eps |2u| in e, which has about 4 eps more. An error of
    e reaches the result, relative to x, by the factor e / (1 + e)^2: at most 1 / 4, and times |2u| at most 0.224. Sum
    and quotient round once each. In all (6 * 0.224 + 4 / 4 + 2) eps |x|.
    """
    bias = torch.cat([torch.linspace(-14, 14, 4001), 2.0 ** torch.linspace(-140, 66, 500)])
    planes = (*portable.quantize(torch.zeros(2, 64)), *portable.quantize(torch.zeros(bias.shape[0], 64)))
    for x in (bias, -bias):  # the sums are 0: x is the bias
        found = library.linear(*planes, x, "gelu_tanh", instruction_set=forced)
        exact = torch.nn.functional.gelu(x.double(), approximate="tanh")
        denormal = 2.0**-149  # where a result has no more bits
        assert ((found[1] - exact).abs() <= 4.4 * 2.0**-24 * x.double().abs() + denormal).all()
        assert same(found, library.linear(*planes, x, "gelu_tanh", instruction_set=0))
        low = library.linear(*planes, x, "gelu_tanh", torch.bfloat16, instruction_set=forced)
        assert same(low, found.bfloat16())


def test_gelu_of_infinities_is_torchs(library: Library, forced: int):
    bias = torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 0.0, 1e-42])
    planes = (*portable.quantize(torch.zeros(9, 64)), *portable.quantize(torch.zeros(len(bias), 64)))
    for rows in (2, 9):
        few = (planes[0][:rows], planes[1][:rows], *planes[2:], bias, "gelu_tanh")
        assert same(library.linear(*few, instruction_set=forced), reference.linear(*few))


@pytest.mark.parametrize("kind", ["rows", "samples", "one", "tokens"])
@pytest.mark.parametrize(("b", "t"), [(2, 3), (3, 21), (1, 40)])
def test_gated_residuals_are_the_portable_ones(library: Library, forced: int, b: int, t: int, kind: str):
    n = 70
    planes = (*portable.quantize(make(b, t, 200)), *portable.quantize(make(n, 200, seed=1)))
    bias, residual = make(n, seed=2), make(b, t, n, seed=3)
    gate = make(*{"rows": (b, t), "samples": (b, 1), "one": (1, 1), "tokens": (1, t)}[kind], n, seed=4, spread=1.0)
    plain = reference.linear(*planes, bias)
    for dtype, *rest in (
        (torch.float32, gate, None), (torch.float16, None, residual.half()), (torch.bfloat16, gate, residual),
        (torch.float32, gate, residual.bfloat16()),
    ):  # fmt: skip
        expected = reference.linear(*planes, bias, None, dtype, None, None, *rest)
        assert not torch.equal(expected, plain.to(dtype))
        found = library.linear(*planes, bias, None, dtype, None, None, *rest, instruction_set=forced)
        assert same(found, expected)
    side, side_weight = branch(b * t, n, 3)
    everything = (bias, None, torch.bfloat16, side.view(b, t, 3), side_weight, gate, residual.half())
    assert same(library.linear(*planes, *everything, instruction_set=forced), reference.linear(*planes, *everything))


def test_gate_and_residual_follow_gelu(library: Library, forced: int):
    planes = (*portable.quantize(make(2, 9, 128, spread=1.0)), *portable.quantize(make(50, 128, seed=1, spread=1.0)))
    gate, residual = make(2, 1, 50, seed=2), make(2, 9, 50, seed=3)
    activated = library.linear(*planes, None, "gelu_tanh", instruction_set=forced)
    rest = (None, "gelu_tanh", torch.float32, None, None, gate, residual)
    assert same(library.linear(*planes, *rest, instruction_set=forced), residual + activated * gate)


def test_every_half_is_read_and_rounded_as_by_torch(library: Library, forced: int):
    """All 65,536 halves as a residual, and as outputs what lies on, beside and between them."""
    planes = (*portable.quantize(torch.zeros(256, 64)), *portable.quantize(torch.zeros(256, 64)))
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.half).view(256, 256)
    assert same(library.linear(*planes, residual=halves, instruction_set=forced), halves.float() + 0.0)
    above = torch.nextafter(halves.float(), torch.tensor(torch.inf))
    gap = torch.nextafter(halves.abs(), torch.tensor(torch.inf).half()).float() - halves.abs().float()
    for x in (halves.float(), above, -above, halves.float() + gap / 2, halves.float() * 1.0004):
        for dtype in FLOATS:
            found = library.linear(*planes, dtype=dtype, residual=x, instruction_set=forced)
            assert same(found, (x + 0.0).to(dtype))


def test_a_nan_stays_in_its_row_and_column(library: Library, forced: int):
    """The sums of a unit without a scale may be anything; nothing else may see them."""
    x, w = make(20, 256), make(100, 256, seed=1)
    expected = reference.linear(*portable.quantize(x), *portable.quantize(w))
    x[3, 70], x[19, 255], w[50, 0], w[99, 130] = torch.nan, torch.inf, torch.nan, -torch.inf
    expected[[3, 19]] = torch.nan
    expected[:, [50, 99]] = torch.nan
    weight = portable.quantize(w)
    for rows in (20, 4):
        planes = (*portable.quantize(x[:rows]), *weight)
        assert same(library.linear(*planes, instruction_set=forced), expected[:rows])
        residual = torch.zeros(rows, 100).half()
        found = library.linear(*planes, residual=residual, instruction_set=forced)
        assert same(found, expected[:rows] + 0.0)


@pytest.mark.parametrize("width", [1, 5, 16, 40])
@pytest.mark.parametrize("m", [1, 3, 8, 11, 300])
def test_side_branch_is_the_portable_one(library: Library, forced: int, m: int, width: int):
    n = 70  # neither whole tiles of 16 nor of 48
    x, w, bias = make(m, 200, spread=1.0), make(n, 200, seed=1, spread=1.0), make(n, seed=2)
    planes = (*portable.quantize(x), *portable.quantize(w))
    side, side_weight = branch(m, n, width)
    assert not same(reference.linear(*planes), reference.linear(*planes, side=side, side_weight=side_weight))
    for dtype, added in ((torch.float32, None), (torch.bfloat16, bias), (torch.float16, bias), (torch.bfloat16, None)):
        found = library.linear(*planes, added, None, dtype, side, side_weight, instruction_set=forced)
        assert same(found, reference.linear(*planes, added, None, dtype, side, side_weight))
    for dtype in (torch.float16, torch.float32):
        side, side_weight = branch(m, n, width, dtype)
        found = library.linear(*planes, bias, None, torch.float32, side, side_weight, instruction_set=forced)
        assert same(found, reference.linear(*planes, bias, None, torch.float32, side, side_weight))


def test_side_branch_with_extreme_values_views_and_threads(library: Library, forced: int):
    """Products beyond fp32's range are rounded before they are added, everywhere; NaN and Inf pass through."""
    x, w = torch.zeros(4, 30, 64), torch.zeros(80, 64)
    planes = (*portable.quantize(x), *portable.quantize(w))
    rows, columns = 2.0 ** torch.linspace(-72, 66, 30), 2.0 ** torch.linspace(-72, 66, 80)
    side = (make(30, 4, 4, spread=0.0) * rows[:, None, None]).bfloat16().transpose(0, 1)
    side_weight = (make(80, 4, seed=1, spread=0.0) * columns[:, None]).bfloat16().t()
    products = side.float()[..., None] * side_weight.float()
    assert ((products != 0) & (products.abs() < 2.0**-126)).any()
    assert products.isinf().any()
    side[1, 2, 3], side_weight[2, 5] = torch.nan, torch.inf
    expected = reference.linear(*planes, side=side, side_weight=side_weight)
    threads = torch.get_num_threads()
    try:
        for count in (1, 5):
            torch.set_num_threads(count)
            found = library.linear(*planes, side=side, side_weight=side_weight, instruction_set=forced)
            assert same(found, expected)
            few = (planes[0][1, :3], planes[1][1, :3], *planes[2:])
            found = library.linear(*few, side=side[1, :3], side_weight=side_weight, instruction_set=forced)
            assert same(found, expected[1, :3])
    finally:
        torch.set_num_threads(threads)


def test_special_values(library: Library, forced: int):
    x = torch.zeros(8, 128)
    x[0, 3] = torch.nan
    x[1, 70] = -torch.inf
    x[2] = -0.0
    x[3] = -1e-45
    x[4] = 3e38
    x[5, ::2] = -1e-20
    x[6, 1] = 2.0**-126
    x[7] = torch.arange(128) - 64.0
    for value in (x, x.bfloat16(), x.half()):
        check_quantize(library, forced, value)
        check_quantize(library, forced, value, torch.linspace(-1, 1, 128), 32)
    codes, scales = library.quantize(x, None, 0, forced)
    assert scales[0].tolist() == [[255, 0, 0, 0], [0, 0, 0, 0]]
    assert codes[0].sum() == 0
    assert codes[2].sum() == 0  # -0.0 is not below 0
    assert (codes[3] == 0x88).all()  # and the sign of what rounds to 0 is kept


def test_views_and_leading_shapes(library: Library, forced: int):
    x = make(6, 8, 256).transpose(0, 1)[:, ::2, ::2]
    assert not x.is_contiguous()
    check_quantize(library, forced, x, make(256)[::2])
    codes, scales = portable.quantize(make(6, 8, 256))
    w_codes, w_scales = portable.quantize(make(60, 256, seed=1))
    views = (codes.transpose(0, 1), scales.transpose(0, 1), w_codes[::3], w_scales[::3], make(40)[::2])
    expected = reference.linear(*views, None, torch.float32)
    assert same(library.linear(*views, None, torch.float32, instruction_set=forced), expected)
    assert same(
        library.linear(codes[0, 0], scales[0, 0], *views[2:], None, torch.float32, instruction_set=forced),
        expected[0, 0],
    )


def test_threads_change_no_bit(library: Library, forced: int):
    x, w = make(100, 640), make(150, 640, seed=1)
    planes = (*portable.quantize(x), *portable.quantize(w))
    expected, few = reference.linear(*planes), reference.linear(planes[0][:3], planes[1][:3], *planes[2:])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            check_quantize(library, forced, x)
            assert same(library.linear(*planes, instruction_set=forced), expected)
            assert same(library.linear(planes[0][:3], planes[1][:3], *planes[2:], instruction_set=forced), few)
            # Without torch's OpenMP the library makes threads of its own.
            alone = Library(library.path)
            alone.parallel = None
            assert same(alone.linear(*planes, instruction_set=forced), expected)
    finally:
        torch.set_num_threads(threads)


def test_calls_from_several_python_threads(library: Library):
    def once(seed: int) -> None:
        x, w = make(37 + seed, 448, seed=seed), make(70, 448, seed=seed + 1)
        expected = (*portable.quantize(x), *portable.quantize(w))
        product = reference.linear(*expected)
        for _ in range(15):
            found = (*library.quantize(x), *library.quantize(w))
            ok.append(all(map(torch.equal, found, expected)) and same(library.linear(*found), product))

    ok: list[bool] = []
    threads = [threading.Thread(target=once, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ok) == 60
    assert all(ok)


def test_a_set_that_the_processor_lacks_is_refused(library: Library):
    with pytest.raises(Hif4Error, match="has no kernels for 99"):
        library.quantize(torch.ones(64), instruction_set=99)
    planes = portable.quantize(torch.ones(2, 64))
    with pytest.raises(Hif4Error, match="has no kernels for 99"):
        library.linear(*planes, *planes, instruction_set=99)


def test_unfit_arguments_are_refused_as_by_the_portable_ones(library: Library):
    planes = portable.quantize(make(4, 256))
    for arguments in ((make(3, 64).double(),), (make(3, 64), make(65)), (make(3, 64), None, 128), (torch.ones(2, 0),)):
        with pytest.raises(Hif4Error) as found:
            library.quantize(*arguments)
        with pytest.raises(Hif4Error) as expected:
            portable.quantize(*arguments)
        assert str(found.value) == str(expected.value)
    codes, scales = planes
    for bad in (
        (codes, scales[:3], *planes), (codes[:, :64], scales[:, :2], *planes), (codes.int(), scales, *planes),
        (*planes, codes[0], scales[0]), (*planes, codes, scales[:, :3]), (codes[:, :16], scales, codes[:, :16], scales),
        (codes[0, 0], scales, *planes), (*planes, *planes, torch.ones(4, 1)), (*planes, *planes, None, "relu"),
    ):  # fmt: skip
        with pytest.raises(Hif4Error) as found:
            library.linear(*bad)
        with pytest.raises(Hif4Error) as expected:
            reference.linear(*bad)
        assert str(found.value) == str(expected.value)
    with pytest.raises(Hif4Error, match="bias must have shape"):
        library.linear(*planes, *planes, torch.ones(5))
    with pytest.raises(Hif4Error, match="float64"):
        library.linear(*planes, *planes, None, None, torch.float64)
    with pytest.raises(Hif4Error, match="side and side_weight belong together"):
        library.linear(*planes, *planes, side=torch.ones(4, 1).bfloat16())


@pytest.mark.usefixtures("enabled")
def test_the_operators_are_the_native_kernels(monkeypatch: pytest.MonkeyPatch):
    x, w, bias = make(9, 256), make(20, 256, seed=1), make(20, seed=2)
    calls: list[str] = []
    for owner, name in ((RowKernels, "quantize"), (LinearKernel, "linear")):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *a, _name=name, _call=original, **b: (calls.append(_name), _call(*a, **b))[1]
        )
    registry.enable()  # again: nothing changes
    planes = torch.ops.hif4.quantize(x, None, 16)
    weight = torch.ops.hif4.quantize(w, None, 16)
    y = torch.ops.hif4.linear(*planes, *weight, bias.bfloat16())
    assert calls == ["quantize", "quantize", "linear"]
    side, side_weight = branch(9, 20, 3)
    found = torch.ops.hif4.linear(*planes, *weight, None, None, torch.bfloat16, side, side_weight)
    assert same(found, reference.linear(*planes, *weight, None, None, torch.bfloat16, side, side_weight))
    assert calls.pop() == "linear"
    assert all(map(torch.equal, planes, portable.quantize(x, None, 16)))
    assert same(y, reference.linear(*planes, *weight, bias.bfloat16(), None, torch.bfloat16))
    registry.disable()
    registry.disable()
    assert same(torch.ops.hif4.linear(*planes, *weight, bias.bfloat16()), y)
    assert len(calls) == 3
    registry.enable()
    torch.ops.hif4.quantize(x)
    assert len(calls) == 4


def test_a_library_loads_whatever_defaults_the_user_has_set():
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            with torch.device("meta"):
                Library(find_library())
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("enabled")
def test_opcheck_and_export_with_the_native_kernels():
    x, weight, bias = make(2, 5, 200), portable.quantize(make(12, 200, seed=1)), make(12, seed=2)
    planes = portable.quantize(x)
    torch.library.opcheck(torch.ops.hif4.quantize.default, (x.bfloat16(), make(200), 8))
    torch.library.opcheck(torch.ops.hif4.linear.default, (*planes, *weight, bias.bfloat16(), "gelu_tanh"))
    torch.library.opcheck(torch.ops.hif4.linear.default, (*planes, *weight), {"dtype": torch.float16})
    side, side_weight = make(2, 5, 3, seed=3).bfloat16(), make(3, 12, seed=4).bfloat16()
    torch.library.opcheck(torch.ops.hif4.linear.default, (*planes, *weight, bias, None, None, side, side_weight))
