"""Check a whole artifact: manifest, every hash, every program against its weights, and the golden outputs."""

from __future__ import annotations

import os
from dataclasses import dataclass

from hif4c.runtime.artifact import Progress, open_artifact
from hif4c.runtime.golden import Replay, replay
from hif4c.runtime.native import select
from hif4c.runtime.safetensors_stream import TensorFile
from hif4c.runtime.transformer import load_expert

__all__ = ["ExpertCheck", "verify_artifact"]


@dataclass(frozen=True)
class ExpertCheck:
    """What was found for one expert; `replay` is None for an artifact without golden outputs."""

    expert: str
    nodes: int
    tensors: int
    replay: Replay | None

    @property
    def passed(self) -> bool:
        """Whether the expert loads and computes what it did when it was compiled."""
        return self.replay is None or self.replay.passed


def verify_artifact(
    path: str | os.PathLike[str], *, progress: Progress | None = None, kernels: str = "auto"
) -> list[ExpertCheck]:
    """Verify an artifact and replay its golden outputs.

    Args:
        path: the artifact's directory.
        progress: called with (file, bytes read) while files are hashed.
        kernels: what replays, as in `hif4c.runtime.load`.

    Raises:
        Hif4Error: the artifact is damaged or incomplete. A golden output that differs is not an error but a check
            that did not pass.
    """
    artifact = open_artifact(path)
    select(kernels)
    artifact.verify(progress=progress)
    checks = []
    for name in artifact.experts:
        model = load_expert(artifact, name, verify=False)
        golden_name = f"golden/{name}.safetensors"
        outcome = None
        if golden_name in artifact.files:
            golden = TensorFile(artifact.path(golden_name))
            outcome = replay(model, {item: golden.read(item) for item in golden.names})
        checks.append(ExpertCheck(name, len(model.graph.nodes), len(model.graph.tensors), outcome))
    return checks
