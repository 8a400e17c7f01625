"""`hif4c evaluate --ladder` as it is typed: tables, files, and what is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from hif4c.compiler import ladder as ladder_module
from hif4c.runtime.errors import Hif4Error
from hif4c.tools.cli import app

LADDER = ("evaluate", "--ladder", "--against", "wan-tiny")
QUICK = ("--prompts", "2", "--steps", "2")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def copied(wan_tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In place of a compile, a copy of a finished artifact; the names of the recipes asked for."""
    names: list[str] = []

    def compile_model(model: str, output: Path, options: Any, events: Any) -> Path:
        names.append(options.recipes["transformer"].name)
        return shutil.copytree(wan_tiny_artifact, output)

    monkeypatch.setattr(ladder_module, "compile_model", compile_model)
    return names


def test_a_ladder_prints_tables_and_writes_its_files(copied: list[str], tmp_path: Path) -> None:
    figures, text, picture = tmp_path / "new" / "l.json", tmp_path / "l.md", tmp_path / "l.png"
    command = (*LADDER, *QUICK, "--recipe", "rtn", "--recipe", "weight-only", "--work", tmp_path / "work")
    result = run(*command, "-o", figures, "--markdown", text, "--plot", picture)
    assert result.exit_code == 0, (result.output, result.exception)
    assert copied == ["rtn", "weight-only"]
    words = " ".join(result.stdout.split())
    for expected in ("latent SNR", "frame SSIM", "bits a weight", "subject", "rtn", "weight-only", "bf16"):
        assert expected in words
    values = json.loads(figures.read_text())
    assert [row["recipe"] for row in values["rows"]] == ["rtn", "weight-only"]
    assert values["prompts"] == 2
    assert 0 < values["rows"][0]["distance"]["frame_ssim"] <= 1
    assert text.read_text().count("\n| weight-only |") == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    # Once more: everything is there already.
    assert run(*command).exit_code == 0
    assert len(copied) == 2


def test_a_sweep_has_a_row_for_each_value(copied: list[str], tmp_path: Path) -> None:
    picture = tmp_path / "sweep.png"
    command = (*LADDER, *QUICK, "--recipe", "rtn", "--sweep", "hadamard=64,128,largest", "--work", tmp_path / "work")
    result = run(*command, "--plot", picture)
    assert result.exit_code == 0, (result.output, result.exception)
    assert copied == ["rtn hadamard=64", "rtn hadamard=128", "rtn hadamard=largest"]
    assert all(name in result.stdout for name in copied)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "rtm"], "did you mean rtn"),
        (["--recipe", "rtn", "--sweep", "hadamard"], "give KEY=VALUE,VALUE"),
        (["--recipe", "rtn", "--sweep", "hadamar=64"], "hadamar"),
        (["--recipe", "rtn", "--sweep", "hadamard=63"], "hadamard must be"),
        (["--recipe", "tail-aware", "--calibration", "/no/such.safetensors"], "/no/such.safetensors: cannot be read"),
        (["--prompts", "0"], "--prompts 0: the synthetic world has 1 to"),
        (["--recipe", "rtn", "--image", "first.png"], "this model takes no --image"),
    ],
)
def test_what_does_not_fit_is_said(arguments: list[str], words: str, tmp_path: Path) -> None:
    result = run(*LADDER, *QUICK, *arguments, "--work", tmp_path)
    assert isinstance(result.exception, Hif4Error), (result.output, result.exception)
    assert words in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "--against", "wan-tiny"], "give ARTIFACT, the directory to evaluate, or --ladder"),
        ([*LADDER, "tiny.hif4"], "--ladder compiles the model itself; leave tiny.hif4 out"),
        (
            ["evaluate", "a", "--against", "wan-tiny", "--recipe", "rtn", "--keep"],
            "--recipe, --keep: only with --ladder",
        ),
    ],
)
def test_a_command_line_that_means_nothing(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in re.sub(r"[\s│]+", " ", result.output)
