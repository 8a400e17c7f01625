"""A small calibrated model that several tests here share: made once a session, in the ways that the compiler would."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from hif4c.compiler import calibrate as calibrate_module
from hif4c.compiler.calibrate import calibrate
from hif4c.compiler.calibration import Calibration, ExpertCalibration
from hif4c.compiler.calibration_inputs import Call
from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.choose import Choices, choose
from hif4c.compiler.locate import locate_model
from hif4c.compiler.models import WanConfig
from hif4c.compiler.pipeline import run_passes
from hif4c.compiler.plan import make_plan
from hif4c.compiler.recipe import Recipe
from hif4c.passes.program import Program
from tests.support.checkpoints import small_config, write_diffusers_model

OUTLIERS = {"blocks.0.attn2.to_q": [5], "blocks.1.attn2.to_q": [5, 77]}
"""Input -> its planted channels, 40 times as large as the others."""


MIXED = """
description = "</script><img src=x onerror=window.hacked=1> & \\"quoted\\""
shift = true
mask_percentile = 99.9
alpha = 0.5
hadamard = 64
rank = 2
keep_high = ["blocks.1.attn1.to_k"]
bf16_layers = 0.2
bf16_steps = 0.4
"""


@dataclass(frozen=True)
class CalibratedModel:
    """A checkpoint of one expert with massive channels in its affine norms, and its calibration on random calls."""

    directory: Path
    path: Path
    calls: list[Call]
    checkpoint: Checkpoint
    calibration: ExpertCalibration
    config: WanConfig
    capture: Callable[[], Program]
    chosen: dict[Recipe, Choices]

    def choose(self, recipe: Recipe) -> Choices:
        """Made once a recipe: not to be changed."""
        if recipe not in self.chosen:
            plan = make_plan(self.config, recipe)
            self.chosen[recipe] = choose(plan, recipe, self.calibration, self.checkpoint)
        return self.chosen[recipe]

    def program(self, recipe: Recipe, stop_after: str | None = None) -> Program:
        """The program as a compile with this recipe makes it."""
        program = self.capture()
        run_passes(program, self.choose(recipe), recipe, stop_after=stop_after)
        return program

    def weight(self, path: str) -> torch.Tensor:
        return self.checkpoint.read(f"{path}.weight")

    def rows(self, path: str) -> torch.Tensor:
        """Calibration rows of a linear's input, float32."""
        (group,) = (group for group in self.calibration.groups.values() if path in group.readers)
        return self.calibration.rows(group.name).float()

    def state(self) -> dict[str, torch.Tensor]:
        return load_file(self.directory / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="session")
def calibrated(captures, inputs, tmp_path_factory: pytest.TempPathFactory) -> CalibratedModel:
    folder = tmp_path_factory.mktemp("calibrated")
    (model,) = write_diffusers_model(folder / "model", "t2v", experts=1).values()
    for path, channels in OUTLIERS.items():
        norm = model.blocks[int(path.split(".")[1])].norm2
        norm.weight[channels] = 40.0
    model.save_pretrained(folder / "model" / "transformer")
    samples = [inputs(seed=seed) for seed in (11, 12, 13)]
    calls = [
        Call(video, torch.full((2,), timestep), text)
        for (video, _, text), timestep in zip(samples, (900.0, 500.0, 100.0), strict=True)
    ]
    path = folder / "calibration.safetensors"
    with mock.patch.object(calibrate_module, "capture", captures):
        calibrate(locate_model(str(folder / "model")), {"transformer": calls}, path, [])
    config = WanConfig.from_dict(small_config("t2v"), "config.json")
    checkpoint = Checkpoint(folder / "model" / "transformer", config, "diffusers")
    calibration = Calibration(path).expert("transformer")
    return CalibratedModel(
        folder / "model", path, calls, checkpoint, calibration, config, lambda: captures.variant("t2v"), {}
    )


@pytest.fixture(scope="session")
def mixed(calibrated, quick_compile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with something of every pass, and a program for some timesteps. Shared: copy it before changing it.

    Two blocks with masks, shifts and side branches; linears of all precisions; a description that is markup.
    """
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "mixed.toml").write_text(MIXED)
    recipe = str(folder / "mixed.toml")
    return quick_compile(calibrated.directory, folder / "out", recipe, calibration=calibrated.path, golden=False)
