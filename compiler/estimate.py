"""What a calibration and a compile will take: time, disk and memory, before they begin.

The work follows from the shapes (bytes to read and write, elements to round, products to multiply); how long that takes
from rates that are measured on this machine (`measure_rates`). What is left out is small or unknowable: how often a
page is in memory already, how well the steps overlap, what else the machine does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hif4c.compiler.calibrate import WAITING
from hif4c.compiler.disk_space import waiting_bytes
from hif4c.compiler.interpret import MEMORY as MEMORY_BUDGET
from hif4c.compiler.machine_rates import MachineRates
from hif4c.compiler.models import WanConfig
from hif4c.compiler.plan import ExpertPlan, PlannedLinear, make_plan
from hif4c.compiler.recipe import SEARCH, Recipe
from hif4c.compiler.workers import BUDGET

__all__ = [
    "UNCERTAINTY",
    "CalibrationLoad",
    "Step",
    "Workload",
    "activation_bytes",
    "calibration_disk",
    "calibration_memory",
    "compile_memory",
    "estimate_calibration",
    "estimate_compile",
    "forward_bytes",
    "forward_operations",
    "groups",
    "latent_tokens",
]

UNCERTAINTY = 3.0
"""Times are right within this factor, where the machine stays as busy as it is during the measurement."""

# Interpreted work, in turns of the probe's loop.
_START, _PROCESS = 1.1e8, 0.3e8  # imports of torch and diffusers; of a fresh process that verifies
_CAPTURE, _PASSES = 3.6e6, 2.2e6  # for every block
_RUN = 0.6e6  # nodes of a block, run once
_GOLDEN_RUNS, _VERIFY_RUNS = 3, 3
"""How often the portable kernels multiply with every weight: alone and in the whole, and once more to see how far a
last-bit change gets; replayed alone and in the whole, and again against the portable definition."""

_ROWS = 256
"""Tokens that a calibration keeps of every input, and errors are measured on."""
_SEARCH_OUTPUTS, _SEARCH_READERS, _SEARCH_TRIES = 512, 6, 12
_GPTQ_PRODUCTS = 8
"""Multiples of 2 N K^2 / 2 operations: the feedback of all earlier columns, and three errors under the Hessian."""
_BINS, _BIN_BYTES, _ROW_BYTES = 4, 776, 512
"""A channel in a calibration file: a histogram a timestep bin with all its buckets in use, and its rows."""
_BASE_MEMORY = 900_000_000
"""Python, torch, diffusers and the program of a large model."""
_ACTIVATION_WIDTHS = 10
"""Values of the model's width that a token has at once in a block, beside one of the feed-forward layer's."""


@dataclass(frozen=True)
class Step:
    """A part of the work.

    Attributes:
        name: for people.
        seconds: it takes.
        read, written: bytes.
    """

    name: str
    seconds: float
    read: float = 0
    written: float = 0


@dataclass(frozen=True)
class Workload:
    """One expert to compile.

    Attributes:
        config: its config.
        plan: its plan.
        recipe: its recipe.
        stored_bytes: of its checkpoint.
        calls: tokens of every recorded call, for rounding by GPTQ.
        measured: whether a calibration is given, so that every linear's error is measured.
    """

    config: WanConfig
    plan: ExpertPlan
    recipe: Recipe
    stored_bytes: int
    calls: tuple[int, ...] = ()
    measured: bool = False

    @property
    def quantized(self) -> list[PlannedLinear]:
        """The linears that get packed."""
        return [linear for linear in self.plan.linears if linear.decision.quantized]

    @property
    def elements(self) -> int:
        """Of the packed weights."""
        return sum(linear.in_features * linear.out_features for linear in self.quantized)


def estimate_compile(
    workloads: Mapping[str, Workload], rates: MachineRates, *, components: int = 0, golden: bool = True
) -> list[Step]:
    """The steps of a compile.

    Args:
        workloads: expert -> its work.
        rates: of this machine.
        components: bytes of the rest of the pipeline that are copied.
        golden: whether golden outputs are recorded.
    """
    works = list(workloads.values())
    configs = {work.config for work in works}
    blocks = sum(work.config.num_layers for work in works)
    traced = sum(config.num_layers for config in configs)
    written = sum(work.plan.bytes_after for work in works)
    elements = sum(work.elements for work in works)
    steps = [Step("start, trace the model, passes", (_START + _CAPTURE * traced + _PASSES * blocks) / rates.loops)]
    if components:
        seconds = components / rates.read + components / rates.write
        steps.append(Step("copy the rest of the pipeline", seconds, components, components))
    checked = [work for work in works if work.measured]
    if checked:
        read = sum(work.stored_bytes for work in checked)
        seconds = max(read / rates.read, read / rates.hash / rates.cores)
        steps.append(Step("compare the weights with the calibration", seconds, read))
    chosen = [work for work in works if work.recipe.needs_calibration]
    if chosen:
        read = sum(work.stored_bytes for work in chosen)
        steps.append(Step("choose masks, shifts, precision", sum(_choose(work, rates) for work in chosen), read))
    solved = [work for work in works if work.recipe.rounding == "gptq"]
    if solved:
        read = sum(work.stored_bytes for work in solved)
        planes = sum(linear.plane_bytes for work in solved for linear in work.quantized)
        steps.append(
            Step("round on the calibration's calls", sum(_solve(work, rates) for work in solved), read, planes)
        )
    tried = [(work.config, count) for work in works if work.recipe.bf16_steps for count in work.calls]
    relaxed = sum(forward_operations(config, count) for config, count in tried)
    read = sum(work.stored_bytes for work in works)
    steps.append(Step("pack the weights", sum(_pack(work, rates) for work in works), read, written))
    hashing = written / rates.hash
    if relaxed:
        # Both programs predict every call.
        steps.append(Step("choose steps in bf16", 2 * relaxed / rates.multiply, 2 * written))
    checks = [hashing, elements * _VERIFY_RUNS / rates.decode, (_PROCESS + _RUN * blocks) / rates.loops]
    if golden:
        checks.append(elements * _GOLDEN_RUNS / rates.decode)
    steps.append(Step("golden outputs, verification", sum(checks), written * (2 if golden else 1)))
    return steps


def _pack(work: Workload, rates: MachineRates) -> float:
    """Reading, computing and writing overlap; the slowest of them counts."""
    computing = work.stored_bytes / rates.hash / rates.cores + work.stored_bytes / rates.scan
    if work.recipe.rounding != "gptq":
        rate = rates.search if work.recipe.rounding == "search" else rates.quantize
        computing += work.elements / rate
    if work.recipe.rank:
        # A randomized SVD: ten products of the weight with a few columns.
        computing += 20 * work.elements * (work.recipe.rank + 8) / rates.multiply
    if work.measured:
        computing += 2 * (2 * _ROWS * work.elements) / rates.multiply
    hashing = work.plan.bytes_after / rates.hash / rates.cores
    return max(computing, work.stored_bytes / rates.read, work.plan.bytes_after / rates.write) + hashing


def _choose(work: Workload, rates: MachineRates) -> float:
    """Every weight is read for its channels' maxima; masks and errors are tried on some rows of it."""
    seconds = work.stored_bytes / min(rates.scan, rates.read)
    for readers, channels in groups(work.plan.linears):
        tried = min(readers, _SEARCH_READERS) if work.recipe.alpha == SEARCH else 0
        outputs = _SEARCH_OUTPUTS * (_SEARCH_TRIES * tried + 2 * readers)
        rows = _ROWS * (_SEARCH_TRIES if tried else 1)
        seconds += (outputs + rows) * channels / rates.quantize
        seconds += 2 * _ROWS * outputs * channels / rates.multiply
    return seconds


def _solve(work: Workload, rates: MachineRates) -> float:
    """Hessians of all inputs, GPTQ of all weights, and the program itself over the recorded calls."""
    tokens = sum(work.calls)
    operations: float = sum(forward_operations(work.config, count) for count in work.calls)
    operations += sum(2 * tokens * channels**2 for _, channels in groups(work.plan.linears))
    for linear in work.quantized:
        n, k = linear.out_features, linear.in_features
        # The factorization is in float64, at half the speed.
        operations += _GPTQ_PRODUCTS * n * k**2 + 2 * k**3 / 3
    # The scales are searched twice: for all columns at once, and unit by unit along the feedback.
    return operations / rates.multiply + 2 * work.elements / rates.search + work.stored_bytes / rates.read


def groups(linears: Sequence[PlannedLinear]) -> list[tuple[int, int]]:
    """(readers, channels) of every quantized input: queries, keys and values of self-attention share one."""
    count: dict[str, tuple[int, int]] = {}
    for linear in linears:
        if not linear.decision.quantized:
            continue
        path = linear.decision.path
        if path.endswith(("attn1.to_k", "attn1.to_v")):
            path = path[:-1] + "q"
        elif path.endswith(("attn2.to_k", "attn2.to_v")):
            path = "text"
        readers, _ = count.get(path, (0, 0))
        count[path] = (readers + 1, linear.in_features)
    return list(count.values())


def compile_memory(workloads: Mapping[str, Workload], cores: int) -> int:
    """Peak resident bytes of a compile, of GPTQ's Hessians too."""
    return _BASE_MEMORY + max(max(_packing_memory(work, cores), _solving_memory(work)) for work in workloads.values())


def _packing_memory(work: Workload, cores: int) -> int:
    """Planes of the weights that are worked on, one a core, of one that waits for the disk and one that is written."""
    largest = max((linear.plane_bytes for linear in work.quantized), default=0)
    # A low-rank branch has its weight whole in float32.
    whole = 4 * _largest(work) if work.recipe.rank else 0
    return min(BUDGET, (cores + 2) * largest + (cores + 1) * whole)


def _solving_memory(work: Workload) -> int:
    """A Hessian with its exact sums, or with what `gptq` says it takes; a call; and the values that wait."""
    if work.recipe.rounding != "gptq":
        return 0
    k = max((linear.in_features for linear in work.quantized), default=0)
    hessian = 4 * k**2
    solving = max(4 * k * (k + 512), hessian + 16 * k * 1024 + 4 * _largest(work))
    waiting = min(MEMORY_BUDGET, waiting_bytes(work.plan) * sum(work.calls))
    return hessian + solving + activation_bytes(work.config, max(work.calls, default=0)) + waiting


def _largest(work: Workload) -> int:
    """Elements of the largest packed weight."""
    return max((linear.in_features * linear.out_features for linear in work.quantized), default=0)


def activation_bytes(config: WanConfig, tokens: int) -> int:
    """What the activations of one call take at once, roughly: some values of the width and one of the feed-forward."""
    return 2 * tokens * (_ACTIVATION_WIDTHS * config.inner_dim + config.ffn_dim)


def forward_bytes(work: Workload, tokens: int) -> int:
    """Resident bytes of one forward pass of the compiled expert, its weights included."""
    return work.plan.bytes_after + activation_bytes(work.config, tokens)


def forward_operations(config: WanConfig, tokens: int, text: int = 512) -> float:
    """Floating-point operations of one forward pass; text is projected for keys and values alone."""
    width, blocks = config.inner_dim, config.num_layers
    per_token = 6 * width**2 + 2 * width * config.ffn_dim
    attention = 2 * width * tokens * (tokens + text)
    return 2 * blocks * (per_token * tokens + 2 * width**2 * text + attention)


@dataclass(frozen=True)
class CalibrationLoad:
    """What a calibration runs.

    Attributes:
        tokens: of a clip.
        sampled: forward passes of one clip that sampling takes, of all experts together; 0 where clips are given.
        calls: recorded calls of each expert.
        batch: clips of a call.
    """

    tokens: int
    sampled: int
    calls: int
    batch: int = 1


def estimate_calibration(
    workloads: Mapping[str, Workload], rates: MachineRates, load: CalibrationLoad, *, components: int = 0
) -> list[Step]:
    """The steps of a calibration.

    Args:
        workloads: expert -> its work.
        rates: of this machine, products on the device that is used.
        load: what it runs.
        components: bytes of the rest of the pipeline, which is read for the sampling.
    """
    works = list(workloads.values())
    traced = sum(config.num_layers for config in {work.config for work in works})
    read = sum(work.stored_bytes for work in works)
    forward = forward_operations(works[0].config, load.tokens) / rates.multiply16
    clips = load.calls * load.batch
    channels = sum(channels for work in works for _, channels in groups(work.plan.linears))
    running = clips * (len(works) * forward + load.tokens * channels / rates.count) + read / rates.read
    file = sum(_calibration_bytes(work.config) for work in works)
    steps = [
        Step("start, trace the model", (_START + _CAPTURE * traced) / rates.loops),
        Step("run, count activations", running + 2 * file / rates.write, read, 2 * file),
    ]
    if load.sampled:
        loaded = read + components
        steps.insert(1, Step("sample by the model itself", load.sampled * forward + loaded / rates.read, loaded))
    return steps


def calibration_disk(configs: Mapping[str, WanConfig], tokens: int, *, expanded: bool = False) -> dict[str, int]:
    """What a calibration writes, for `check_disk`: its parts, the file, and values that wait.

    Args:
        configs: of the experts.
        tokens: of all recorded calls of an expert.
        expanded: whether every token has a timestep of its own.
    """
    file = sum(_calibration_bytes(config) for config in configs.values())
    waiting = tokens * max(_calibration_waiting(config, expanded) for config in configs.values()) - WAITING
    needs = {"the file and its parts": 2 * file, "activations on the way": waiting}
    return {name: count for name, count in needs.items() if count > 0}


def calibration_memory(
    workloads: Mapping[str, Workload], load: CalibrationLoad, *, components: int = 0, expanded: bool = False
) -> int:
    """Peak resident bytes of a calibration: the whole pipeline while it samples, else a block, a call and a budget.

    `components` as in `estimate_calibration`, `expanded` as in `calibration_disk`.
    """
    works = list(workloads.values())
    call = max(activation_bytes(work.config, load.tokens * load.batch) for work in works)
    tokens = load.tokens * load.batch * load.calls
    waiting = tokens * max(_calibration_waiting(work.config, expanded) for work in works)
    block = max(work.stored_bytes // work.config.num_layers for work in works)
    running = block + min(WAITING, waiting)
    sampling = sum(work.plan.bytes_before for work in works) + components if load.sampled else 0
    return _BASE_MEMORY + call + max(running, sampling)


def _calibration_waiting(config: WanConfig, expanded: bool) -> int:
    """Bytes of a token between two blocks: the residual stream and the tables of the rotary embedding, in float32.

    With a timestep of its own also what the timestep makes: six modulations and the embedding.
    """
    return 2 * config.inner_dim * (8 if expanded else 1) + 2 * 4 * config.attention_head_dim


def _calibration_bytes(config: WanConfig) -> int:
    """Histograms and rows of every group, at most."""
    linears = make_plan(config, Recipe("calibration")).linears
    return sum(channels for _, channels in groups(linears)) * (_BINS * _BIN_BYTES + _ROW_BYTES)


def latent_tokens(config: WanConfig, height: int, width: int, frames: int) -> int:
    """Tokens of a video: its VAE's factors follow from the latent channels."""
    space, time = {8: (4, 2), 48: (16, 4)}.get(config.out_channels, (8, 4))
    sizes = ((frames - 1) // time + 1, height // space, width // space)
    return math.prod(size // patch for size, patch in zip(sizes, config.patch_size, strict=True))
