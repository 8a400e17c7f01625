"""The world: captions, split and renderer."""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple

import numpy as np
import pytest

from hif4c.compiler.tiny.world import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    NUM_TEMPLATES,
    SHAPES,
    TRAVEL,
    Attributes,
    all_attributes,
    attribute_indices,
    caption,
    held_out_attributes,
    held_out_prompts,
    render,
    render_batch,
    training_attributes,
)


def test_split_is_disjoint_and_complete() -> None:
    held_out, training = set(held_out_attributes()), set(training_attributes())
    assert not held_out & training
    assert held_out | training == set(all_attributes())
    assert len(held_out) == len(all_attributes()) // 10 == 45


def test_split_is_deterministic() -> None:
    assert held_out_attributes() == held_out_attributes()
    assert held_out_attributes()[0] == Attributes("triangle", "red", "black", "left")


def test_held_out_combinations_are_spread_over_the_attributes() -> None:
    for position, table in enumerate((SHAPES, COLOURS, BACKGROUNDS, DIRECTIONS)):
        everything = Counter(astuple(item)[position] for item in held_out_attributes())
        beginning = Counter(astuple(item)[position] for item in held_out_attributes()[:15])
        assert set(everything) == set(table)
        assert max(everything.values()) - min(everything.values()) <= 1
        assert set(beginning) == set(table)


def test_held_out_prompts_are_unique_and_name_their_attributes() -> None:
    prompts = held_out_prompts(135)
    assert len({text for text, _ in prompts}) == 135
    for text, attributes in prompts:
        assert set(astuple(attributes)) <= set(text.split())
    assert held_out_prompts(20) == prompts[:20]
    assert len({text for text, _ in prompts} & {caption(a, k) for a in training_attributes() for k in range(3)}) == 0


@pytest.mark.parametrize("count", [-1, 136])
def test_held_out_prompts_rejects_impossible_counts(count: int) -> None:
    with pytest.raises(ValueError, match="between 0 and 135"):
        held_out_prompts(count)


def test_attributes_reject_unknown_names() -> None:
    with pytest.raises(ValueError, match="'hexagon'"):
        Attributes("hexagon", "red", "black", "left")


def test_captions_have_one_sentence_per_template() -> None:
    item = Attributes("cross", "cyan", "brown", "still")
    assert caption(item) == "a cyan cross standing still on a brown background"
    assert len({caption(item, k) for k in range(NUM_TEMPLATES)}) == NUM_TEMPLATES


@pytest.mark.parametrize("size", [(9, 32, 32), (1, 32, 32), (17, 48, 40)])
def test_render_has_the_asked_shape_and_colours(size: tuple[int, int, int]) -> None:
    frames, height, width = size
    clip = render(Attributes("cross", "red", "white", "still"), None, frames, height, width)
    assert clip.shape == (frames, height, width, 3)
    assert clip.dtype == np.float32
    assert clip.min() >= 0
    assert clip.max() <= 1
    np.testing.assert_allclose(clip[0, 0, 0], BACKGROUNDS["white"], atol=1e-6)
    distance = np.abs(clip[0] - np.asarray(COLOURS["red"], dtype=np.float32)).max(-1)
    assert 80 < (distance < 1e-3).sum() < 140  # a cross of 15 x 5 bars covers 125 pixels


@pytest.mark.parametrize("direction", list(DIRECTIONS))
def test_shapes_travel_as_told_and_stay_inside(direction: str) -> None:
    rng = np.random.default_rng(4)
    for shape in SHAPES:
        clip = render(Attributes(shape, "yellow", "black", direction), rng)
        mask = clip[..., 0] - clip[0, 0, 0, 0]
        y, x = np.mgrid[:32, :32]
        path = np.stack([(mask * x).sum((1, 2)), (mask * y).sum((1, 2))], 1) / mask.sum((1, 2))[:, None]
        np.testing.assert_allclose(path[-1] - path[0], TRAVEL * np.asarray(DIRECTIONS[direction]), atol=0.6)
        assert mask.sum((1, 2)).min() > 0.9 * mask.sum((1, 2)).max()  # nothing left the frame


def test_render_depends_on_the_generator_only() -> None:
    indices = attribute_indices(all_attributes()[:6])
    first = render_batch(indices, np.random.default_rng(1))
    assert np.array_equal(first, render_batch(indices, np.random.default_rng(1)))
    assert not np.array_equal(first, render_batch(indices, np.random.default_rng(2)))
