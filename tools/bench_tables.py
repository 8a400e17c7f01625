"""The tables of `hif4c bench`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from hif4c.compiler.amounts import format_bytes, format_seconds
from hif4c.compiler.bench_linear import FORMATS, LinearFigures
from hif4c.compiler.bench_memory import Memory
from hif4c.compiler.bench_scale import PartFigures, ScaleResult, StageFigures
from hif4c.compiler.bench_static import StaticFigures
from hif4c.compiler.bench_step import EAGER, W4A4, StepFigures, StepResult
from hif4c.compiler.bench_timing import Timing
from hif4c.compiler.roofline import BlockModel
from hif4c.tools.console import make_table

__all__ = ["linear_tables", "model_table", "scale_tables", "static_table", "step_tables", "to_markdown"]

_SHOWN_OPERATORS = 14


def linear_tables(figures: Sequence[LinearFigures]) -> list[Table]:
    """Times of every format, and what the 4-bit linear gains over the others, with one number of threads each."""
    tables = []
    for threads in dict.fromkeys(item.threads for item in figures):
        chosen = [item for item in figures if item.threads == threads]
        names = [name for name in FORMATS if any(name in item.timings for item in chosen)]
        title = f"ms, median / minimum; {threads} {'thread' if threads == 1 else 'threads'}"
        times = make_table(title, ("K x N", "M", *names))
        for item in chosen:
            times.add_row(f"{item.k} x {item.n}", str(item.m), *(_both(item.timings.get(name)) for name in names))
        tables.append(times)
        if not any(item.quantize for item in chosen):
            continue
        others = [name for name in names if name != "hif4"]
        columns = (
            "K x N", "M", "GOP/s", *others, "bf16, minima", "quantize", "of hif4", "in torch", "error",
        )  # fmt: skip
        title = f"how many times as long as hif4 the others take; its quantization, in ms; {title.rpartition('; ')[2]}"
        gains = make_table(title, columns)
        for item in chosen:
            gains.add_row(*_gains(item, others))
        tables.append(gains)
    return tables


def _gains(item: LinearFigures, others: Sequence[str]) -> list[str]:
    shape = [f"{item.k} x {item.n}", str(item.m)]
    if item.quantize is None or item.quantize_torch is None or item.error is None or "hif4" not in item.timings:
        return shape
    took = item.timings["hif4"].median
    return [
        *shape, f"{2e-9 * item.m * item.k * item.n / took:.0f}", *(_times(item.ratio(name)) for name in others),
        _times(item.ratio("bf16", minimum=True)), f"{1e3 * item.quantize.median:.3f}",
        f"{100 * item.quantize.median / took:.1f} %", f"{item.quantize_torch.median / item.quantize.median:.0f}x",
        f"{item.error:.1e}",
    ]  # fmt: skip


def step_tables(result: StepResult) -> list[Table]:
    """Times, memory, and where the time goes."""
    options = result.options
    title = (
        f"one step: width {options.width}, {options.heads} heads, ffn {options.ffn}, {options.layers} layers, "
        f"{options.text} text tokens; {result.threads} threads, {options.repetitions} rounds"
    )
    columns = ("tokens", "what", "median, s", "minimum, s", f"{EAGER} / it", "minima", "compile, s")
    times = make_table(title, columns, left=2)
    for item in result.figures:
        for name, timing in item.timings.items():
            compiling = item.compile_seconds if name == "torch.compile" else None
            times.add_row(
                str(item.tokens), name, f"{timing.median:.3f}", f"{timing.minimum:.3f}",
                _times(item.ratio(EAGER, name)), _times(item.ratio(EAGER, name, minimum=True)),
                "" if compiling is None else f"{compiling:.0f}",
            )  # fmt: skip
    return [times, *_memory_table(result.memory), *(_operator_table(item) for item in result.figures)]


def _memory_table(memory: dict[str, Memory]) -> list[Table]:
    if not memory:
        return []
    columns = ("", "weights, MB", "of 4-bit linears", "resident, MB", "more in a step")
    table = make_table("memory: bytes of the weights; growth of a fresh process", columns)
    for name, item in memory.items():
        row = (item.weights, item.quantized, item.resident, item.peak)
        table.add_row(name, *("" if value is None else f"{value / 1e6:.1f}" for value in row))
    before, after = memory[EAGER], memory[W4A4]
    pairs = (
        (after.weights, before.weights), (after.quantized, before.quantized),
        (after.resident, before.resident), (after.peak, before.peak),
    )  # fmt: skip
    table.add_row(f"{W4A4} / {EAGER}", *(f"{100 * a / b:.1f} %" if a is not None and b else "" for a, b in pairs))
    return [table]


def _operator_table(item: StepFigures) -> Table:
    """Milliseconds of every operator in one profiled step of each; the small ones in one row."""
    names = list(item.operators)
    found = {name: {operator: seconds for operator, _, seconds in rows} for name, rows in item.operators.items()}
    operators = sorted(
        {operator for rows in found.values() for operator in rows if operator},
        key=lambda operator: -max(rows.get(operator, 0.0) for rows in found.values()),
    )
    table = make_table(f"where a step of {item.tokens} tokens goes: ms by operator, one profiled step", ("", *names))

    def add(label: str, chosen: Sequence[str]) -> None:
        sums = {name: sum(found[name].get(operator, 0.0) for operator in chosen) for name in names}
        if any(sums.values()):
            cells = (
                f"{1e3 * sums[name]:.1f} ({100 * sums[name] / sum(found[name].values()):4.1f} %)" if sums[name] else ""
                for name in names
            )
            table.add_row(label, *cells)

    for operator in operators[:_SHOWN_OPERATORS]:
        add(operator, [operator])
    add(f"{len(operators[_SHOWN_OPERATORS:])} other operators", operators[_SHOWN_OPERATORS:])
    add("outside of operators", [""])
    table.add_row("in all", *(f"{1e3 * sum(found[name].values()):.1f}" for name in names))
    return table


def scale_tables(result: ScaleResult) -> list[Table]:
    """The disk by itself, and every stage with its parts; rates of reading stand beside the disk's own."""
    options = result.options
    layers = "all" if options.layers is None else options.layers
    title = (
        f"{options.model}, {layers} layers: {format_bytes(result.weights)} of weights, artifact "
        f"{format_bytes(result.artifact)} ({options.recipe})"
    )
    columns = (
        "stage",
        "time",
        "read",
        "written",
        "read/s",
        "of the disk's",
        "RSS after",
        "peak RSS",
        "all processes",
        "cached",
    )
    stages = make_table(title, columns)
    for stage in result.stages:
        items: list[StageFigures | PartFigures] = [stage, *stage.parts]
        for item in items:
            stages.add_row(*_scale_row(item, result.disk.read))
    return [_disk_table(result), stages]


def _disk_table(result: ScaleResult) -> Table:
    disk = result.disk
    table = make_table("the disk, in blocks of 16 MiB, one thread", ("what", "amount", "bytes/s"))
    rows = (
        ("read through the page cache, cold", disk.read_bytes, disk.read),
        ("read without the page cache", disk.read_bytes, disk.read_direct),
        ("write without the page cache", disk.written_bytes, disk.write_direct),
        ("making the checkpoint", result.weights, None if result.made is None else result.weights / result.made),
    )
    for name, amount, rate in rows:
        if rate is not None:
            table.add_row(name, format_bytes(amount), f"{format_bytes(rate)}/s")
    return table


def _scale_row(item: StageFigures | PartFigures, disk: float) -> list[str]:
    rate = item.read / item.seconds if item.seconds > 0 else 0.0
    row = [format_seconds(item.seconds), format_bytes(item.read), format_bytes(item.written)]
    # Of what reads little, a rate says nothing.
    row += [f"{format_bytes(rate)}/s", f"{100 * rate / disk:.0f} %"] if item.read > 1e8 else ["", ""]
    if isinstance(item, PartFigures):
        return [f"  {item.name}", *row, format_bytes(item.resident)]
    cached = "" if item.cached is None else format_bytes(item.cached)
    return [item.name, *row, "", format_bytes(item.peak), format_bytes(item.together), cached]


def static_table(target: str, figures: Sequence[StaticFigures]) -> Table:
    """One row a binary."""
    columns = (
        "kernel", "variant", "KB", "registers", "spills", "in loop", "shared, KB", "threads", "blocks",
        "matrix instruction", "of them", "loop", "fp32", "per matrix",
    )  # fmt: skip
    title = f"{target}: instructions of a warp in one turn of the main loop, one unit of 64 channels of a tile"
    table = make_table(title, columns, left=2)
    for item in figures:
        report, loop = item.report, item.report.loop
        end = item.file.removeprefix(f"{item.name}.").rpartition(".")[0]
        inside = (
            ["", "", "", "", ""]
            if loop is None
            else [
                loop.matrix_instruction, str(loop.matrix_count), str(loop.instructions), str(item.fp32),
                f"{loop.instructions / loop.matrix_count:.1f}",
            ]
        )  # fmt: skip
        table.add_row(
            item.name, end, f"{item.bytes / 1e3:.0f}", str(report.registers), str(report.spills),
            "" if loop is None else str(loop.spills), f"{(report.static_shared + report.dynamic_shared) / 1024:.0f}",
            str(report.threads), str(report.blocks), *inside,
        )  # fmt: skip
    return table


def model_table(model: str, tokens: int, blocks: Sequence[BlockModel]) -> Table:
    """One row a GPU; ranges go from pipes that do not overlap to pipes that overlap perfectly."""
    columns = (
        "GPU", "linears bf16, ms", "linears HiF4, ms", "of it quantize, expand", "linears", "attention, ms",
        "its share of bf16", "block",
    )  # fmt: skip
    title = f"MODEL, not measured: one block of {model}, {tokens} tokens; speed-up of linears and block over bf16"
    table = make_table(title, columns)
    for item in blocks:
        slow, fast = (item.hif4(serial=serial) for serial in (True, False))
        linears, block = (
            f"{item.speedup(serial=True, block=whole):.2f} .. {item.speedup(serial=False, block=whole):.2f}x"
            for whole in (False, True)
        )
        table.add_row(
            item.gpu, f"{1e3 * item.bf16:.1f}", f"{1e3 * slow:.1f} .. {1e3 * fast:.1f}", f"{1e3 * item.overhead:.1f}",
            linears, f"{1e3 * item.attention:.1f}", f"{100 * item.attention / (item.attention + item.bf16):.0f} %",
            block,
        )  # fmt: skip
    return table


def to_markdown(table: Table) -> str:
    """A table of plain cells, with its title in bold above."""
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    head, *rows = ("| " + " | ".join(cells) + " |" for cells in zip(*columns, strict=True))
    rule = "| " + " | ".join("---:" if column.justify == "right" else "---" for column in table.columns) + " |"
    return "\n".join([f"**{table.title}**", "", head, rule, *rows, ""])


def _both(timing: Timing | None) -> str:
    return "" if timing is None else f"{_ms(timing.median)} / {_ms(timing.minimum)}"


def _ms(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:.3f}" if milliseconds < 10 else f"{milliseconds:.1f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"
