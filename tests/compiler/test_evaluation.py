"""Distances between clips: structural similarity against figures worked out by hand, medians and quartiles."""

import math

import numpy as np
import pytest
import torch

from hif4c.compiler.evaluation import Clip, evaluate_pair, frame_ssim, measure_distance

C1, C2 = 0.01**2, 0.03**2


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(0).random((3, 24, 20, 3)).astype(np.float32)


def test_equal_frames_are_alike(frames: np.ndarray) -> None:
    assert frame_ssim(frames, frames) == pytest.approx(1, abs=1e-12)


def test_similarity_falls_with_noise(frames: np.ndarray) -> None:
    noise = np.random.default_rng(1).standard_normal(frames.shape)
    found = [frame_ssim(frames, frames + size * noise) for size in (0, 0.03, 0.1, 0.3, 1)]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 5
    assert found[-1] < 0.5


def test_similarity_is_symmetric_and_at_least_minus_one(frames: np.ndarray) -> None:
    other = frames[:, ::-1]
    assert frame_ssim(frames, other) == pytest.approx(frame_ssim(other, frames), abs=1e-12)
    assert -1 <= frame_ssim(frames, 1 - frames) < 0


def test_constant_frames_differ_in_luminance_alone() -> None:
    first, second = np.full((1, 16, 16, 3), 0.25), np.full((1, 16, 16, 3), 0.75)
    expected = (2 * 0.25 * 0.75 + C1) / (0.25**2 + 0.75**2 + C1)
    assert frame_ssim(first, second) == pytest.approx(expected, rel=1e-12)


def test_one_window_by_hand() -> None:
    """A frame of 11 x 11 is one window; a single bright pixel has the mean w and the variance w - w^2."""
    taps = [math.exp(-(k**2) / (2 * 1.5**2)) for k in range(-5, 6)]
    w = (1 / sum(taps)) ** 2  # of the middle of the two-dimensional window
    bright, half = np.zeros((1, 11, 11, 1)), np.zeros((1, 11, 11, 1))
    bright[0, 5, 5], half[0, 5, 5] = 1, 0.5
    variance = w - w * w
    luminance = (2 * w * 0.5 * w + C1) / (w * w + 0.25 * w * w + C1)
    structure = (2 * 0.5 * variance + C2) / (variance + 0.25 * variance + C2)
    assert frame_ssim(bright, half) == pytest.approx(luminance * structure, rel=1e-12)
    dark = C1 * C2 / ((w * w + C1) * (variance + C2))
    assert frame_ssim(bright, np.zeros_like(bright)) == pytest.approx(dark, rel=1e-12)


def test_windows_lie_inside_the_frame() -> None:
    """What differs in a corner is seen by few windows: its four pixels weigh less than four in the middle."""
    base = np.full((1, 32, 32, 1), 0.5)
    corner, middle = base.copy(), base.copy()
    corner[0, :2, :2], middle[0, 15:17, 15:17] = 1, 1
    assert 1 - frame_ssim(base, corner) < 0.1 * (1 - frame_ssim(base, middle))


def test_frames_that_are_small_or_not_finite() -> None:
    small = np.random.default_rng(2).random((2, 8, 8, 3))
    assert frame_ssim(small, small) == pytest.approx(1, abs=1e-12)
    assert frame_ssim(small, 1 - small) < 0.9
    broken = small.copy()
    broken[1, 2, 3, 0] = np.nan
    assert frame_ssim(small, broken) == -1


def test_medians_and_quartiles_over_clips() -> None:
    """Errors of 1, .1, .01, .001 and 0 on latents of ones: 0, 20, 40, 60 dB and equal."""
    frames = np.full((2, 12, 12, 3), 0.5, np.float32)
    reference = [Clip(torch.ones(1, 1, 4, 4), frames)] * 5
    found = [Clip(torch.ones(1, 1, 4, 4) * (1 + error), frames) for error in (1, 0.1, 0.01, 0.001, 0)]
    result = measure_distance(reference, found)
    # The errors are rounded to float32 (2^-24 relative to 1), which the smallest sees as 6e-5: far below .01 dB.
    assert result["distance"]["latent_snr"] == pytest.approx(40, abs=0.01)
    assert result["spread"]["latent_snr"] == pytest.approx([20, 60], abs=0.01)
    assert result["distance"]["frame_psnr"] == math.inf
    assert result["spread"]["frame_psnr"] == [math.inf, math.inf]
    assert result["spread"]["frame_ssim"] == pytest.approx([1, 1], abs=1e-12)
    assert result["distance"].keys() == result["spread"].keys()
    assert evaluate_pair(reference, found, None) == {**result, "scores": None}
