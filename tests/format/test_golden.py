"""Every golden set, bit for bit: outputs of the format's official simulator (global-computing-consortium/HiFloat4)."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hif4c.runtime.format import dequantize, quantize

GOLDEN = Path(__file__).parents[1] / "data" / "hif4_golden.safetensors"


def names() -> list[str]:
    with safe_open(GOLDEN, "pt") as file:
        return sorted(key.removesuffix(".x") for key in file.keys() if key.endswith(".x"))  # noqa: SIM118


def load(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    with safe_open(GOLDEN, "pt") as file:
        return file.get_tensor(f"{name}.x"), file.get_tensor(f"{name}.y")


def test_all_sets_are_there():
    sets = {name.split(".")[0] for name in names()}
    assert {"gauss", "tiny", "subnormal", "huge", "ties", "zeros", "tail200", "wide"} <= sets
    assert len(names()) == 23


@pytest.mark.parametrize("name", names())
def test_quantize_then_dequantize_gives_the_simulators_bits(name: str):
    x, y = load(name)
    got = dequantize(*quantize(x), x.shape[-1])
    assert got.dtype == y.dtype == torch.bfloat16
    # Bit patterns, as -0.0 == 0.0 would hide a lost sign.
    assert (got.view(torch.int16) != y.view(torch.int16)).sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_outputs_hold_the_same_values(dtype: torch.dtype):
    x, y = load("wide.f32")
    assert torch.equal(dequantize(*quantize(x), x.shape[-1], dtype), y.to(dtype))
