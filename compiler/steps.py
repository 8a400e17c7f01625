"""Which denoising steps keep bf16 activations: measured on the calibration's calls, chosen under a budget of steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hif4c.compiler.calibration import ExpertCalibration
from hif4c.compiler.ranks import ALONE, Ranks
from hif4c.runtime.transformer import CompiledTransformer

__all__ = ["StepError", "choose_ranges", "measure_steps"]

MAX_TIMESTEP = 1000.0
MAX_CLIPS = 4
"""Clips of a recorded batch that errors are measured on."""


@dataclass(frozen=True)
class StepError:
    """How far an expert's prediction is off at one timestep.

    Attributes:
        expert: which one serves the step.
        timestep: 0 to 1000.
        w4a4, w4a16: relative energy of the error of the predicted flow, with activations in 4 bits and in bf16.
    """

    expert: str
    timestep: float
    w4a4: float
    w4a16: float


def measure_steps(
    expert: str,
    model: CompiledTransformer,
    calibration: ExpertCalibration,
    progress: Callable[[int], None] = lambda count: None,
    *,
    ranks: Ranks = ALONE,
) -> list[StepError]:
    """Run both programs of an expert on its calibration calls and compare with the recorded outputs.

    Args:
        expert: its name.
        model: the compiled expert, with a second program.
        calibration: the expert's.
        progress: called with 1 after every call of this rank.
        ranks: share the calls. Errors are summed in the order of the calls, so the result does not depend on them.

    Returns:
        One entry for every timestep of the calls, in their order; the same on every rank.
    """
    energies: dict[int, tuple[float, list[float]]] = {}
    mine = set(ranks.share(range(calibration.call_count)))
    with ranks.together():
        programs = [model.variant(None), model.variant("bf16")]
        for number, (whole, recorded) in enumerate(calibration.calls()):
            if number not in mine:
                continue
            # Errors are averages over tokens: a few clips of a batch say as much as all.
            call, expected = whole.first(MAX_CLIPS), recorded[:MAX_CLIPS].double()
            found = [expected.square().sum()]
            for program in programs:
                found.append((program(*call.inputs, return_dict=False)[0].double() - expected).square().sum())
            energies[number] = call.noise_level, [float(value) for value in found]
            progress(1)
    for part in ranks.all_gather(energies):
        energies |= part
    sums: dict[float, list[float]] = {}
    for _, (timestep, values) in sorted(energies.items()):
        sums[timestep] = [total + value for total, value in zip(sums.get(timestep, [0.0] * 3), values, strict=True)]
    return [_step_error(expert, timestep, *values) for timestep, values in sums.items()]


def _step_error(expert: str, timestep: float, signal: float, w4a4: float, w4a16: float) -> StepError:
    # Of a prediction that is zero, any error would be infinitely large; such a step says nothing.
    return StepError(expert, timestep, *(noise / signal if signal else 0.0 for noise in (w4a4, w4a16)))


def choose_ranges(
    errors: Sequence[StepError], shares: Mapping[str, float], timesteps: Sequence[float] = ()
) -> dict[str, list[tuple[float, float]]]:
    """Timestep ranges, by expert, of the steps that gain most from bf16 activations.

    Args:
        errors: of the experts in `shares`; every timestep stands for one step of the sampling schedule.
        shares: expert -> share of its steps that may be chosen. Experts of equal shares have one budget, spent where
            it gains most. It is rounded to whole steps.
        timesteps: the schedule's other steps, served by experts that are not in `shares`.

    The error of a step enters the latents in proportion to the step's length in sigma, so steps are ranked by that
    length times what the error's norm loses. Ranges end midway between neighbouring timesteps, so that they do not
    depend on how a sampler rounds them.
    """
    levels = sorted({*timesteps, *(item.timestep for item in errors)})
    place = {level: index for index, level in enumerate(levels)}

    def gain(item: StepError) -> float:
        index = place[item.timestep]
        length = item.timestep - (levels[index - 1] if index else 0.0)
        return length * (item.w4a4**0.5 - item.w4a16**0.5)

    ranges: dict[str, list[tuple[float, float]]] = {expert: [] for expert in shares}
    for share in set(shares.values()):
        steps = [item for item in errors if shares[item.expert] == share]
        ranked = sorted(steps, key=lambda item: (gain(item), item.timestep), reverse=True)
        chosen = [item for item in ranked[: round(share * len(steps))] if gain(item) > 0]
        for item in sorted(chosen, key=lambda item: item.timestep):
            index = place[item.timestep]
            low = (levels[index - 1] + item.timestep) / 2 if index else 0.0
            high = (item.timestep + levels[index + 1]) / 2 if index + 1 < len(levels) else MAX_TIMESTEP
            mine = ranges[item.expert]
            if mine and mine[-1][1] == low:
                mine[-1] = (mine[-1][0], high)
            else:
                mine.append((low, high))
    return ranges
