"""docs/passes.md: what each pass does and why, from its docstrings, and what it does to a block, from a real run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher

import torch

from hif4c.compiler.calibrate import find_groups, plan_program
from hif4c.compiler.capture import capture
from hif4c.compiler.choose import MASK, SHIFT, Choices, can_shift
from hif4c.compiler.inspection import Traced
from hif4c.compiler.models import WanConfig, read_json_object, tiny_directory
from hif4c.compiler.pipeline import PASS_NAMES, PIPELINE
from hif4c.compiler.plan import make_plan
from hif4c.compiler.program_views import NodeView, Structure
from hif4c.compiler.recipe import DEFAULT_RECIPE, Recipe, load_recipe
from hif4c.compiler.report_passes import RELAXED, PassStep, StepRecorder, pass_docstring
from hif4c.passes.program import Program
from hif4c.passes.verify import Stage

__all__ = ["passes_page"]

BLOCK = "blocks.0"
BLOCKS = 2
MAX_LINES = 20
"""Changed lines that are shown of a pass."""
SIDE_BRANCHES, BRANCH_RECIPE = "add_side_branches", "svd"
"""A pass that the default recipe has no use for, and a recipe that has."""
MARKS = "Changes marks of the program, which the passes behind it read; no line of the block."

RULES = {
    Stage.CAPTURED: "The graph is well formed: every node has a value, and stored tensors and placeholders agree in "
    "name, dtype and shape. No `hif4` operator stands in it.",
    Stage.FUNCTIONAL: "Nothing writes into its argument, and no buffer is uninitialised.",
    Stage.PLANNED: "Every linear has a decision. Only quantized linears have masks and side branches; masks fit what "
    "they multiply, what is folded is folded somewhere, and what is taken off an input is given back by the linears "
    "that read it.",
    Stage.QDQ: "Input and weight of each linear are quantized and dequantized if its decision says so, and else not. "
    "The program runs as it is: it is the readable reference of the fused one.",
    Stage.PACKED: "No weight is quantized when the program runs; the planes that are stored instead have the shapes of "
    "the format, and no weight is stored twice.",
    Stage.LOWERED: "One fused node for every quantized linear, one `aten.linear` for every other, no dequantize; a "
    "fused linear lies in a block, reads the planes of one weight, and its input is masked and rotated as its weight "
    "was.",
    Stage.FUSED: "As before; norms, residuals and attention may be fused as well.",
}
"""What `hif4c.passes.verify` checks at each stage, beside what holds from the stages before."""

INTRODUCTION = """# The passes

What happens to a model between the trace and the artifact: {count} passes, one file each in [passes/](../passes), run
in this order by [compiler/pipeline.py](../compiler/pipeline.py). The [verifier](#the-verifier) checks the program
after each of them. relax_activations makes the second program of an expert that keeps bf16 activations in some steps.

The texts are the passes' own docstrings, and every figure and line comes from a run: {blocks} blocks of wan-tiny with
the default recipe, `{recipe}`. It reads no calibration, as the numbers in masks and channel means change no line of a
program; where a calibration finds an input to be best without a mask, its lines lack it. `python tools/make_docs.py
passes` writes this page. The same of an artifact:

```
hif4c inspect OUT --stage lower_linears --block 0     # the program after a pass
hif4c inspect OUT --html report.html                  # every pass, before and after, as graphs
```

**How to read the lines.** Block 0 before (`-`) and after (`+`) the pass, in order of execution, below the path of the
module that a line belongs to. `%17` is a value of the block, `outside%4` one that is made outside the blocks; a value
keeps its number from pass to pass. Behind `#` stands what the plan says about a linear; `stored` lines say how a tensor
is made from the checkpoint's. Sizes: b clips, f latent frames of h x w patches, text tokens.

| | pass | block 0 | nodes in all | rules after it |
| ---: | --- | ---: | ---: | --- |
"""


def passes_page() -> str:
    """The page as Markdown; traces a small model, which takes some seconds."""
    found = read_json_object(tiny_directory() / "transformer" / "config.json")
    config = WanConfig.from_dict({**found, "num_layers": BLOCKS}, "config.json")
    captured = capture(config)
    recorder, branches = StepRecorder(), StepRecorder()
    traced = _traced(captured, config, load_recipe(DEFAULT_RECIPE))
    recorder.run(traced)
    recorder.relax(traced.program)
    branches.run(_traced(captured, config, load_recipe(BRANCH_RECIPE)), stop_after=SIDE_BRANCHES)
    stages = {name: stage for name, _, stage in PIPELINE}
    rows, sections = [], []
    for number, (before, step) in enumerate(zip(recorder.steps, recorder.steps[1:], strict=False), 1):
        title = step.name if step.name == RELAXED else f"{number}. {step.name}"
        link = title.lower().replace(".", "").replace(" ", "-")
        difference = _Difference(recorder, before, step)
        rule = stages.get(step.name, Stage.FUSED).name.lower()
        place = "" if step.name == RELAXED else number
        rows.append(f"| {place} | [{step.name}](#{link}) | {difference.counts} | {step.nodes} | {rule} |\n")
        sections.append(_section(title, step, difference))
        if step.name == SIDE_BRANCHES:
            *_, before, step = branches.steps
            shown = _Difference(branches, before, step)
            sections.append(f"*With the recipe `{BRANCH_RECIPE}`:* {_facts(step, shown)}.\n\n{shown.text()}")
    introduction = INTRODUCTION.format(count=len(PASS_NAMES), blocks=BLOCKS, recipe=DEFAULT_RECIPE)
    return introduction + "".join(rows) + "\n" + "\n".join([*sections, _verifier()])


def _traced(captured: Program, config: WanConfig, recipe: Recipe) -> Traced:
    """A run of a recipe whose calibration says nothing: masks are ones, channel means zeros."""
    groups = find_groups(plan_program(captured.copy(), config))
    masks: dict[str, torch.Tensor] = {}
    shifts: dict[str, torch.Tensor] = {}
    mask_of: dict[str, str] = {}
    shift_of: dict[str, str] = {}
    for group in groups:
        if recipe.mask_percentile is not None:
            masks[group.name + MASK] = torch.ones(group.channels)
            mask_of |= dict.fromkeys(group.readers, group.name + MASK)
        if recipe.shift and can_shift(group.name):
            shifts[group.name + SHIFT] = torch.zeros(group.channels)
            shift_of |= dict.fromkeys(group.readers, group.name + SHIFT)
    choices = Choices(make_plan(config, recipe), masks, mask_of, shifts, shift_of)
    return Traced(captured.copy(), choices, recipe, "wan-tiny")


def _section(title: str, step: PassStep, difference: _Difference) -> str:
    what, how = pass_docstring(step.name)
    parts = [f"## {title}", what, how, f"*{'Did' if step.changed else 'Did nothing'}:* {_facts(step, difference)}."]
    if difference.changed:
        parts.append(difference.text().rstrip())
    elif step.changed:
        parts.append(MARKS)
    return "\n\n".join(parts) + "\n"


def _facts(step: PassStep, difference: _Difference) -> str:
    return "; ".join([*step.notes, *([f"{difference.counts} lines of block 0"] if difference.changed else [])])


def _verifier() -> str:
    rules = "\n".join(f"- **{stage.name.lower()}**: {RULES[stage]}" for stage in Stage)
    return (
        "## The verifier\n\n[passes/verify.py](../passes/verify.py) states the legal program at every stage and runs "
        "after every pass. What breaks a rule is a bug of the pass that ran last: it stops the compile and names the "
        f"pass.\n\n{rules}\n"
    )


class _Difference:
    """What a pass did to the block that is shown."""

    def __init__(self, recorder: StepRecorder, before: PassStep, after: PassStep) -> None:
        structures = list(recorder.structures)
        self._before, self._after = (_lines(structures[step.blocks[BLOCK]]) for step in (before, after))
        matcher = SequenceMatcher(None, self._before, self._after, autojunk=False)
        self._changes = [change for change in matcher.get_opcodes() if change[0] != "equal"]
        self.went = sum(end - start for _, start, end, _, _ in self._changes)
        self.came = sum(end - start for _, _, _, start, end in self._changes)

    @property
    def changed(self) -> bool:
        return bool(self._changes)

    @property
    def counts(self) -> str:
        return f"-{self.went} +{self.came}" if self.changed else ""

    def text(self) -> str:
        """The changed lines as a Markdown block, the first ones of many."""
        rows: list[str] = []
        room, module = MAX_LINES, None
        for _, start, end, new_start, new_end in self._changes:
            went, came = _cut(end - start, new_end - new_start, room)
            room -= went + came
            chosen = [("-", line) for line in self._before[start : start + went]]
            chosen += [("+", line) for line in self._after[new_start : new_start + came]]
            for sign, (heading, line) in chosen:
                if heading != module:
                    rows.append(f"  {heading}")
                    module = heading
                rows.append(f"{sign}   {line}")
        if self.went + self.came > MAX_LINES:
            rows.append(f"  ... the first {MAX_LINES} of {self.went + self.came} changed lines")
        return "```diff\n" + "\n".join(rows) + "\n```\n"


def _cut(went: int, came: int, room: int) -> tuple[int, int]:
    """How many lines of a change are shown, of what went and of what came alike."""
    if went + came <= room:
        return went, came
    first = min(went, max(room // 2, room - came))
    return first, min(came, room - first)


def _lines(structure: Structure) -> Sequence[tuple[str, str]]:
    """(module, line) of every node, and a line for every stored tensor that is not a copy of the checkpoint's."""
    lines = [(node.module or "(block)", _line(node)) for node in structure.nodes]
    reads = dict.fromkeys(item for node in structure.nodes for item in node.reads if "; " in item)
    return [*lines, *(("stored", item) for item in reads)]


def _line(node: NodeView) -> str:
    """The plan's word on a linear until the linear itself says it all."""
    return node.line if node.target.startswith("aten.") else replace(node, marks="").line
