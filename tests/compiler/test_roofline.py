"""The paper model of GPUs, by arithmetic that can be done by hand."""

import pytest

from hif4c.compiler.models import load_builtin
from hif4c.compiler.roofline import GPUS, LOOPS, Gpu, model_block, model_linear
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.kernel_files import GPU_TARGETS

BY_NAME = {gpu.name: gpu for gpu in GPUS}
A14B = next(iter(load_builtin("Wan2.2-T2V-A14B").experts.values()))


@pytest.mark.parametrize(
    ("name", "bf16", "int8"),
    # Dense peaks of the data sheets, in 10^12 operations a second.
    [
        ("A100 SXM 80 GB", 312, 624), ("RTX 4090", 165.2, 660.6), ("RTX 5090", 209.5, 838),
        ("H100 SXM", 989.4, 1979), ("B200", 2250, 4500), ("MI300X", 1307.4, 2614.9),
    ],
)  # fmt: skip
def test_rates_are_those_of_the_data_sheets(name: str, bf16: float, int8: float) -> None:
    gpu = BY_NAME[name]
    assert gpu.peak_bf16 == pytest.approx(bf16 * 1e12, rel=3e-3)
    assert gpu.peak_bf16 * gpu.int8 / gpu.bf16 == pytest.approx(int8 * 1e12, rel=3e-3)


def test_every_target_is_modelled() -> None:
    assert sorted(gpu.target for gpu in GPUS) == sorted(GPU_TARGETS) == sorted(LOOPS)


def test_clocks_of_a_turn() -> None:
    (loop,) = LOOPS["cuda-sm80"]
    matrix, issue, vector = loop.clocks(BY_NAME["A100 SXM 80 GB"])
    assert matrix == 128 * 128 * 64 / 2048  # multiply-accumulates over those of a clock
    assert issue == loop.instructions * 8 / 4  # warps, schedulers
    assert vector == loop.vector * 8 * 32 / 64  # warps, threads, lanes


def test_a_linear_by_hand() -> None:
    gpu = BY_NAME["A100 SXM 80 GB"]
    found = model_linear(gpu, 32760, 5120, 5120)
    rounds = -(-256 * 40 // 108)  # tiles of 128 x 128 over multiprocessors
    assert found.bound == pytest.approx(rounds * 80 * 544 / 1.41e9)  # 80 units; the fp32 pipe is the longest
    assert found.serial == pytest.approx(rounds * 80 * (512 + 544) / 1.41e9)
    assert found.bf16 == pytest.approx(2 * 32760 * 5120**2 / (0.85 * gpu.peak_bf16))
    assert found.quantize == pytest.approx(32760 * 5120 * (2 + 0.5625) / 2.039e12)
    expanded = 0.5625 + 1 + 4 / 64  # planes read, int8 and a scale a unit written
    assert found.expand == pytest.approx((32760 + 5120) * 5120 * expanded / 2.039e12)
    assert model_linear(gpu, 32760, 5120, 5120, quantized=False).quantize == 0


@pytest.mark.parametrize("name", ["H100 SXM", "B200"])
def test_a_bf16_kernel_is_not_faster_than_the_library(name: str) -> None:
    found = model_linear(BY_NAME[name], 32760, 5120, 5120)
    assert found.bf16 <= found.bound <= found.serial


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.target)
def test_a_block_of_a14b(gpu: Gpu) -> None:
    block = model_block(gpu, A14B, 32760)
    # 19.6 and 22 (with the text, 22.3) times 10^12 operations, text keys and values aside.
    rate = gpu.peak_bf16 * gpu.efficiency
    assert block.bf16 * rate == pytest.approx(19.6e12, rel=0.01)
    assert block.attention * rate == pytest.approx(22.3e12, rel=0.01)
    assert len(block.linears) == 10
    assert sum(item.quantize > 0 for item in block.linears) == 7  # q, k and v share one input; k and v of the text too
    slow, fast = (block.speedup(serial=serial, block=False) for serial in (True, False))
    whole = block.speedup(serial=False, block=True)
    assert slow <= fast
    assert min(1, fast) <= whole <= max(1, fast)  # attention is the same on both sides
    longer = model_block(gpu, A14B, 75600)
    assert abs(longer.speedup(serial=False, block=True) - 1) < abs(whole - 1)


def test_no_tokens_are_refused() -> None:
    with pytest.raises(Hif4Error, match="at least one"):
        model_block(GPUS[0], A14B, 0)
