"""hif4c inspect --model-explorer and --diff: what they print, and what they say about what cannot be."""

import json
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hif4c.tools.cli import app
from hif4c.tools.console import run
from tests.support.forging import forge

WEIGHTS = "transformer/weights.safetensors"
Inspect = Callable[..., tuple[int, str, str]]


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Iterator[Inspect]:
    """Run `hif4c inspect` with all its error handling; returns status, stdout, stderr."""

    def execute(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run(lambda: app(["inspect", *map(str, arguments)]))
        return int(caught.value.code or 0), *capsys.readouterr()

    before = signal.getsignal(signal.SIGTERM)
    yield execute
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def mistake(inspect: Inspect) -> Callable[..., str]:
    """Run what must fail: status 1, nothing on stdout, one sentence; returns it."""

    def execute(*arguments: str | Path) -> str:
        status, stdout, stderr = inspect(*arguments)
        assert (status, stdout) == (1, "")
        (sentence,) = stderr.splitlines()
        assert sentence.startswith("error: ")
        return sentence

    return execute


@pytest.fixture
def plain(artifacts: Callable[..., Path]) -> Path:
    return artifacts("t2v", "rtn")


def test_model_explorer_files_and_the_command_that_opens_them(inspect: Inspect, plain: Path, tmp_path: Path) -> None:
    output = tmp_path / "a folder" / "out.json"
    status, text, _ = inspect(plain, "--model-explorer", output)
    assert status == 0
    program, graphs, option = shlex.split(text.splitlines()[-1])
    assert program == "model-explorer"
    assert [graph["id"] for graph in json.loads(Path(graphs).read_text())["graphs"]] == ["transformer", "transformer_2"]
    name, _, paths = option.partition("=")
    assert name == "--node_data_paths"
    written = sorted(path for path in output.parent.iterdir() if path != output)
    assert sorted(map(Path, paths.split(","))) == written
    assert all(f"wrote {path}" in text for path in (output, *written))
    assert "no sqnr: nothing was measured" in text


def test_model_explorer_mistakes(mistake: Callable[..., str], plain: Path, tmp_path: Path) -> None:
    assert "ends in .json" in mistake(plain, "--model-explorer", tmp_path / "out")
    assert "inside the artifact" in mistake(plain, "--model-explorer", plain / "out.json")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in mistake(plain, "--model-explorer", tmp_path / "file" / "out.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_diff_tells_from_its_own_artifact_to_the_other(inspect: Inspect, plain: Path, tmp_path: Path) -> None:
    after = shutil.copytree(plain, tmp_path / "after")
    tensors = load_file(after / WEIGHTS)
    tensors["proj_out.weight"][0, 0] += 1
    save_file(tensors, after / WEIGHTS)

    def change(manifest: dict) -> None:
        linears = {linear["path"]: linear for linear in manifest["experts"]["transformer"]["linears"]}
        linears["blocks.1.ffn.net.2"]["rounding"] = "gptq"

    forge(after, change, **{WEIGHTS: (after / WEIGHTS).read_bytes()})
    for arguments in (("--diff", plain, after), (after, "--diff", plain)):
        status, text, _ = inspect(*arguments)
        assert status == 0
        assert "rounding nearest -> gptq" in text
        assert "24 of 26 linears are the same" in text
        assert "transformer_2: nothing differs" in text
    assert "rounding gptq -> nearest" in inspect("--diff", after, plain)[1]
    status, text, _ = inspect("--diff", plain, plain)
    assert status == 0
    assert text.count("nothing differs") == 2


def test_diff_mistakes(mistake: Callable[..., str], plain: Path, tmp_path: Path) -> None:
    assert "there is no such directory" in mistake("--diff", tmp_path / "none", plain)
    assert "holds no manifest.json" in mistake("--diff", tmp_path, plain)
    assert "holds no manifest.json" in mistake("--diff", plain, tmp_path)
    for option in (("--block", "0"), ("--graph",), ("--expert", "transformer"), ("--stage", "list")):
        assert f"{option[0]} is for what is printed" in mistake("--diff", plain, plain, *option)
    damaged = shutil.copytree(plain, tmp_path / "damaged")
    data = (damaged / WEIGHTS).read_bytes()
    (damaged / WEIGHTS).write_bytes(b"\xff" * 8 + data[8:])
    assert str(damaged / WEIGHTS) in mistake("--diff", plain, damaged)
    (damaged / WEIGHTS).write_bytes(data[:-1])
    assert "bytes, the manifest says" in mistake("--diff", plain, damaged)
