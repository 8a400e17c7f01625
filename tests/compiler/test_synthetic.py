import pytest
import torch

from hif4c.compiler.synthetic import KINDS, synthetic_layer

PEAKS = {
    "attn1.q": (9.8, 9.95),
    "attn1.out": (8.8, 8.95),
    "attn2.q": (52.9, 53.6),
    "attn2.out": (3.5, 19.3),
    "ffn.0": (8.2, 13.8),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1024, 5120])  # tokens: 32 calls of attn2.out
def test_statistics_of_the_kind(kind: str, width: int):
    x, weight = synthetic_layer(kind, 512, width, 32, seed=0)
    assert x.dtype == weight.dtype == torch.bfloat16
    assert x.shape == (512, width)
    assert weight.shape == (32, width)
    x = x.float()
    if kind in PEAKS:
        low, high = PEAKS[kind]
        assert low < x.abs().max() < high
    channels, tokens = x.abs().amax(0), x.abs().amax(1)
    if kind == "attn2.q":
        massive = channels.argmax()
        assert (channels > 10).sum() == 1
        assert x[:, massive].std() / x[:, massive].mean() < 0.01
    if kind == "attn2.out":
        calls = tokens.view(-1, 16).amax(1)
        assert (calls > 2 * calls.median()).float().mean() == 1 / 32
        assert calls.sort().values[-2] < 1.21
    if kind == "ffn.0":
        assert 1 <= (tokens > 7).sum() <= 2
        assert (channels > 7).sum() == 4
    if kind == "ffn.2":
        assert -0.171 < x.min() < -0.169  # the minimum of GELU(tanh) is -0.17004
        assert x.max() > 20 * x.std()


@pytest.mark.parametrize("kind", KINDS)
def test_channels_are_correlated_and_the_seed_fixes_everything(kind: str):
    x, weight = synthetic_layer(kind, 1024, 256, 8, seed=0)
    again, same_weight = synthetic_layer(kind, 1024, 256, 8, seed=0)
    other, _ = synthetic_layer(kind, 1024, 256, 8, seed=1)
    assert torch.equal(x, again)
    assert torch.equal(weight, same_weight)
    assert not torch.equal(x, other)
    # Independent channels would leave correlations of 1/sqrt(1024).
    correlation = torch.corrcoef(x.float().T)
    assert correlation.fill_diagonal_(0).square().mean().sqrt() > 2 / 1024**0.5
