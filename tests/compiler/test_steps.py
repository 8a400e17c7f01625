import itertools

import pytest
import torch

from hif4c.compiler.calibration_inputs import Call
from hif4c.compiler.steps import StepError, choose_ranges, measure_steps
from hif4c.runtime.errors import Hif4Error
from tests.support.forked_ranks import in_ranks


def step(timestep: float, norm_gain: float, expert: str = "transformer") -> StepError:
    """A step whose error's norm falls from 0.5 by `norm_gain`."""
    return StepError(expert, timestep, 0.25, (0.5 - norm_gain) ** 2)


# Lengths 100, 200, 300, 400: the gain of a step is its length times what the norm loses.
STEPS = [step(100, 0.2), step(300, 0.3), step(600, 0.1), step(1000, 0.12)]  # gains 20, 60, 30, 48


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.0, []),
        (0.1, []),  # .4 of a step rounds to none
        (0.2, [(200, 450)]),  # .8 to one
        (0.5, [(200, 450), (800, 1000)]),
        (0.75, [(200, 1000)]),  # neighbours become one range
        (1.0, [(0, 1000)]),
    ],
)
def test_by_hand(share, expected):
    for order in itertools.permutations(STEPS):
        assert choose_ranges(order, {"transformer": share}) == {"transformer": expected}


def test_ranges_end_midway_between_neighbours():
    steps = [step(200, 0.1), step(500, 0), step(750, 0.2)]
    assert choose_ranges(steps, {"transformer": 0.4}) == {"transformer": [(625, 1000)]}
    assert choose_ranges(steps, {"transformer": 1.0}) == {"transformer": [(0, 350), (625, 1000)]}


def test_steps_that_gain_nothing_are_left_out():
    steps = [step(500, -0.1), step(1000, 0)]
    assert choose_ranges(steps, {"transformer": 1.0}) == {"transformer": []}


def test_errors_count_by_their_norms():
    """From .09 to .04 the norm loses .1, from .01 to 0 as much; the energy loses five times less."""
    steps = [StepError("transformer", 500, 0.09, 0.0401), StepError("transformer", 1000, 0.01, 0.0)]
    assert choose_ranges(steps, {"transformer": 0.5}) == {"transformer": [(750, 1000)]}


HIGH = [step(1000, 0.2, "transformer"), step(900, 0.3, "transformer")]  # lengths 100 and 300
LOW = [step(600, 0.2, "transformer_2"), step(300, 0.1, "transformer_2")]  # 300 and 300


def test_experts_of_one_share_have_one_budget():
    """Gains 20, 90, 60, 30: with half of the steps each expert gets one, with a quarter only the first does."""
    both = {"transformer": 0.5, "transformer_2": 0.5}
    assert choose_ranges(HIGH + LOW, both) == {"transformer": [(750, 950)], "transformer_2": [(450, 750)]}
    quarter = dict.fromkeys(both, 0.25)
    assert choose_ranges(HIGH + LOW, quarter) == {"transformer": [(750, 950)], "transformer_2": []}
    # Neighbours of two experts stay two ranges, as each reads its own.
    assert choose_ranges(HIGH + LOW, dict.fromkeys(both, 1.0)) == {
        "transformer": [(750, 1000)],
        "transformer_2": [(0, 750)],
    }


def test_experts_of_two_shares_have_a_budget_each():
    shares = {"transformer": 0.5, "transformer_2": 1.0}
    assert choose_ranges(HIGH + LOW, shares) == {"transformer": [(750, 950)], "transformer_2": [(0, 750)]}


def test_the_steps_of_an_expert_without_a_second_program_still_have_their_place():
    """Alone, the step at 900 would seem to last until 0, and its range to reach there."""
    steps = [step(1000, 0.3, "transformer"), step(900, 0.2, "transformer")]  # 30 and 60
    shares = {"transformer": 0.5}
    assert choose_ranges(steps, shares, [1000, 900, 600, 300]) == {"transformer": [(750, 950)]}
    assert choose_ranges(steps, shares, [1000, 900, 880, 300]) == {"transformer": [(950, 1000)]}  # 30 and 4
    assert choose_ranges(steps, shares) == {"transformer": [(0, 950)]}


def test_nothing_to_choose_from():
    assert choose_ranges([], {}) == {}
    assert choose_ranges([step(1000, 0.1)], {"transformer": 1.0}) == {"transformer": [(0, 1000)]}


class Recorded:
    """Seven calls at three timesteps with outputs of sizes that fp64 sums round, and a model that is off by a share."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.outputs = [torch.randn(2, 3, 1, 4, 4, generator=generator) * 10.0**index for index in range(7)]
        self.call_count = 7

    def calls(self):
        for index, output in enumerate(self.outputs):
            yield Call(output, torch.full((2,), [900.0, 500.0, 100.0][index % 3]), output), output

    def variant(self, name):
        return lambda hidden, timestep, text, return_dict: (hidden * (1.1 if name is None else 1.01),)


def test_ranks_measure_what_one_process_measures():
    """To the bit, though sums of the ranks' sums would not be; each rank runs its own calls."""
    told = []

    def run(ranks):
        del told[:]
        return measure_steps("transformer", Recorded(), Recorded(), told.append, ranks=ranks), len(told)

    ((expected, count),) = in_ranks(1, run)
    assert count == 7
    assert [error.timestep for error in expected] == [900, 500, 100]
    assert all(error.w4a4 == pytest.approx(0.01, rel=1e-5) for error in expected)
    assert in_ranks(3, run) == [(expected, 3), (expected, 2), (expected, 2)]


def test_a_rank_that_cannot_measure_ends_the_others():
    class Broken(Recorded):
        def variant(self, name):
            raise Hif4Error("broken")

    found = in_ranks(2, lambda ranks: measure_steps("t", [Recorded, Broken][ranks.rank](), Recorded(), ranks=ranks))
    assert [str(error) for error in found] == ["rank 1 failed: broken", "broken"]
