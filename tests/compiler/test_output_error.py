import pytest
import torch

from hif4c.compiler.output_error import error_energy
from hif4c.runtime.format import dequantize, quantize


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_energies_are_those_of_the_outputs(dtype: torch.dtype):
    # More rows and columns than are worked on at once, neither a multiple.
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(300, 1216, generator=g).double(), torch.randn(1100, 1216, generator=g)
    planes = quantize(weight)
    noise = error_energy(weight, planes, (x.T @ x).to(dtype))
    error = weight.double() - dequantize(*planes, 1216, torch.float64)
    assert noise.dtype == torch.float64
    # Sums of 1216 fp32 products, twice.
    torch.testing.assert_close(noise, (x @ error.T).square().sum(0), rtol=1e-5, atol=0)
