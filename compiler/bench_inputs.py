"""Random inputs of a transformer of a given size."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hif4c.runtime.errors import Hif4Error

__all__ = ["Latent", "random_inputs"]

MAX_TOKENS = 1 << 20


@dataclass(frozen=True)
class Latent:
    """Latent frames, height and width of one video; patches of 2 x 2 become one token."""

    frames: int
    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> Latent:
        """Read "FxHxW"; Hif4Error says what is wrong with it."""
        parts = text.strip().lower().split("x")
        if len(parts) != 3 or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
            raise Hif4Error(f"latent {text!r}: give FRAMESxHEIGHTxWIDTH, such as 5x24x52.")
        latent = cls(*map(int, parts))
        if latent.height % 2 or latent.width % 2:
            raise Hif4Error(f"latent {text!r}: height and width are multiples of the patch size 2; choose others.")
        if latent.tokens > MAX_TOKENS:
            raise Hif4Error(f"latent {text!r}: {latent.tokens} tokens are more than {MAX_TOKENS}; give a smaller one.")
        return latent

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.frames * self.height * self.width // 4

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


def random_inputs(
    latent: Latent, channels: int, text_dim: int, text: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positional inputs of a call: video [1, channels, F, H, W], timestep [1] fp32, text [1, text, text_dim]; bf16."""
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(1, channels, latent.frames, latent.height, latent.width, generator=generator)
    embeddings = torch.randn(1, text, text_dim, generator=generator)
    return video.bfloat16(), torch.tensor([500.0]), embeddings.bfloat16()
