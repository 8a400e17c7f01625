"""The plots of the report's page, as Bokeh's own JSON: drawn in the browser when they come into view."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from hif4c.compiler.report_numbers import ArtifactNumbers, ExpertNumbers, LinearNumbers

if TYPE_CHECKING:
    from bokeh.plotting import figure as Figure

__all__ = ["EXPERT_COLOURS", "kind_colours", "make_plots"]

EXPERT_COLOURS = ("#4a74d8", "#e07b1f")
"""The first and the second expert's, wherever both are in one plot."""
_GREY = "#7d8794"
_FAMILIES = {
    "attn1.": ("#3450b5", "#5b86ec", "#9cb8f6", "#3fb1e3"),
    "attn2.": ("#17774d", "#2fae74", "#7fcfa5", "#a3b523"),
    "ffn.": ("#c2410c", "#f59e0b"),
}
"""Shades of blue, green and orange, in the order in which a family's linears come."""
_OTHERS = ("#7b3fa0", "#c0569f", "#8c6d55", "#666666")


def kind_colours(numbers: ArtifactNumbers) -> dict[str, str]:
    """A colour for every kind of linear in a block, in the program's order."""
    kinds = dict.fromkeys(
        linear.kind for expert in numbers.experts for linear in expert.linears if linear.block is not None
    )
    colours: dict[str, str] = {}
    for kind in kinds:
        family = next((name for name in _FAMILIES if kind.startswith(name)), "")
        shades = _FAMILIES.get(family, _OTHERS)
        seen = sum(other.startswith(family) if family else not other.startswith(tuple(_FAMILIES)) for other in colours)
        colours[kind] = shades[seen % len(shades)]
    return colours


def make_plots(numbers: ArtifactNumbers) -> dict[str, Any]:
    """Every plot that there are numbers for: its name -> the item that BokehJS embeds."""
    from bokeh.embed import json_item
    from bokeh.layouts import row

    colours = kind_colours(numbers)
    ceiling = _ceiling(linear.sqnr for expert in numbers.experts for linear in expert.linears)
    brightest = max((max(g.channel_maxima, default=0.0) for e in numbers.experts for g in e.groups), default=0.0)
    makers: dict[str, Callable[[ExpertNumbers], Figure | None]] = {
        "sqnr": lambda expert: _lines(expert, colours, "SQNR, dB", lambda linear: linear.sqnr, ceiling=ceiling),
        "errors": lambda expert: _lines(
            expert, colours, "relative error energy", lambda linear: linear.errors.get("w4a4"), log=True
        ),
        "masks": lambda expert: _masks(expert, colours),
        "tails": lambda expert: _tails(expert, colours),
        "bytes": lambda expert: _bytes(expert, colours),
        "outliers": lambda expert: _heat_map(expert, brightest),
    }
    plots: dict[str, Any] = {}
    for name, make in makers.items():
        panels = [panel for expert in numbers.experts if (panel := make(expert)) is not None]
        if panels:
            if name != "outliers":  # experts may have different inputs
                _share_ranges(panels)
            plots[name] = json_item(row(panels, sizing_mode="stretch_width"))
    plots["histograms"] = json_item(row(_histograms(numbers), sizing_mode="stretch_width"))
    plots["lines"] = json_item(_graph_lines())
    return plots


def _figure(title: str, height: int = 260, **options: Any) -> Figure:
    """A figure that reads well on a light and on a dark page."""
    from bokeh.plotting import figure

    options = {"tools": "xpan,xbox_zoom,reset", "sizing_mode": "stretch_width", **options}
    plot = figure(title=title, height=height, min_width=200, **options)
    plot.background_fill_color = plot.border_fill_color = None
    plot.outline_line_color = None
    plot.title.text_color = _GREY
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    for axis in plot.axis:
        axis.axis_label_text_color = axis.major_label_text_color = _GREY
        axis.axis_line_color = axis.major_tick_line_color = _GREY
        axis.minor_tick_line_color = None
        axis.axis_label_text_font_style = "normal"
    for grid in plot.grid:
        grid.grid_line_color = _GREY
        grid.grid_line_alpha = 0.18
    return plot


def _log_ticks(plot: Figure, low: float, high: float) -> None:
    """Ticks at 1, 2 and 5 of each decade, or fewer; Bokeh's own crowd at the upper end of a range of one or two."""
    from bokeh.models import BasicTickFormatter, FixedTicker

    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    mantissas = (1, 2, 5) if last - first <= 3 else (1,)
    step = max(1, (last - first) // 6)
    ticks = [mantissa * 10.0**decade for decade in range(first - 1, last + 1, step) for mantissa in mantissas]
    plot.yaxis.ticker = FixedTicker(ticks=ticks)
    plot.yaxis.formatter = BasicTickFormatter(power_limit_low=-4, power_limit_high=6)
    plot.ygrid.ticker = plot.yaxis[0].ticker


def _share_ranges(panels: Sequence[Figure]) -> None:
    """Experts are compared: the same axes for both."""
    for panel in panels[1:]:
        panel.x_range, panel.y_range = panels[0].x_range, panels[0].y_range


def _hover(plot: Figure, renderers: Sequence[Any], *tooltips: tuple[str, str]) -> None:
    from bokeh.models import HoverTool

    plot.add_tools(HoverTool(renderers=list(renderers), tooltips=list(tooltips), point_policy="snap_to_data"))


def _by_kind(linears: Iterable[LinearNumbers]) -> dict[str, list[LinearNumbers]]:
    """Linears of the blocks."""
    found: dict[str, list[LinearNumbers]] = {}
    for linear in linears:
        if linear.block is not None:
            found.setdefault(linear.kind, []).append(linear)
    return found


def _lines(
    expert: ExpertNumbers,
    colours: dict[str, str],
    label: str,
    value: Callable[[LinearNumbers], float | None],
    *,
    log: bool = False,
    ceiling: float = math.inf,
) -> Figure | None:
    """One line a kind over the blocks; None where there is no value. What is above the ceiling is drawn there."""
    plot = _figure(expert.name, x_axis_label="block", y_axis_label=label, y_axis_type="log" if log else "linear")
    rows = []
    strokes = []
    for kind, linears in _by_kind(expert.linears).items():
        points = [(item.block, found, item.path) for item in linears if (found := value(item)) and math.isfinite(found)]
        heights = [min(found, ceiling) for _, found, _ in points]
        rows += [
            (kind, colours[kind], block, height, found, path, "triangle" if found > ceiling else "circle")
            for (block, found, path), height in zip(points, heights, strict=True)
        ]
        if points:
            strokes.append((kind, colours[kind], [block for block, _, _ in points], heights))
    if not rows:
        return None
    if log:
        _log_ticks(plot, min(row[3] for row in rows), max(row[3] for row in rows))
    plot.multi_line("x", "y", color="colour", line_width=1.6, source=_table(("kind", "colour", "x", "y"), strokes))
    source = _table(("kind", "colour", "x", "y", "value", "path", "marker"), rows)
    dots = plot.scatter("x", "y", color="colour", marker="marker", size=6, source=source)
    _hover(plot, [dots], ("", "@path"), (label, "@value{0.00e+0}" if log else "@value{0.0}"))
    return plot


def _table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> dict[str, list[Any]]:
    """Columns of rows. Of a source with a column "kind" the page hides rows."""
    columns = list(zip(*rows, strict=True)) or [()] * len(names)
    return {name: list(column) for name, column in zip(names, columns, strict=True)}


def _ceiling(values: Iterable[float | None]) -> float:
    """A value that the few far above all others must not push the axis beyond; infinity where there are none."""
    found = sorted(value for value in values if value is not None and math.isfinite(value))
    usual = found[int(0.95 * (len(found) - 1))] if found else 0.0
    return 1.25 * usual if found and found[-1] > 2 * usual > 0 else math.inf


def _spans(
    expert: ExpertNumbers,
    colours: dict[str, str],
    label: str,
    spans: Sequence[tuple[str, int, float, float, str]],
    names: tuple[str, str],
) -> Figure | None:
    """A vertical span for each (kind, block, low, high, path), the kinds of a block side by side."""
    if not spans:
        return None
    plot = _figure(expert.name, x_axis_label="block", y_axis_label=label, y_axis_type="log")
    kinds = [kind for kind in colours if any(span[0] == kind for span in spans)]
    shift = {kind: (index - (len(kinds) - 1) / 2) * 0.7 / len(kinds) for index, kind in enumerate(kinds)}
    rows = [(kind, colours[kind], block + shift[kind], low, high, path) for kind, block, low, high, path in spans]
    _log_ticks(plot, min(row[3] for row in rows), max(row[4] for row in rows))
    data = _table(("kind", "colour", "x", "low", "high", "path"), rows)
    line = plot.segment("x", "low", "x", "high", source=data, line_width=2, color="colour")
    ends = [
        plot.scatter("x", end, source=line.data_source, size=5, marker=marker, color="colour")
        for end, marker in (("low", "circle"), ("high", "triangle"))
    ]
    _hover(plot, ends, ("", "@path"), (names[0], "@low{0.000a}"), (names[1], "@high{0.000a}"))
    return plot


def _masks(expert: ExpertNumbers, colours: dict[str, str]) -> Figure | None:
    masks = {item.mask: item for item in reversed(expert.linears) if item.mask_min is not None}
    spans = [
        (item.kind, item.block, item.mask_min, item.mask_max, item.path)
        for item in reversed(masks.values())
        if item.block is not None and item.mask_min is not None and item.mask_max is not None
    ]
    return _spans(expert, colours, "channel mask", spans, ("least", "largest"))


def _tails(expert: ExpertNumbers, colours: dict[str, str]) -> Figure | None:
    kinds = {item.path: (item.kind, item.block) for item in expert.linears}
    spans = []
    for group in expert.groups:
        kind, block = kinds.get(group.name, ("", None))
        if block is not None and group.percentiles[-1] > 0:
            spans.append((kind, block, group.percentiles[-1], group.maximum, group.name))
    return _spans(expert, colours, "|x| of the input", spans, ("99.9 %", "maximum"))


def _bytes(expert: ExpertNumbers, colours: dict[str, str]) -> Figure | None:
    """Stacked bytes of each block, and what they are in bf16."""
    plot = _figure(expert.name, x_axis_label="block", y_axis_label="MB")
    floor: dict[int, float] = {}
    whole: dict[int, float] = {}
    rows = []
    for kind, linears in _by_kind(expert.linears).items():
        for item in linears:
            assert item.block is not None
            low = floor.get(item.block, 0.0)
            floor[item.block] = low + item.bytes / 1e6
            whole[item.block] = whole.get(item.block, 0.0) + item.bf16_bytes / 1e6
            rows.append((kind, colours[kind], item.block, low, floor[item.block], item.path, item.bytes))
    if not rows:
        return None
    data = _table(("kind", "colour", "x", "bottom", "top", "path", "size"), rows)
    bars = plot.vbar("x", 0.7, "top", "bottom", source=data, color="colour", line_color=None)
    plot.vbar(list(whole), 0.7, list(whole.values()), fill_color=None, line_color=_GREY, line_dash="dotted")
    _hover(plot, [bars], ("", "@path"), ("bytes", "@size{0,0}"))
    plot.y_range.start = 0
    return plot


def _histograms(numbers: ArtifactNumbers) -> list[Figure]:
    """Three empty histograms, which the page fills for the chosen linear; a source an expert."""
    panels = []
    for name, title, label in (
        ("weight", "stored weights", "|w|, power of 2"),
        ("in_unit", "use of the in-unit integers", "|n|"),
        ("input", "activations of its input", "|x|, power of 2"),
    ):
        plot = _figure(title, height=230, x_axis_label=label, y_axis_label="share, %", tools="")
        for index, expert in enumerate(numbers.experts):
            # Nothing high to begin with: Bokeh complains of a range without data.
            data = {"left": [0.0], "right": [1.0], "top": [0.001]}
            bars = plot.quad(
                "left", "right", "top", 0, source=data, name=expert.name, color=EXPERT_COLOURS[index % 2], alpha=0.42
            )
            bars.data_source.name = f"{name}:{index}"
            _hover(plot, [bars], (expert.name, "@top{0.00} %"), ("from", "@left{0.0}"))
        plot.y_range.start = 0
        panels.append(plot)
    return panels


def _heat_map(expert: ExpertNumbers, brightest: float) -> Figure | None:
    """Inputs from top to bottom, runs of channels from left to right; None without a calibration."""
    import numpy as np
    from bokeh.models import ColorBar, FixedTicker, LogColorMapper
    from bokeh.palettes import Inferno256

    groups = [group for group in expert.groups if group.channel_maxima]
    if not groups:
        return None
    columns = max(len(group.channel_maxima) for group in groups)
    image = np.ones((len(groups), columns), np.float32)
    for index, group in enumerate(groups):
        # Inputs with fewer channels than columns fill the width too.
        places = np.arange(columns) * len(group.channel_maxima) // columns
        image[index] = np.asarray(group.channel_maxima, np.float32)[places]
    count = len(groups)
    plot = _figure(
        expert.name,
        height=max(300, min(900, 90 + 9 * count)),
        x_axis_label="channel, % of the input's",
        x_range=(0, 100),
        y_range=(count, 0),
        tools="ypan,ybox_zoom,reset",
    )
    mapper = LogColorMapper(palette=Inferno256[16:], low=1, high=max(2.0, brightest))
    plot.image([image], x=0, y=0, dw=100, dh=count, color_mapper=mapper, name="outliers")
    data = {
        "y": [index + 0.5 for index in range(count)],
        "name": [group.name for group in groups],
        "worst": [f"{group.worst[0].index} ({group.worst[0].ratio or math.nan:.3g} x)" for group in groups],
    }
    rows = plot.hbar("y", 1, 100, 0, source=data, fill_alpha=0, line_alpha=0)
    _hover(plot, [rows], ("", "@name"), ("worst channel", "@worst"))
    firsts = {group.block: index for index, group in reversed(list(enumerate(groups))) if group.block is not None}
    step = max(1, len(firsts) // 12)
    shown = {index: f"block {block}" for block, index in sorted(firsts.items()) if block % step == 0}
    plot.yaxis.ticker = FixedTicker(ticks=list(shown))
    plot.yaxis.major_label_overrides = shown
    bar = ColorBar(color_mapper=mapper, width=10, padding=6, title="times median", background_fill_color=None)
    bar.major_label_text_color = bar.title_text_color = _GREY
    bar.title_text_font_style = "normal"
    plot.add_layout(bar, "right")
    plot.grid.visible = False
    return plot


def _graph_lines() -> Figure:
    """The lines of a program's drawing, in pixels; the page gives them and the size, and puts the nodes on top."""
    from bokeh.models import ColumnDataSource, Range1d
    from bokeh.plotting import figure

    plot = figure(
        width=100, height=100, min_border=0, tools="", toolbar_location=None, outline_line_color=None,
        x_range=Range1d(0, 100), y_range=Range1d(100, 0), background_fill_color=None, border_fill_color=None,
        name="lines",
    )  # fmt: skip
    plot.axis.visible = plot.grid.visible = False
    names = ("x0", "y0", "x1", "y1", "cx0", "cy0", "cx1", "cy1", "colour", "width")
    source = ColumnDataSource({name: [] for name in names}, name="lines:source")
    plot.bezier(*names[:4], *names[4:8], line_color="colour", line_width="width", source=source)
    return plot
