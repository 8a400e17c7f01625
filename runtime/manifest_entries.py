"""What a manifest says for people, of linears, recipes and calibrations: checked once, so that readers rely on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["check_expert", "check_linears", "check_manifest", "shown"]

Rule = Callable[[Any], bool]

MAX_COUNT = 1 << 40
MAX_NUMBER = 1e300
PRECISIONS = ("w4a4", "w4a16", "high")


def check_linears(entries: Any) -> None:
    """Check the list `linears` of an expert, keys as in docs/artifact.md; a ValueError says what is wrong.

    Required is what every version of the format has. Keys that are not known are ignored.
    """
    if not _is_list(_is_object)(entries):
        raise ValueError("linears is not a list of objects")
    for entry in entries:
        _check(entry, LINEAR, f"the linear {shown(entry.get('path'))}", LINEAR_REQUIRED)
    if len({entry["path"] for entry in entries}) != len(entries):
        raise ValueError("two linears have the same path")


def check_expert(entry: Mapping[str, Any]) -> None:
    """Check `recipe`, `calibration`, `loras` and `step_errors` of an expert; a ValueError says what is wrong."""
    _check(entry, EXPERT, "an expert", ("recipe",))
    _check(entry["recipe"], RECIPE, "its recipe", ("name",))
    if "calibration" in entry:
        _check(entry["calibration"], CALIBRATION, "its calibration", tuple(CALIBRATION))
        for run in entry["calibration"]["runs"]:
            _check(run, RUN, "a run of its calibration")
    for lora in entry.get("loras", ()):
        _check(lora, LORA, "one of its LoRAs", tuple(LORA))


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Check what is told of the whole artifact: `targets`, `versions`, and `model` where people read it."""
    _check(manifest, MANIFEST, "the manifest", ("model",))
    _check(manifest["model"], MODEL, "its model", ("source",))


def shown(value: Any) -> str:
    """What stands in the manifest, cut where a sentence would become a page."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."


def _check(entry: Mapping[str, Any], rules: Mapping[str, Rule], what: str, required: tuple[str, ...] = ()) -> None:
    for name, rule in rules.items():
        if name not in entry:
            if name in required:
                raise ValueError(f"{what} has no {name}")
        elif not rule(entry[name]):
            raise ValueError(f"{name} of {what} cannot be {shown(entry[name])}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -MAX_NUMBER <= value <= MAX_NUMBER


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_list(rule: Rule = lambda value: True) -> Rule:
    return lambda value: isinstance(value, list) and all(map(rule, value))


def _or_null(rule: Rule) -> Rule:
    return lambda value: value is None or rule(value)


LINEAR: Mapping[str, Rule] = {
    "path": _is_text,
    "precision": lambda value: value in PRECISIONS,
    "reason": _is_text,
    "in_features": _is_count,
    "out_features": _is_count,
    "mask": _or_null(_is_text),
    "mask_folded": _is_flag,
    "hadamard": _is_count,
    "shift": _or_null(_is_text),
    "rank": _is_count,
    "rounding": _is_text,
    "alpha": _or_null(_is_number),
    "outlier_columns": _is_count,
    "sqnr": _or_null(_is_number),
    "errors": _is_numbers,
}
LINEAR_REQUIRED = ("path", "precision", "reason", "in_features", "out_features", "mask", "hadamard")
LORA: Mapping[str, Rule] = {"file": _is_text, "sha256": _is_text, "scale": _is_number, "tensors": _is_count}
RECIPE: Mapping[str, Rule] = {"name": _is_text, "description": _is_text}
CALIBRATION: Mapping[str, Rule] = {"sha256": _is_text, "runs": _is_list(_is_object)}
RUN: Mapping[str, Rule] = {"prompts": _is_list(), "clips": _is_list()}
EXPERT: Mapping[str, Rule] = {
    "recipe": _is_object,
    "calibration": _is_object,
    "loras": _is_list(_is_object),
    "step_errors": _is_list(_is_numbers),
}
MODEL: Mapping[str, Rule] = {"source": _is_text, "boundary_ratio": _or_null(_is_number)}
MANIFEST: Mapping[str, Rule] = {"model": _is_object, "targets": _is_list(_is_text), "versions": _is_object}
