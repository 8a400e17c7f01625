"""Guidance shared by two ranks gives the latents of one process, to the bit, on diffusers' own pipelines."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
from PIL import Image
from torch import nn

from hif4c.compiler import ranks as ranks_module
from hif4c.compiler.ranks import Ranks
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.native import portable_kernels
from hif4c.runtime.parallel_guidance import check_guidance_ranks, split_guidance
from hif4c.runtime.transformer import load
from hif4c.tools.sample import sample
from tests.support.checkpoints import VARIANTS, build_transformer
from tests.support.forked_ranks import in_ranks

STEPS = 4
PROMPT = "a red circle moves left"


class Counted(nn.Module):
    """A transformer that keeps the text embeddings it was called with."""

    def __init__(self, expert: nn.Module) -> None:
        super().__init__()
        self.expert: Any = expert
        self.texts: list[np.ndarray] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("expert"), name)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        self.texts.append(named["encoder_hidden_states"].float().numpy())
        return self.expert(*inputs, **named)


class Vae:
    """What the image-to-video pipeline asks of a VAE beside encoding."""

    config = SimpleNamespace(z_dim=16)


def random_condition(image: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """For `prepare_latents`: noise, and a random condition in place of the encoded image."""
    (generator,) = (item for item in arguments if isinstance(item, list))
    condition = torch.randn(1, 20, 2, 4, 4, generator=torch.Generator().manual_seed(9))
    return torch.randn(1, 16, 2, 4, 4, generator=generator[0]), condition


def make_pipeline(variant: str, compiled: Path | None = None) -> Any:
    """A pipeline without text encoder and VAE around one or two random transformers, each of which counts its calls."""
    names = ("transformer",) if variant == "ti2v" else ("transformer", "transformer_2")
    experts = {
        name: Counted(load(compiled, name) if compiled else build_transformer(variant, seed=index))
        for index, name in enumerate(names)
    }
    # Half of the steps for each of two experts.
    settings = {"boundary_ratio": 0.8 if len(names) == 2 else None, "expand_timesteps": variant == "ti2v"}
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    modules = {"tokenizer": None, "text_encoder": None, "vae": None, "scheduler": scheduler, **experts}
    if variant != "i2v":
        return WanPipeline(**modules, **settings)
    pipeline = WanImageToVideoPipeline(**modules, **settings)
    pipeline.vae, pipeline.prepare_latents = Vae(), random_condition
    return pipeline


def run(pipeline: Any, variant: str, *, seed: int = 0, guidance: float = 4.0) -> np.ndarray:
    """Latents, as an array: a tensor does not outlive the process that sends it."""
    generator = torch.Generator().manual_seed(1)
    arguments: dict[str, Any] = {
        "prompt_embeds": torch.randn(1, 7, 64, generator=generator),
        "negative_prompt_embeds": torch.randn(1, 7, 64, generator=generator),
        "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": STEPS, "guidance_scale": guidance,
        "generator": [torch.Generator().manual_seed(seed)], "output_type": "latent", "return_dict": False,
    }  # fmt: skip
    if variant != "ti2v":
        arguments["guidance_scale_2"] = 2.5
    if variant == "i2v":
        arguments["image"] = Image.new("RGB", (32, 32))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**arguments)[0].numpy()


def texts_of(pipeline: Any) -> list[list[np.ndarray]]:
    """The text embeddings of the calls of every expert."""
    return [expert.texts for expert in (pipeline.transformer, pipeline.transformer_2) if expert is not None]


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_give_the_latents_of_one_process(variant):
    pipeline = make_pipeline(variant)

    def work(ranks: Ranks) -> Any:
        if ranks.count == 1:
            return run(pipeline, variant), texts_of(pipeline)
        with split_guidance(pipeline):
            latents = run(pipeline, variant)
        assert isinstance(pipeline.transformer, Counted)
        return latents, texts_of(pipeline)

    ((expected, texts),) = in_ranks(1, work)
    found = in_ranks(2, work)
    experts = 1 if variant == "ti2v" else 2
    assert [len(calls) for calls in texts] == [2 * STEPS // experts] * experts
    for rank, (latents, mine) in enumerate(found):
        assert np.array_equal(latents, expected)
        # Each rank made every second of the calls: those with the prompt, or those without.
        for calls, all_calls in zip(mine, texts, strict=True):
            assert len(calls) == STEPS // experts
            assert all(np.array_equal(a, b) for a, b in zip(calls, all_calls[rank::2], strict=True))


def test_compiled_experts(artifacts):
    with portable_kernels():
        pipeline = make_pipeline("t2v", artifacts("t2v"))

        def work(ranks: Ranks) -> np.ndarray:
            if ranks.count == 1:
                return run(pipeline, "t2v")
            with split_guidance(pipeline):
                return run(pipeline, "t2v")

        (expected,) = in_ranks(1, work)
        first, second = in_ranks(2, work)
    assert np.array_equal(first, expected)
    assert np.array_equal(second, expected)


def test_what_rank_0_starts_from_is_what_both_predict_from():
    """As when a user gives no generator: each rank then starts from noise of its own."""
    pipeline = make_pipeline("ti2v")

    def work(ranks: Ranks) -> np.ndarray:
        if ranks.count == 1:
            return run(pipeline, "ti2v")
        with split_guidance(pipeline):
            return run(pipeline, "ti2v", seed=ranks.rank)

    (expected,) = in_ranks(1, work)
    first, second = in_ranks(2, work)
    assert np.array_equal(first, expected)
    assert not np.array_equal(second, expected)


def test_without_guidance_there_is_nothing_to_share():
    pipeline = make_pipeline("ti2v")

    def work(ranks: Ranks) -> None:
        with split_guidance(pipeline):
            run(pipeline, "ti2v", guidance=1.0)

    for error in in_ranks(2, work):
        assert isinstance(error, Hif4Error)
        assert "without guidance" in str(error)
    # A last step without the second call is seen as well.
    assert all("without guidance" in str(error) for error in in_ranks(2, lambda ranks: _one_call(pipeline)))


def _one_call(pipeline: Any) -> None:
    with split_guidance(pipeline), pipeline.transformer.cache_context("cond"):
        pipeline.transformer(
            hidden_states=torch.zeros(1, 48, 1, 2, 2), timestep=torch.zeros(1, 1),
            encoder_hidden_states=torch.zeros(1, 7, 64), return_dict=False,
        )  # fmt: skip


def test_a_rank_that_goes_ends_the_other_with_a_sentence():
    pipeline = make_pipeline("ti2v")

    def work(ranks: Ranks) -> None:
        if ranks.rank == 1:
            raise ValueError("gone")
        with split_guidance(pipeline):
            run(pipeline, "ti2v")

    first, second = in_ranks(2, work)
    assert isinstance(second, ValueError)
    assert isinstance(first, Hif4Error)
    assert "the other rank has gone" in str(first)


def test_other_numbers_of_ranks_are_refused():
    check_guidance_ranks(1, 1.0)
    check_guidance_ranks(2, 4.0)
    with pytest.raises(Hif4Error, match="shared by 2 ranks, not 3"):
        check_guidance_ranks(3, 4.0)
    with pytest.raises(Hif4Error, match="without guidance"):
        check_guidance_ranks(2, 1.0)
    with pytest.raises(Hif4Error, match="shared by 2 ranks, not 1"), split_guidance(make_pipeline("ti2v")):
        pass


def test_the_command(wan_tiny_artifact, tmp_path, capfd):
    """On wan-tiny: rank 0 alone prints and writes, and the clip is that of one process."""

    def work(ranks: Ranks) -> None:
        folder = tmp_path / f"{ranks.count} ranks"
        with mock.patch.object(ranks_module, "start_ranks", return_value=contextlib.nullcontext(ranks)):
            clip = folder / f"{ranks.rank}.mp4"
            keep = "both" if ranks.count == 1 else "active"
            asked = {"steps": 2, "frames": 5, "negative_prompt": "blue", "kernels": "portable", "keep": keep}
            sample(wan_tiny_artifact, PROMPT, clip, **asked)

    for count in (1, 2):
        assert in_ranks(count, work) == [None] * count
        assert capfd.readouterr().out.count("wrote") == 3
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / f"{count} ranks").iterdir()} for count in (1, 2))
    assert one == two
    assert sorted(one) == ["0.gif", "0.mp4", "0.png"]


def test_the_command_with_three_ranks(wan_tiny_artifact, tmp_path):
    def work(ranks: Ranks) -> None:
        with mock.patch.object(ranks_module, "start_ranks", return_value=contextlib.nullcontext(ranks)):
            sample(wan_tiny_artifact, PROMPT, tmp_path / "clip.mp4")

    first, *others = in_ranks(3, work)
    assert isinstance(first, Hif4Error)
    assert "shared by 2 ranks, not 3" in str(first)
    assert all(isinstance(other, EOFError) for other in others)  # they have left without a word
