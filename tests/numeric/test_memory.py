"""No temporary grows with the tensor: a weight is never widened as a whole, neither when packed nor when multiplied."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hif4c.runtime.format import dequantize, quantize
from hif4c.runtime.reference import linear, linear_w4

N, K = 4096, 1024
FP32_WEIGHT = 4 * N * K


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.nbytes = max(self.nbytes, t.nbytes)
        return out


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many small operations: on a busy machine the threads' meetings would cost more than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_packing_and_decoding_go_by_blocks_of_rows(weight: torch.Tensor):
    with Largest() as seen:
        planes = quantize(weight, torch.ones(K), 64)
    assert seen.nbytes <= FP32_WEIGHT // 2  # the bf16 weight itself
    with Largest() as seen:
        dequantize(*planes, K)
    assert seen.nbytes <= FP32_WEIGHT // 2


def test_linears_decode_the_weight_by_blocks_of_rows(weight: torch.Tensor):
    planes = quantize(weight)
    x = weight[:3].float()
    with Largest() as seen:
        linear(*quantize(x), *planes)
    assert seen.nbytes <= FP32_WEIGHT // 2
    side = {"side": torch.ones(3, 40).bfloat16(), "side_weight": torch.ones(40, N).bfloat16()}
    with Largest() as seen:
        linear(*quantize(x), *planes, **side)
    assert seen.nbytes <= FP32_WEIGHT // 2
    with Largest() as seen:
        linear_w4(x, *planes)
    assert seen.nbytes <= FP32_WEIGHT // 2
