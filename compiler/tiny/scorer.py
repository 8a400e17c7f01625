"""An objective scorer for clips of wan-tiny's world: it reads the four attributes back from pixels.

The frame is modelled as two colours and a soft coverage. Background: median of the border. Subject colour: median of
the most distant pixels. Coverage: projection onto the line between the two colours. Shape: best soft intersection
over union of the coverage with each rendered template, over all positions (half-pixel steps), summed over the frames.
Direction: regression of the subject's fitted position over time. Any array is accepted: noise, constants and NaN
score low and never raise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from hif4c.compiler.tiny.world import BACKGROUNDS, COLOURS, SHAPES, TRAVEL, Attributes, coverage

__all__ = ["AXES", "ClipScore", "score_clip", "summarize"]

Array = npt.NDArray[np.float64]

AXES = (
    "shape",
    "colour",
    "background",
    "direction",
    "fit_iou",
    "subject_consistency",
    "motion_smoothness",
)
_BORDER = 2  # pixels
_SUBJECT_PIXELS = 60  # a frame: fewer than the smallest shape covers
_MIN_CONTRAST = 0.2  # RGB distance between subject and background below which there is no subject
_MIN_FIT = 0.5  # soft IoU below which no shape and no direction is recognized
_MAX_COLOUR_ERROR = 0.35  # RGB distance to a named colour beyond which it is not recognized


@dataclass(frozen=True)
class ClipScore:
    """What was recovered from one clip and how it compares with what was asked for.

    `shape`, `colour`, `background` and `direction` are names or None where nothing could be recognized. `fit_iou`:
    mean soft IoU (0..1) of the subject with the best-fitting shape. `subject_consistency`: how alike (coverage and
    colour) the subject is from frame to frame and to the first frame, 0..1. `motion_smoothness`: 1 / (1 + RMS second
    difference of the subject's position in pixels), 0..1.
    """

    expected: Attributes
    shape: str | None
    colour: str | None
    background: str | None
    direction: str | None
    fit_iou: float
    subject_consistency: float
    motion_smoothness: float

    @property
    def shape_right(self) -> bool:
        """Whether the recovered shape is the expected one."""
        return self.shape == self.expected.shape

    @property
    def colour_right(self) -> bool:
        """Whether the recovered subject colour is the expected one."""
        return self.colour == self.expected.colour

    @property
    def background_right(self) -> bool:
        """Whether the recovered background is the expected one."""
        return self.background == self.expected.background

    @property
    def direction_right(self) -> bool:
        """Whether the recovered direction is the expected one."""
        return self.direction == self.expected.direction

    @property
    def fully_right(self) -> bool:
        """Whether all four attributes are right."""
        return self.shape_right and self.colour_right and self.background_right and self.direction_right

    def axes(self) -> dict[str, float]:
        """The seven axes of the score (see `AXES`), each 0..1."""
        return {
            "shape": float(self.shape_right),
            "colour": float(self.colour_right),
            "background": float(self.background_right),
            "direction": float(self.direction_right),
            "fit_iou": self.fit_iou,
            "subject_consistency": self.subject_consistency,
            "motion_smoothness": self.motion_smoothness,
        }


def _as_unit_float(frames: npt.ArrayLike) -> Array | None:
    """Frames as float64 in 0..1 without NaN, or None where the array is no usable clip."""
    array = np.asarray(frames)
    if array.ndim != 4 or array.shape[-1] != 3 or array.shape[0] < 1 or min(array.shape[1:3]) < 8:
        return None
    scale = 255.0 if array.dtype == np.uint8 else 1.0
    return np.clip(np.nan_to_num(array.astype(np.float64) / scale, nan=0.5, posinf=1.0, neginf=0.0), 0.0, 1.0)


def _nearest(colour: Array, table: Mapping[str, tuple[float, float, float]]) -> str | None:
    distances = {name: float(np.linalg.norm(colour - np.asarray(value))) for name, value in table.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= _MAX_COLOUR_ERROR else None


@lru_cache(maxsize=8)
def _templates(height: int, width: int) -> tuple[npt.NDArray[np.complex128], Array]:
    """Spectra [shape, 4, H', W'] of the templates at half-pixel offsets, zero-padded, and their energies [shape, 4]."""
    size = (height + 24, width + 24)
    y, x = np.meshgrid(np.arange(-12, 13, dtype=np.float32), np.arange(-12, 13, dtype=np.float32), indexing="ij")
    spectra, energies = [], []
    for shape in range(len(SHAPES)):
        for dy, dx in ((0.0, 0.0), (0.0, 0.5), (0.5, 0.0), (0.5, 0.5)):
            template = coverage(np.asarray(shape), x - np.float32(dx), y - np.float32(dy)).astype(np.float64)
            spectra.append(np.conj(np.fft.rfft2(template, size)))
            energies.append(float((template**2).sum()))
    stacked = np.stack(spectra).reshape(len(SHAPES), 4, *spectra[0].shape)
    return stacked, np.asarray(energies).reshape(len(SHAPES), 4)


def _fit_shapes(alpha: Array) -> tuple[Array, Array]:
    """Best soft IoU [shape, F] and its position (x, y) [shape, F, 2] of every shape in coverage maps [F, H, W].

    Soft IoU is the Tanimoto coefficient a.t / (a.a + t.t - a.t), which one correlation yields for all positions.
    """
    frames, height, width = alpha.shape
    spectra, energies = _templates(height, width)
    size = (height + 24, width + 24)
    padded = np.pad(alpha, ((0, 0), (12, 12), (12, 12)))
    signal = np.fft.rfft2(padded, size)
    energy = (alpha**2).sum((1, 2))
    best = np.full((len(SHAPES), frames), -1.0)
    position = np.zeros((len(SHAPES), frames, 2))
    for shape in range(len(SHAPES)):
        for k, (dy, dx) in enumerate(((0.0, 0.0), (0.0, 0.5), (0.5, 0.0), (0.5, 0.5))):
            # The template's corner at row r of the padded frame puts its centre at row r of the frame.
            product = np.fft.irfft2(signal * spectra[shape, k], size)[:, :height, :width].reshape(frames, -1)
            at = product.argmax(1)
            dot = product[np.arange(frames), at]
            score = dot / np.maximum(energy + energies[shape, k] - dot, 1e-9)
            better = score > best[shape]
            found = np.stack([at % width + dx, at // width + dy], axis=1)
            best[shape] = np.where(better, score, best[shape])
            position[shape] = np.where(better[:, None], found, position[shape])
    return np.clip(best, 0.0, 1.0), position


def _refine(alpha: Array, position: Array) -> Array:
    """Centroids [F, 2] of the coverage within 11 pixels of the fitted positions: finer than the fit's half pixels."""
    _, height, width = alpha.shape
    y, x = np.mgrid[:height, :width].astype(np.float64)
    near = np.maximum(abs(x - position[:, 0, None, None]), abs(y - position[:, 1, None, None])) <= 11
    weight = np.where(near, np.clip(alpha - 0.25, 0.0, None), 0.0)
    mass = np.maximum(weight.sum((1, 2)), 1e-9)
    return np.stack([(weight * x).sum((1, 2)) / mass, (weight * y).sum((1, 2)) / mass], axis=1)


def _direction(path: Array) -> str | None:
    """Direction of positions [F, 2]: a regression; None where it is neither still nor clearly along one axis."""
    count = len(path)
    time = np.linspace(-0.5, 0.5, count) if count > 1 else np.zeros(1)
    dx, dy = (time @ (path - path.mean(0)) / max(float(time @ time), 1e-9)).tolist()  # pixels over the clip
    near, far = sorted((abs(dx), abs(dy)))
    if far < TRAVEL / 3:
        return "still"
    if near > 0.6 * far:
        return None
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def _consistency(alpha: Array, frames: Array, path: Array, fits: Array) -> float:
    """Mean likeness of each frame's subject, moved to the middle, to the previous frame's and to the first's."""
    if len(alpha) < 2:
        return float(fits.mean())
    centre = np.asarray([(alpha.shape[2] - 1) / 2, (alpha.shape[1] - 1) / 2])
    moved = np.stack([ndimage.shift(a, (centre - p)[::-1], order=1) for a, p in zip(alpha, path, strict=True)])
    weight = np.clip(alpha - 0.5, 0.0, None)[..., None]
    colours = (frames * weight).sum((1, 2)) / np.maximum(weight.sum((1, 2)), 1e-9)

    def likeness(i: int, j: int) -> float:
        dot = float((moved[i] * moved[j]).sum())
        union = float((moved[i] ** 2).sum() + (moved[j] ** 2).sum()) - dot
        same_colour = max(0.0, 1.0 - float(np.linalg.norm(colours[i] - colours[j])))
        return dot / max(union, 1e-9) * same_colour

    pairs = [(likeness(i, i - 1) + likeness(i, 0)) / 2 for i in range(1, len(alpha))]
    # Without a recognizable subject, likeness says nothing (a constant frame is alike too).
    return float(np.clip(np.mean(pairs), 0.0, 1.0) * min(1.0, float(fits.mean()) / _MIN_FIT))


def score_clip(frames: npt.ArrayLike, expected: Attributes) -> ClipScore:
    """Score one clip, float (0..1) or uint8 `[F, H, W, 3]`, against what its prompt asked for. Never raises on bad
    pixels.
    """
    clip = _as_unit_float(frames)
    if clip is None:
        return ClipScore(expected, None, None, None, None, 0.0, 0.0, 0.0)
    inside = np.zeros(clip.shape[1:3], dtype=bool)
    inside[_BORDER:-_BORDER, _BORDER:-_BORDER] = True
    back = np.median(clip[:, ~inside].reshape(-1, 3), axis=0)
    distance = np.linalg.norm(clip - back, axis=-1)
    pixels = clip.reshape(-1, 3)
    farthest = np.argsort(distance.reshape(-1), kind="stable")[-_SUBJECT_PIXELS * len(clip) :]
    front = np.median(pixels[farthest], axis=0)
    background = _nearest(back, BACKGROUNDS)
    contrast = float(np.linalg.norm(front - back))
    if contrast < _MIN_CONTRAST:
        return ClipScore(expected, None, None, background, None, 0.0, 0.0, 0.0)
    alpha = np.clip((clip - back) @ (front - back) / contrast**2, 0.0, 1.0)
    fits, positions = _fit_shapes(alpha)
    best = int(fits.mean(1).argmax())
    fit = float(fits[best].mean())
    path = _refine(alpha, positions[best])
    bend = np.diff(path, n=2, axis=0)
    smoothness = 1.0 / (1.0 + float(np.sqrt((bend**2).sum(1).mean()))) if len(bend) else 1.0
    recognized = fit >= _MIN_FIT
    return ClipScore(
        expected=expected,
        shape=SHAPES[best] if recognized else None,
        colour=_nearest(front, COLOURS),
        background=background,
        direction=_direction(path) if recognized else None,
        fit_iou=fit,
        subject_consistency=_consistency(alpha, clip, path, fits[best]),
        # A trajectory means something only where a subject was found.
        motion_smoothness=smoothness * min(1.0, fit / _MIN_FIT),
    )


def summarize(scores: Sequence[ClipScore]) -> dict[str, float]:
    """Means over clips of the seven `AXES` and of `fully_right`, and `mean`, the mean of the seven axes; each 0..1.

    Raises ValueError where there is no clip.
    """
    if not scores:
        raise ValueError("no clips to summarize")
    rows = [score.axes() for score in scores]
    summary = {axis: float(np.mean([row[axis] for row in rows])) for axis in AXES}
    summary["mean"] = float(np.mean([summary[axis] for axis in AXES]))
    summary["fully_right"] = float(np.mean([score.fully_right for score in scores]))
    return summary
