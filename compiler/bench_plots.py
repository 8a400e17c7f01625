"""Pictures of `hif4c bench`: linears beside bf16, and where the time of a step goes."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from hif4c.compiler.bench_linear import FORMATS, LinearFigures
from hif4c.compiler.bench_step import StepResult

__all__ = ["group_operators", "plot_linear", "plot_step"]

_COLOURS = {
    "fp32": "#bbbbbb", "bf16": "#888888", "int8": "#e7b27a", "torchao-int8": "#d95f02", "torchao-int4": "#8c564b",
    "hif4": "#1f77b4", "hif4-w4a16": "#7fb6dd",
}  # fmt: skip
_KINDS = {
    "linear": ("aten::linear", "aten::addmm", "hif4::linear", "hif4::linear_w4"),
    "attention": ("aten::scaled_dot_product_attention", "hif4::attention"),
    "quantize": ("hif4::quantize",),
    "norm and quantize": ("hif4::norm_quantize",),
    "norm, rotary": ("aten::layer_norm", "aten::rms_norm", "hif4::norm", "hif4::rms_rotary"),
}
_KIND_COLOURS = ("#1f77b4", "#d95f02", "#2ca02c", "#7b3294", "#e7298a", "#bbbbbb", "#636363")
OTHER, OUTSIDE = "other operators", "outside of operators"


def plot_linear(figures: Sequence[LinearFigures], machine: str) -> Figure:
    """Speed of every format over that of torch's bf16, a panel a number of rows and threads; bars are medians."""
    panels = list(dict.fromkeys((item.threads, item.m) for item in figures))
    names = [name for name in FORMATS if any(name in item.timings for item in figures)]
    figure = Figure(figsize=(9, 1.2 + 2.1 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (threads, rows) in zip(axes, panels, strict=True):
        chosen = [item for item in figures if (item.threads, item.m) == (threads, rows)]
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            heights = [item.ratio("bf16", name) or 0.0 for item in chosen]
            places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(chosen))]
            axis.bar(places, heights, width, color=_COLOURS[name], label=name)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(chosen)), [f"{item.k} x {item.n}" for item in chosen])
        axis.set_title(f"{rows} rows, {threads} {'thread' if threads == 1 else 'threads'}", fontsize=10)
        axis.set_ylabel("speed / bf16")
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    figure.suptitle(f"linears, quantization of the input included; {machine}", fontsize=10)
    return figure


def plot_step(result: StepResult, machine: str) -> Figure:
    """Time of a step by kind of operator, a panel a size of video; what was not profiled is one bar."""
    figure = Figure(figsize=(9, 0.9 + 2.0 * len(result.figures)), layout="constrained")
    axes = figure.subplots(len(result.figures), 1, squeeze=False)[:, 0]
    kinds = [*_KINDS, OTHER, OUTSIDE]
    for axis, item in zip(axes, result.figures, strict=True):
        names = list(item.timings)
        for row, name in enumerate(names):
            median = item.timings[name].median
            parts = group_operators(item.operators[name]) if name in item.operators else {}
            total = sum(parts.values())
            left = 0.0
            for kind, colour in zip(kinds, _KIND_COLOURS, strict=True):
                # The profiled run is another one than the timed: its shares, the median's length.
                width = parts.get(kind, 0.0) / total * median if total else 0.0
                axis.barh(row, width, left=left, color=colour, label=kind if row == 0 else None)
                left += width
            if not total:
                axis.barh(row, median, color="white", edgecolor="black", hatch="//")
            axis.text(median, row, f" {median:.2f} s", va="center", fontsize=9)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(f"{item.tokens} tokens", fontsize=10)
        axis.set_xlabel("seconds a step (median)")
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    options = result.options
    title = f"one step of a Wan of width {options.width}, {options.layers} layers, {result.threads} threads; {machine}"
    figure.suptitle(title, fontsize=10)
    return figure


def group_operators(rows: Sequence[tuple[str, int, float]]) -> dict[str, float]:
    """Seconds by kind of operator, from what `profile_operators` gave."""
    kinds = {name: kind for kind, names in _KINDS.items() for name in names}
    groups = dict.fromkeys([*_KINDS, OTHER, OUTSIDE], 0.0)
    for name, _, seconds in rows:
        groups[kinds.get(name, OTHER) if name else OUTSIDE] += seconds
    return groups
