"""What each pass did to an expert's program, as data for the report's page.

The config is traced again and every pass runs once; equal regions are stored once, whatever block and pass they are of.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

from hif4c.compiler.emit import to_graph
from hif4c.compiler.inspection import Traced, trace_again
from hif4c.compiler.pipeline import PassRecord
from hif4c.compiler.program_details import ProgramDetails, stored_details
from hif4c.compiler.program_views import NodeView, Structure, view_regions
from hif4c.passes.program import Precision, Program
from hif4c.passes.relax_activations import relax_activations
from hif4c.runtime.artifact import Artifact, ExpertInfo
from hif4c.runtime.graph import Graph, encode

__all__ = [
    "CAPTURED",
    "RELAXED",
    "STORED",
    "ExpertPasses",
    "NotApplied",
    "PassStep",
    "StepRecorder",
    "artifact_passes",
    "expert_passes",
    "pass_docstring",
]

CAPTURED, STORED, RELAXED = "captured", "graph.json", "relax_activations"
Events = Callable[[str, Any], None]


@dataclass(frozen=True)
class PassStep:
    """The program after one pass.

    Attributes:
        name: of the pass; "captured" before the first, "graph.json" for the stored program, and "relax_activations"
            for the stored program of the timesteps that keep activations in bf16.
        what: what it does, in a sentence.
        changed: whether the pass says that it changed the program (which may be marks alone).
        notes: what the pass did and left alone.
        nodes: nodes of the program after it, without inputs and stored tensors.
        blocks: region ("outside", "blocks.0", ...) -> number of its structure.
    """

    name: str
    what: str
    changed: bool
    notes: tuple[str, ...]
    nodes: int
    blocks: dict[str, int]


@dataclass(frozen=True)
class NotApplied:
    """Something that was left alone: what, why, and the pass that left it."""

    what: str
    why: str
    pass_name: str


@dataclass(frozen=True)
class ExpertPasses:
    """Every step from the captured program to the stored ones.

    Attributes:
        expert: its name.
        passes: in order; the step before one is what it started from.
        structures: what the numbers in `PassStep.blocks` mean.
        not_applied: what did not apply, and why.
    """

    expert: str
    passes: tuple[PassStep, ...]
    structures: tuple[Structure, ...]
    not_applied: tuple[NotApplied, ...]

    def difference(self, step: int, region: str) -> tuple[list[NodeView], list[NodeView]]:
        """The nodes of a region that step number `step` took away, and those that it brought."""
        after = self._nodes(step, region)
        before = self._nodes(step - 1, region) if step else {}
        return [node for node in before if node not in after], [node for node in after if node not in before]

    def _nodes(self, step: int, region: str) -> dict[NodeView, None]:
        number = self.passes[step].blocks.get(region)
        return {} if number is None else dict.fromkeys(self.structures[number].nodes)

    def to_json(self) -> dict[str, Any]:
        """Plain data, with every distinct node once.

        "nodes" are rows in the order of `NodeView`'s attributes (which "node_fields" names), those of a structure are
        positions in it: between two steps, the nodes that went and came are a difference of sets of positions.
        """
        table: dict[NodeView, int] = {}
        structures = [
            {
                "nodes": [table.setdefault(node, len(table)) for node in structure.nodes],
                "edges": [list(edge) for edge in structure.edges],
                "inputs": [list(astuple(item)) for item in structure.inputs],
            }
            for structure in self.structures
        ]
        return {
            "expert": self.expert,
            "passes": [vars(step) for step in self.passes],
            "not_applied": [vars(item) for item in self.not_applied],
            "node_fields": list(NodeView.__dataclass_fields__),
            "nodes": [list(vars(node).values()) for node in table],
            "structures": structures,
        }


def expert_passes(artifact: Artifact, expert: str, on_event: Events = lambda event, value: None) -> ExpertPasses:
    """Trace the expert's config again and record the program after every pass.

    Args:
        artifact: an opened artifact.
        expert: the expert's name.
        on_event: called with ("stage", what is being done), once a pass.

    Raises:
        Hif4Error: there is no such expert, or the manifest's config, recipe or linears cannot be used.
    """
    on_event("stage", f"{expert}: trace")
    return _collect(trace_again(artifact, expert), artifact, expert, on_event)


def artifact_passes(artifact: Artifact, on_event: Events = lambda event, value: None) -> dict[str, ExpertPasses]:
    """`expert_passes` of every expert; those of one config share its trace, which is what takes long."""
    captured: dict[tuple[Any, ...], Program] = {}
    found = {}
    for expert in artifact.experts:
        on_event("stage", f"{expert}: trace")
        found[expert] = _collect(trace_again(artifact, expert, captured), artifact, expert, on_event)
    return found


def _collect(traced: Traced, artifact: Artifact, expert: str, on_event: Events) -> ExpertPasses:
    recorder = StepRecorder()
    records = recorder.run(traced, lambda name: on_event("stage", f"{expert}: {name}"))
    recorder.add_stored(STORED, "The program that the artifact stores.", (), traced.program, artifact.graph(expert))
    if "bf16" in artifact.variants(expert):
        notes = tuple(relax_activations(traced.program).notes)
        stored = artifact.graph(expert, "bf16")
        recorder.add_stored(RELAXED, _sentence(RELAXED), notes, traced.program, stored)
    left = _not_applied(records, traced, artifact.expert(expert))
    return ExpertPasses(expert, tuple(recorder.steps), tuple(recorder.structures), tuple(left))


class StepRecorder:
    """Records one program after every pass; equal structures get one number.

    Attributes:
        steps: so far.
        structures: structure -> number, in the order of the numbers.
    """

    def __init__(self) -> None:
        self.steps: list[PassStep] = []
        self.structures: dict[Structure, int] = {}
        self._details = ProgramDetails()

    def run(
        self, traced: Traced, on_pass: Callable[[str], None] = lambda name: None, stop_after: str | None = None
    ) -> list[PassRecord]:
        """Record the captured program, run the passes on it and record each."""
        self.add(CAPTURED, "The program as `torch.export` traced it.", True, (), traced.program)

        def record_pass(record: PassRecord, program: Program) -> None:
            on_pass(record.name)
            self.add(record.name, _sentence(record.name), record.changed, record.notes, program)

        return traced.run(stop_after, record_pass)

    def relax(self, program: Program) -> None:
        """Run `relax_activations` on a program that went through all passes, and record it."""
        result = relax_activations(program)
        self.add(RELAXED, _sentence(RELAXED), result.changed, tuple(result.notes), program)

    def add(self, name: str, what: str, changed: bool, notes: tuple[str, ...], program: Program) -> None:
        """Record a program; the arguments are attributes of its `PassStep`."""
        graph = to_graph(program)
        blocks = self._blocks(graph, program)
        self.steps.append(PassStep(name, what, changed, notes, len(graph.nodes), blocks))

    def add_stored(self, name: str, what: str, notes: tuple[str, ...], program: Program, stored: Graph) -> None:
        """Record an artifact's own program; what the passes know holds where it is the program traced again."""
        same = encode(to_graph(program)) == encode(stored)
        blocks = self._blocks(stored, program if same else None)
        if not same:
            notes = (*notes, "not what this version of hif4c, torch and diffusers traces: values are numbered anew")
        self.steps.append(PassStep(name, what, blocks != self.steps[-1].blocks, notes, len(stored.nodes), blocks))

    def _blocks(self, graph: Graph, program: Program | None) -> dict[str, int]:
        """The number of every region's structure."""
        if program is None:
            regions = view_regions(graph, stored_details(graph), {})
        else:
            regions = view_regions(graph, self._details.nodes(program), self._details.tensors(program))
        return {
            region: self.structures.setdefault(structure, len(self.structures)) for region, structure in regions.items()
        }


def _not_applied(records: list[PassRecord], traced: Traced, info: ExpertInfo) -> list[NotApplied]:
    """From the manifest what the plan left in more bits, and from the notes what the passes left alone."""
    kept: dict[tuple[str, str], list[str]] = {}
    for decision in traced.choices.plan.decisions:
        if decision.precision == Precision.HIGH:
            kept.setdefault(("4 bits", str(decision.reason)), []).append(decision.path)
        elif decision.precision == Precision.W4A16 and traced.recipe.precision == Precision.W4A4:
            kept.setdefault(("4-bit activations", str(decision.reason)), []).append(decision.path)
    found = [NotApplied(f"{what}: {', '.join(paths)}", why, "choose_precision") for (what, why), paths in kept.items()]
    for record in records:
        found += [item for note in record.notes if (item := _from_note(note, record)) is not None]
    if info.bf16_timesteps:
        when = ", ".join(f"{low:g} to {high:g}" for low, high in info.bf16_timesteps)
        why = f"the recipe keeps bf16 activations in up to {traced.recipe.bf16_steps:.0%} of the steps"
        found.append(NotApplied(f"4-bit activations: timesteps {when}", why, RELAXED))
    return found


NOTES = (
    re.compile(r"\d+ (?P<what>not \w+), (?P<why>.*): (?P<where>[^:]*)"),
    re.compile(r"(?P<where>[^:]*): (?P<what>not \w+), (?P<why>.*)"),
)
"""Notes of what was left alone: "3 not folded, REASON: PATH and 2 more" and "PATH: not fused, REASON"."""


def _from_note(note: str, record: PassRecord) -> NotApplied | None:
    """What a pass's note says that it left alone; None for a note of what it did."""
    for pattern in NOTES:
        if match := pattern.fullmatch(note):
            return NotApplied(f"{match['what']}: {match['where']}", match["why"], record.name)
    return None if record.changed else NotApplied("the whole pass", note, record.name)


def pass_docstring(name: str) -> tuple[str, str]:
    """(what it does: its module's docstring, how: the docstring of its function without arguments and errors).

    A pass has the name of its module in `hif4c.passes` and of the function there.
    """
    module = importlib.import_module(f"hif4c.passes.{name}")
    how = inspect.cleandoc(getattr(module, name).__doc__ or "")
    for heading in ("\n\nArgs:", "\n\nRaises:", "\n\nReturns:"):
        how = how.split(heading)[0]
    return inspect.cleandoc(module.__doc__ or ""), how


def _sentence(name: str) -> str:
    """What a pass does: the first paragraph of its docstring, on one line."""
    what, _ = pass_docstring(name)
    return " ".join(what.split("\n\n")[0].split())
