"""Training of wan-tiny's text side: a word-level T5 tokenizer and a two-layer UMT5 encoder.

The encoder learns to name all four attributes of a caption at every token, before any video is seen; after that it is
frozen, so that both experts can be trained independently against the same embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from hif4c.compiler.tiny.world import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    all_captions,
    caption,
    held_out_prompts,
    training_attributes,
)

__all__ = ["MAX_TOKENS", "TextRecipe", "build_tokenizer", "encode_text", "train_text_encoder"]

MAX_TOKENS = 14  # the longest caption has 12 words, plus the end token
_TABLES = (tuple(SHAPES), tuple(COLOURS), tuple(BACKGROUNDS), tuple(DIRECTIONS))


@dataclass(frozen=True)
class TextRecipe:
    """Steps and optimizer settings of the text encoder's training (one process)."""

    steps: int = 1200
    batch: int = 64
    learning_rate: float = 2e-3
    word_dropout: float = 0.05
    caption_dropout: float = 0.05
    seed: int = 0


def build_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer whose pieces are the words of the world's captions; any other word becomes the unknown token."""
    words = sorted({word for text in all_captions() for word in text.split()})
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = specials + [(f"▁{word}", -1.0) for word in words]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def _labels(texts: list[str]) -> torch.Tensor:
    # One class more than values: "the caption does not say".
    rows = []
    for text in texts:
        words = set(text.split())
        rows.append([next((i for i, value in enumerate(t) if value in words), len(t)) for t in _TABLES])
    return torch.tensor(rows)


def encode_text(
    tokenizer: T5Tokenizer, encoder: UMT5EncoderModel, texts: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [N, MAX_TOKENS, 64] with zeros after the end token, as `WanPipeline` makes them, and lengths int64
    [N].
    """
    tokens = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    hidden = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return hidden * tokens.attention_mask[..., None], tokens.attention_mask.sum(1)


def _accuracy(tokenizer: T5Tokenizer, encoder: UMT5EncoderModel, heads: nn.ModuleList, texts: list[str]) -> float:
    with torch.no_grad():
        hidden, lengths = encode_text(tokenizer, encoder, texts)
        last = hidden[torch.arange(len(texts)), lengths - 1]
        found = torch.stack([head(last).argmax(-1) for head in heads], dim=1)
    return float((found == _labels(texts)).all(1).float().mean())


def train_text_encoder(recipe: TextRecipe) -> tuple[T5Tokenizer, UMT5EncoderModel, float]:
    """Train from scratch; also returns the share of held-out captions whose attributes the end token names rightly."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng([recipe.seed, 7])
    tokenizer = build_tokenizer()
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    encoder = UMT5EncoderModel(config)
    heads = nn.ModuleList([nn.Linear(64, len(table) + 1) for table in _TABLES])
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.steps)
    items = training_attributes()
    for _ in range(recipe.steps):
        texts = []
        for i in rng.integers(0, len(items), recipe.batch):
            words = caption(items[i], int(rng.integers(3))).split()
            kept = [word for word in words if rng.random() >= recipe.word_dropout]
            texts.append("" if rng.random() < recipe.caption_dropout else " ".join(kept))
        hidden, lengths = encode_text(tokenizer, encoder, texts)
        valid = torch.arange(MAX_TOKENS) < lengths[:, None]
        labels = _labels(texts)
        loss = torch.zeros(())
        for k, head in enumerate(heads):
            target = labels[:, k, None].expand(-1, MAX_TOKENS)[valid]
            loss = loss + functional.cross_entropy(head(hidden[valid]), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    encoder.eval().requires_grad_(False)
    return tokenizer, encoder, _accuracy(tokenizer, encoder, heads, [text for text, _ in held_out_prompts(135)])
