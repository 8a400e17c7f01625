"""Linears with made-up weights and inputs whose maxima are those published of Wan2.2's activations.

Published per-tensor maxima (A14B I2V, medians over blocks): attn1 q/k/v 9.9; attn1 out 8.9; attn2 q 53.5, one massive
channel through an affine LayerNorm, the same for every token; attn2 out 1.2 with rare calls at 4 to 16 times that;
ffn.0 5.2 with spikes to 13.7; ffn.2 reads GELU(tanh): never below -0.17, a heavy positive tail.

Nothing else is known of the real inputs: correlations, means and sizes of the channels are invented, and so are the
weights, which have none of a trained weight's structure but rows of different sizes.
"""

import math

import torch
import torch.nn.functional as F

__all__ = ["KINDS", "synthetic_layer"]

KINDS = ("attn1.q", "attn1.out", "attn2.q", "attn2.out", "ffn.0", "ffn.2")
_CALL = 16  # tokens that share the size of a call of attn2.out


def synthetic_layer(
    kind: str, tokens: int, width: int, out_features: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """An input x bf16 [tokens, width] and a weight bf16 [out_features, width] of one kind of KINDS.

    The seed fixes everything. Tokens are exchangeable (those of attn2.out in calls of 16), so that any of them can be
    held out; their maxima are set over all of them. Channels are correlated: a quarter as many factors as channels
    (512 at most), the i-th of size i^-1/2, carry two thirds of the variance.
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + KINDS.index(kind))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    # Rows of different sizes, each Gaussian.
    weight = normal(out_features, width) * (0.25 * normal(out_features, 1)).exp() / math.sqrt(width)
    factors = min(width // 4, 512)
    spectrum = torch.arange(1, factors + 1).rsqrt()
    mixing = normal(factors, width) * (spectrum / spectrum.norm())[:, None]
    hidden = normal(tokens, factors) @ mixing * math.sqrt(2 / 3) + normal(tokens, width) * math.sqrt(1 / 3)
    return _INPUTS[kind](hidden, generator).to(torch.bfloat16), weight.to(torch.bfloat16)


def _attn1_q(hidden: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return _modulated_norm(hidden, generator, 9.9)


def _attn1_out(hidden: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return _averaged_values(hidden, generator, 8.9)


def _attn2_q(hidden: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    tokens, width = hidden.shape
    # At width 5120 a normalized channel of 53.5 leaves the others a variance of 1 - 53.5^2/5120.
    x = F.layer_norm(hidden, (width,)) * math.sqrt(1 - 53.5**2 / 5120)
    x[:, width // 3] = 53.5 * (1 - 0.01 * torch.rand(tokens, generator=generator))
    return x


def _attn2_out(hidden: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    tokens = len(hidden)
    x = _averaged_values(hidden, generator, 1.2)
    calls = -(-tokens // _CALL)
    size = torch.ones(calls)
    rare = slice(int(torch.randint(min(calls, 32), (1,), generator=generator)), None, 32)
    size[rare] = 4 + 12 * torch.rand(size[rare].shape, generator=generator)
    return x * size.repeat_interleave(_CALL)[:tokens, None]


def _ffn_0(hidden: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    tokens, width = hidden.shape
    x = _modulated_norm(hidden, generator, 5.2)
    spiking = torch.randint(tokens, (max(1, tokens // 256),), generator=generator)
    channels = torch.randint(width, (4,), generator=generator)
    sizes = 13.7 * (1 - 0.4 * torch.rand(len(spiking), 4, generator=generator))
    x[spiking[:, None], channels] = sizes * x[spiking[:, None], channels].sign()
    return x


def _ffn_2(hidden: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    tokens, width = hidden.shape
    channels = (0.4 * torch.randn(width, generator=generator)).exp()
    tail = (0.4 * torch.randn(tokens, width, generator=generator)).exp()
    return F.gelu(hidden * channels * tail - 0.5, approximate="tanh")


def _averaged_values(hidden: torch.Tensor, generator: torch.Generator, largest: float) -> torch.Tensor:
    """What an attention gives: channels of different sizes, with `largest` as the maximum."""
    x = hidden * (0.5 * torch.randn(hidden.shape[1], generator=generator)).exp()
    return x * (largest / x.abs().max())


def _modulated_norm(hidden: torch.Tensor, generator: torch.Generator, largest: float) -> torch.Tensor:
    """LayerNorm of channels of different sizes, times 1 + scale, plus shift, with `largest` as its maximum."""
    width = hidden.shape[1]
    sizes = (0.5 * torch.randn(width, generator=generator)).exp()
    scale, shift = 0.5 * torch.randn(2, width, generator=generator)
    x = F.layer_norm(hidden * sizes, (width,)) * (1 + scale) + 0.6 * shift
    return x * (largest / x.abs().max())


_INPUTS = {
    "attn1.q": _attn1_q,
    "attn1.out": _attn1_out,
    "attn2.q": _attn2_q,
    "attn2.out": _attn2_out,
    "ffn.0": _ffn_0,
    "ffn.2": _ffn_2,
}
