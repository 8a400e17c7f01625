"""A compile with LoRAs is the compile of a checkpoint that they were added to before."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from hif4c.compiler import calibrate as calibrate_module
from hif4c.compiler.calibrate import calibrate
from hif4c.compiler.calibration import Calibration
from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.locate import locate_model
from hif4c.compiler.lora import fuse_loras
from hif4c.compiler.report import render_report
from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.errors import Hif4Error

EXPERTS = ("transformer", "transformer_2")


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[tuple[Path, float], ...]]:
    """Two files for one expert, one of them for the other, too: a 4-bit weight, a bias, a norm and a table change."""
    folder = tmp_path_factory.mktemp("loras")
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(shape, generator=generator)

    style, fast = folder / "style.safetensors", folder / "fast.safetensors"
    name = "lora_unet_blocks_1_cross_attn_v"
    save_file(
        {f"{name}.lora_down.weight": draw(4, 128), f"{name}.lora_up.weight": draw(128, 4), f"{name}.alpha": draw()},
        style,
    )
    name = "diffusion_model.blocks.0"
    save_file(
        {f"{name}.norm3.diff": draw(128), f"{name}.ffn.2.diff_b": draw(128), f"{name}.diff_m": draw(1, 6, 128)}, fast
    )
    return {"transformer": ((style, 0.5), (fast, 1.0)), "transformer_2": ((fast, -1.0),)}


@pytest.fixture(scope="module")
def fused_before(models, loras, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with the LoRAs in its files."""
    folder = tmp_path_factory.mktemp("fused") / "t2v"
    shutil.copytree(models["t2v"].directory, folder)
    for expert in EXPERTS:
        path = folder / expert / "diffusion_pytorch_model.safetensors"
        names = list(load_file(path))
        with fuse_loras(Checkpoint(models["t2v"].directory / expert), loras[expert], expert) as checkpoint:
            tensors = {name: checkpoint.read(name).clone() for name in names}
        path.unlink()
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def contents(path: Path) -> dict[str, bytes]:
    return {item.relative_to(path).as_posix(): item.read_bytes() for item in path.rglob("*") if item.is_file()}


def manifest(path: Path) -> Any:
    return json.loads((path / "manifest.json").read_text())


def test_same_bytes_as_fused_before(models, loras, fused_before, quick_compile, tmp_path):
    """But for what the manifest and the report say of the LoRAs, and of where the model was."""
    fused = quick_compile(models["t2v"].directory, tmp_path / "fused", loras=loras, golden=False)
    before = quick_compile(fused_before, tmp_path / "before", golden=False)
    told = ("manifest.json", "report.json", "report.html")
    first, second = contents(fused), contents(before)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name] and name not in told] == []
    mine, theirs = manifest(fused)["experts"], manifest(before)["experts"]
    for expert in EXPERTS:
        found = mine[expert].pop("loras")
        assert mine[expert] == {key: value for key, value in theirs[expert].items() if key != "loras"}
        assert [(item["file"], item["scale"]) for item in found] == [
            (path.name, scale) for path, scale in loras[expert]
        ]
        assert [item["tensors"] for item in found] == ([1, 3] if expert == "transformer" else [3])
    told = json.loads((fused / "report.json").read_text())["experts"]
    assert [item["file"] for item in told["transformer"]["loras"]] == ["style.safetensors", "fast.safetensors"]
    assert "fast.safetensors" in (fused / "report.html").read_text()
    assert "loras" not in json.loads((before / "report.json").read_text())["experts"]["transformer"]
    assert render_report(open_artifact(fused))[2].title == "LoRAs in the weights"


def test_a_calibration_is_of_the_fused_weights(calibrated, captures, loras, quick_compile, tmp_path):
    """One that was made with the LoRAs serves a compile with them; one of the model without them is refused."""
    mine, path, output = {"transformer": loras["transformer"]}, tmp_path / "calibration.safetensors", tmp_path / "out"
    with pytest.raises(Hif4Error, match=r"was made from other weights than this transformer .* with the same LoRAs"):
        quick_compile(calibrated.directory, output, "tail-aware", calibration=calibrated.path, loras=mine)
    assert not output.exists()
    with mock.patch.object(calibrate_module, "capture", captures):
        calibrate(locate_model(str(calibrated.directory)), {"transformer": calibrated.calls}, path, [], loras=mine)
    with Calibration(path) as found:
        assert found.expert("transformer").fingerprint != calibrated.calibration.fingerprint
    quick_compile(calibrated.directory, output, "tail-aware", calibration=path, loras=mine)
    (expert,) = manifest(output)["experts"].values()
    assert [item["tensors"] for item in expert["loras"]] == [1, 3]
    with pytest.raises(Hif4Error, match="was made from other weights"):
        quick_compile(calibrated.directory, tmp_path / "without", "tail-aware", calibration=path)
