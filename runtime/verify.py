"""Check a whole artifact: manifest, every hash, every program against its weights, and the golden outputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hif4c.runtime.artifact import Artifact, Progress, open_artifact
from hif4c.runtime.golden import OnNode, Replay, replay
from hif4c.runtime.native import select
from hif4c.runtime.safetensors_stream import TensorFile
from hif4c.runtime.transformer import CompiledTransformer, load_expert

__all__ = ["ExpertCheck", "verify_artifact"]


@dataclass(frozen=True)
class ExpertCheck:
    """What was found for one program of an expert.

    Attributes:
        expert: its name.
        nodes: nodes of the program.
        tensors: stored tensors that the program reads.
        replay: None for a program without golden outputs.
        variant: None for the main program, "bf16" for the one with activations in bf16.
    """

    expert: str
    nodes: int
    tensors: int
    replay: Replay | None
    variant: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the program loads and computes what it did when it was compiled."""
        return self.replay is None or self.replay.passed


def verify_artifact(
    path: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    kernels: str = "auto",
    experts: Sequence[str] | None = None,
    on_node: Callable[[int], None] = lambda total: None,
) -> list[ExpertCheck]:
    """Verify an artifact and replay its golden outputs: one check a program, those of an expert together.

    Args:
        path: the artifact's directory.
        progress: called with (file, bytes read) while files are hashed.
        kernels: what replays, as in `hif4c.runtime.load`.
        experts: replay these only; None for all.
        on_node: called after every node that was replayed, with the number of all that will be.

    Raises:
        Hif4Error: the artifact is damaged or incomplete. A golden output that differs is not an error but a check
            that did not pass.
    """
    artifact = open_artifact(path)
    artifact.verify(progress=progress)
    select(kernels, artifact)
    names = [name for name in artifact.experts if experts is None or name in experts]
    programs = [(name, variant) for name in names for variant in (None, *artifact.variants(name))]
    total = sum(len(artifact.graph(name, variant).nodes) for name, variant in programs)
    checks = []
    for name in names:
        model = load_expert(artifact, name, verify=False, release=True)
        for variant in (None, *artifact.variants(name)):
            # Alone: the golden timestep may lie in a range of the other program.
            program = model.variant(variant)
            label = name if variant is None else f"{name}.{variant}"
            outcome = _replay(artifact, label, program, lambda: on_node(total))
            graph = program.graph
            checks.append(ExpertCheck(name, len(graph.nodes), len(graph.tensors), outcome, variant))
    return checks


def _replay(artifact: Artifact, name: str, program: CompiledTransformer, on_node: OnNode) -> Replay | None:
    relative = f"golden/{name}.safetensors"
    if relative not in artifact.files:
        return None
    golden = TensorFile(artifact.path(relative))
    return replay(program, {item: golden.read(item) for item in golden.names}, on_node)
