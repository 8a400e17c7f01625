"""hif4c calibrate shared by several processes: the file is that of one, and what fails is said once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hif4c.compiler import calibrate as calibrate_module
from hif4c.compiler.calibration_run import CalibrationOptions, run_calibration
from hif4c.compiler.locate import locate_model
from hif4c.runtime.pipeline import load_components
from tests.support.forked_ranks import in_ranks
from tests.support.tiny import write_short_tiny

TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
THREADS = {**os.environ, "OMP_NUM_THREADS": "1"}  # what torchrun gives its processes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_short_tiny(tmp_path_factory.mktemp("tiny") / "short-tiny")


def test_two_ranks_sample_and_calibrate_as_one(model, captures, tmp_path, monkeypatch):
    """Three batches of one prompt, so one rank samples two of them; of six calls an expert four are kept."""
    monkeypatch.setattr(calibrate_module, "capture", captures)
    location = locate_model(str(model))
    # Both once and not in every rank: a trace, and what loading a pipeline imports.
    captures(location.configs["transformer"])
    load_components(str(model), "WanPipeline", without_experts=True)
    sampling = (("steps", 2), ("frames", 5), ("height", 16), ("width", 16))
    options = CalibrationOptions(count=3, calls=4, batch=1, sampling=sampling)
    for count in (1, 2):
        done = in_ranks(
            count, lambda ranks: run_calibration(location, tmp_path / str(ranks.count), options, ranks=ranks)
        )
        assert done == [None] * count
    assert (tmp_path / "2").read_bytes() == (tmp_path / "1").read_bytes()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["1", "2"]


def calibrate(interpreter: list[str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *interpreter, "-m", "hif4c.tools.cli", "calibrate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=THREADS)


@pytest.mark.slow
def test_torchrun_writes_the_calibration_of_one_process(model, tmp_path):
    options = ("--prompts", "3", "--batch", "1", "--steps", "2", "--frames", "5", "--calls", "3", "--size", "16x16")
    shared, alone = (
        calibrate(how, model, "-o", tmp_path / name, *options) for how, name in ((TORCHRUN, "2"), ([], "1"))
    )
    assert (shared.returncode, alone.returncode) == (0, 0), shared.stderr + alone.stderr
    assert (tmp_path / "2").read_bytes() == (tmp_path / "1").read_bytes()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["1", "2"]
    # One of them speaks, and says the same but for its name and the time it took.
    assert shared.stdout.splitlines()[:-2] == alone.stdout.splitlines()[:-2]


def test_what_fails_under_torchrun_is_said_once(model, tmp_path):
    (tmp_path / "clips").mkdir()
    failed = calibrate(TORCHRUN, model, "-o", tmp_path / "c", "--clips", tmp_path / "clips")
    assert failed.returncode != 0
    assert failed.stderr.count("error: ") == 1
    assert "holds no clip" in failed.stderr
    assert [item.name for item in tmp_path.iterdir()] == ["clips"]
