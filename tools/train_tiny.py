"""Train wan-tiny from scratch: VAE, text encoder, both experts; then export and score the pipeline.

The defaults are the recipe of the shipped weights. An interrupted run continues where its work folder says it was.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path.pop(0)  # run as a script: this folder must not hide the standard library (inspect)

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.multiprocessing as mp
from diffusers import AutoencoderKLWan

from hif4c.compiler.tiny.dit_data import DataRecipe, encode_clips
from hif4c.compiler.tiny.dit_training import DitRecipe, train_expert
from hif4c.compiler.tiny.evaluation import score_pipeline, score_rendered
from hif4c.compiler.tiny.export import export_pipeline
from hif4c.compiler.tiny.scorer import ClipScore, summarize
from hif4c.compiler.tiny.text_training import TextRecipe, train_text_encoder
from hif4c.compiler.tiny.vae_training import VaeRecipe, train_vae

__all__ = ["main"]

# The recipes of the shipped experts.
HIGH = DitRecipe()
LOW = DitRecipe(steps=5500)


def _show(title: str, scores: Sequence[ClipScore]) -> None:
    summary = summarize(scores)
    print(f"{title} ({len(scores)} clips):", " ".join(f"{name} {value:.3f}" for name, value in summary.items()))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train_tiny", description="Train wan-tiny from scratch on two CPU cores.")
    parser.add_argument("out", type=Path, help="folder that receives the pipeline")
    parser.add_argument("--work", type=Path, default=Path("wan_tiny_work"), help="folder for intermediate results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=VaeRecipe.steps)
    parser.add_argument("--text-steps", type=int, default=TextRecipe.steps)
    parser.add_argument("--high-steps", type=int, default=HIGH.steps, help="steps of the high-noise expert")
    parser.add_argument("--low-steps", type=int, default=LOW.steps, help="steps of the low-noise expert")
    parser.add_argument("--prompts", type=int, default=135, help="held-out prompts to score (at most 135)")
    return parser.parse_args(arguments)


def _expert(high: bool, steps: int, seed: int) -> DitRecipe:
    base = HIGH if high else LOW
    # Another number of steps keeps the share of the decay.
    decay = max(1, round(base.decay_steps * steps / base.steps))
    return DitRecipe(steps=steps, decay_steps=decay, seed=seed)


def _train_expert(work: Path, high: bool, recipe: DitRecipe) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train_expert(work, work / ("high" if high else "low"), high, recipe)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the whole recipe; returns 0."""
    options = _parse(arguments)
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "vae.done").exists():
        train_vae(work / "vae", VaeRecipe(steps=options.vae_steps, seed=options.seed))
        (work / "vae.done").touch()
    if not (work / "text").exists():
        tokenizer, encoder, accuracy = train_text_encoder(TextRecipe(steps=options.text_steps, seed=options.seed))
        print(f"text encoder: {accuracy:.3f} of the held-out captions understood")
        tokenizer.save_pretrained(work / "text" / "tokenizer")
        encoder.save_pretrained(work / "text" / "text_encoder")
    if not (work / "latents.pt").exists():
        encode_clips(work / "vae", work / "latents.pt", DataRecipe(seed=options.seed))
    context = mp.get_context("spawn")
    workers = []
    for high, steps in ((True, options.high_steps), (False, options.low_steps)):
        workers.append(context.Process(target=_train_expert, args=(work, high, _expert(high, steps, options.seed))))
        workers[-1].start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            print(f"training of an expert failed with exit code {worker.exitcode}", file=sys.stderr)
            return 1
    pipeline = export_pipeline(work / "vae", work / "text", work / "high", work / "low", options.out)
    pipeline.set_progress_bar_config(disable=True)
    _show("true clips", score_rendered(options.prompts))
    with torch.no_grad():
        _show("reconstructions", score_rendered(options.prompts, AutoencoderKLWan.from_pretrained(options.out / "vae")))
    _show("sampled", score_pipeline(pipeline, options.prompts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
