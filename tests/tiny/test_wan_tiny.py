"""The shipped wan-tiny: its configuration, its size, and that it follows prompts it was never trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from safetensors import safe_open
from transformers import AutoTokenizer

from hif4c.compiler.models import tiny_directory
from hif4c.compiler.tiny.evaluation import sample_clip, score_pipeline
from hif4c.compiler.tiny.scorer import summarize
from hif4c.compiler.tiny.world import all_captions

EXPERTS = ("transformer", "transformer_2")


@pytest.fixture(scope="module")
def pipeline() -> Iterator[WanPipeline]:
    # Products this small are slower on several threads, and many times slower on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pipe = WanPipeline.from_pretrained(tiny_directory(), dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    yield pipe
    torch.set_num_threads(threads)


def test_shipped_files_are_small_and_bf16() -> None:
    files = [file for file in tiny_directory().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 15_000_000
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert {file.parent.name for file in weights} == {"text_encoder", "vae", *EXPERTS}
    for file in weights:
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} == {"BF16"}  # noqa: SIM118


@pytest.mark.parametrize("name", EXPERTS)
def test_expert_configuration(name: str) -> None:
    config = json.loads((tiny_directory() / name / "config.json").read_text())
    expected = {
        "patch_size": [1, 2, 2],
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "num_layers": 6,
        "ffn_dim": 1280,
        "freq_dim": 64,
        "text_dim": 64,
        "in_channels": 8,
        "out_channels": 8,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 64,
        "image_dim": None,
        "added_kv_proj_dim": None,
    }
    assert {key: config[key] for key in expected} == expected


def test_every_block_linear_has_whole_units(pipeline: WanPipeline) -> None:
    for name in EXPERTS:
        blocks = getattr(pipeline, name).blocks
        linears = [module for module in blocks.modules() if isinstance(module, torch.nn.Linear)]
        assert len(linears) == 60
        assert all(linear.in_features % 64 == 0 for linear in linears)


def test_experts_hand_over_at_the_boundary(pipeline: WanPipeline) -> None:
    assert pipeline.config.boundary_ratio == 0.875
    assert pipeline.scheduler.config.prediction_type == "flow_prediction"
    assert pipeline.scheduler.config.flow_shift == 3.0
    first, second = (getattr(pipeline, name).blocks[0].attn1.to_q.weight for name in EXPERTS)
    assert not torch.equal(first, second)


def test_tokenizer_knows_every_caption() -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_directory() / "tokenizer")
    captions = all_captions()
    tokens = tokenizer(captions).input_ids
    assert all(tokenizer.unk_token_id not in row for row in tokens)
    assert all(len(row) == len(text.split()) + 1 for row, text in zip(tokens, captions, strict=True))
    assert len({tuple(row) for row in tokens}) == len(captions)


def test_held_out_prompts_are_followed(pipeline: WanPipeline) -> None:
    scores = score_pipeline(pipeline, 4)
    assert sum(score.fully_right for score in scores) >= 3
    summary = summarize(scores)
    assert summary["fit_iou"] > 0.6
    assert summary["subject_consistency"] > 0.6


def test_guidance_and_prompt_matter(pipeline: WanPipeline) -> None:
    first = sample_clip(pipeline, "a red cross moving left on a black background", 0, num_inference_steps=6)
    second = sample_clip(pipeline, "a red cross moving left on a white background", 0, num_inference_steps=6)
    assert first.shape == (9, 32, 32, 3)
    assert second.mean() - first.mean() > 0.4


@pytest.mark.parametrize("size", [(5, 32, 32), (17, 32, 32), (9, 48, 64), (1, 32, 32)])
def test_other_sizes_are_sampled(pipeline: WanPipeline, size: tuple[int, int, int]) -> None:
    frames, height, width = size
    options = {"num_frames": frames, "height": height, "width": width, "num_inference_steps": 2}
    clip = sample_clip(pipeline, "a red cross standing still on a black background", 0, **options)
    assert clip.shape == (*size, 3)
    assert np.isfinite(clip).all()


@pytest.mark.parametrize("length", [16, 64, 512])
def test_padded_text_length_does_not_matter(pipeline: WanPipeline, length: int) -> None:
    prompt = "a blue ring moving down on a white background"
    clip = sample_clip(pipeline, prompt, 1, max_sequence_length=length, num_inference_steps=10)
    # White around, blue inside: the caption was understood at this length.
    assert clip[:, :2].mean() > 0.8
    assert clip.min(axis=(1, 2))[:, 0].max() < 0.5


def test_tiny_directory_is_a_pipeline_directory() -> None:
    assert isinstance(tiny_directory(), Path)
    index = json.loads((tiny_directory() / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"
