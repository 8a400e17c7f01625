"""The synthetic world of wan-tiny: one large coloured shape that moves (or not) over a plain background.

Every clip is described completely by four attributes (shape, colour, background, direction) and a starting jitter, so
a scorer can read the attributes back from pixels and say objectively whether a video follows its prompt. About a
tenth of the attribute combinations is never trained on; captions of those are the evaluation prompts.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection
from dataclasses import astuple, dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "DIRECTIONS",
    "NUM_FRAMES",
    "NUM_TEMPLATES",
    "SHAPES",
    "SIZE",
    "TRAVEL",
    "Attributes",
    "all_attributes",
    "all_captions",
    "attribute_indices",
    "caption",
    "coverage",
    "held_out_attributes",
    "held_out_prompts",
    "render",
    "render_batch",
    "training_attributes",
]

FloatArray: TypeAlias = npt.NDArray[np.float32]
IntArray: TypeAlias = npt.NDArray[np.int64]

SIZE = 32  # height and width of a frame, pixels
NUM_FRAMES = 9
TRAVEL = 12.0  # pixels between the first and the last position of a moving shape
JITTER_ALONG = 1.0  # uniform +- pixels of the middle position, along the motion
JITTER_ACROSS = 2.0  # and across it (a still shape uses this one on both axes)

# Shapes were chosen for coarse differences: any two of them overlap in about half of their union or less.
SHAPES: tuple[str, ...] = ("triangle", "cross", "ring")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.75, 0.15),
    "blue": (0.10, 0.20, 0.95),
    "yellow": (0.95, 0.90, 0.10),
    "magenta": (0.85, 0.10, 0.85),
    "cyan": (0.10, 0.85, 0.90),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.02, 0.02, 0.02),
    "gray": (0.50, 0.50, 0.50),
    "white": (0.97, 0.97, 0.97),
    "brown": (0.45, 0.27, 0.12),
    "pink": (1.00, 0.70, 0.78),
}
# Unit motion (x to the right, y downwards) of each direction.
DIRECTIONS: dict[str, tuple[float, float]] = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "still": (0.0, 0.0),
}
_MOTION_WORDS = {name: f"moving {name}" for name in DIRECTIONS} | {"still": "standing still"}
_TEMPLATES = (
    "a {colour} {shape} {motion} on a {background} background",
    "{background} background with a {colour} {shape} {motion}",
    "the {shape} is {colour} and {motion} and the background is {background}",
)
NUM_TEMPLATES = len(_TEMPLATES)


@dataclass(frozen=True, order=True)
class Attributes:
    """What a caption says about a clip; the fields hold names from `SHAPES`, `COLOURS`, `BACKGROUNDS`, `DIRECTIONS`."""

    shape: str
    colour: str
    background: str
    direction: str

    def __post_init__(self) -> None:
        names: tuple[Collection[str], ...] = (SHAPES, COLOURS, BACKGROUNDS, DIRECTIONS)
        for value, allowed in zip(astuple(self), names, strict=True):
            if value not in allowed:
                raise ValueError(f"{value!r} is not one of {', '.join(allowed)}")


def all_attributes() -> list[Attributes]:
    """All 450 combinations, in a fixed order."""
    return [Attributes(*values) for values in itertools.product(SHAPES, COLOURS, BACKGROUNDS, DIRECTIONS)]


def attribute_indices(attributes: list[Attributes]) -> IntArray:
    """Positions of the four values in their tables: int64 [N, 4] (shape, colour, background, direction)."""
    tables = (list(SHAPES), list(COLOURS), list(BACKGROUNDS), list(DIRECTIONS))
    rows = [[table.index(value) for table, value in zip(tables, astuple(item), strict=True)] for item in attributes]
    return np.asarray(rows, dtype=np.int64).reshape(-1, 4)


def _is_held_out(item: Attributes) -> bool:
    # A Latin-square rule rather than a random draw: every value of every attribute is held out about equally often,
    # and no pair of values more than three times.
    shape, colour, background, direction = (int(index) for index in attribute_indices([item])[0])
    return (shape + colour + background) % 2 == 0 and direction == (shape + 2 * background + 2 * (colour // 2)) % 5


def held_out_attributes() -> list[Attributes]:
    """The combinations that training never sees, ordered so that any prefix is spread over the attributes."""
    left = [item for item in all_attributes() if _is_held_out(item)]
    ordered: list[Attributes] = []
    seen: Counter[tuple[int, str]] = Counter()
    while left:
        # Greedy: the combination whose values have been used least so far (ties in table order).
        best = min(left, key=lambda item: sum(seen[pair] for pair in enumerate(astuple(item))))
        left.remove(best)
        seen.update(enumerate(astuple(best)))
        ordered.append(best)
    return ordered


def training_attributes() -> list[Attributes]:
    """The combinations that may be trained on: all but the held-out ones."""
    return [item for item in all_attributes() if not _is_held_out(item)]


def caption(attributes: Attributes, template: int = 0) -> str:
    """One of the `NUM_TEMPLATES` captions (lower-case words separated by single spaces) of a clip."""
    return _TEMPLATES[template].format(
        shape=attributes.shape,
        colour=attributes.colour,
        background=attributes.background,
        motion=_MOTION_WORDS[attributes.direction],
    )


def all_captions() -> list[str]:
    """Every caption of the world; its words are the vocabulary of the tokenizer."""
    return [caption(item, template) for item in all_attributes() for template in range(NUM_TEMPLATES)]


def held_out_prompts(n: int) -> list[tuple[str, Attributes]]:
    """The first `n` evaluation prompts with what they ask for: deterministic, no repeats, templates rotating.

    Raises ValueError where `n` is negative or exceeds the number of different prompts.
    """
    items = held_out_attributes()
    if not 0 <= n <= NUM_TEMPLATES * len(items):
        raise ValueError(f"n must be between 0 and {NUM_TEMPLATES * len(items)}, got {n}")
    prompts = []
    for i in range(n):
        lap, position = divmod(i, len(items))
        prompts.append((caption(items[position], (position + lap) % NUM_TEMPLATES), items[position]))
    return prompts


def coverage(shape: npt.NDArray[np.int64], x: FloatArray, y: FloatArray) -> FloatArray:
    """Antialiased coverage 0..1 of shapes at offsets from their centres.

    `shape` holds indices into `SHAPES` and broadcasts with `x` and `y` (pixels, x right, y down). Coverage is half
    minus the signed distance to the outline, clipped: a one-pixel ramp.
    """
    ax, ay = np.abs(x), np.abs(y)
    # Apex (0, -8), base y = 5.5 with half width 8.
    slope = np.float32(np.hypot(13.5, 8.0))
    triangle = np.maximum(y - 5.5, (13.5 * ax - 8.0 * (y + 8.0)) / slope)
    cross = np.minimum(np.maximum(ax - 7.5, ay - 2.5), np.maximum(ax - 2.5, ay - 7.5))
    ring = np.abs(np.hypot(x, y) - 5.75) - 2.0
    distance = np.where(shape == 0, triangle, np.where(shape == 1, cross, ring))
    return np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)


def render_batch(
    indices: IntArray,
    rng: np.random.Generator,
    num_frames: int = NUM_FRAMES,
    height: int = SIZE,
    width: int = SIZE,
) -> FloatArray:
    """Clips of attribute indices `[N, 4]` (see `attribute_indices`): float32 `[N, F, H, W, 3]` in 0..1.

    The middle position is the centre of the frame plus a random, sub-pixel jitter; a moving shape travels `TRAVEL`
    pixels over the clip at constant speed, whatever the number of frames.
    """
    count = len(indices)
    motion = np.asarray(list(DIRECTIONS.values()), dtype=np.float32)[indices[:, 3]]
    amplitude = JITTER_ACROSS + (JITTER_ALONG - JITTER_ACROSS) * np.abs(motion)
    middle = np.asarray([(width - 1) / 2, (height - 1) / 2]) + amplitude * rng.uniform(-1, 1, (count, 2))
    time = np.linspace(-0.5, 0.5, num_frames) if num_frames > 1 else np.zeros(1)
    centre = (middle[:, None] + TRAVEL * time[None, :, None] * motion[:, None]).astype(np.float32)
    x = np.arange(width, dtype=np.float32)[None, None, None, :] - centre[:, :, 0, None, None]
    y = np.arange(height, dtype=np.float32)[None, None, :, None] - centre[:, :, 1, None, None]
    x, y = np.broadcast_arrays(x, y)
    alpha = coverage(indices[:, 0, None, None, None], x, y)[..., None]
    front = np.asarray(list(COLOURS.values()), dtype=np.float32)[indices[:, 1], None, None, None]
    back = np.asarray(list(BACKGROUNDS.values()), dtype=np.float32)[indices[:, 2], None, None, None]
    return (back + alpha * (front - back)).astype(np.float32)


def render(
    attributes: Attributes,
    rng: np.random.Generator | None = None,
    num_frames: int = NUM_FRAMES,
    height: int = SIZE,
    width: int = SIZE,
) -> FloatArray:
    """One clip: float32 `[F, H, W, 3]` in 0..1. Without `rng` the jitter is drawn from seed 0."""
    generator = np.random.default_rng(0) if rng is None else rng
    return render_batch(attribute_indices([attributes]), generator, num_frames, height, width)[0]
