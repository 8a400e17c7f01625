"""Norm, rotary embedding and attention against the operators of the traced model that they stand for."""

import pytest
import torch
import torch.nn.functional as F

from hif4c.runtime import rows
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import quantize


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens", [1, 7])
def test_norm_is_the_adaptive_norm_of_the_model(tokens: int):
    x, scale, shift = normal(2, 7, 96).bfloat16(), normal(2, tokens, 96, seed=1), normal(2, tokens, 96, seed=2)
    y = (F.layer_norm(x.float(), [96], None, None, 1e-6) * (1 + scale) + shift).to(torch.bfloat16)
    assert torch.equal(rows.norm(x, None, None, scale, shift, 1e-6, torch.bfloat16), y)
    planes = rows.norm_quantize(x, None, None, scale, shift, 1e-6, torch.bfloat16, scale[0, 0], 32)
    assert all(map(torch.equal, planes, quantize(y, scale[0, 0], 32)))


def test_norm_with_weight_and_bias():
    x, weight, bias = 100 + normal(2, 7, 96).bfloat16(), normal(96, seed=1), normal(96, seed=2)
    y = F.layer_norm(x.float(), [96], weight, bias, 1e-6)
    assert torch.equal(rows.norm(x, weight, bias, None, None, 1e-6, torch.float32), y)


def test_rms_rotary_is_norm_and_embedding_of_the_model():
    x, weight = normal(2, 5, 48).bfloat16(), normal(48, seed=1).bfloat16()
    angle = normal(1, 5, 1, 8, seed=2)
    cos, sin = angle.cos(), angle.sin()
    y = F.rms_norm(x, [48], weight, 1e-6).unflatten(2, (3, -1))
    first, second = y[..., 0::2], y[..., 1::2]
    expected = torch.empty_like(y)
    expected[..., 0::2] = first * cos - second * sin
    expected[..., 1::2] = first * sin + second * cos
    assert torch.equal(rows.rms_rotary(x, weight, 1e-6, 3, cos, sin), expected)
    assert torch.equal(rows.rms_rotary(x, weight, 1e-6, 3), y)


def test_attention_is_that_of_torch():
    q, k, v = (normal(2, n, 3, 16, seed=n).transpose(1, 2) for n in (5, 7, 7))
    assert torch.equal(rows.attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_what_does_not_fit_is_refused():
    x = normal(2, 5, 48)
    for wrong in (
        lambda: rows.norm(x, x[0, 0, :3], None, None, None, 1e-6, torch.float32),
        lambda: rows.norm(x, None, None, x, None, 1e-6, torch.float32),
        lambda: rows.norm(x, None, None, x[:, :2], x[:, :2], 1e-6, torch.float32),
        lambda: rows.norm(x.int(), None, None, None, None, 1e-6, torch.float32),
        lambda: rows.rms_rotary(x, x[0, 0], 1e-6, 5),
        lambda: rows.rms_rotary(x, x[0, 0], 1e-6, 3, x),
        lambda: rows.rms_rotary(x, x[0, 0], 1e-6, 3, normal(1, 4, 1, 8), normal(1, 4, 1, 8)),
        lambda: rows.attention(x[None], x[None], x[None, :, :, :3]),
        lambda: rows.attention(x[None], x[None].bfloat16(), x[None]),
    ):
        with pytest.raises(Hif4Error):
            wrong()
