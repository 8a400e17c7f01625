"""The differences of two artifacts as tables for people: what changed, and how much did not."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hif4c.compiler.amounts import format_bytes
from hif4c.compiler.artifact_diff import Change, ExpertDifference, LinearDifference
from hif4c.compiler.report import ExpertSummary
from hif4c.runtime.artifact import Artifact

__all__ = ["render_difference"]

_FIELDS = ("precision", "shift", "mask", "rotation", "rounding", "branch")
_NAMES = 3
"""Names that are given of things that are only counted."""


def render_difference(
    before: Artifact, after: Artifact, differences: Sequence[ExpertDifference]
) -> Iterator[RenderableType]:
    """Tables and sentences about what `compare_artifacts` found."""
    for first, second in ((before, after), (after, before)):
        if alone := [name for name in first.experts if name not in second.experts]:
            yield _sentence(f"{', '.join(alone)}: only in {first.root}, not compared.")
    for item in differences:
        yield from _expert(item, str(before.root), str(after.root))


def _expert(item: ExpertDifference, before: str, after: str) -> Iterator[RenderableType]:
    changed = [linear for linear in item.linears if not linear.same]
    if not changed and not item.settings and not any(item.only) and not item.tensors and not item.programs:
        yield _sentence(f"{item.expert}: nothing differs ({len(item.linears)} linears, weights included).")
        return
    yield _table(
        f"{item.expert}: settings and totals", ("", before, after),
        [*((name, _value(change.before), _value(change.after)) for name, change in item.settings.items()),
         *_totals(*item.summaries)],
    )  # fmt: skip
    counts = _counts(changed)
    if counts:
        yield _table(f"{item.expert}: changes of {len(changed)} linears", ("change", "linears"), counts)
    rows = _linears(changed)
    if len(rows) > 1:
        yield _table(f"{item.expert}: linears", rows[0], rows[1:])
    same = len(item.linears) - len(changed)
    yield _sentence(f"{item.expert}: {same} of {len(item.linears)} linears are the same, weights included.")
    for paths, root in zip(item.only, (before, after), strict=True):
        if paths:
            yield _sentence(f"{_named(paths, 'linear')} only in {root}, or of another shape there; not compared.")
    others = len(item.tensors) + item.same_tensors
    if item.tensors:
        yield _sentence(f"{_named(item.tensors, 'tensor')} of the {others} of no linear differ.")
    elif others:
        yield _sentence(f"The {others} tensors of no linear are the same.")
    yield from _programs(item, before, after)


def _totals(before: ExpertSummary, after: ExpertSummary) -> list[tuple[str, ...]]:
    """The figures of both summaries, where they differ."""
    found: list[tuple[str, str, str]] = []
    for name in sorted({*before.precisions, *after.precisions}):
        found.append((f"{name} linears", str(before.precisions.get(name, 0)), str(after.precisions.get(name, 0))))
    for name, first, second in (
        ("nodes", before.nodes, after.nodes),
        ("inputs with a shift", before.resolved.shifts, after.resolved.shifts),
        ("masks", before.resolved.masks, after.resolved.masks),
        ("masks folded away", before.resolved.folded, after.resolved.folded),
    ):
        found.append((name, str(first), str(second)))
    for name, size, other in (
        ("4-bit planes", before.plane_bytes, after.plane_bytes),
        ("side branches", before.branch_bytes, after.branch_bytes),
        ("other tensors", before.other_bytes, after.other_bytes),
        ("files", before.file_bytes, after.file_bytes),
    ):
        shown = [format_bytes(count) for count in (size, other)]
        exact = size != other and shown[0] == shown[1]
        found.append((name, *((f"{size:,} bytes", f"{other:,} bytes") if exact else shown)))
    for name, value, another in (
        ("SQNR, median", before.resolved.sqnr_median, after.resolved.sqnr_median),
        ("SQNR, lowest", before.resolved.sqnr_min, after.resolved.sqnr_min),
    ):
        found.append((name, _decibels(value, " dB"), _decibels(another, " dB")))
    return [row for row in found if row[1] != row[2]]


def _counts(changed: Sequence[LinearDifference]) -> list[tuple[str, ...]]:
    """(change, linears): each kind of change, the frequent ones of a field first."""
    rows: list[tuple[str, str]] = []
    for name in _FIELDS:
        found = Counter(change for linear in changed if (change := getattr(linear, name)) is not None)
        rows += [(f"{name} {_arrow(change)}", str(count)) for change, count in found.most_common()]
    ratios = [linear.mask_ratio for linear in changed if linear.mask_ratio is not None]
    if ratios:
        rows.append((f"stored mask is another, values up to {_ratio(max(ratios))} apart", str(len(ratios))))
    sizes = [linear.bytes for linear in changed if linear.bytes is not None]
    if sizes:
        more = sum(after - before for before, after in sizes)
        rows.append((f"bytes, together {format_bytes(abs(more))} {'more' if more > 0 else 'less'}", str(len(sizes))))
    gains = [
        linear.sqnr[1] - linear.sqnr[0]
        for linear in changed
        if linear.sqnr is not None and linear.sqnr[0] is not None and linear.sqnr[1] is not None
    ]
    for name, values in (("better", [x for x in gains if x > 0]), ("worse", [-x for x in gains if x < 0])):
        if values:
            middle, most = statistics.median(values), max(values)
            rows.append((f"SQNR {name}, median {middle:.1f} dB, most {most:.1f} dB", str(len(values))))
    rows += _weights([linear.weight for linear in changed if linear.weight is not None])
    tensors = Counter(name for linear in changed for name in linear.tensors)
    return [*rows, *((f"{name} is another", str(count)) for name, count in tensors.items())]


def _weights(shares: Sequence[float]) -> list[tuple[str, str]]:
    if not shares:
        return []
    return [(f"weight is another, median {statistics.median(shares):.0%} of it", str(len(shares)))]


def _linears(changed: Sequence[LinearDifference]) -> list[tuple[str, ...]]:
    """A heading and a row a linear. What is the same change in all of them is told by the counts alone."""
    columns: dict[str, list[str]] = {"linear": [linear.path for linear in changed]}
    for name in _FIELDS:
        changes: list[Change | None] = [getattr(linear, name) for linear in changed]
        ratios = [linear.mask_ratio if name == "mask" else None for linear in changed]
        if len(set(changes)) > 1 or any(ratios):
            columns[name] = [
                " ".join([*([_arrow(change)] if change else []), *([_ratio(ratio)] if ratio else [])])
                for change, ratio in zip(changes, ratios, strict=True)
            ]
    columns["bytes"] = ["" if linear.bytes is None else "{:,} -> {:,}".format(*linear.bytes) for linear in changed]
    columns["SQNR, dB"] = [
        "" if linear.sqnr is None else f"{_decibels(linear.sqnr[0])} -> {_decibels(linear.sqnr[1])}"
        for linear in changed
    ]
    columns["weight"] = [_share(linear.weight) for linear in changed]
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    return [tuple(filled), *zip(*filled.values(), strict=True)] if len(filled) > 1 else []


def _programs(item: ExpertDifference, before: str, after: str) -> Iterator[RenderableType]:
    for variant, calls in item.programs.items():
        if not calls:
            yield _sentence(f"{item.expert}: its {variant} program calls the same operators, with other arguments.")
        elif all(pair[0] == 0 for pair in calls.values()) or all(pair[1] == 0 for pair in calls.values()):
            root = after if next(iter(calls.values()))[1] else before
            yield _sentence(f"{item.expert}: only {root} has a {variant} program.")
        else:
            rows = [(target, *map(str, pair)) for target, pair in calls.items()]
            yield _table(f"{item.expert}: calls in the {variant} program", ("operator", before, after), rows)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, collapse_padding=True)
    for number, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _sentence(text: str) -> Text:
    return Text(text)


def _named(names: Sequence[str], kind: str) -> str:
    """ "3 linears (a, b, c)"; of many, the first."""
    more = ", ..." if len(names) > _NAMES else ""
    return f"{len(names)} {kind}{'s' if len(names) != 1 else ''} ({', '.join(names[:_NAMES])}{more})"


def _arrow(change: Change) -> str:
    return f"{_value(change.before)} -> {_value(change.after)}"


def _value(text: str) -> str:
    return text or "none"


def _ratio(ratio: float) -> str:
    return f"x{ratio:.3g}" if math.isfinite(ratio) else "other columns"


def _share(share: float | None) -> str:
    if share is None:
        return ""
    return "scales" if share == 0 else f"{share:.0%}" if share >= 0.005 else "<1%"


def _decibels(value: float | None, unit: str = "") -> str:
    return "none" if value is None else f"{value:.1f}{unit}"
