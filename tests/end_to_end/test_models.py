"""The published models by name: T2V-A14B, I2V-A14B and TI2V-5B, narrow and with few layers, from both layouts."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from hif4c.compiler.calibrate import calibrate
from hif4c.compiler.calibration_inputs import Call
from hif4c.compiler.experts import DTYPE
from hif4c.compiler.locate import locate_model
from hif4c.compiler.plan import make_plan
from hif4c.compiler.recipe import load_recipe
from hif4c.compiler.synthetic_checkpoint import CheckpointOptions, make_checkpoint
from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.format import dequantize, quantize
from hif4c.runtime.transformer import load
from hif4c.runtime.verify import verify_artifact
from tests.support.checkpoints import narrow_model

CHANNELS = {"Wan2.2-T2V-A14B": (16, 16), "Wan2.2-I2V-A14B": (36, 16), "Wan2.2-TI2V-5B": (48, 48)}
COMPILE = """
import json, sys
from pathlib import Path
from hif4c.compiler.compile import CompileOptions, compile_model
from hif4c.compiler.memory_use import peak_rss
from hif4c.compiler.recipe import load_recipe
model, output, options = sys.argv[1:]
values = json.loads(options)
recipes = {"transformer": load_recipe(values.pop("recipe"))}
values = {key: Path(value) if key == "calibration" else value for key, value in values.items()}
compile_model(model, output, CompileOptions(recipes, components="none", **values), lambda event, value: None)
print(peak_rss())
"""


def ignore(event, value):
    pass


def write(model, path, **options):
    make_checkpoint(model, path, CheckpointOptions(**options), ignore)
    return path


def hashes(root):
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def differing(one, other, path=""):
    """Paths of the values that differ between two JSON objects."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return set() if one == other else {path}
    assert one.keys() == other.keys()
    return {name for key in one for name in differing(one[key], other[key], f"{path}.{key}".removeprefix("."))}


def make_inputs(config, per_token, seed=0):
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(1, config.in_channels, 3, 8, 6, generator=generator).bfloat16()
    timestep = torch.rand((1, 36) if per_token else (1,), generator=generator) * 1000
    return video, timestep, torch.randn(1, 7, config.text_dim, generator=generator).bfloat16()


def quantize_in_place(model, linears):
    """What `rtn` computes, in diffusers' module: the linears' weights and inputs rounded to HiF4, nothing else."""

    def rounded(x):
        return dequantize(*quantize(x), x.shape[-1])

    for linear in linears:
        if linear["precision"] == "w4a4":
            module = model.get_submodule(linear["path"])
            module.weight.data = rounded(module.weight.data)
            module.register_forward_pre_hook(lambda module, arguments: (rounded(arguments[0]), *arguments[1:]))


@pytest.fixture(scope="module")
def compiled(quick_compile, tmp_path_factory):
    """Name of a model -> its description, checkpoint and artifact; made once."""
    made = {}

    def compiled(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("compiled")
            model = narrow_model(name)
            checkpoint = write(model, folder / "checkpoint")
            made[name] = model, checkpoint, quick_compile(checkpoint, folder / "artifact")
        return made[name]

    return compiled


@pytest.mark.parametrize("name", CHANNELS)
def test_plan_compile_verify_and_forward(name, compiled):
    """The compiled expert computes what diffusers' own module computes with rounded weights and inputs, up to what the
    last bit of bf16 does: some intermediate values are rounded to bf16 there and not here. The yardstick is how far the
    output moves when all latents move by one ulp, which flips codes of 4 bits everywhere behind them; fusion changes
    fewer values by half as much, so 1.5 times is generous. And it is nearer to the rounded module than half of what
    the rounding does: half of the linears unrounded, or rounded twice, would not pass."""
    model, checkpoint, artifact = compiled(name)
    config = model.configs["transformer"]
    assert (config.in_channels, config.out_channels) == CHANNELS[name]
    location = locate_model(str(checkpoint))
    assert list(location.experts) == list(model.configs)
    plan = make_plan(location.configs["transformer"], load_recipe("rtn"), DTYPE)
    assert all(check.passed and check.replay.identical for check in verify_artifact(artifact, kernels="portable"))
    for expert, info in open_artifact(artifact).experts.items():
        precisions = [linear["precision"] for linear in info.linears]
        assert precisions == [decision.precision for decision in plan.decisions]
        assert (precisions.count("w4a4"), precisions.count("high")) == (20, 6)
        original = WanTransformer3DModel.from_pretrained(checkpoint / expert, torch_dtype=torch.bfloat16).eval()
        sample = make_inputs(config, model.pipeline.expand_timesteps)
        moved = (torch.nextafter(sample[0], torch.full_like(sample[0], torch.inf)), *sample[1:])
        with torch.no_grad():
            plain = original(*sample, return_dict=False)[0]
            quantize_in_place(original, info.linears)
            expected = original(*sample, return_dict=False)[0]
            yardstick = relative(original(*moved, return_dict=False)[0], expected)
        found = load(artifact, expert)(*sample).sample
        distance = relative(found, expected)
        assert found.shape == (1, config.out_channels, 3, 8, 6)
        message = f"{expert}: {distance:.4f} away, one ulp moves it by {yardstick:.4f}"
        assert 0 < distance < 1.5 * yardstick, message
        assert distance < relative(expected, plain) / 2, message


@pytest.mark.parametrize("name", CHANNELS)
def test_both_layouts_give_the_same_artifact(name, compiled, quick_compile, tmp_path):
    """Byte for byte, every file. The checkpoints have one name in two directories: it is the only thing of theirs that
    an artifact tells, as the next test shows."""
    model, _, artifact = compiled(name)
    wan = write(model, tmp_path / "checkpoint", layout="wan", shard_bytes=200_000)
    assert hashes(artifact) == hashes(quick_compile(wan, tmp_path / "artifact"))


def test_of_a_checkpoint_an_artifact_tells_its_name_alone(compiled, quick_compile, tmp_path):
    """Here another one of the same length, so that the sizes of the reports stay the same as well."""
    model, _, one = compiled("Wan2.2-TI2V-5B")
    two = quick_compile(write(model, tmp_path / "other_name", layout="wan"), tmp_path / "artifact")
    found, other = hashes(one), hashes(two)
    assert found.keys() == other.keys()
    assert {path for path in found if found[path] != other[path]} == {"manifest.json", "report.json", "report.html"}
    reports = [json.loads((path / "report.json").read_text()) for path in (one, two)]
    assert differing(*reports) == {"model"}
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (one, two)]
    files = {f"files.report.{kind}.sha256" for kind in ("html", "json")}
    assert differing(*manifests) == {"digest", "model.source", *files}


def compile_apart(directory: Path, recipe: str, **options: Any) -> int:
    """Compile `directory/checkpoint` in a process of its own; returns the peak of resident memory, children included.

    Checkpoint and artifact are removed: they are large.
    """
    values = json.dumps({"recipe": recipe, **options})
    try:
        result = subprocess.run(
            [sys.executable, "-P", "-c", COMPILE, str(directory / "checkpoint"), str(directory / "artifact"), values],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
    finally:
        shutil.rmtree(directory)
    return int(result.stdout)


@pytest.mark.parametrize("golden", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_layer_at_full_width_in_less_than_3_gb(golden, tmp_path):
    """Golden outputs take a forward with the portable kernels, and another one to verify them."""
    write("Wan2.2-T2V-A14B", tmp_path / "checkpoint", layers=1, experts=("transformer",))
    assert compile_apart(tmp_path, "rtn", golden=golden) < 3e9


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["rtn", "tail-aware"])
def test_memory_does_not_grow_with_the_layers(recipe, tmp_path):
    """A layer of this width has 28 MB in bf16: 12 more of them in memory would be 340 MB."""
    sizes = {"num_attention_heads": 8, "attention_head_dim": 128, "ffn_dim": 2816, "text_dim": 512}
    model = narrow_model("Wan2.2-T2V-A14B", **sizes)
    peaks = []
    for layers in (4, 16):
        directory = tmp_path / str(layers)
        write(model, directory / "checkpoint", layers=layers, experts=("transformer",))
        options = {}
        if recipe != "rtn":
            location = locate_model(str(directory / "checkpoint"))
            video, timestep, text = make_inputs(location.configs["transformer"], per_token=False)
            calibrate(location, {"transformer": [Call(video, timestep, text)]}, directory / "calibration", [])
            options["calibration"] = str(directory / "calibration")
        peaks.append(compile_apart(directory, recipe, **options))
    assert peaks[1] - peaks[0] < 64e6, peaks
