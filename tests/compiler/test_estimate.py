import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hif4c.compiler import machine_rates as rates_module
from hif4c.compiler.calibrate import find_groups, plan_program
from hif4c.compiler.estimate import (
    CalibrationLoad,
    Workload,
    calibration_disk,
    calibration_memory,
    compile_memory,
    estimate_calibration,
    estimate_compile,
    forward_operations,
    groups,
    latent_tokens,
)
from hif4c.compiler.locate import describe_model
from hif4c.compiler.machine_rates import MachineRates, measure_rates
from hif4c.compiler.models import WanConfig
from hif4c.compiler.plan import make_plan
from hif4c.compiler.recipe import Recipe, load_recipe
from hif4c.compiler.sketch import ChannelSketch
from hif4c.runtime.errors import Hif4Error
from tests.support.checkpoints import build_transformer, random_inputs, small_config

FAST = MachineRates(2, *[1e30] * 11)
"""A machine that does everything at once; what a test slows down is then all that takes time."""


def work(model="Wan2.2-T2V-A14B", recipe="rtn", **options):
    config = describe_model(model).configs["transformer"]
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    plan = make_plan(config, recipe)
    return Workload(config, plan, recipe, plan.bytes_before, **options)


def seconds(found, **rates):
    steps = estimate_compile({"transformer": found}, dataclasses.replace(FAST, **rates))
    return {step.name: step.seconds for step in steps}


def test_packing_takes_as_long_as_the_slowest_of_reading_computing_and_writing():
    found = work()
    assert seconds(found, read=1e9)["pack the weights"] == pytest.approx(found.stored_bytes / 1e9)
    assert seconds(found, write=1e8, read=1e9)["pack the weights"] == pytest.approx(found.plan.bytes_after / 1e8)
    assert seconds(found, quantize=1e9, read=1e12)["pack the weights"] == pytest.approx(found.elements / 1e9)


def test_hashes_are_of_what_is_read_and_twice_of_what_is_written():
    """In packing on both cores; and by the verification, which has one file after the other."""
    found = work()
    times = seconds(found, hash=1e9)
    assert times["pack the weights"] == pytest.approx((found.stored_bytes + found.plan.bytes_after) / 2e9)
    assert times["golden outputs, verification"] == pytest.approx(found.plan.bytes_after / 1e9)


def test_bytes():
    found = work()
    total = estimate_compile({"transformer": found, "transformer_2": found}, FAST, components=10)
    assert sum(step.written for step in total) == 2 * found.plan.bytes_after + 10
    pack = next(step for step in total if step.name == "pack the weights")
    assert pack.read == 2 * found.stored_bytes


def test_recipes_that_do_more_take_longer():
    rates = MachineRates(2, 1e7, 5e9, 4e6, 5e8, 5e8, 1.6e10, 1.8e9, 1.4e11, 4e11, 5e8, 1e9)
    totals = []
    for name in ("rtn", "tail-aware", "gptq", "best"):
        found = work("Wan2.2-TI2V-5B", name, calls=(1000,) * 4, measured=name != "rtn")
        totals.append(sum(step.seconds for step in estimate_compile({"transformer": found}, rates)))
    assert totals == sorted(totals)
    assert all(math.isfinite(total) for total in totals)


def test_groups_are_those_of_the_calibration(captures):
    """So are histograms and Hessians counted."""
    config = WanConfig.from_dict(small_config("t2v"), "config.json")
    program = plan_program(captures.variant("t2v"), config)
    expected = [(len(group.readers), group.channels) for group in find_groups(program)]
    assert sorted(groups(make_plan(config, Recipe("mine")).linears)) == sorted(expected)


def test_operations_of_a_forward_pass():
    """As torch counts them in the model itself, but for what does not grow with the tokens and the blocks' linears:
    embeddings and the output projection, below 15 % in this small model."""
    config = WanConfig.from_dict(small_config("t2v"), "config.json")
    inputs = random_inputs("t2v", batch=1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build_transformer("t2v")(**inputs)
    tokens = math.prod(inputs["hidden_states"].shape[2:]) // math.prod(config.patch_size)
    operations = forward_operations(config, tokens, inputs["encoder_hidden_states"].shape[1])
    assert 0.85 * counter.get_total_flops() < operations <= counter.get_total_flops()


@pytest.mark.parametrize(
    ("model", "size", "tokens"),
    [
        ("Wan2.2-T2V-A14B", (480, 832, 81), 32760),
        ("Wan2.2-TI2V-5B", (704, 1280, 121), 27280),
        ("wan-tiny", (32, 32, 9), 80),
    ],
)
def test_tokens_of_a_clip(model, size, tokens):
    """32760 is what Wan's own code has as its sequence length at 480p."""
    assert latent_tokens(describe_model(model).configs["transformer"], *size) == tokens


def test_memory_of_a_compile():
    """Far less than 3 GB by rounding, whatever the number of layers; more by GPTQ, whose Hessian has 13824 channels."""
    plain = work()
    needed = compile_memory({"transformer": plain}, 2)
    assert 0.9e9 < needed < 1.5e9
    assert needed < compile_memory({"transformer": plain}, 64) < 3e9
    config = dataclasses.replace(plain.config, num_layers=4)
    short = Workload(config, make_plan(config, plain.recipe), plain.recipe, 0)
    assert compile_memory({"transformer": short}, 2) == needed
    assert compile_memory({"transformer": work(recipe="svd")}, 2) > needed
    solved = compile_memory({"transformer": work(recipe="gptq")}, 2)
    assert solved > needed + 2 * 4 * 13824**2
    # Beyond its budget of 2 GiB what waits is on the disk; a call's own activations are in memory.
    calls = compile_memory({"transformer": work(recipe="gptq", calls=(32760,) * 32)}, 2)
    assert calls == compile_memory({"transformer": work(recipe="gptq", calls=(32760,) * 64)}, 2) > solved + 2**31


def test_a_calibration():
    found = {"transformer": work(), "transformer_2": work()}
    load = CalibrationLoad(32760, sampled=1280, calls=32)
    clips = dataclasses.replace(load, sampled=0)
    names = [step.name for step in estimate_calibration(found, FAST, load)]
    assert names == ["start, trace the model", "sample by the model itself", "run, count activations"]
    assert len(estimate_calibration(found, FAST, clips)) == 2
    # Sampling has the whole pipeline in memory; clips need a block and the values that wait.
    assert calibration_memory(found, load) > 57e9 > 10e9 > calibration_memory(found, clips)
    # 39424 channels of inputs in a block, and the text.
    disk = calibration_disk({name: item.config for name, item in found.items()}, 32 * 32760)
    assert disk["the file and its parts"] == 2 * 2 * (40 * 39424 + 5120) * (4 * 776 + 512)
    assert disk["activations on the way"] == 32 * 32760 * (5120 * 2 + 2 * 128 * 4) - 2**30
    # Where every token has a timestep, its six modulations and their embedding wait with it.
    configs = {name: item.config for name, item in found.items()}
    expanded = calibration_disk(configs, 32 * 32760, expanded=True)
    assert expanded["activations on the way"] == 32 * 32760 * (8 * 5120 * 2 + 2 * 128 * 4) - 2**30


def test_bytes_of_a_histogram():
    """With all buckets in use in all bins, a sketch is as large as is said, but for its few numbers."""
    sketch = ChannelSketch(64, 4)
    values = torch.logspace(-4, 2, 4000)[:, None].expand(-1, 64)
    for bin_number in range(4):
        sketch.update(values, bin_number)
    assert 0.97 < sum(tensor.nbytes for tensor in sketch.to_tensors().values()) / (64 * 4 * 776) <= 1.02


@pytest.fixture
def quick(monkeypatch):
    """One call of everything, on little data."""
    monkeypatch.setattr(rates_module, "WRITE_BYTES", 1 << 20)
    monkeypatch.setattr(rates_module, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(rates_module, "ROWS", 64)
    monkeypatch.setattr(rates_module, "PRODUCT", 256)
    monkeypatch.setattr(rates_module, "SECONDS", 0.0)


def test_the_machine_is_measured_and_nothing_is_left(quick, tmp_path):
    threads = torch.get_num_threads()
    (tmp_path / "weights").write_bytes(bytes(1 << 18))
    found = measure_rates(tmp_path, [tmp_path / "weights"])
    assert all(0 < value < math.inf for value in vars(found).values())
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    assert found.cores == torch.get_num_threads() == threads
    # A core hashes and loops within these on anything that runs this test.
    assert 1e7 < found.hash < 1e11
    assert 1e5 < found.loops < 1e9


def test_a_folder_that_cannot_be_written(quick):
    with pytest.raises(Hif4Error, match=r"^/proc: cannot be written"):
        measure_rates(Path("/proc"))
