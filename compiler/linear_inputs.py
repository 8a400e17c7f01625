"""What a calibration knows of the inputs of an expert's quantized linears, as the stored planes meet them."""

from __future__ import annotations

from hif4c.compiler.calibration import ExpertCalibration
from hif4c.compiler.linear_error import linear_sqnr
from hif4c.compiler.masks import rotated
from hif4c.compiler.planes import InputStatistics, Planes, PreparedWeight
from hif4c.passes.program import Program, TensorSource

__all__ = ["LinearInputs"]


class LinearInputs:
    """The calibration rows of each linear of a program.

    Args:
        program: with decisions, masks and shifts.
        calibration: the expert's.
    """

    def __init__(self, program: Program, calibration: ExpertCalibration) -> None:
        self._program, self._calibration = program, calibration

    def energy(self, source: TensorSource) -> InputStatistics | None:
        """E[x^2] of the input of a weight, shifted, masked and rotated; None where it was not calibrated."""
        path = _path(source)
        group = self._calibration.group_of(path)
        if group is None:
            return None
        rows, shift = self._calibration.rows(group).float(), self._program.decisions[path].shift
        rows = rows if shift is None else rows - self._program.shifts[shift]
        mask = None if source.mask is None else self._program.masks[source.mask]
        return InputStatistics(rotated(rows, mask, source.hadamard).square().mean(0), len(rows))

    def sqnr(self, source: TensorSource, weight: PreparedWeight, planes: Planes) -> float | None:
        """SQNR in dB of the linear's output by these planes of its weight; None as above."""
        path = _path(source)
        group, decision = self._calibration.group_of(path), self._program.decisions[path]
        if group is None:
            return None
        mask = None if decision.mask is None else self._program.masks[decision.mask]
        shift = None if decision.shift is None else self._program.shifts[decision.shift]
        return linear_sqnr(decision, self._calibration.rows(group).float(), weight, planes, mask, shift)


def _path(source: TensorSource) -> str:
    return str(source.source).removesuffix(".weight")
