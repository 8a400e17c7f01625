"""A tuner that times nothing."""

from collections.abc import Callable, Sequence

import torch

from hif4c.runtime.gpu.tuning import Candidate, Tuner


class Picked(Tuner):
    """Takes the first candidate whose name begins so, and insists that its result agrees.

    Args:
        prefix: of the name; an empty one takes the first of all.
        checks: whether results are compared; a driver that only records gives none.
    """

    def __init__(self, prefix: str = "", checks: bool = True) -> None:
        super().__init__(["picked"], lambda run: 0.0, None)
        self.prefix, self.checks = prefix, checks
        self.offered: list[str] = []

    def choose(
        self,
        key: str,
        candidates: Sequence[Candidate],
        disagrees: Callable[[torch.Tensor], str | None],
        spoil: Callable[[], object] = lambda: None,
    ) -> Candidate:
        self.offered = [candidate.name for candidate in candidates]
        chosen = next((item for item in candidates if item.name.startswith(self.prefix)), None)
        assert chosen is not None, f"{key}: there is no {self.prefix} among {self.offered}"
        if not self.checks:
            return chosen
        spoil()
        result = chosen.run()
        reason = disagrees(result)
        assert reason is None, f"{key}: {chosen.name}: {reason}"
        return Candidate(chosen.name, lambda: result)  # it is computed already
