"""What `hif4c plan --estimate` prints: time, disk and memory of a calibration and a compile on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hif4c.compiler.amounts import format_bytes, format_seconds
from hif4c.tools.console import console, make_table

if TYPE_CHECKING:
    from rich.table import Table

    from hif4c.compiler.estimate import CalibrationLoad, Step, Workload
    from hif4c.compiler.locate import ModelDescription, ModelLocation
    from hif4c.compiler.machine_rates import MachineRates
    from hif4c.compiler.plan import ExpertPlan
    from hif4c.compiler.recipe import Recipe

__all__ = ["show_estimate"]


def show_estimate(
    model: str,
    description: ModelDescription,
    recipes: Mapping[str, Recipe],
    plans: Mapping[str, ExpertPlan],
    output: Path,
    calibration: Mapping[str, int],
) -> None:
    """Measure this machine and print two tables.

    Args:
        model: as it was typed; weights are looked at where it is a folder.
        description: of it.
        recipes: expert -> recipe.
        plans: of the same experts.
        output: the artifact's directory, for its disk.
        calibration: what was asked for: "width", "height", "frames", "calls".
    """
    from hif4c.compiler import estimate
    from hif4c.compiler.disk_space import compile_disk, components_bytes, existing_folder
    from hif4c.compiler.machine_rates import measure_rates

    location = _locate(model)
    stored, files = _stored(location, plans)
    load = _calibration_load(description, calibration)
    calls = () if load is None else (load.tokens * load.batch,) * load.calls
    works = {
        name: estimate.Workload(
            description.configs[name], plans[name], recipe, stored[name], calls, measured=recipe.needs_calibration
        )
        for name, recipe in recipes.items()
    }
    components = None if location is None or location.layout != "diffusers" else location.root
    rest = 0 if components is None else components_bytes(components)
    rates = measure_rates(existing_folder(output), files)
    parts: dict[str, list[Step]] = {}
    tokens = dict.fromkeys(works, sum(calls))
    disk = compile_disk(
        plans, recipes, components=components, tokens=tokens, expanded=description.pipeline.expand_timesteps
    )
    rows = {"compile": (estimate.compile_memory(works, rates.cores), disk)}
    if load is not None and any(recipe.needs_calibration for recipe in recipes.values()):
        parts["calibrate"] = estimate.estimate_calibration(works, rates, load, components=rest)
        configs = {name: work.config for name, work in works.items()}
        expanded = description.pipeline.expand_timesteps
        memory = estimate.calibration_memory(works, load, components=rest, expanded=expanded)
        waiting = estimate.calibration_disk(configs, sum(calls), expanded=expanded)
        rows = {"calibrate": (memory, waiting), **rows}
    parts["compile"] = estimate.estimate_compile(works, rates, components=rest)
    console.print(_times(f"{description.source}: time on this machine, {rates.cores} cores", parts))
    if load is not None:
        rows["one pass of one expert"] = (max(estimate.forward_bytes(work, load.tokens) for work in works.values()), {})
    console.print(_space(rows, existing_folder(output)))
    for sentence in _remarks(location, works, load, rates):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def _locate(model: str) -> ModelLocation | None:
    """The model where its files are a folder on this machine; hub models are not fetched for an estimate."""
    from hif4c.compiler.locate import locate_model
    from hif4c.compiler.models import TINY_NAME

    return locate_model(model) if Path(model).is_dir() or model == TINY_NAME else None


def _stored(location: ModelLocation | None, plans: Mapping[str, ExpertPlan]) -> tuple[dict[str, int], list[Path]]:
    """Bytes of every expert's checkpoint, in bf16 where it is not here; and its files."""
    from hif4c.compiler.checkpoint import Checkpoint

    if location is None:
        return {name: plan.bytes_before for name, plan in plans.items()}, []
    stored = {}
    for name in plans:
        with Checkpoint(location.experts[name], location.configs[name], location.layout) as checkpoint:
            stored[name] = checkpoint.total_bytes
    return stored, [file for name in plans for file in sorted(location.experts[name].glob("*.safetensors"))]


def _calibration_load(description: ModelDescription, asked: Mapping[str, int]) -> CalibrationLoad | None:
    """What `hif4c calibrate` runs, by default but for what was asked; None for a model without usual settings."""
    from hif4c.compiler.calibration_run import SMALL_MODEL_BATCH, SMALL_WIDTH, CalibrationOptions
    from hif4c.compiler.estimate import CalibrationLoad, latent_tokens
    from hif4c.compiler.sampling_defaults import sampling_defaults
    from hif4c.runtime.sampling import SamplingSettings

    defaults, options = sampling_defaults(description.configs), CalibrationOptions()
    if defaults is None:
        return None
    settings = SamplingSettings.from_defaults(defaults, **{key: asked[key] for key in asked if key != "calls"})
    config = next(iter(description.configs.values()))
    passes = options.count * settings.steps * (2 if settings.guidance > 1 else 1)
    batch = SMALL_MODEL_BATCH if config.inner_dim <= SMALL_WIDTH else 1
    tokens = latent_tokens(config, settings.height, settings.width, settings.frames)
    return CalibrationLoad(tokens, passes, asked.get("calls", options.calls), batch)


def _times(title: str, parts: Mapping[str, Sequence[Step]]) -> Table:
    table = make_table(title, ("", "step", "time", "reads", "writes"), left=2)
    for command, steps in parts.items():
        for step in steps:
            table.add_row(command, step.name, *_figures(step.seconds, step.read, step.written))
            command = ""
        totals = (sum(getattr(step, name) for step in steps) for name in ("seconds", "read", "written"))
        table.add_row("", "in all", *_figures(*totals), style="bold", end_section=True)
    return table


def _figures(seconds: float, read: float, written: float) -> list[str]:
    return [format_seconds(seconds), format_bytes(read) if read else "", format_bytes(written) if written else ""]


def _space(rows: Mapping[str, tuple[int, Mapping[str, int]]], folder: Path) -> Table:
    """Memory and disk that is needed and that there is; what does not fit is red."""
    from hif4c.compiler.disk_space import free_bytes

    there, free = memory_there(), free_bytes(folder)
    table = make_table("memory and disk", ("", "peak memory", "there is", "disk needed", "free"), left=1)
    for name, (memory, needs) in rows.items():
        disk = sum(needs.values())
        table.add_row(
            name, _fits(memory, there), "" if there is None else format_bytes(there),
            _fits(disk, free) if disk else "", format_bytes(free) if disk and free is not None else "",
        )  # fmt: skip
    return table


def _fits(needed: int, there: int | None) -> str:
    text = format_bytes(needed)
    return text if there is None or needed <= there else f"[red]{text} (too much)[/]"


def memory_there() -> int | None:
    """Bytes of this machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _remarks(
    location: ModelLocation | None,
    works: Mapping[str, Workload],
    load: CalibrationLoad | None,
    rates: MachineRates,
) -> list[str]:
    from hif4c.compiler.estimate import UNCERTAINTY

    read, write = format_bytes(rates.read), format_bytes(rates.write)
    sentences = [
        f"Times are right within a factor of {UNCERTAINTY:g}, if this machine stays as busy as it is now: "
        f"disk {read}/s read, {write}/s written, SHA-256 {format_bytes(rates.hash)}/s a core, "
        f"{rates.multiply / 1e9:,.0f} GFLOP/s."
    ]
    if location is None:
        sentences.append(
            "The weights are no folder here: taken as bf16, and fetching them and the pipeline is left out."
        )
    if load is not None and any(work.recipe.needs_calibration for work in works.values()):
        sentences.append(
            f"calibrate: on the CPU, {load.calls} calls of each expert with {load.tokens:,} tokens a clip. A GPU "
            "(--device), clips instead of sampling (--clips), a smaller --size or fewer --calls make it faster."
        )
    weights = max(work.plan.bytes_after for work in works.values())
    before = max(work.plan.bytes_before for work in works.values())
    sentences.append(f"A GPU holds an expert's weights in {format_bytes(weights)}, in bf16 in {format_bytes(before)}.")
    return sentences
