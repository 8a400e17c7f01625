"""compile_model from a directory to an artifact, through everything that a user's call goes through."""

import filecmp
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from hif4c.compiler import experts as experts_module
from hif4c.compiler.compile import CompileOptions, compile_model
from hif4c.compiler.pipeline import PASS_NAMES
from hif4c.compiler.recipe import load_recipe
from hif4c.compiler.report import write_report
from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import quantize
from hif4c.runtime.kernel_files import cpu_target
from hif4c.runtime.transformer import load
from hif4c.runtime.verify import verify_artifact
from tests.support.checkpoints import VARIANTS, write_diffusers_model, write_wan_model
from tests.support.kills import assert_equal_trees, files_of

COMPILE = """
import sys
from hif4c.compiler.compile import CompileOptions, compile_model
from hif4c.compiler.recipe import load_recipe
recipes = {name: load_recipe("rtn") for name in sys.argv[3:]}
compile_model(sys.argv[1], sys.argv[2], CompileOptions(recipes, components="none"), lambda event, value: None)
"""

DUMB = {"TERM": "dumb", "COLUMNS": "40", "LINES": "7", "NO_COLOR": "1"}


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_two_compiles_give_the_same_bytes(artifacts, models, tmp_path):
    """The second one in a process of its own, with another hash seed, directory, terminal and number of threads,
    nothing shared or left out; it also shows that what the other tests leave out (see quick_compile) changes no byte.
    The directory holds an inspect.py, as tools/ does, which the process that verifies must not take for Python's."""
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1", **DUMB}
    output = tmp_path / "deep" / "er" / "again"
    (tmp_path / "inspect.py").write_text("raise SystemExit('the wrong inspect was imported')\n")
    result = subprocess.run(
        [sys.executable, "-P", "-c", COMPILE, models["t2v"].directory, output, "transformer", "transformer_2"],
        capture_output=True, text=True, check=False, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert_equal_trees(artifacts("t2v", "rtn"), output)
    assert os.listdir(output.parent) == ["again"]


@pytest.mark.parametrize(
    "environment",
    [
        DUMB,
        {"TERM": "xterm-256color", "COLUMNS": "300", "FORCE_COLOR": "1"},
        {"TERM": "unknown", "TTY_COMPATIBLE": "0"},
    ],
)
def test_the_terminal_does_not_change_the_report(environment, artifacts, monkeypatch, tmp_path):
    """With the test above, of the one compiled in a dumb terminal: not a byte of the artifact depends on it."""
    path = artifacts("t2v", "rtn")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    write_report(open_artifact(path), tmp_path)
    for name in ("report.html", "report.json"):
        assert (tmp_path / name).read_bytes() == (path / name).read_bytes(), name


@pytest.mark.parametrize("variant", ["t2v", "ti2v"])
def test_both_layouts_of_one_model_give_the_same_experts(variant, artifacts, quick_compile, tmp_path):
    """Of the checkpoint only the names differ, so of the artifact only the name of the directory it was made from."""
    write_wan_model(tmp_path / variant, variant, shards=True)
    original = quick_compile(tmp_path / variant, tmp_path / "out")
    converted = artifacts(variant, "rtn")
    assert files_of(original) == files_of(converted)
    for relative_path in files_of(original):
        if relative_path != "manifest.json":
            assert filecmp.cmp(original / relative_path, converted / relative_path, shallow=False), relative_path
    manifests = [open_artifact(path).manifest for path in (original, converted)]
    for name in manifests[0]["experts"]:
        fingerprints = {manifest["experts"][name]["fingerprint"] for manifest in manifests}
        assert len(fingerprints) == 1


def test_shards_change_nothing(artifacts, quick_compile, tmp_path):
    write_diffusers_model(tmp_path / "t2v", "t2v", shards=True)
    assert len(list((tmp_path / "t2v" / "transformer").glob("*.safetensors"))) > 1
    assert_equal_trees(quick_compile(tmp_path / "t2v", tmp_path / "out"), artifacts("t2v", "rtn"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_planes_are_the_quantized_weights_and_take_4_and_a_half_bits(variant, artifacts, models):
    path = artifacts(variant, "rtn")
    report = json.loads((path / "report.json").read_text())
    for name, info in open_artifact(path).experts.items():
        checkpoint = load_file(models[variant].directory / name / "diffusion_pytorch_model.safetensors")
        stored = load_file(path / name / "weights.safetensors")
        planes = weights = 0
        for linear in info.linears:
            weight = checkpoint[f"{linear['path']}.weight"]
            assert tuple(weight.shape) == (linear["out_features"], linear["in_features"])
            if linear["precision"] == "high":
                assert torch.equal(stored[f"{linear['path']}.weight"], weight)
                continue
            for plane, expected in zip(("codes", "scales"), quantize(weight), strict=True):
                found = stored[f"{linear['path']}.weight.{plane}"]
                assert torch.equal(found, expected)
                planes += found.nbytes
            weights += weight.numel()
        assert 16 * planes == 9 * weights
        entry = report["experts"][name]
        assert (entry["plane_bytes"], entry["quantized_weights"]) == (planes, weights)
        assert entry["bits_per_quantized_weight"] == 4.5
        assert entry["bf16_bytes"] == 2 * sum(value.numel() for value in checkpoint.values())
        sizes = sum(file.stat().st_size for file in (path / name).iterdir())
        assert entry["file_bytes"] == sizes


def test_a_recipe_for_each_expert(models, quick_compile, inputs, tmp_path):
    recipes = {"transformer": "rotate", "transformer_2": "weight-only"}
    path = quick_compile(models["t2v"].directory, tmp_path / "out", recipes)
    artifact = open_artifact(path)
    assert {name: info.recipe["name"] for name, info in artifact.experts.items()} == recipes
    kinds = {}
    for name in artifact.experts:
        kinds[name] = {linear["precision"] for linear in artifact.expert(name).linears}
        sample = inputs("t2v", 1, 2, 4, 6, 5)
        with torch.no_grad():
            expected = models["t2v"].experts[name](*sample, return_dict=False)[0]
        assert relative(load(path, name)(*sample).sample, expected) < 0.3
    assert kinds == {"transformer": {"high", "w4a4"}, "transformer_2": {"high", "w4a16"}}
    assert all(check.passed for check in verify_artifact(path))


def test_one_expert_of_two(models, quick_compile, artifacts, tmp_path):
    path = quick_compile(models["t2v"].directory, tmp_path / "out", {"transformer_2": "rtn"})
    artifact = open_artifact(path)
    assert list(artifact.experts) == ["transformer_2"]
    assert artifact.manifest["model"]["experts"] == ["transformer", "transformer_2"]  # those of the model
    assert not (path / "transformer").exists()
    for name in ("graph.json", "weights.safetensors"):
        assert filecmp.cmp(
            path / "transformer_2" / name, artifacts("t2v", "rtn") / "transformer_2" / name, shallow=False
        )
    with pytest.raises(Hif4Error, match="holds no expert 'transformer'; it holds transformer_2"):
        load(path)


def test_channels_that_do_not_fill_units_stay_and_the_rest_is_right(quick_compile, inputs, tmp_path):
    """Three heads of 32: only ffn.net.2, with 256 input channels, becomes 4-bit."""
    written = write_diffusers_model(tmp_path / "odd", "t2v", experts=1, num_attention_heads=3)
    assert list(written) == ["transformer"]
    path = quick_compile(tmp_path / "odd", tmp_path / "out")
    linears = {linear["path"]: linear for linear in open_artifact(path).expert("transformer").linears}
    kept = [linear for linear in linears.values() if linear["reason"] == "in_features 96 is not a multiple of 64"]
    assert len(kept) == 18
    assert linears["blocks.0.ffn.net.2"]["precision"] == "w4a4"
    model = WanTransformer3DModel.from_pretrained(tmp_path / "odd" / "transformer", torch_dtype=torch.bfloat16)
    sample = inputs("t2v", 2, 2, 4, 6, 5)
    with torch.no_grad():
        expected = model(*sample, return_dict=False)[0]
    # Two linears of twenty are quantized: below the error of the whole, above the noise of bf16.
    assert 1e-3 < relative(load(path)(*sample).sample, expected) < 0.15


def test_the_rest_of_the_pipeline_is_copied_or_linked(models, quick_compile, tmp_path):
    """A VAE of two files: the pickle beside the safetensors is left behind."""
    model = shutil.copytree(models["ti2v"].directory, tmp_path / "model")
    (model / "vae").mkdir()
    (model / "vae" / "config.json").write_text("{}")
    shutil.copy(model / "transformer" / "diffusion_pytorch_model.safetensors", model / "vae")
    (model / "vae" / "pickled.bin").write_bytes(b"\x80\x04.")
    for mode in ("copy", "link"):
        path = quick_compile(model, tmp_path / mode, components=mode, golden=False)
        pipeline = [name for name in files_of(path) if name.startswith("pipeline/")]
        assert pipeline == [
            "pipeline/model_index.json", "pipeline/vae/config.json", "pipeline/vae/diffusion_pytorch_model.safetensors",
        ]  # fmt: skip
        copied = path / "pipeline/vae/diffusion_pytorch_model.safetensors"
        assert copied.samefile(model / "vae" / copied.name) == (mode == "link")
        index = json.loads((path / "pipeline/model_index.json").read_text())
        assert (index["transformer"], index["vae"]) == ([None, None], ["diffusers", "AutoencoderKLWan"])
        assert not (path / "golden").exists()
        open_artifact(path).verify()
        (check,) = verify_artifact(path)
        assert check.passed
        assert check.replay is None


def test_events_tell_the_progress(models, captures, monkeypatch, tmp_path):
    """Steps in order, every pass, and amounts that add up to the total announced before them."""
    monkeypatch.setattr(experts_module, "capture", captures)
    events = []
    options = CompileOptions({"transformer": load_recipe("rtn")}, components="none")
    compile_model(str(models["ti2v"].directory), tmp_path / "out", options, lambda *event: events.append(event))
    steps = [value for kind, value in events if kind == "step"]
    assert steps == [
        f"building kernels for {cpu_target()}", "capturing transformer", "packing transformer",
        "recording golden outputs", "verifying in a fresh process",
    ]  # fmt: skip
    starts = [index for index, (kind, _) in enumerate(events) if kind == "total"]
    assert [events[start - 1][1] for start in starts] == [
        "packing transformer", "recording golden outputs", "verifying in a fresh process",
    ]  # fmt: skip
    assert [kind for kind, _ in events[: starts[0]]].count("bytes") == 0
    for start, end in zip(starts, [*starts[1:], len(events)], strict=True):
        assert sum(value for kind, value in events[start:end] if kind == "bytes") == events[start][1] > 0
    assert [value.name for kind, value in events if kind == "pass"] == list(PASS_NAMES)
