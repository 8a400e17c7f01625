"""Choosing among variants: fastest of those that work and agree, once a shape, remembered across processes."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.gpu import tuning
from hif4c.runtime.gpu.tuning import Candidate, Tuner, bucket, sample_rows

RIGHT = torch.tensor([1.0, 2.0, float("nan")])


class Clock:
    """Measures a candidate as the seconds it was given, and counts how often it was asked."""

    def __init__(self) -> None:
        self.seconds: dict[Callable[[], torch.Tensor], float] = {}
        self.asked = 0

    def __call__(self, run: Callable[[], torch.Tensor]) -> float:
        self.asked += 1
        return self.seconds[run]

    def candidate(
        self, name: str, seconds: float, result: torch.Tensor | Exception = RIGHT, family: str | None = "int8"
    ) -> Candidate:
        def run() -> torch.Tensor:
            if isinstance(result, Exception):
                raise result
            return result

        self.seconds[run] = seconds
        return Candidate(name, run, family)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def agrees(result: torch.Tensor) -> str | None:
    return None if torch.allclose(result, RIGHT, atol=0.1, equal_nan=True) else "it is wrong"


def test_the_fastest_is_chosen_and_timed_once(clock: Clock) -> None:
    tuner = Tuner(["gpu"], clock, None)
    candidates = [clock.candidate("slow", 3.0), clock.candidate("fast", 1.0), clock.candidate("middle", 2.0)]
    for _ in range(3):
        assert tuner.choose("linear", candidates, agrees).name == "fast"
    assert clock.asked == 3
    assert tuner.known("linear") == "fast"
    tuner.choose("another shape", candidates, agrees)
    assert clock.asked == 6


@pytest.mark.parametrize(
    "broken",
    [Hif4Error("x.cubin: CUDA_ERROR_INVALID_IMAGE"), torch.OutOfMemoryError("out of memory"), RuntimeError()],
)
def test_what_does_not_run_is_dropped_with_its_reason(
    clock: Clock, broken: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    candidates = [clock.candidate("broken", 0.0, broken), clock.candidate("works", 9.0)]
    assert Tuner(["gpu"], clock, None).choose("linear", candidates, agrees).name == "works"
    reason = str(broken) or "RuntimeError"
    assert f"linear on gpu: broken is not used: {reason}" in caplog.text


def test_what_fails_while_it_is_timed_is_dropped(clock: Clock) -> None:
    def measure(run: Callable[[], torch.Tensor]) -> float:
        if run is first.run:
            raise RuntimeError("an illegal memory access was encountered")
        return 1.0

    first, second = clock.candidate("first", 0.0), clock.candidate("second", 0.0)
    assert Tuner(["gpu"], measure, None).choose("linear", [first, second], agrees).name == "second"


def test_what_computes_something_else_is_dropped_also_when_it_is_first(clock: Clock) -> None:
    candidates = [clock.candidate("wrong", 0.0, RIGHT + 1), clock.candidate("right", 9.0)]
    assert Tuner(["gpu"], clock, None).choose("linear", candidates, agrees).name == "right"


def test_one_family_agrees_to_the_bit_and_others_need_not(clock: Clock) -> None:
    near = RIGHT + 2.0**-20
    candidates = [
        clock.candidate("int8 a", 5.0),
        clock.candidate("int8 b", 1.0, near),
        clock.candidate("bf16", 3.0, near, family=None),
        clock.candidate("int8 c", 4.0, RIGHT.clone()),
    ]
    assert Tuner(["gpu"], clock, None).choose("linear", candidates, agrees).name == "bf16"


def test_candidates_that_write_into_one_tensor_are_told_apart(clock: Clock) -> None:
    out = torch.zeros(3)
    wrong = Candidate("writes nothing", lambda: out, "int8")
    right = Candidate("writes", lambda: out.copy_(RIGHT), "int8")
    near = Candidate("writes something near", lambda: out.copy_(RIGHT + 2.0**-20), "int8")
    seconds = {wrong.run: 0.0, right.run: 5.0, near.run: 1.0}
    tuner = Tuner(["gpu"], seconds.__getitem__, None)
    chosen = tuner.choose("linear", [right, wrong, near], agrees, lambda: out.fill_(float("inf")))
    assert chosen.name == "writes"


def test_nothing_works(clock: Clock) -> None:
    candidates = [clock.candidate("a", 0.0, Hif4Error("no a")), clock.candidate("b", 0.0, RIGHT * 2)]
    with pytest.raises(Hif4Error, match=r"none of its GPU kernels works here \(a: no a; b: it is wrong\).*portable"):
        Tuner(["gpu"], clock, None).choose("linear N=16", candidates, agrees)


def test_a_choice_is_kept_for_the_next_process_and_belongs_to_its_machine(clock: Clock, tmp_path: Path) -> None:
    candidates = [clock.candidate("a", 2.0), clock.candidate("b", 1.0)]
    machine = ["H100", "12080", "kernels 1"]
    Tuner(machine, clock, tmp_path).choose("linear", candidates, agrees)
    asked = clock.asked
    assert Tuner(machine, clock, tmp_path).choose("linear", candidates, agrees).name == "b"
    assert clock.asked == asked
    for place in range(3):
        other = [*machine[:place], "other", *machine[place + 1 :]]
        before = clock.asked
        Tuner(other, clock, tmp_path).choose("linear", candidates, agrees)
        assert clock.asked == before + 2, machine[place]


def test_a_name_that_there_is_no_longer_is_chosen_anew(clock: Clock, tmp_path: Path) -> None:
    Tuner(["gpu"], clock, tmp_path).choose("linear", [clock.candidate("gone", 1.0)], agrees)
    tuner = Tuner(["gpu"], clock, tmp_path)
    assert tuner.choose("linear", [clock.candidate("new", 1.0)], agrees).name == "new"
    assert Tuner(["gpu"], clock, tmp_path).known("linear") == "new"


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xff\xfe",
        b"{}",
        b"[1]",
        b"[" * 100_000,
        b'{"schema": 2, "choices": {"linear": "a"}}',
        b'{"schema": 1, "choices": ["linear"]}',
        b'{"schema": 1, "choices": {"linear": 7}}',
        b'{"schema": 1, "choices": 7}',
        b" " * (tuning.MAX_FILE_BYTES + 1),
    ],
)
def test_a_file_of_garbage_is_no_choice_and_is_replaced(clock: Clock, tmp_path: Path, garbage: bytes) -> None:
    tuner = Tuner(["gpu"], clock, tmp_path)
    assert tuner.path is not None
    tuner.path.write_bytes(garbage)
    assert tuner.choose("linear", [clock.candidate("b", 1.0)], agrees).name == "b"
    assert json.loads(tuner.path.read_bytes())["choices"] == {"linear": "b"}


def test_files_are_private_and_whole_and_keep_what_others_chose(clock: Clock, tmp_path: Path) -> None:
    directory = tmp_path / "hif4c" / "tuning"
    first, second = Tuner(["gpu"], clock, directory), Tuner(["gpu"], clock, directory)
    assert first.known("x") is None
    assert second.known("x") is None
    first.choose("one", [clock.candidate("a", 1.0)], agrees)
    second.choose("two", [clock.candidate("b", 1.0)], agrees)
    assert first.path is not None
    assert json.loads(first.path.read_bytes())["choices"] == {"one": "a", "two": "b"}
    assert directory.stat().st_mode & 0o777 == 0o700
    assert first.path.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in directory.iterdir()] == [first.path.name]


def test_a_directory_that_others_may_write_to_or_a_full_disk_only_forgets(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "hif4c" / "tuning"
    directory.mkdir(parents=True)
    directory.chmod(0o777)
    tuner = Tuner(["gpu"], clock, directory)
    assert tuner.choose("linear", [clock.candidate("a", 1.0)], agrees).name == "a"
    assert list(directory.iterdir()) == []

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    directory.chmod(0o700)
    monkeypatch.setattr(os, "replace", full)
    tuner = Tuner(["gpu"], clock, directory)
    assert tuner.choose("linear", [clock.candidate("a", 1.0)], agrees).name == "a"
    assert tuner.known("linear") == "a"
    assert list(directory.iterdir()) == [], "no half-written file stays"


def test_a_link_is_not_followed(clock: Clock, tmp_path: Path) -> None:
    elsewhere = Tuner(["gpu"], clock, tmp_path / "elsewhere")
    elsewhere.choose("linear", [clock.candidate("a", 1.0)], agrees)
    tuner = Tuner(["gpu"], clock, tmp_path / "tuning")
    assert tuner.path is not None
    assert elsewhere.path is not None
    tuner.path.parent.mkdir(mode=0o700)
    tuner.path.symlink_to(elsewhere.path)
    assert tuner.known("linear") is None


def test_threads_that_need_one_shape_time_it_once(clock: Clock) -> None:
    tuner = Tuner(["gpu"], clock, None)
    candidates = [clock.candidate("a", 2.0), clock.candidate("b", 1.0)]
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(tuner.choose("linear", candidates, agrees).name)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["b"] * 8
    assert clock.asked == 2


def test_buckets_and_samples() -> None:
    assert [bucket(rows) for rows in (1, 2, 3, 4, 5, 1560, 32760)] == [1, 2, 4, 4, 8, 2048, 32768]
    cpu = torch.device("cpu")
    assert sample_rows(1, cpu).tolist() == [0]
    assert sample_rows(5, cpu).tolist() == [0, 1, 2, 3, 4]
    rows = sample_rows(75600, cpu).tolist()
    assert (len(rows), rows[0], rows[-1]) == (tuning.SAMPLED_ROWS, 0, 75599)
