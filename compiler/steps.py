"""Which denoising steps keep bf16 activations: measured on the calibration's calls, chosen under a budget of steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hif4c.compiler.calibration import ExpertCalibration
from hif4c.runtime.transformer import CompiledTransformer

__all__ = ["StepError", "choose_ranges", "measure_steps"]

MAX_TIMESTEP = 1000.0


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
) -> list[StepError]:
    """Run both programs of an expert on its calibration calls and compare with the recorded outputs."""
    sums: dict[float, list[float]] = {}
    programs = [model.variant(None), model.variant("bf16")]
    for call, expected in calibration.calls():
        entry = sums.setdefault(call.noise_level, [0.0, 0.0, 0.0])
        entry[0] += float(expected.double().square().sum())
        for index, program in enumerate(programs):
            found = program(*call.inputs, return_dict=False)[0]
            entry[1 + index] += float((found.double() - expected.double()).square().sum())
        progress(1)
    return [
        StepError(expert, timestep, noise / signal, rest / signal) for timestep, (signal, noise, rest) in sums.items()
    ]


def choose_ranges(errors: Sequence[StepError], share: float) -> Mapping[str, list[tuple[float, float]]]:
    """Timestep ranges, by expert, of the steps that gain most from bf16 activations.

    Args:
        errors: of all experts; every timestep stands for one step of the sampling schedule.
        share: of the steps that may be chosen, rounded to whole steps.

    The error of a step enters the latents in proportion to the step's length in sigma, so steps are ranked by that
    length times what the error's norm loses. Ranges end midway between neighbouring timesteps, so that they do not
    depend on how a sampler rounds them.
    """
    ordered = sorted(errors, key=lambda item: item.timestep)
    levels = [item.timestep for item in ordered]
    gains = []
    for index, item in enumerate(ordered):
        length = item.timestep - (levels[index - 1] if index else 0.0)
        gains.append((length * (item.w4a4**0.5 - item.w4a16**0.5), index))
    count = round(share * len(ordered))
    chosen = {index for gain, index in sorted(gains, reverse=True)[:count] if gain > 0}
    ranges: dict[str, list[tuple[float, float]]] = {item.expert: [] for item in ordered}
    for index, item in enumerate(ordered):
        if index not in chosen:
            continue
        low = (levels[index - 1] + item.timestep) / 2 if index else 0.0
        high = (item.timestep + levels[index + 1]) / 2 if index + 1 < len(levels) else MAX_TIMESTEP
        mine = ranges[item.expert]
        if mine and mine[-1][1] == low:
            mine[-1] = (mine[-1][0], high)
        else:
            mine.append((low, high))
    return ranges
