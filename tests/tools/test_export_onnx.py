"""hif4c export-onnx: what it prints, how its options are passed on, and when it fails."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from typer.testing import CliRunner

from hif4c.compiler import onnx_verify
from hif4c.compiler.amounts import format_bytes
from hif4c.compiler.onnx_verify import OnnxCheck
from hif4c.runtime.errors import Hif4Error
from hif4c.tools.cli import app
from tests.support.forging import forge

CHECK = OnnxCheck(
    path=Path("model.onnx"), expert="transformer", variant=None, linears=20, codes_differ=0, linear_error=0.5, worst="",
    program_error=1e-7, worst_value="", distance=1e-7, recorded=1e-3, flips=0, activations=1000, flip_distance=1e-3,
)  # fmt: skip


@pytest.fixture
def artifact(artifacts, tmp_path):
    return shutil.copytree(artifacts("t2v", "rtn"), tmp_path / "[out].hif4")


def run(*arguments):
    return CliRunner().invoke(app, ["export-onnx", *map(str, arguments)])


def metadata(path):
    return json.loads(onnx.load(path, load_external_data=False).metadata_props[0].value)


def test_every_expert(artifact, tmp_path):
    """A name in brackets is text, not markup; the weights stay where they are."""
    result = run(artifact, "-o", tmp_path / "model.onnx")
    assert result.exit_code == 0, (result.output, result.exception)
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("  model.")]
    assert [line[0] for line in lines] == ["model.transformer.onnx", "model.transformer_2.onnx"]
    for line in lines:
        path = tmp_path / line[0]
        expert = line[0].split(".")[1]
        weights = artifact / expert / "weights.safetensors"
        assert line[2:] == [
            f"{path.stat().st_size:,}",
            f"[out].hif4/{expert}/weights.safetensors",
            f"{weights.stat().st_size:,}",
        ]
    assert "the weights stay in" in result.stderr


def test_options(artifact, tmp_path):
    options = ("--expert", "transformer_2", "--opset", 20, "--weights", "copy", "--qdq")
    result = run(artifact, "-o", tmp_path / "m.onnx", *options)
    assert result.exit_code == 0, (result.output, result.exception)
    found = metadata(tmp_path / "m.onnx")
    assert (found["expert"], found["opset"], found["form"]) == ("transformer_2", 20, "qdq")
    assert [item["location"] for item in found["data"]] == ["m.safetensors"]
    again = run(artifact, "-o", tmp_path / "m.onnx", *options)
    assert isinstance(again.exception, Hif4Error)
    assert "already exists" in str(again.exception)


@pytest.mark.parametrize(("change", "verdict", "status"), [({}, "ok", 0), ({"codes_differ": 3}, "differs", 1)])
def test_verify(change, verdict, status, artifact, tmp_path, monkeypatch):
    """What the check says decides; files that differ are there to be looked at."""
    checked = []

    def verify(opened, paths, **options):
        checked.extend(paths)
        return [dataclasses.replace(CHECK, **change)]

    monkeypatch.setattr(onnx_verify, "verify_onnx", verify)
    result = run(artifact, "-o", tmp_path / "model.onnx", "--expert", "transformer", "--verify")
    assert result.exit_code == status
    assert checked == [tmp_path / "model.onnx"]
    assert (tmp_path / "model.onnx").is_file()
    (line,) = [line for line in result.stdout.splitlines() if verdict in line.split()]
    assert ("identical" in line) is (status == 0)


def test_what_cannot_be_verified_is_refused_before_it_is_exported(artifact, tmp_path):
    def without_golden(manifest):
        manifest["files"] = {name: item for name, item in manifest["files"].items() if not name.startswith("golden/")}

    forge(artifact, without_golden)
    shutil.rmtree(artifact / "golden")
    result = run(artifact, "-o", tmp_path / "model.onnx", "--verify")
    assert isinstance(result.exception, Hif4Error)
    assert "has no golden/transformer.safetensors; only what has golden outputs" in str(result.exception)
    assert list(tmp_path.glob("*.onnx")) == []


def test_the_summary_counts_what_is_written(artifact, tmp_path):
    for weights in ("copy", "artifact"):
        result = run(artifact, "-o", tmp_path / f"{weights}.onnx", "--expert", "transformer", "--weights", weights)
        size = sum(path.stat().st_size for path in tmp_path.glob(f"{weights}.*"))
        assert f"wrote {format_bytes(size)}" in result.stdout


def test_as_a_program(artifact, tmp_path):
    script = Path(__file__).parents[2] / "tools" / "export_onnx.py"
    command = [sys.executable, str(script), str(artifact), "-o", "missing/model.onnx"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.strip() == (
        "error: missing: there is no such folder; make it, or choose another place for the output."
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["[out].hif4"]
