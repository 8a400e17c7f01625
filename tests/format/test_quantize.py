"""Shapes, strides, dtypes, tails, non-finite numbers and errors of the format's functions."""

import pytest
import torch

from hif4c.runtime import format as hif4_format
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import check_planes, dequantize, in_unit_integers, packed_shapes, quantize, unit_scales


def gauss(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("shape", [(64,), (200,), (3, 128), (2, 3, 5, 65), (0, 128), (2, 0, 70), (4, 1)])
def test_leading_shapes(shape: tuple[int, ...]):
    x = gauss(*shape)
    codes, scales = quantize(x)
    assert (codes.shape, scales.shape) == packed_shapes(shape)
    assert codes.dtype == scales.dtype == torch.uint8
    y = dequantize(codes, scales, shape[-1])
    assert y.shape == x.shape
    rows = quantize(x.reshape(-1, shape[-1]))
    assert same((codes.reshape(rows[0].shape), scales.reshape(rows[1].shape)), rows)


@pytest.mark.parametrize("k", [1, 63, 64, 65, 130, 200])
def test_a_tail_is_padded_with_zeros(k: int):
    x = gauss(5, k)
    padded = torch.nn.functional.pad(x, (0, -k % 64))
    planes = quantize(x)
    assert same(planes, quantize(padded))
    assert torch.equal(dequantize(*planes, k), dequantize(*planes, padded.shape[1])[:, :k])


def test_strides_do_not_matter():
    x = gauss(6, 256)
    for view in (x.t().contiguous().t(), gauss(6, 512)[:, ::2], x[:, :200], x[::2], x[:1].expand(4, 256)):
        assert same(quantize(view), quantize(view.contiguous()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_first(dtype: torch.dtype):
    x = gauss(4, 192).to(dtype)
    assert same(quantize(x), quantize(x.float()))


def test_a_mask_multiplies_in_fp32():
    x, mask = gauss(4, 192).bfloat16(), gauss(192, seed=1).abs()
    assert same(quantize(x, mask), quantize(x.float() * mask))
    assert same(quantize(x, mask.bfloat16()), quantize(x.float() * mask.bfloat16().float()))
    assert not same(quantize(x, mask), quantize((x * mask.bfloat16()).float()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), -float("nan")])
def test_a_unit_with_nan_or_inf_is_nan_and_canonical(bad: float):
    x = gauss(2, 192)
    clean = quantize(x)
    x[1, 100] = bad
    codes, scales = quantize(x)
    assert scales[1, 1].tolist() == [0xFF, 0, 0, 0]
    assert codes[1, 32:64].sum() == 0
    y = dequantize(codes, scales, 192, torch.float32)
    assert y[1, 64:128].isnan().all()
    assert unit_scales(scales).isnan().tolist() == [[False] * 3, [False, True, False]]
    # Nothing else may change.
    codes[1, 32:64], scales[1, 1] = clean[0][1, 32:64], clean[1][1, 1]
    assert same((codes, scales), clean)


def test_the_product_with_a_mask_may_overflow_to_nan():
    _, scales = quantize(torch.full((64,), 3e38), torch.full((64,), 4.0))
    assert scales[0, 0] == 0xFF


def test_the_sign_of_what_rounds_to_zero():
    x = torch.tensor([7.0, -1e-6, 1e-6, -0.0] + [0.0] * 60)
    codes, scales = quantize(x)
    assert codes[:2].tolist() == [7 | 8 << 4, 0]
    assert torch.signbit(dequantize(codes, scales, 64)).tolist()[:4] == [False, True, False, False]
    assert in_unit_integers(codes, scales)[0, 1] == 0


def test_fp16_overflows_as_documented():
    codes, scales = quantize(torch.full((64,), 1e5))
    assert dequantize(codes, scales, 64, torch.float16).isinf().all()
    assert dequantize(codes, scales, 64, torch.float32).isfinite().all()


@pytest.mark.parametrize("hadamard", [0, 32])
def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch, hadamard: int):
    x, mask = gauss(37, 160), gauss(160, seed=2)
    planes = quantize(x, mask, hadamard)
    y = dequantize(*planes, 160)
    for block in (1, 5 * 192, 36 * 192):
        monkeypatch.setattr(hif4_format, "_BLOCK_CPU", block)
        assert same(quantize(x, mask, hadamard), planes)
        assert torch.equal(dequantize(*planes, 160), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64])
def test_other_input_dtypes_are_refused(dtype: torch.dtype):
    with pytest.raises(Hif4Error, match=str(dtype).removeprefix("torch.")):
        quantize(torch.zeros(2, 64, dtype=dtype))


def test_unfit_inputs_are_refused():
    x = gauss(2, 192)
    with pytest.raises(Hif4Error, match="scalar"):
        quantize(torch.tensor(1.0))
    with pytest.raises(Hif4Error, match="at least one channel"):
        quantize(torch.zeros(3, 0))
    with pytest.raises(Hif4Error, match=r"\[192\]"):
        quantize(x, torch.ones(191))
    with pytest.raises(Hif4Error, match=r"\[192\]"):
        quantize(x, torch.ones(1, 192))
    with pytest.raises(Hif4Error, match="floating point"):
        quantize(x, torch.ones(192, dtype=torch.int64))
    with pytest.raises(Hif4Error, match="does not divide"):
        quantize(x, hadamard=128)
    with pytest.raises(Hif4Error, match="power of two"):
        quantize(x, hadamard=3)


def test_unfit_planes_are_refused():
    codes, scales = quantize(gauss(2, 192))
    for k in (0, 128, 193):
        with pytest.raises(Hif4Error, match=f"K = {k}"):
            dequantize(codes, scales, k)
    with pytest.raises(Hif4Error, match="uint8"):
        dequantize(codes.int(), scales, 192)
    with pytest.raises(Hif4Error, match="uint8"):
        in_unit_integers(codes, scales.to(torch.int8))
    with pytest.raises(Hif4Error, match="whole units"):
        dequantize(codes[:, :-1], scales, 192)
    with pytest.raises(Hif4Error, match=r"need scales of shape \[2, 3, 4\]"):
        dequantize(codes, scales[:, :2], 192)
    with pytest.raises(Hif4Error, match="need scales"):
        in_unit_integers(codes, scales[:1])
    with pytest.raises(Hif4Error, match="int32"):
        dequantize(codes, scales, 192, torch.int32)
    with pytest.raises(Hif4Error, match=r"^blocks\.0\.attn1\.to_q"):
        check_planes(codes, scales, 500, what="blocks.0.attn1.to_q")
    with pytest.raises(Hif4Error, match="scalar"):
        packed_shapes(())
