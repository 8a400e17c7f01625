"""Native attention against attention in fp64 on the same bf16 numbers, and against torch's own in bf16."""

import ctypes
import math
import threading
from collections.abc import Iterator

import pytest
import torch

from hif4c.runtime import rows
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.native import registry
from hif4c.runtime.native.attention_bindings import NativeAttention
from hif4c.runtime.native.bindings import Library
from hif4c.runtime.native.build import find_compiler, find_library

try:
    find_compiler()
except Hif4Error as error:
    pytest.skip(f"native kernels cannot be built: {error}", allow_module_level=True)

AVX512 = 2  # its number; asked for by it, the kernels also run where the best for attention is AMX
HALF_UNIT = 2.0**-8  # of bf16, relative
SHAPES = [  # B, H, T, S, D
    (1, 1, 1, 1, 32),
    (1, 2, 1, 300, 64),
    (2, 3, 13, 1, 96),
    (1, 2, 25, 33, 128),
    (1, 1, 12, 256, 256),
    (1, 1, 97, 257, 160),
    (1, 1, 5, 1031, 224),
    (1, 2, 60, 512, 128),
]


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(find_library())


@pytest.fixture
def native(library: Library) -> NativeAttention:
    found = NativeAttention(library, AVX512)
    if not found.available:
        pytest.skip("this processor has no AVX-512 with BF16")
    return found


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of torch's threads is put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(b: int, h: int, t: int, s: int, d: int, seed: int = 0, scale: float = 1.0) -> list[torch.Tensor]:
    """q, k, v as a model has them: permuted views of [B, T, H, D]; `scale` widens the logits. v has a mean."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, n, h, d, generator=generator) for n in (t, s, s))
    return [x.bfloat16().transpose(1, 2) for x in (scale * q, k, v + 0.5)]


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in fp64, and how far from it the kernel may be.

    The kernel rounds each weight to bf16 after an exp2 with a relative error of 3e-6, of a logit summed in fp32; as it
    divides by the sum of the rounded, an error e of a weight w moves the result by w * e * (value - result), to the
    first order. The products with the values are summed in fp32 and the result is rounded to bf16.
    """
    q, k, v = q.double(), k.double(), v.double()
    s, d = k.shape[-2:]
    scale = d**-0.5
    weights = (q @ k.mT * scale).softmax(-1)
    y = weights @ v
    logit_error = d * 2.0**-24 * scale * (q.abs() @ k.abs().mT)
    relative = HALF_UNIT + 3e-6 + 2 * logit_error  # twice: the largest, which is subtracted, has one too
    moved = torch.stack([((weights * relative)[..., i, :, None] * (v - y[..., i, None, :]).abs()).sum(-2)
                         for i in range(q.shape[-2])], -2)  # fmt: skip
    sums = s * 2.0**-23 * (weights @ v.abs())
    first_order = 1.1  # the largest relative error is below 0.05
    return y, first_order * (moved + sums + HALF_UNIT * y.abs()) + 2.0**-126


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_close_to_fp64(native: NativeAttention, shape: tuple[int, ...], scale: float):
    q, k, v = make(*shape, scale=scale)
    assert native.covers(q, k, v)
    y, allowed = exact(q, k, v)
    found = native.attention(q, k, v)
    assert found.dtype == torch.bfloat16
    assert found.shape == q.shape
    assert found.transpose(1, 2).is_contiguous()
    assert ((found - y).abs() <= allowed).all()


@pytest.mark.parametrize("shape", [(1, 2, 60, 512, 128), (1, 4, 156, 700, 64), (2, 4, 300, 32, 32)], ids=str)
def test_no_further_from_fp64_than_torch(native: NativeAttention, shape: tuple[int, ...]):
    """Both round the weights and the result; what chance does to the sums of 15,000 squared errors is below 2 %."""
    q, k, v = make(*shape)
    y = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    ours, torchs = ((f(q, k, v) - y).norm() for f in (native.attention, rows.attention))
    assert ours <= 1.02 * torchs


def test_weights_add_up_to_one(native: NativeAttention):
    """A value that is every key's comes back as it is, also where all roundings of the weights go one way.

    Beside the largest weight, 1, all are 0.5 and 0.8 of half a unit: rounded to 0.5. Divided by the sum of the weights
    before their rounding, the result would be low by 0.8 * 2^-8 of it, more than half a unit of 1.75: 2^-8 / 1.75.
    """
    q, k, v = (torch.zeros(1, 1, n, 64) for n in (20, 531, 531))
    q[..., :2] = 1
    k[..., 1:, 0] = -5.5
    k[..., 1:, 1] = 8 * math.log(0.5 * (1 + 0.8 * HALF_UNIT)) + 5.5
    v[:] = 1.75
    q, k, v = (x.bfloat16() for x in (q, k, v))
    assert torch.equal(native.attention(q, k, v), v[:, :, :20])


def test_any_strides(native: NativeAttention):
    q, k, v = make(2, 3, 29, 70, 64)
    expected = native.attention(q, k, v)
    assert torch.equal(native.attention(*(x.contiguous() for x in (q, k, v))), expected)
    apart = [x.mT.contiguous().mT for x in (q, k, v)]
    assert all(x.stride(-1) != 1 for x in apart)
    assert torch.equal(native.attention(*apart), expected)
    joined = torch.cat([x.transpose(1, 2).flatten(2) for x in (k, v)], -1)  # odd addresses too
    parts = torch.cat([joined[..., :1], joined], -1)[..., 1:].unflatten(-1, (6, 64)).transpose(1, 2)
    assert torch.equal(native.attention(q, parts[:, :3], parts[:, 3:]), expected)
    shared = [x[:, :1].expand(-1, 3, -1, -1) for x in (k, v)]
    assert torch.equal(native.attention(q, *shared), native.attention(q, *(x.contiguous() for x in shared)))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", [(1, 2, 200, 300, 32), (2, 6, 20, 1024, 256)], ids=str)  # the second: heads in turns
def test_same_bits_whatever_the_threads(native: NativeAttention, shape: tuple[int, ...]):
    q, k, v = make(*shape)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(native.attention(q, k, v))
    alone = torch.cat([native.attention(*(x[:, h : h + 1] for x in (q, k, v))) for h in range(shape[1])], 1)
    assert all(torch.equal(y, found[0]) for y in (*found, alone))


def test_callers_do_not_disturb_each_other(native: NativeAttention):
    inputs = [make(1, 2, 50 + i, 300, 64, seed=i) for i in range(4)]
    expected = [native.attention(*x) for x in inputs]
    found: list[list[torch.Tensor]] = [[] for _ in inputs]

    def work(i: int) -> None:
        found[i].extend(native.attention(*inputs[i]) for _ in range(10))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for results, y in zip(found, expected, strict=True):
        assert len(results) == 10
        assert all(torch.equal(result, y) for result in results)


def test_large_logits(native: NativeAttention):
    """Where logits are 2^60 and more apart a query takes the value of one key, and nothing overflows."""
    q, k, v = make(1, 2, 30, 300, 64)
    q, k = q * 2.0**40, k * 2.0**40
    largest = (q.double() @ k.double().mT).argmax(-1)
    expected = v.gather(2, largest[..., None].expand(-1, -1, -1, 64))
    assert torch.equal(native.attention(q, k, v), expected)


def test_keys_beyond_the_last_do_not_count(native: NativeAttention):
    """Their logits would be 0, far above these."""
    q, k, v = make(1, 1, 5, 35, 64)
    q, k = 30 * q.abs(), -30 * k.abs()
    y, allowed = exact(q, k, v)
    assert ((native.attention(q, k, v) - y).abs() <= allowed).all()


def test_not_finite_as_torch(native: NativeAttention):
    def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found, expected = native.attention(q, k, v), rows.attention(q, k, v)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.isinf(), expected.isinf())
        rest = expected.isfinite()
        torch.testing.assert_close(found[rest], expected[rest], rtol=4 * HALF_UNIT, atol=4 * HALF_UNIT)
        return found

    for place, value in (("q", torch.nan), ("k", torch.nan), ("v", torch.nan), ("v", torch.inf), ("v", -torch.inf)):
        q, k, v = (x.contiguous() for x in make(1, 2, 20, 290, 64))
        {"q": q, "k": k, "v": v}[place][0, 1, 7, 3] = value
        assert not check(q, k, v).isfinite().all()
    q, k, v = (x.contiguous() for x in make(1, 1, 20, 290, 64))
    q, k = q.abs(), k.abs()
    q[0, 0, 4] = torch.inf  # every logit inf: inf - inf
    assert check(q, k, v)[0, 0, 4].isnan().all()
    assert (check(q, -k, v)[0, 0, 4] == 0).all()  # every logit -inf: torch takes 0
    k[0, 0, 280] *= -1  # one of them -inf
    q[0, 0, 4] = 2.0**120
    k[0, 0, 280] *= 2.0**100
    assert check(q, k, v).isfinite().all()


def test_error_of_the_powers(native: NativeAttention, library: Library):
    """The relative error that the source states, over the range of normal results; exact at both ends."""
    x = torch.cat([-torch.logspace(-30, math.log2(126), 200_003, base=2.0), -torch.linspace(0, 1, 300_007)])
    ends = torch.tensor([0.0, -torch.inf, -1e30, torch.nan])
    x = torch.cat([x, ends])
    y = torch.empty_like(x)
    function = library.functions.hif4_attention_exp2
    function.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int)
    assert function(x.data_ptr(), x.numel(), y.data_ptr(), AVX512) == 0
    assert y[-4:-1].tolist() == [1, 0, 0]
    assert y[-1].isnan()
    relative = (y[:-4].double() / x[:-4].double().exp2() - 1).abs()
    assert relative.max() < 3e-6


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 2, 9, 20, 40), torch.bfloat16),
        ((1, 2, 9, 20, 288), torch.bfloat16),
        ((1, 2, 9, 20, 64), torch.float32),
        ((1, 2, 9, 20, 64), torch.float16),
        ((1, 2, 0, 20, 64), torch.bfloat16),
        ((0, 2, 9, 20, 64), torch.bfloat16),
    ],
    ids=str,
)
def test_what_is_not_covered_is_torchs(library: Library, shape: tuple[int, ...], dtype: torch.dtype):
    native = NativeAttention(library)
    q, k, v = (x.to(dtype) for x in make(*shape))
    assert not native.covers(q, k, v)
    assert torch.equal(native.attention(q, k, v), rows.attention(q, k, v))


def test_other_instruction_sets_leave_it_to_torch(library: Library):
    q, k, v = make(1, 2, 9, 20, 64)
    for number in (0, 1):
        native = NativeAttention(library, number)
        assert not native.available
        assert torch.equal(native.attention(q, k, v), rows.attention(q, k, v))
        native.available = True  # and the library itself refuses
        with pytest.raises(Hif4Error, match="no kernels for"):
            native.attention(q, k, v)


def test_tensors_that_do_not_fit(native: NativeAttention):
    q, k, v = make(1, 2, 9, 20, 64)
    with pytest.raises(Hif4Error, match="do not fit"):
        native.attention(q, k, v[:, :, :19])
    with pytest.raises(Hif4Error, match="do not fit"):
        native.attention(q[..., :32], k, v)


def test_a_library_that_computes_something_else_is_noticed(native: NativeAttention):
    assert native.agrees()
    compute = native._attention

    def wrong(*arguments: int) -> int:
        status = compute(*arguments)
        ctypes.memset(arguments[3], 0, 2 * 64)  # the first query's result of a head
        return status

    native._attention = wrong
    assert not native.agrees()


def test_the_operator_runs_it(library: Library, native: NativeAttention):
    if not NativeAttention(library).available:
        pytest.skip("this processor has AMX, which torch uses")
    q, k, v = make(1, 2, 50, 300, 64)
    expected = native.attention(q, k, v)
    assert not torch.equal(expected, rows.attention(q, k, v))  # roundings differ somewhere
    before = registry.is_enabled()
    registry.enable()
    try:
        assert torch.equal(torch.ops.hif4.attention(q, k, v), expected)
    finally:
        if not before:
            registry.disable()
