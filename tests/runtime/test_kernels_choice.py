"""`kernels=` where people meet it: load, verify, and `hif4c bench linear`."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hif4c.runtime import Hif4Error, load, load_pipeline
from hif4c.runtime.native import registry
from hif4c.runtime.verify import verify_artifact
from hif4c.tools.cli import app

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler on this machine"
)


@pytest.fixture(autouse=True)
def choice() -> Iterator[None]:
    """What the process had chosen is put back."""
    enabled = registry.is_enabled()
    registry.disable()
    yield
    registry.select("native" if enabled else "portable")


@needs_compiler
def test_a_model_computes_the_same_bits_with_both(artifacts: Callable[..., Path], inputs: Callable[..., tuple]):
    path = artifacts()
    model = load(path, kernels="native")
    assert registry.is_enabled()
    video, timestep, text = inputs()
    native = model(video, timestep, text, return_dict=False)[0]
    model = load(path, kernels="portable")
    assert not registry.is_enabled()
    portable = model(video, timestep, text, return_dict=False)[0]
    assert torch.equal(native, portable)
    load(path)
    assert registry.is_enabled()  # "auto", where there is a compiler


@needs_compiler
def test_an_artifact_verifies_with_both(artifacts: Callable[..., Path]):
    for kernels in ("native", "portable"):
        for check in verify_artifact(artifacts(), kernels=kernels):
            assert check.passed
            assert check.replay is not None
            assert check.replay.codes_differ == 0
            assert check.replay.distance == 0
        result = CliRunner().invoke(app, ["verify", str(artifacts()), "--kernels", kernels])
        assert result.exit_code == 0, result.output


def test_an_unknown_word_is_refused(artifacts: Callable[..., Path]):
    for call in (load, load_pipeline):
        with pytest.raises(Hif4Error, match="auto, native, portable"):
            call(artifacts(), kernels="quick")


@needs_compiler
def test_bench_prints_machine_and_ratios():
    arguments = ["bench", "linear", "--shapes", "128x64,64x32", "--rows", "1,9", "--seconds", "0.02", "--threads", "1"]
    threads = torch.get_num_threads()
    try:
        result = CliRunner().invoke(app, arguments)
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "kernels: native" in result.stdout
    assert "bf16 / HiF4" in result.stdout
    assert sum(line.split()[:3] == ["128", "x", "64"] for line in result.stdout.splitlines()) == 2
    bad = CliRunner().invoke(app, ["bench", "linear", "--rows", "zero"])
    assert bad.exit_code == 2
