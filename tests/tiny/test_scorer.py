"""The scorer: perfect on true clips, sees every wrong attribute, and survives garbage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from hif4c.compiler.tiny.scorer import AXES, ClipScore, score_clip, summarize
from hif4c.compiler.tiny.world import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    Attributes,
    held_out_prompts,
    render,
)

Frames = npt.NDArray[np.float32]
RNG = np.random.default_rng(0)
ITEM = Attributes("ring", "green", "pink", "up")


def _scores(change: Callable[[Frames], npt.ArrayLike], count: int = 45) -> list[ClipScore]:
    rng = np.random.default_rng(5)
    return [score_clip(change(render(item, rng)), item) for _, item in held_out_prompts(count)]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda clip: clip, id="true"),
        pytest.param(lambda clip: (clip * 255).round().astype(np.uint8), id="uint8"),
        pytest.param(lambda clip: clip + RNG.normal(0, 0.1, clip.shape), id="noise"),
        pytest.param(lambda clip: ndimage.gaussian_filter(clip, (0, 1, 1, 0)), id="blur"),
    ],
)
def test_true_clips_are_fully_right(change: Callable[[Frames], npt.ArrayLike]) -> None:
    summary = summarize(_scores(change))
    assert summary["fully_right"] == 1.0
    assert summary["fit_iou"] > 0.88
    assert summary["subject_consistency"] > 0.9
    assert summary["motion_smoothness"] > 0.75


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("shape", SHAPES),
        ("colour", tuple(COLOURS)),
        ("background", tuple(BACKGROUNDS)),
        ("direction", tuple(DIRECTIONS)),
    ],
)
def test_each_wrong_attribute_is_detected_alone(field: str, values: tuple[str, ...]) -> None:
    clip = render(ITEM, np.random.default_rng(1))
    for value in values:
        expected = replace(ITEM, **{field: value})
        score = score_clip(clip, expected)
        assert getattr(score, f"{field}_right") == (value == getattr(ITEM, field))
        assert score.fully_right == (expected == ITEM)
        others = {"shape", "colour", "background", "direction"} - {field}
        assert all(getattr(score, f"{other}_right") for other in others)


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param(RNG.uniform(0, 1, (9, 32, 32, 3)), id="noise"),
        pytest.param(np.full((9, 32, 32, 3), 0.5), id="constant"),
        pytest.param(np.full((9, 32, 32, 3), np.nan), id="nan"),
        pytest.param(np.full((9, 32, 32, 3), np.inf, dtype=np.float32), id="inf"),
        pytest.param(np.zeros((9, 32, 32, 3), dtype=np.uint8), id="black"),
        pytest.param(np.linspace(0, 1, 9 * 32 * 32 * 3).reshape(9, 32, 32, 3), id="ramp"),
        pytest.param(np.zeros((0, 32, 32, 3)), id="no frames"),
        pytest.param(np.zeros((9, 4, 4, 3)), id="too small"),
        pytest.param(np.zeros(7), id="wrong rank"),
        pytest.param(RNG.uniform(0, 1, (1, 16, 24, 3)), id="one small frame"),
    ],
)
def test_garbage_scores_low_and_does_not_raise(frames: npt.NDArray[np.float64]) -> None:
    score = score_clip(frames, ITEM)
    assert not score.fully_right
    assert score.shape is None
    assert score.direction is None
    assert summarize([score])["mean"] < 0.35
    assert all(0 <= value <= 1 for value in score.axes().values())


def test_random_noise_hardly_scores_on_average() -> None:
    summary = summarize(_scores(lambda clip: RNG.uniform(0, 1, clip.shape)))
    assert summary["shape"] == summary["direction"] == summary["fully_right"] == 0
    assert summary["mean"] < 0.15


def test_shuffled_frames_lose_smoothness_and_direction() -> None:
    expected = Attributes("cross", "blue", "white", "right")
    clip = render(expected)
    shuffled = clip[[4, 0, 7, 2, 8, 1, 6, 3, 5]]
    assert not score_clip(shuffled, expected).direction_right
    assert score_clip(shuffled, expected).motion_smoothness < 0.5 * score_clip(clip, expected).motion_smoothness


def test_flicker_lowers_consistency() -> None:
    clip = render(ITEM)
    other = render(replace(ITEM, shape="triangle", colour="blue"))
    mixed = clip.copy()
    mixed[1::2] = other[1::2]
    assert score_clip(mixed, ITEM).subject_consistency < 0.6 < score_clip(clip, ITEM).subject_consistency


def test_other_sizes_and_lengths_are_scored() -> None:
    for size in ((5, 32, 32), (17, 40, 48), (1, 32, 32)):
        still = replace(ITEM, direction="still")
        assert score_clip(render(still, None, *size), still).fully_right


def test_summary_is_the_mean_of_its_axes() -> None:
    clips = [score_clip(render(ITEM), ITEM), score_clip(np.zeros((9, 32, 32, 3)), ITEM)]
    summary = summarize(clips)
    assert set(summary) == {*AXES, "mean", "fully_right"}
    assert summary["fully_right"] == 0.5
    assert summary["mean"] == pytest.approx(np.mean([summary[axis] for axis in AXES]))
    with pytest.raises(ValueError, match="no clips"):
        summarize([])
