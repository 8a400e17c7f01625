"""hif4c bench linear: the 4-bit linear beside torch's, on this machine."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path.pop(0)  # run as a script: this folder must not hide the standard library (inspect)

import platform
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from hif4c.tools.console import console, make_table, progress_bar, run

__all__ = ["app", "linear"]

SHAPES = "1536x1536,1536x8960,5120x5120"
ROWS = "1,8,256,2048"

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Measure on this machine what a part costs beside torch's.",
)


@app.callback()
def group() -> None:
    """Keeps `bench linear` a command with a name of its own while it is the only one."""


@app.command("linear")
def linear(
    shapes: Annotated[str, typer.Option(help="KxN, separated by commas.")] = SHAPES,
    rows: Annotated[str, typer.Option(help="Rows M, separated by commas.")] = ROWS,
    seconds: Annotated[float, typer.Option(help="About how long to measure each shape.")] = 2.0,
    threads: Annotated[int | None, typer.Option(help="Threads. Default: torch's.")] = None,
    kernels: Annotated[str, typer.Option(help="auto, native or portable.")] = "native",
) -> None:
    """Time y = x W^T + b for bf16 x: torch in fp32 and bf16, and HiF4 (the quantization of x included).

    The repetitions of all take turns, so that a busy machine slows each alike; medians and their ratios are shown.
    """
    import torch

    from hif4c.runtime.native import registry

    registry.select(kernels)
    if threads is not None:
        if threads < 1:
            raise typer.BadParameter("threads must be at least 1")
        torch.set_num_threads(threads)
    sizes = [_pair(item) for item in shapes.split(",")]
    counts = [_number(item) for item in rows.split(",")]
    console.print(_machine(registry), highlight=False)
    table = make_table(
        "medians in ms; HiF4 includes the quantization of x",
        ("K x N", "M", "fp32", "bf16", "HiF4", "of it quantize", "HiF4 GOP/s", "fp32 / HiF4", "bf16 / HiF4"),
    )
    with progress_bar("measuring", len(sizes) * len(counts)) as advance:
        for k, n in sizes:
            for m in counts:
                took = measure(m, k, n, seconds)
                table.add_row(
                    f"{k} x {n}", str(m), *(f"{1e3 * took[name]:.3f}" for name in ("fp32", "bf16", "hif4", "quantize")),
                    f"{2e-9 * m * k * n / took['hif4']:.0f}",
                    f"{took['fp32'] / took['hif4']:.2f}", f"{took['bf16'] / took['hif4']:.2f}",
                )  # fmt: skip
                advance(1)
    console.print(table)


def measure(m: int, k: int, n: int, seconds: float) -> dict[str, float]:
    """Median seconds of one linear [m, k] x [k, n], by name: fp32, bf16, hif4, and quantize (a part of hif4)."""
    import torch

    from hif4c.runtime.format import quantize

    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
    bias = torch.randn(n, generator=generator)
    planes = quantize(weight)
    x16, weight16, bias16 = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    hif4, functional = torch.ops.hif4, torch.nn.functional
    calls: dict[str, Callable[[], Any]] = {
        "fp32": lambda: functional.linear(x, weight, bias),
        "bf16": lambda: functional.linear(x16, weight16, bias16),
        "hif4": lambda: hif4.linear(*hif4.quantize(x16), *planes, bias16),
        "quantize": lambda: hif4.quantize(x16),
    }
    took: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for call in calls.values():
            call()
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(took["hif4"]) < 3:
            for name, call in calls.items():
                started = time.perf_counter()
                call()
                took[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in took.items()}


def _machine(registry: Any) -> str:
    import torch

    from hif4c.runtime.native.bindings import INSTRUCTION_SETS

    kernels = "portable"
    if registry.is_enabled():
        kernels = f"native, {INSTRUCTION_SETS[registry.enable().instruction_set]}"
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{_processor()}, {os.cpu_count()} processors{load}; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads; kernels: {kernels}"
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _pair(text: str) -> tuple[int, int]:
    k, _, n = text.partition("x")
    return _number(k), _number(n)


def _number(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is not a positive number; shapes look like 1536x1536, rows like 1,8,256")
    return int(text)


if __name__ == "__main__":
    run(app)
