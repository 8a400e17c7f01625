"""The paper's figure (arXiv 2602.11287): squared error on Gaussian data, HiF4 : NVFP4 : MXFP4 = 1 : 1.32 : 1.89."""

import pytest
import torch

from hif4c.runtime.format import dequantize, quantize


def e2m1(x: torch.Tensor) -> torch.Tensor:
    """Nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 (half to even mantissa), saturating; fp64."""
    exponent = torch.floor(torch.log2(x.abs().clamp(min=1.0))).clamp(max=2)
    step = 2.0 ** (exponent - 1)
    return (torch.round(x / step) * step).clamp(-6, 6)


def nvfp4(x: torch.Tensor) -> torch.Tensor:
    """NVIDIA: blocks of 16, E4M3 scale amax/6, under an fp32 per-tensor scale that maps the largest one to 448."""
    blocks = x.view(-1, 16)
    tensor_scale = (x.abs().max() / (6 * 448)).float().double()
    amax = blocks.abs().amax(-1, keepdim=True)
    scale = (amax / 6 / tensor_scale).float().to(torch.float8_e4m3fn).double() * tensor_scale
    return (e2m1(blocks / scale) * scale).view_as(x)


def mxfp4(x: torch.Tensor) -> torch.Tensor:
    """OCP Microscaling 1.0: blocks of 32, E8M0 scale 2^(floor(log2(amax)) - 2), elements saturate."""
    blocks = x.view(-1, 32)
    amax = blocks.abs().amax(-1, keepdim=True)
    scale = 2.0 ** (torch.floor(torch.log2(amax)) - 2)
    return (e2m1(blocks / scale) * scale).view_as(x)


def hif4(x: torch.Tensor) -> torch.Tensor:
    return dequantize(*quantize(x.float()), x.shape[-1], torch.float64)


def errors(sigma: float) -> tuple[float, float, float]:
    x = (torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)) * sigma).double()
    hif, nv, mx = (((f(x) - x) ** 2).mean().item() / sigma**2 for f in (hif4, nvfp4, mxfp4))
    return hif, nv, mx


def test_e2m1_rounds_to_the_nearest_of_its_values():
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    x = torch.linspace(-7, 7, 4001, dtype=torch.float64)
    nearest = (x.abs()[:, None] - values).abs().amin(-1)
    assert torch.equal((e2m1(x) - x).abs(), nearest)


def test_ratio_of_the_paper():
    # A power-of-two scale makes MXFP4's error depend on where sigma lies in its binade: measured, its ratio runs from
    # 1.86 to 2.01. The paper's 1.89 is that of a weight's usual sigma of 0.02 (measured 1 : 1.31 : 1.89).
    hif, nv, mx = errors(0.02)
    assert hif == pytest.approx(0.0069, rel=0.02)
    assert nv / hif == pytest.approx(1.32, rel=0.02)
    assert mx / hif == pytest.approx(1.89, rel=0.02)


@pytest.mark.parametrize("sigma", [1.0, 2**0.25, 2**0.5, 2**0.75])
def test_the_order_holds_wherever_sigma_lies(sigma: float):
    hif, nv, mx = errors(sigma)
    assert 1.29 < nv / hif < 1.35
    assert 1.82 < mx / hif < 2.05
