"""The commands as people start them: `hif4c NAME` and `python tools/NAME.py`."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = ("plan", "compile", "verify", "sample", "inspect", "evaluate", "trust", "bench")


@pytest.mark.parametrize("name", [*COMMANDS, "demo", "make_checkpoint", "make_docs", "train_tiny"])
def test_script_explains_itself(name: str, tmp_path: Path) -> None:
    script = ROOT / "tools" / f"{name}.py"
    # In another directory: nothing may depend on where it is started, and tools/ must not hide the standard library.
    result = subprocess.run(
        [sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout or "usage" in result.stdout


def test_console_script_lists_every_command_and_teaches_a_first_round() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "hif4c.tools.cli", "--help"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    for name in COMMANDS:
        assert f" {name} " in result.stdout
    assert "hif4c compile wan-tiny" in result.stdout


def test_script_and_command_are_the_same_code(tmp_path: Path) -> None:
    command = ["plan", "Wan2.2-TI2V-5B", "--summary"]
    outputs = [
        subprocess.run([sys.executable, *start, *rest], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for start, rest in (
            (["-m", "hif4c.tools.cli"], command),
            ([str(ROOT / "tools" / "plan.py")], command[1:]),
        )
    ]
    assert outputs[0] == outputs[1]
    assert "300" in outputs[0]


def test_bad_input_is_one_sentence_and_a_status(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "hif4c.tools.cli", "verify", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert "manifest.json" in result.stderr
