"""`hif4c plan --estimate`: what people are told before they start."""

from collections import namedtuple
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hif4c.compiler import machine_rates as rates_module
from hif4c.compiler.machine_rates import MachineRates
from hif4c.tools import plan_estimate as module
from hif4c.tools.cli import app
from tests.support.checkpoints import write_diffusers_model

RATES = MachineRates(2, 1e7, 5e9, 4e6, 5e8, 5e8, 1.6e10, 1.8e9, 1.4e11, 4e11, 5e8, 1e9)
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def plan(monkeypatch):
    """Run `hif4c plan` on a machine of those rates, with 24 GB of memory and 20 GB of disk; returns what it printed."""
    asked = []

    def measure(folder, weights=()):
        asked.append((folder, list(weights)))
        return RATES

    monkeypatch.setattr(rates_module, "measure_rates", measure)
    monkeypatch.setattr(module, "memory_there", lambda: 24_000_000_000)
    monkeypatch.setattr("hif4c.compiler.disk_space.shutil.disk_usage", lambda path: Usage(10**12, 0, 20 * 10**9))

    def run(*arguments):
        result = CliRunner().invoke(app, ["plan", *map(str, arguments), "--estimate"])
        assert result.exit_code == 0, (result.output, result.exception)
        run.asked = asked
        return result.stdout

    return run


def row(text, start):
    """The cells of the row that begins with these words."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(f"{start}  ")]
    return [cell.strip() for cell in line.strip().removeprefix(start).split("  ") if cell.strip()]


def test_a_recipe_without_calibration(plan, tmp_path):
    text = plan("Wan2.2-T2V-A14B", "--recipe", "rtn", "-o", tmp_path / "not" / "yet" / "out")
    assert plan.asked == [(tmp_path, [])]
    assert "sample by the model itself" not in text
    # 57.15 GB at 0.5 GB/s; computing and writing take less. 16.76 GB are then hashed on two cores.
    assert row(text, "pack the weights") == ["1 min 59 s", "57.2 GB", "16.8 GB"]
    memory, there, disk, free = row(text.split("memory and disk")[1], "compile")
    assert (there, disk, free) == ("24.0 GB", "16.8 GB", "20.0 GB")
    assert memory.endswith("GB")
    assert "within a factor of" in text
    assert "The weights are no folder here" in text
    assert "8.4 GB, in bf16 in 28.6 GB" in text
    assert "block linear" not in text


def test_what_does_not_fit_is_said(plan):
    """The default recipe: GPTQ on 32 calls of 32760 tokens, and sampling with the whole pipeline in memory."""
    text = plan("Wan2.2-T2V-A14B")
    space = text.split("memory and disk")[1]
    assert row(space, "calibrate")[0].endswith("GB (too much)")
    assert row(space, "compile")[2].endswith("GB (too much)")
    assert "(too much)" not in row(space, "one pass of one expert")[0]
    assert "a smaller --size or fewer --calls" in text


def test_a_smaller_calibration(plan):
    """832 x 480 x 81 are 52 x 30 x 21 tokens, of 16 x 16 pixels and 4 frames each; 256 x 256 x 17 are 16 x 16 x 5."""
    text = plan("Wan2.2-T2V-A14B", "--size", "256x256", "--frames", "17", "--calls", "4")
    assert "4 calls of each expert with 1,280 tokens a clip" in text
    space = text.split("memory and disk")[1]
    assert "(too much)" not in row(space, "compile")[0]
    assert "32,760 tokens" in plan("Wan2.2-T2V-A14B")


def test_weights_that_are_here(plan, tmp_path, monkeypatch):
    """Their own bytes, float32 as they are; and their files are what the disk's speed is read from."""
    monkeypatch.chdir(tmp_path)
    write_diffusers_model(tmp_path / "model", "t2v", experts=1, shards=True)
    text = plan(tmp_path / "model", "--recipe", "rtn")
    ((folder, files),) = plan.asked
    assert folder == tmp_path
    assert files == sorted((tmp_path / "model" / "transformer").glob("*.safetensors"))
    assert len(files) > 1
    stored = sum(path.stat().st_size for path in files)
    assert row(text, "pack the weights")[1] == f"{stored / 1e6:.1f} MB"
    assert "no folder here" not in text
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_a_model_without_usual_settings(plan, tmp_path):
    """It cannot be calibrated without being told a size: its compile is estimated."""
    write_diffusers_model(tmp_path / "model", "t2v", experts=1, in_channels=12, out_channels=12)
    text = plan(tmp_path / "model", "--recipe", "tail-aware")
    assert "choose masks" in text
    assert "calibrate" not in text
    assert "one pass" not in text


def test_the_place_of_the_artifact(plan, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    plan("Wan2.2-TI2V-5B", "--recipe", "rtn")
    assert [folder.resolve() for folder, _ in plan.asked] == [Path(tmp_path).resolve()]
