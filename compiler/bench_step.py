"""One denoising step of a random Wan: eager diffusers in bf16, torch.compile of it, and the compiled artifact.

What takes turns is one call of the transformer with one video, in this process; memory is measured in fresh ones.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from hif4c.compiler.bench_inputs import Latent, random_inputs
from hif4c.compiler.bench_memory import COMPILED, DIFFUSERS, Memory, measure_memory
from hif4c.compiler.bench_timing import Timing, take_turns
from hif4c.compiler.random_model import compile_random_model, random_config
from hif4c.runtime.transformer import load

__all__ = ["EAGER", "TORCH_COMPILE", "W4A4", "W4A16", "StepFigures", "StepOptions", "StepResult", "measure_steps"]

EAGER, TORCH_COMPILE, W4A4, W4A16 = "diffusers bf16", "torch.compile", "hif4c W4A4", "hif4c W4A16"

Events = Callable[[str, Any], None]
Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class StepOptions:
    """What is measured.

    Attributes:
        width: of the residual stream.
        heads: of the attention.
        ffn: inner width of the feed-forward layers.
        layers: blocks.
        text_dim: width of the text embeddings.
        text: their number.
        latents: sizes of the video.
        repetitions: rounds of the timing.
        torch_compile: whether torch.compile is measured as well; compiling takes minutes.
        memory: whether memory is measured.
        kernels: as in `hif4c.runtime.load`.
    """

    width: int = 1536
    heads: int = 12
    ffn: int = 8960
    layers: int = 4
    text_dim: int = 4096
    text: int = 512
    latents: tuple[Latent, ...] = (Latent(5, 24, 52),)
    repetitions: int = 5
    torch_compile: bool = True
    memory: bool = True
    kernels: str = "jit"


@dataclass(frozen=True)
class StepFigures:
    """One size of video.

    Attributes:
        latent: as it was given.
        tokens: length of the sequence.
        timings: name -> seconds of a step.
        compile_seconds: of torch.compile, its first call included; None where it was left out.
        distance: of the W4A4 step's result from the bf16 model's, relative. The weights are random: it shows that both
            compute one function, and is no measure of quality.
        operators: name -> (operator, calls, seconds), largest first, of one profiled step; "" for what is outside of
            operators.
    """

    latent: str
    tokens: int
    timings: dict[str, Timing]
    compile_seconds: float | None
    distance: float
    operators: dict[str, list[tuple[str, int, float]]] = field(default_factory=dict)

    def ratio(self, name: str, to: str = W4A4, *, minimum: bool = False) -> float:
        """How many times as long as `to` a step takes."""
        one, other = self.timings[name], self.timings[to]
        return one.minimum / other.minimum if minimum else one.median / other.median


@dataclass(frozen=True)
class StepResult:
    """All sizes, and the memory of the two models."""

    options: StepOptions
    threads: int
    figures: list[StepFigures]
    memory: dict[str, Memory]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        steps = [
            {**asdict(item), "ratios": {name: item.ratio(name) for name in item.timings if name != W4A4}}
            for item in self.figures
        ]
        sizes = {**asdict(self.options), "latents": [str(item) for item in self.options.latents]}
        memory = {name: asdict(item) for name, item in self.memory.items()}
        return {"options": sizes, "threads": self.threads, "steps": steps, "memory": memory}


def measure_steps(options: StepOptions, directory: Path, events: Events) -> StepResult:
    """Make a random model, compile it, and measure it.

    Args:
        options: see `StepOptions`.
        directory: an empty one; model and artifact are left in it.
        events: ("step", sentence) before every part, ("advance", 1) after every round of the timing.

    Raises:
        Hif4Error: sizes that do not fit, or kernels that cannot be had.
    """
    config = random_config(options.width, options.heads, options.ffn, options.layers, options.text_dim)
    events("step", "making and compiling a random model")
    model, artifact = compile_random_model(directory, config)
    memory = {}
    if options.memory:
        for kind, name in ((DIFFUSERS, EAGER), (COMPILED, W4A4)):
            events("step", f"measuring the memory of {name}")
            largest = max(options.latents, key=lambda item: item.tokens)
            memory[name] = measure_memory(kind, model, artifact, largest, options.text, options.kernels)
    from diffusers import WanTransformer3DModel

    eager = WanTransformer3DModel.from_pretrained(model / "transformer", torch_dtype=torch.bfloat16).eval()
    ours = load(artifact, kernels=options.kernels, verify=False)
    figures = [
        _measure(options, latent, eager, {W4A4: ours.variant(None), W4A16: ours.variant("bf16")}, events)
        for latent in options.latents
    ]
    return StepResult(options, torch.get_num_threads(), figures, memory)


def _measure(options: StepOptions, latent: Latent, eager: Any, ours: dict[str, Any], events: Events) -> StepFigures:
    inputs = random_inputs(latent, eager.config.in_channels, eager.config.text_dim, options.text)
    compile_seconds = None

    def call(module: Any) -> Call:
        return lambda: module(*inputs, return_dict=False)[0]

    calls = {EAGER: call(eager)}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if options.torch_compile:
            events("step", f"torch.compile for {latent}")
            calls[TORCH_COMPILE], compile_seconds = _torch_compile(eager, call, stack)
        calls |= {name: call(module) for name, module in ours.items()}
        events("step", f"steps of {latent.tokens} tokens")
        timings = take_turns(calls, repetitions=options.repetitions, on_round=lambda: events("advance", 1))
        expected, found = calls[EAGER]().float(), calls[W4A4]().float()
        distance = float((found - expected).norm() / expected.norm())
        operators = {name: profile_operators(calls[name]) for name in (EAGER, W4A4, W4A16)}
    return StepFigures(str(latent), latent.tokens, timings, compile_seconds, distance, operators)


def _torch_compile(eager: Any, call: Callable[[Any], Call], stack: ExitStack) -> tuple[Call, float]:
    """Compile for one size of video, without what earlier runs left in caches; (call, seconds)."""
    from torch._inductor.utils import fresh_cache

    stack.enter_context(fresh_cache())
    torch._dynamo.reset()
    compiled = call(torch.compile(eager, dynamic=False))
    started = time.perf_counter()
    compiled()
    return compiled, time.perf_counter() - started


def profile_operators(call: Call) -> list[tuple[str, int, float]]:
    """(operator, calls, seconds) of one call, largest first; "" is the time outside of operators.

    Operators are those that Python calls: what they call themselves is part of them.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silent():
        with torch.profiler.profile(activities=activities):
            torch.ones(1)  # what the profiler does when it is first used is no part of a step
        with torch.profiler.profile(activities=activities) as profile:
            started = time.perf_counter()
            call()
            total = time.perf_counter() - started
    seconds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in profile.events():
        if event.cpu_parent is None and "::" in event.name:
            seconds[event.name] += event.cpu_time_total * 1e-6
            counts[event.name] += 1
    rows: Sequence[tuple[str, int, float]] = [(name, counts[name], seconds[name]) for name in seconds]
    outside = ("", 0, max(0.0, total - sum(seconds.values())))
    return sorted([*rows, outside], key=lambda row: -row[2])


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing reaches stderr: torch's profiler announces itself there, from C++."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
