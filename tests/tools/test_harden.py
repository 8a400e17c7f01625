"""tools/harden.py: what it writes and says."""

import subprocess
import sys
from pathlib import Path

import pytest

from hif4c.runtime.errors import Hif4Error
from hif4c.tools.harden import harden

ROOT = Path(__file__).parents[2]


def test_script_explains_itself(tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / "tools" / "harden.py", "--help"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "wan2.2" in result.stdout


def test_it_writes_a_model_and_shows_what_was_injected(tmp_path, capsys):
    harden("wan-tiny", tmp_path / "hard", "wan2.2")
    shown = capsys.readouterr().out
    assert (tmp_path / "hard" / "model_index.json").is_file()
    assert (tmp_path / "hard" / "hardened.json").is_file()
    rows = [line.split() for line in shown.splitlines()]
    assert ["transformer", "attn2.to_q", "6,", "each", "its", "own", "1", "16"] in rows
    assert ["transformer_2", "attn1.to_q", "6,", "the", "same", "in", "all", "2", "4"] in rows


def test_an_unknown_profile_is_an_error(tmp_path):
    with pytest.raises(Hif4Error, match="choose one of x32, x128"):
        harden("wan-tiny", tmp_path / "hard", "x100")
