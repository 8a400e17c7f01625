"""hif4c trust: what would run is shown, one question, and the trust can be taken back."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.kernel_files import trust_entries, write_kernel_set
from hif4c.runtime.trust import trust_path, trusted_hashes
from hif4c.tools.cli import app
from tests.support.forging import forge


@pytest.fixture(autouse=True)
def elsewhere(artifacts: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who compiled nothing here."""
    artifacts()  # first, as a compilation records what it built
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def artifact(artifacts: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy with one GPU kernel more."""
    path = shutil.copytree(artifacts(), tmp_path / "artifact")
    folder = path / "kernels" / "cuda-sm80"
    write_kernel_set(folder, "cuda-sm80", {}, [("a", "b", "a.b.cubin", b"binary", {})])
    forge(path, **{f"kernels/cuda-sm80/{file.name}": file.read_bytes() for file in folder.iterdir()})
    return path


def run(*arguments: str | Path, answer: str | None = None, monkeypatch: pytest.MonkeyPatch | None = None) -> Result:
    """Run `hif4c trust`, at a terminal when there is an answer."""
    if monkeypatch is not None:
        monkeypatch.setattr("hif4c.tools.trust.is_interactive", lambda: True)
    return CliRunner().invoke(app, ["trust", *map(str, arguments)], input=answer)


def test_what_would_run_is_shown_and_recorded_once(artifact: Path):
    entries = trust_entries(open_artifact(artifact))
    result = run(artifact, "--yes")
    assert result.exit_code == 0, (result.output, result.exception)
    rows = [line.split() for line in result.stdout.splitlines() if line.split()[-1:] == ["no"]]
    assert ["cuda-sm80", "a.b.cubin"] in [row[:2] for row in rows]
    assert len(rows) == len([name for name in open_artifact(artifact).files if name.startswith("kernels/")]) - (
        len({entry.target for entry in entries.values()})
    )  # all but the lists
    digest = next(digest for digest, entry in entries.items() if entry.file == "a.b.cubin")
    assert digest[:32] in result.stdout
    assert str(trust_path()) in result.stdout.replace("\n", "")
    assert trusted_hashes() == entries.keys()
    again = run(artifact)  # nothing to ask any more
    assert again.exit_code == 0
    assert "trusted already" in again.stdout
    assert sum(line.split()[-1:] == ["yes"] for line in again.stdout.splitlines()) == len(rows)


@pytest.mark.parametrize(("answer", "trusted"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_one_question_at_a_terminal(artifact: Path, monkeypatch: pytest.MonkeyPatch, answer: str, trusted: bool):
    result = run(artifact, answer=answer, monkeypatch=monkeypatch)
    assert result.stdout.count("Let these run on this machine?") == 1
    assert result.exit_code == (0 if trusted else 1)
    assert bool(trusted_hashes()) == trusted


def test_without_a_terminal_and_yes_nothing_is_trusted(artifact: Path):
    assert not sys.stdin.isatty()
    result = run(artifact)
    assert isinstance(result.exception, Hif4Error)
    assert "no terminal to ask on; look at the table, and give --yes" in str(result.exception)
    assert not trusted_hashes()


def test_trust_is_taken_away_again(artifact: Path):
    run(artifact, "--yes")
    before = len(trusted_hashes())
    result = run(artifact, "--revoke")
    assert result.exit_code == 0, (result.output, result.exception)
    assert f"no longer trusted: {before} files" in result.stdout
    assert not trusted_hashes()
    assert run(artifact, "--revoke").exit_code == 0


@pytest.mark.parametrize("name", ["kernels/cuda-sm80/a.b.cubin", "transformer/graph.json"])
def test_a_damaged_artifact_is_not_trusted(artifact: Path, name: str):
    data = (artifact / name).read_bytes()
    (artifact / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    result = run(artifact, "--yes")
    assert isinstance(result.exception, Hif4Error)
    assert "does not match the manifest" in str(result.exception)
    assert not trusted_hashes()


def test_an_artifact_without_kernels_has_nothing_to_trust(artifact: Path):
    shutil.rmtree(artifact / "kernels")

    def drop(manifest: dict) -> None:
        manifest["files"] = {name: entry for name, entry in manifest["files"].items() if "kernels/" not in name}

    forge(artifact, drop)
    result = run(artifact)
    assert result.exit_code == 0
    assert "brings no kernels" in result.stdout


def test_a_trust_file_that_others_may_write_is_not_added_to(artifact: Path):
    run(artifact, "--yes")
    before = trust_path().read_bytes()
    trust_path().chmod(0o666)
    result = run(artifact, "--yes")
    assert isinstance(result.exception, Hif4Error)
    assert "other users may write to it" in str(result.exception)
    assert trust_path().read_bytes() == before
