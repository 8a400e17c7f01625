"""hif4c calibrate: what it prints and writes, and the sentence for each mistake."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from hif4c.compiler import calibrate as calibrate_module
from hif4c.compiler.calibration import Calibration
from hif4c.runtime.errors import Hif4Error
from hif4c.tools.cli import app
from tests.support.tiny import write_short_tiny


def run(*arguments: str | Path) -> Result:
    """Run the command in this process; an Hif4Error is found in `result.exception`."""
    return CliRunner().invoke(app, ["calibrate", *(str(argument) for argument in arguments)])


def message(*arguments: str | Path) -> str:
    """Run what must fail on its input; returns the sentence."""
    result = run(*arguments)
    assert isinstance(result.exception, Hif4Error), (result.output, result.exception)
    return str(result.exception)


@pytest.fixture(scope="module")
def calibrated(captures, tmp_path_factory):
    """wan-tiny with one block on two prompts in four steps, and what was printed."""
    folder = tmp_path_factory.mktemp("calibrated")
    model, path = write_short_tiny(folder / "short-tiny"), folder / "folder" / "calib.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate_module, "capture", captures)
        result = run(model, "-o", path, "--prompts", "2", "--steps", "4", "--frames", "5", "--calls", "4")
    assert result.exit_code == 0, (result.output, result.exception)
    return path, result.stdout


def rows_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_it_prints_what_the_inputs_look_like(calibrated):
    path, text = calibrated
    assert text.count("inputs of the 4-bit linears, 4 calls") == 2
    rows = rows_of(text)
    with Calibration(path) as calibration:
        for name, expert in calibration.experts.items():
            assert f"short-tiny, {name}: inputs" in text
            kinds = {".".join(group.split(".")[2:]) for group in expert.groups}
            assert len(kinds) == 7
            for kind in kinds:
                groups = [expert.sketch(group) for group in expert.groups if group.endswith(f".{kind}")]
                largest = max(float(sketch.maximum().max()) for sketch in groups)
                tail = max(float(sketch.percentile(99.9).max()) for sketch in groups)
                tokens = int(groups[0].count().sum())
                assert [kind, str(len(groups)), f"{tokens:,}", f"{tail:.3g}", f"{largest:.3g}"] in rows
    assert f"{path} written" in text
    assert f"{path.stat().st_size / 1e6:,.1f} MB" in text


def test_the_file_records_what_was_asked_for(calibrated):
    with Calibration(calibrated[0]) as calibration:
        (run,) = calibration.runs
        assert len(run["prompts"]) == 2
        assert (run["steps"], run["frames"], run["seed"]) == (4, 5, 0)
        assert run["calls"] == {"transformer": 4, "transformer_2": 4}


def test_nothing_but_the_file_is_left(calibrated):
    path, _ = calibrated
    assert list(path.parent.iterdir()) == [path]


def test_merging(calibrated, tmp_path):
    path, text = calibrated
    other = shutil.copy(path, tmp_path / "other.safetensors")
    result = run("--merge", path, other, "-o", tmp_path / "new" / "both.safetensors")
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.stdout.count("8 calls") == 2
    before = {row[0]: row[1:] for row in rows_of(text) if len(row) == 5 and row[0].startswith(("attn", "ffn"))}
    after = {row[0]: row[1:] for row in rows_of(result.stdout) if row and row[0] in before}
    for kind, (inputs, tokens, _, maximum) in before.items():
        assert after[kind][0] == inputs
        assert int(after[kind][1].replace(",", "")) == 2 * int(tokens.replace(",", ""))
        assert after[kind][3] == maximum
    with Calibration(tmp_path / "new" / "both.safetensors") as merged:
        assert len(merged.runs) == 2
    assert sorted(item.name for item in tmp_path.iterdir()) == ["new", "other.safetensors"]


def test_files_that_do_not_merge(calibrated, tmp_path):
    path, _ = calibrated
    output = tmp_path / "both"
    assert "needs two calibration files or more" in message("--merge", path, "-o", output)
    assert "given twice" in message("--merge", path, path, "-o", output)
    assert "nothing: cannot be read" in message("--merge", path, tmp_path / "nothing", "-o", output)
    save_file({"x": torch.ones(1)}, tmp_path / "weights")
    assert "weights: is not a calibration file" in message("--merge", path, tmp_path / "weights", "-o", output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["wan-tiny", "--prompts", "0"], "0 calibration prompts: there are 1 to"),
        (["wan-tiny", "--prompts", "100000"], "100000 calibration prompts: there are 1 to"),
        (["wan-tiny", "--steps", "0"], "steps 0: must be a positive whole number"),
        (["wan-tiny", "--guidance", "-1"], "guidance -1.0: must be a positive number"),
        (["wan-tiny", "--device", "foo"], "device 'foo' cannot be used here"),
        (["wan-tiny", "--image", "first.png"], "this model takes no --image"),
        (["wan-tiny", "--clips", "nothing"], "nothing: no such folder"),
        (["wan-tiny", "--prompt-file", "nothing"], "nothing: cannot be read"),
        (["wan-tiny", "wan-tiny"], "2 models: calibrate one at a time, or merge calibration files with --merge"),
        (["wan-tinny"], "wan-tinny: no such directory or model (did you mean wan-tiny"),
        (["wan-tiny", "--revision", "main"], "a local model has no revision"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in message(*arguments, "-o", tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--size", "36x32"], ["--frames", "8"]])
def test_sizes_that_do_not_fit(tmp_path, arguments):
    assert "must be a" in message("wan-tiny", "-o", tmp_path / "c", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--calls", "0"], ["--batch", "0"], ["--seed", "-1"], ["--size", "32"]])
def test_misuse(tmp_path, arguments):
    result = run("wan-tiny", "-o", tmp_path / "c", *arguments)
    assert result.exit_code == 2
    assert not (tmp_path / "c").exists()


def test_no_model_and_no_output(tmp_path):
    assert run("-o", tmp_path / "c").exit_code == 2
    assert run("wan-tiny").exit_code == 2


@pytest.mark.parametrize("content", [b"", b"\n  \n\t\n"])
def test_a_prompt_file_without_a_prompt(tmp_path, content):
    (tmp_path / "prompts.txt").write_bytes(content)
    words = message("wan-tiny", "-o", tmp_path / "c", "--prompt-file", tmp_path / "prompts.txt")
    assert "prompts.txt: holds no prompt" in words
    assert not (tmp_path / "c").exists()


def test_a_prompt_file_that_is_no_text(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xff\xfe\x00")
    words = message("wan-tiny", "-o", tmp_path / "c", "--prompt-file", tmp_path / "prompts.txt")
    assert "prompts.txt: cannot be read" in words


def test_an_output_that_is_a_directory(tmp_path):
    assert "cannot be written there (is a directory)" in message("wan-tiny", "-o", tmp_path)
