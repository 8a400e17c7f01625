"""A compile that is killed anywhere and continued makes the same bytes, and so do ranks that share it."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from hif4c.compiler import calibrate as calibrate_module
from hif4c.compiler import compile as compile_module
from hif4c.compiler import experts as experts_module
from hif4c.compiler.calibrate import calibrate
from hif4c.compiler.calibration_inputs import Call
from hif4c.compiler.compile import CompileOptions, compile_model
from hif4c.compiler.journal import Journal
from hif4c.compiler.locate import locate_model
from hif4c.compiler.ranks import ALONE
from hif4c.compiler.recipe import Recipe
from hif4c.runtime.errors import Hif4Error
from tests.support.checkpoints import write_diffusers_model
from tests.support.forked_ranks import in_ranks
from tests.support.kills import assert_equal_trees, compile_through_kills

EVERYTHING = Recipe(
    "everything", shift=True, mask_percentile=99.9, alpha=0.5, hadamard=64, rounding="gptq", bf16_steps=0.5
)
"""Every stage of a compile: masks chosen, weights rounded on calls, steps measured."""


@dataclass(frozen=True)
class Compile:
    """A calibrated model of one expert and the ways to compile it in a forked process, which takes no imports."""

    model: Path
    options: CompileOptions
    captures: Any

    def run(self, output: Path, *, resume: bool = False, ranks=ALONE, events=lambda event, value: None) -> None:
        """In one thread: what GPTQ sums depends on their number in the last bit."""
        torch.set_num_threads(1)
        with (
            mock.patch.object(experts_module, "capture", self.captures),
            mock.patch.object(compile_module, "verify_in_fresh_processes"),
        ):
            compile_model(str(self.model), output, replace(self.options, resume=resume), events, ranks=ranks)

    def forked(self, work: Callable[[], None]) -> int:
        """The exit status of a forked process."""
        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        process.join(120)
        assert process.exitcode is not None
        return process.exitcode


@pytest.fixture(scope="module")
def compiled(captures, inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    write_diffusers_model(folder / "model", "t2v", experts=1)
    samples = [inputs(batch=1, seed=seed) for seed in (11, 12)]
    calls = [
        Call(video, torch.full((1,), timestep), text)
        for (video, _, text), timestep in zip(samples, (900.0, 100.0), strict=True)
    ]
    with mock.patch.object(calibrate_module, "capture", captures):
        calibrate(locate_model(str(folder / "model")), {"transformer": calls}, folder / "calibration.safetensors", [])
    captures.variant("t2v")  # before anything forks
    options = CompileOptions(
        {"transformer": EVERYTHING}, components="none", calibration=folder / "calibration.safetensors"
    )
    return Compile(folder / "model", options, captures)


@pytest.fixture(scope="module")
def undisturbed(compiled, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert compiled.forked(lambda: compiled.run(output)) == 0
    return output


def killed_at(number: int) -> None:
    """Let this process be killed when it waits for the disk for the n-th time: after that, something is finished."""
    left = [number]

    def stopping(real: Callable[[int], None]) -> Callable[[int], None]:
        def wait(descriptor: int) -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)

        return wait

    os.fsync, os.fdatasync = stopping(os.fsync), stopping(os.fdatasync)


def test_killed_again_and_again(compiled, undisturbed, tmp_path):
    """Every run comes some 30 steps further, through all stages; what a kill leaves is never taken for finished."""
    output, kills, stages, numbers = tmp_path / "out", 0, set(), random.Random(0)

    def work(number: int) -> None:
        killed_at(number)
        compiled.run(output, resume=kills > 0)

    while (status := compiled.forked(partial(work, numbers.randint(20, 40)))) != 0:
        assert status == -signal.SIGKILL
        kills += 1
        assert kills < 50
        stages |= {path.name for path in (tmp_path / ".out.partial" / "journal").iterdir()}
    assert_equal_trees(undisturbed, output)
    assert os.listdir(tmp_path) == ["out"]
    assert kills >= 3
    assert stages == {"choose", "gptq", "files", "pack", "made", "steps", "weights"}


def test_two_ranks_make_the_same(compiled, undisturbed, tmp_path):
    results = in_ranks(2, lambda ranks: compiled.run(tmp_path / "out", ranks=ranks))
    assert results == [None, None]
    assert_equal_trees(undisturbed, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


# In this process, with plain rounding.


@pytest.fixture
def interrupted(models, quick_compile, tmp_path):
    """A copy of a model whose compile was interrupted when one expert was packed; (model, output)."""
    model, output = shutil.copytree(models["t2v"].directory, tmp_path / "t2v"), tmp_path / "results" / "out"
    real, said = Journal.record, []

    def interrupt(journal, key, *arguments):
        real(journal, key, *arguments)
        if key == "pack/transformer/blocks.0":
            raise KeyboardInterrupt

    with mock.patch.object(Journal, "record", interrupt), pytest.raises(KeyboardInterrupt):
        quick_compile(model, output, events=lambda event, value: said.append(value))
    assert os.listdir(output.parent) == [".out.partial"]
    assert said[-1].endswith("the same command with --resume continues it")
    return model, output


def test_an_interrupted_compile_is_continued(interrupted, artifacts, quick_compile):
    """What was done is counted, and not done again."""
    model, output = interrupted
    events = []
    quick_compile(model, output, resume=True, events=lambda *event: events.append(event))
    assert_equal_trees(artifacts("t2v", "rtn"), output)
    assert os.listdir(output.parent) == ["out"]
    first = events.index(("step", "packing transformer"))
    (_, total), unit, (kind, skipped) = events[first + 1 : first + 4]
    assert (unit, kind) == (("unit", "bytes"), "skipped")
    rest = events[first + 4 : events.index(("step", "packing transformer_2"))]
    assert sum(value for kind, value in rest if kind == "bytes") == total - skipped
    assert 0 < skipped < total


def test_finished_blocks_are_not_lost_with_the_files(interrupted, artifacts, quick_compile):
    """The disk has lost the entry that says that the weight files were made; scratch of the killed run goes."""
    model, output = interrupted
    partial = output.parent / ".out.partial"
    (partial / "journal" / "files" / "transformer.safetensors").unlink()
    left = partial / "scratch" / "values-left"
    left.mkdir()
    seen = []
    quick_compile(model, output, resume=True, events=lambda *event: seen.append(left.exists()))
    assert not any(seen)
    assert_equal_trees(artifacts("t2v", "rtn"), output)


def test_other_inputs_are_refused_by_name(interrupted, quick_compile):
    model, output = interrupted
    before = sorted(output.parent.rglob("*"))
    for changes, name in (
        ({"recipe": "rotate"}, "the recipe of transformer, the recipe of transformer_2"),
        ({"targets": ()}, "option targets"),
        ({"golden": False}, "option golden"),
    ):
        with pytest.raises(Hif4Error, match=f"begun with other inputs: {name} changed; give it what it was begun with"):
            quick_compile(model, output, resume=True, **changes)
    with pytest.raises(Hif4Error, match="an unfinished compile of out is there; continue it with --resume"):
        quick_compile(model, output)
    assert sorted(output.parent.rglob("*")) == before


def test_weights_are_compared_by_what_they_hold(interrupted, artifacts, quick_compile):
    """A file that was copied is another file with the same weights; one that was written to has others."""
    model, output = interrupted
    path = model / "transformer" / "diffusion_pytorch_model.safetensors"
    original = load_file(path)
    name = "blocks.0.ffn.net.2.weight"
    save_file({**original, name: original[name] + 1}, path, metadata={"format": "pt"})
    with pytest.raises(Hif4Error, match=f"{name} of transformer changed"):
        quick_compile(model, output, resume=True)
    save_file(original, path, metadata={"format": "pt"})
    quick_compile(model, output, resume=True)
    assert_equal_trees(artifacts("t2v", "rtn"), output)


def test_calibrated_weights_are_compared_as_a_whole(compiled, tmp_path):
    """Masks depend on all of them, so a change anywhere is one, though nothing was packed yet."""
    model = shutil.copytree(compiled.model, tmp_path / "model")
    copied = replace(compiled, model=model)

    def interrupt(event, value):
        if event == "bytes":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copied.run(tmp_path / "out", events=interrupt)
    path = model / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "proj_out.bias": tensors["proj_out.bias"] + 1}, path, metadata={"format": "pt"})
    with pytest.raises(Hif4Error, match="the weights of transformer changed"):
        copied.run(tmp_path / "out", resume=True)
    assert (tmp_path / ".out.partial" / "inputs.json").exists()


def test_another_number_of_threads_is_refused(compiled, tmp_path):
    """Where it decides the last bit of what is summed."""

    def interrupt(event, value):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiled.run(tmp_path / "out", events=interrupt)
    with (
        mock.patch.object(torch, "get_num_threads", return_value=7),
        pytest.raises(Hif4Error, match=r"option threads \(OMP_NUM_THREADS\) changed"),
    ):
        compiled.run(tmp_path / "out", resume=True)


def test_a_disk_that_fills_up(models, quick_compile, artifacts, tmp_path):
    """What was finished stays, and the compile goes on when there is space again."""
    output = tmp_path / "results" / "out"
    real, left = os.pwrite, [20]

    def write(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    with mock.patch.object(os, "pwrite", write), pytest.raises(Hif4Error, match="No space left on device"):
        quick_compile(models["t2v"].directory, output)
    assert os.listdir(output.parent) == [".out.partial"]
    quick_compile(models["t2v"].directory, output, resume=True)
    assert_equal_trees(artifacts("t2v", "rtn"), output)
    assert os.listdir(output.parent) == ["out"]


# As users start it.


@pytest.mark.slow
def test_torchrun_makes_the_same(quick_compile, tmp_path):
    """Two ranks that torchrun starts, against one process of as many threads each; and what fails is said once."""
    write_diffusers_model(tmp_path / "model", "t2v", experts=1, num_layers=1)
    output = tmp_path / "results" / "out"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    command = [Path(sys.executable).with_name("hif4c"), "compile", tmp_path / "model", "-o", output, "--recipe", "rtn"]
    command += ["--components", "none", "--target", "portable", "--no-golden"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    made = subprocess.run([*torchrun, *command], capture_output=True, text=True, check=False, env=environment)
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("compiled and verified") == 1
    assert made.stderr.count("packing transformer") == 1
    reference = tmp_path / "reference"
    quick_compile(tmp_path / "model", reference, golden=False, targets=())
    assert_equal_trees(reference, output)
    assert os.listdir(output.parent) == ["out"]


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    """wan-tiny with the default recipe: calibrated, masks searched, rounded on its calls, steps measured."""
    hif4c = Path(sys.executable).with_name("hif4c")
    started = time.monotonic()
    subprocess.run([hif4c, "compile", "wan-tiny", "-o", tmp_path / "reference"], check=True, capture_output=True)
    seconds = time.monotonic() - started
    output = tmp_path / "results" / "out"
    command = [hif4c, "compile", "wan-tiny", "-o", output]
    found = compile_through_kills(command, output, tmp_path / "reference", kills=20, seconds=seconds)
    assert len(found.stages) == 20
    assert found.compiles >= 2
