from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hif4c.compiler import calibration_run
from hif4c.compiler import disk_space as module
from hif4c.compiler.components import copy_components
from hif4c.compiler.disk_space import check_disk, compile_disk, components_bytes, present_bytes, recorded_tokens
from hif4c.compiler.locate import describe_model, locate_model
from hif4c.compiler.models import tiny_directory
from hif4c.compiler.plan import make_plan
from hif4c.compiler.recipe import Recipe, load_recipe
from hif4c.runtime.errors import Hif4Error

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free(monkeypatch):
    """Set how much is free; returns the folders that were asked about."""
    asked = []

    def set_free(count):
        monkeypatch.setattr(
            module.shutil, "disk_usage", lambda path: asked.append(Path(path)) or Usage(10**12, 0, count)
        )
        return asked

    return set_free


def needs_of(model, recipe, **options):
    configs = describe_model(model).configs
    recipes = dict.fromkeys(configs, recipe)
    return compile_disk({name: make_plan(config, recipe) for name, config in configs.items()}, recipes, **options)


def test_enough(tmp_path, free):
    free(1000)
    check_disk(tmp_path / "out", {"weights": 1000}, doing="compiling")


def test_too_little(tmp_path, free):
    asked = free(3_100_000_000)
    target = tmp_path / "not" / "yet" / "out"
    needs = {"weights": 16_760_000_000, "the rest of the pipeline": 12_000_000_000}
    with pytest.raises(Hif4Error) as caught:
        check_disk(target, needs, doing="compiling")
    assert str(caught.value) == (
        f"{target}: compiling needs 28.8 GB of disk there (16.8 GB weights, 12.0 GB the rest of the pipeline) and "
        f"3.1 GB are free in {tmp_path}; free some, or choose another place."
    )
    assert asked == [tmp_path]
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_counts(tmp_path, free):
    (tmp_path / ".out.partial" / "artifact").mkdir(parents=True)
    (tmp_path / ".out.partial" / "artifact" / "weights").write_bytes(bytes(1_000_000))
    present = present_bytes(tmp_path / ".out.partial")
    assert 1_000_000 <= present < 1_000_000 + 2**16  # whole blocks of the file system
    free(1000)
    check_disk(tmp_path / "out", {"weights": present + 1000}, doing="compiling")
    with pytest.raises(Hif4Error, match=r"needs 2\.0 kB more of disk"):
        check_disk(tmp_path / "out", {"weights": present + 2000}, doing="compiling")
    with pytest.raises(Hif4Error):
        check_disk(tmp_path / "other", {"weights": present}, doing="compiling")


def test_reserved_space_is_present_and_a_hole_is_not(tmp_path):
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(1 << 24)
    assert present_bytes(tmp_path) < 1 << 20
    assert present_bytes(tmp_path / "nothing") == 0


def test_a_file_system_that_says_nothing(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(module.shutil, "disk_usage", fail)
    check_disk(tmp_path / "out", {"weights": 1 << 60}, doing="compiling")


def test_what_a_compile_writes():
    """The planes of A14B's 800 quantized weights wait on the disk once more where GPTQ makes them."""
    plain = needs_of("Wan2.2-T2V-A14B", load_recipe("rtn"))
    plan = make_plan(describe_model("Wan2.2-T2V-A14B").configs["transformer"], load_recipe("rtn"))
    assert plain["weights"] == 2 * plan.bytes_after
    assert plain.keys() == {"weights", "golden outputs and kernels"}
    solved = needs_of("Wan2.2-T2V-A14B", load_recipe("gptq"), tokens={"transformer": 32 * 32760})
    planes = sum(linear.plane_bytes for linear in plan.linears if linear.decision.quantized)
    assert solved["rounded weights on the way"] == 2 * planes
    assert solved["weights"] == plain["weights"]
    # 32 calls of 32760 tokens: the residual stream in 16 bits and the feed-forward layer's 13824 activations in 4.5;
    # but for the 2 GiB that stay in memory.
    assert solved["activations on the way"] == 32 * 32760 * (2 * 5120 + 13824 * 9 // 16) - 2**31


def test_a_timestep_a_token_waits_too():
    """Six modulations and an embedding beside the residual stream, all as wide and in 16 bits."""
    tokens = {"transformer": 32 * 27280}
    plain, expanded = (
        needs_of("Wan2.2-TI2V-5B", load_recipe("gptq"), tokens=tokens, expanded=flag)["activations on the way"]
        for flag in (False, True)
    )
    assert expanded - plain == 32 * 27280 * 7 * 2 * 3072


def test_a_budget_is_spent():
    """8 bits a weight of the blocks: half of what they take in bf16."""
    needs = needs_of("Wan2.2-TI2V-5B", Recipe("mine", average_bits=8))
    plan = make_plan(describe_model("Wan2.2-TI2V-5B").configs["transformer"], load_recipe("rtn"))
    blocks = sum(linear.in_features * linear.out_features for linear in plan.linears if linear.decision.quantized)
    assert needs["weights"] == plan.bytes_before - blocks
    assert needs["weights"] > plan.bytes_after


def test_kernels_of_several_targets():
    targets = needs_of("wan-tiny", load_recipe("rtn"), targets=("cpu", "cuda-sm90"))
    portable = needs_of("wan-tiny", load_recipe("rtn"), targets=())
    name = "golden outputs and kernels"
    assert targets[name] - portable[name] == (1 << 20) + (16 << 20)


def test_components(tmp_path):
    """As many bytes as are copied, but for the index, which is written anew."""
    copy_components(tiny_directory(), tmp_path / "pipeline")
    copied = {path: path.stat().st_size for path in (tmp_path / "pipeline").rglob("*") if path.is_file()}
    del copied[tmp_path / "pipeline" / "model_index.json"]
    assert components_bytes(tiny_directory()) == sum(copied.values()) > 0
    assert needs_of("wan-tiny", load_recipe("rtn"), components=tiny_directory())["the rest of the pipeline"] == sum(
        copied.values()
    )
    assert components_bytes(tmp_path) == 0


def test_a_real_artifact_is_no_larger(wan_tiny_artifact):
    """Headers, program and reports are not counted: a few kB a linear, within what is said of the golden outputs."""
    needs = needs_of("wan-tiny", load_recipe("rtn"), components=tiny_directory())
    sizes = {path: path.stat().st_size for path in wan_tiny_artifact.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < sum(needs.values())
    experts = ("transformer", "transformer_2")
    weights = sum(size for path, size in sizes.items() if path.suffix == ".safetensors" and path.parent.name in experts)
    assert weights == pytest.approx(needs["weights"], rel=0.1)


def test_a_calibration_asks_first(tmp_path, free, monkeypatch):
    """Before it loads anything."""
    free(1000)
    monkeypatch.setattr(calibration_run, "load_components", None)
    output = tmp_path / "calibration.safetensors"
    with pytest.raises(Hif4Error, match=r"calibration\.safetensors: calibrating needs .* and 1\.0 kB are free in"):
        calibration_run.run_calibration(locate_model("wan-tiny"), output, calibration_run.CalibrationOptions())
    assert list(tmp_path.iterdir()) == []


class Recorded:
    """A calibration with two calls of one video and of two, 8 channels, 3 frames of 4 x 6."""

    def calls(self):
        for batch in (1, 2):
            yield SimpleNamespace(hidden_states=torch.empty(batch, 8, 3, 4, 6)), None


def test_tokens_of_recorded_calls():
    """Patches of 1 x 2 x 2."""
    config = describe_model("wan-tiny").configs["transformer"]
    assert recorded_tokens(Recorded(), config) == 3 * (3 * 2 * 3)
