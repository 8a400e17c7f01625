"""Kills at random times, and what an artifact must be afterwards."""

import filecmp
import os
import random
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Kills", "assert_equal_trees", "compile_through_kills", "files_of"]


def files_of(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def assert_equal_trees(one: Path, other: Path) -> None:
    assert files_of(one) == files_of(other)
    _, differ, errors = filecmp.cmpfiles(one, other, files_of(one), shallow=False)
    assert (differ, errors) == ([], [])


@dataclass
class Kills:
    """What `compile_through_kills` did.

    Attributes:
        stages: for every kill, after how many seconds it came and the newest piece that was finished then.
        compiles: how many compiles reached their end through kills, each compared with the reference.
    """

    stages: list[tuple[float, str]]
    compiles: int


def compile_through_kills(
    command: Sequence[str | Path], output: Path, reference: Path, *, kills: int, seconds: float, seed: int = 0
) -> Kills:
    """Kill a compile with SIGKILL at random times, continue it, and kill it again, until it is complete; begin anew.

    Every artifact that comes of it must equal the reference byte for byte, with nothing beside it.

    Args:
        command: compiles into `output`; "--resume" is added where there is something to continue.
        output: in a folder of its own; removed after it was compared.
        reference: the artifact of an undisturbed compile.
        kills: how many in all; the last compile then runs to its end.
        seconds: kills come after 0 to this many; about what a compile takes.
        seed: of the times.
    """
    times, done = random.Random(seed), Kills([], 0)
    partial = output.with_name(f".{output.name}.partial")
    output.parent.mkdir(parents=True, exist_ok=True)
    while len(done.stages) < kills or partial.exists():
        resume = ["--resume"] if partial.exists() else []
        after = times.uniform(0, seconds) if len(done.stages) < kills else None
        process = subprocess.Popen([*command, *resume], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        began = time.monotonic()
        try:
            _, errors = process.communicate(timeout=after)
            assert process.returncode == 0, errors
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            done.stages.append((time.monotonic() - began, _newest(partial, output)))
        if output.exists() and not partial.exists():
            assert_equal_trees(reference, output)
            assert os.listdir(output.parent) == [output.name]
            shutil.rmtree(output)
            done.compiles += 1
    assert os.listdir(output.parent) == []
    return done


def _newest(partial: Path, output: Path) -> str:
    """What was finished last when a process was killed."""
    if output.exists():
        return "complete"
    paths = [path for path in partial.rglob("*") if path.is_file()]
    return max(paths, key=lambda path: path.stat().st_mtime_ns).relative_to(partial).as_posix() if paths else "nothing"
