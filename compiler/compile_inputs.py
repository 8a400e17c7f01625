"""What an artifact depends on, and whether an unfinished compile can go on with what there is now."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hif4c.compiler.calibration import Calibration
from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.journal import Journal
from hif4c.compiler.locate import ModelLocation
from hif4c.compiler.lora import FusedCheckpoint
from hif4c.compiler.pack import changed_tensor
from hif4c.compiler.recipe import Recipe
from hif4c.runtime.errors import Hif4Error

__all__ = ["VERSIONS", "WEIGHTS", "check_inputs", "describe_inputs"]

VERSIONS = ("hif4c", "torch", "diffusers")
"""Packages whose versions an artifact records."""
WEIGHTS = "weights"
"""The entry that says how the files look from outside; they may hold the same though this differs."""


def describe_inputs(
    location: ModelLocation,
    checkpoints: Mapping[str, Checkpoint],
    recipes: Mapping[str, Recipe],
    calibration: Path | None,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What the artifact will be made from, as JSON.

    Args:
        location: the model.
        checkpoints: of every expert that is compiled.
        recipes: likewise.
        calibration: the file that was given.
        settings: what else decides what is written.
    """
    found: dict[str, Any] = {
        "the model": {"source": location.source, "pipeline": dataclasses.asdict(location.pipeline)}
    }
    for name, checkpoint in checkpoints.items():
        found[f"the config of {name}"] = location.configs[name].to_dict()
        found[f"the recipe of {name}"] = recipes[name].to_dict()
        found[f"the LoRAs of {name}"] = checkpoint.record if isinstance(checkpoint, FusedCheckpoint) else []
    found["the calibration"] = None
    if calibration is not None:
        with Calibration(calibration) as file:
            found["the calibration"] = file.digest()
    found |= {f"option {name}": value for name, value in settings.items()}
    found |= {f"the version of {name}": importlib.metadata.version(name) for name in VERSIONS}
    found[WEIGHTS] = {name: _outside(checkpoint) for name, checkpoint in checkpoints.items()}
    inputs: dict[str, Any] = json.loads(json.dumps(found))
    return inputs


def check_inputs(
    before: Mapping[str, Any], now: Mapping[str, Any], checkpoints: Mapping[str, Checkpoint], journal: Journal
) -> None:
    """Refuse to continue with other inputs.

    Args:
        before, now: of `describe_inputs`.
        checkpoints: the weights as they are now.
        journal: of what was made before. Where files of weights look different, what they hold is compared: all of it
            where `WEIGHTS`/EXPERT has a fingerprint (a calibration depends on it), else what went into finished blocks.

    Raises:
        Hif4Error: something differs.
    """
    changed = [name for name in sorted({*before, *now} - {WEIGHTS}) if before.get(name) != now.get(name)]
    if not changed:
        for name, checkpoint in checkpoints.items():
            if before[WEIGHTS][name] == now[WEIGHTS][name]:
                continue
            whole = journal.done(f"{WEIGHTS}/{name}")
            if whole is not None and whole.values != checkpoint.fingerprint():
                changed.append(f"the weights of {name}")
            elif whole is None and (tensor := changed_tensor(name, checkpoint, journal)):
                changed.append(f"{tensor} of {name}")
    if changed:
        raise Hif4Error(
            f"the unfinished compile was begun with other inputs: {', '.join(changed)} changed; give it what it was "
            "begun with, or remove it and begin again."
        )


def _outside(checkpoint: Checkpoint) -> list[list[Any]]:
    """Name, size, times and number of every file: what changes whenever a file is written to or replaced."""
    states = [(path.name, path.stat()) for path in checkpoint.files]
    return [[name, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino] for name, state in states]
