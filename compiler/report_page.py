"""report.html: an artifact's programs, figures and plots as one page that loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hif4c.compiler.amounts import format_bytes
from hif4c.compiler.calibration import Calibration
from hif4c.compiler.journal import write_durably
from hif4c.compiler.report_layout import lay_out
from hif4c.compiler.report_numbers import ArtifactNumbers, ExpertNumbers, artifact_numbers, to_json
from hif4c.runtime.artifact import Artifact
from hif4c.runtime.errors import Hif4Error

__all__ = ["PageContent", "render_page", "write_report_page"]

Events = Callable[[str, Any], None]
"""Called with (event, value): "step" sentence; of a long step its "total", and "bytes" 1 after each piece."""
_WEB = Path(__file__).parent / "web"
_SCRIPTS = ("page.js", "graph.js")
_LIBRARIES = ("bokeh", "igraph", "jinja2")
_WORST = 40
_PLOTS = (
    ("sqnr", "SQNR by layer", "Of the output on calibration rows, in dB: more is better. A triangle on top is "
     "above the axis.",
     "No SQNR was measured when this artifact was compiled: its recipe chose nothing by a calibration."),
    ("errors", "Sensitivity by layer", "Relative energy of the output error on calibration rows by plain rounding, "
     "weights and activations in 4 bits: less is better.", ""),
    ("masks", "Range of the channel masks", "From the least to the largest entry of each stored mask; folded masks are "
     "in the weights and not stored.", ""),
    ("tails", "Maximum against 99.9 percentile", "Of |x| of each input: the dot is the 99.9 percentile of all its "
     "values, the triangle the maximum.", "Percentiles and maxima of the inputs are not known."),
    ("bytes", "Bytes by block", "Of the linears as stored; the dotted frame is the same in bf16.", ""),
)  # fmt: skip
"""(name, title, what it shows, what is missing where there is none)."""


@dataclass(frozen=True)
class PageContent:
    """Everything on the page.

    Attributes:
        numbers: of the artifact.
        programs: of each expert, `ExpertPasses.to_json()`.
        calibrated: whether a calibration file was given.
    """

    numbers: ArtifactNumbers
    programs: Sequence[Mapping[str, Any]]
    calibrated: bool


def write_report_page(
    artifact: Artifact,
    output: Path,
    calibration: Calibration | None = None,
    on_event: Events = lambda event, value: None,
) -> int:
    """Collect everything and write the page; under its name it appears complete or not at all.

    Args:
        artifact: opened.
        output: the file; one that is there is replaced.
        calibration: for the activations; None for a page that says what is missing.
        on_event: progress, see `Events`.

    Returns:
        Bytes of the page.

    Raises:
        Hif4Error: a library is missing, the artifact or the calibration cannot be used, or the file cannot be written.
    """
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise Hif4Error(f"the report needs {', '.join(missing)}: install them with `pip install 'hif4c[report]'`.")
    from hif4c.compiler.pipeline import PASS_NAMES
    from hif4c.compiler.report_passes import artifact_passes

    if output.is_dir():
        raise Hif4Error(f"{output} is a directory; give the page a file name.")
    if output.resolve().is_relative_to(artifact.root.resolve()):
        raise Hif4Error(f"{output}: lies inside the artifact, whose files are all listed; choose another folder.")
    if not output.parent.is_dir():
        raise Hif4Error(f"{output} cannot be written (No such file or directory); choose another place with --html.")
    numbers = artifact_numbers(artifact, calibration, on_event)
    on_event("step", "tracing the passes")
    on_event("total", len(artifact.experts) * (1 + len(PASS_NAMES)))
    programs = [item.to_json() for item in artifact_passes(artifact, lambda *_: on_event("bytes", 1)).values()]
    on_event("step", "drawing")
    page = render_page(PageContent(numbers, programs, calibration is not None)).encode()
    _write(output, page)
    return len(page)


def render_page(content: PageContent) -> str:
    """The page as text; every string of the content is escaped."""
    import jinja2
    from bokeh.resources import Resources

    from hif4c.compiler.report_plots import EXPERT_COLOURS, kind_colours, make_plots

    numbers = content.numbers
    plots = make_plots(numbers)
    programs, forms = _with_forms(content.programs)
    data = {
        "numbers": {"experts": json.loads(to_json(numbers.experts))},
        "programs": programs,
        "forms": forms,
        "colours": kind_colours(numbers),
        "expert_colours": EXPERT_COLOURS,
    }
    scripts = [*Resources(mode="inline", components=["bokeh"]).js_raw]
    scripts += [(_WEB / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_WEB), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template("template.html").render(
        numbers=numbers,
        calibrated=content.calibrated,
        policy=_policy(scripts),
        style=(_WEB / "page.css").read_text(encoding="utf-8"),
        scripts=scripts,
        data=_script_json(data),
        plot_data=_script_json(plots),
        drawn=plots,
        plots=_PLOTS,
        kinds=kind_colours(numbers),
        precisions=sorted({linear.precision for expert in numbers.experts for linear in expert.linears}),
        expert_names=[expert.name for expert in numbers.experts],
        stats=_stats(numbers),
        summary=_summary(numbers),
        about=_about(numbers),
        files=[(name, f"{size:,}") for name, size in sorted(numbers.files.items())],
        worst=[(expert.name, _worst(expert)) for expert in numbers.experts if expert.groups],
        left_out=_left_out(content.programs),
    )


def _with_forms(programs: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The programs, whose structures say their form by its number, and the forms: edges and drawing.

    Blocks that differ in a mask or a name, and programs before and after a mark, have one form: it is drawn once.
    """
    number: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {}
    result = []
    for program in programs:
        structures = []
        for structure in program["structures"]:
            key = (len(structure["nodes"]), tuple((start, end) for start, end in structure["edges"]))
            form = number.setdefault(key, len(number))
            structures.append({"nodes": structure["nodes"], "inputs": structure["inputs"], "form": form})
        result.append({**program, "structures": structures})
    return result, [{"edges": edges, "layout": vars(lay_out(nodes, edges))} for nodes, edges in number]


def _left_out(programs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """(what, why, pass, experts) of what did not apply, the same of several experts once."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for program in programs:
        for item in program["not_applied"]:
            found.setdefault((item["what"], item["why"], item["pass_name"]), []).append(program["expert"])
    return [
        (*row, "all" if len(experts) == len(programs) > 1 else ", ".join(experts)) for row, experts in found.items()
    ]


def _script_json(value: Any) -> str:
    """JSON that no string in it can end the script element of, or begin a comment in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(scripts: Sequence[str]) -> str:
    """A content security policy: only these scripts run, and nothing is loaded or sent."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _stats(numbers: ArtifactNumbers) -> list[tuple[str, str]]:
    """What matters first."""
    bf16 = sum(expert.summary.bf16_bytes for expert in numbers.experts)
    stored = sum(expert.summary.file_bytes for expert in numbers.experts)
    linears = [linear for expert in numbers.experts for linear in expert.linears]
    quantized = [linear for linear in linears if linear.precision != "high"]
    weights = sum(linear.in_features * linear.out_features for linear in quantized)
    packed = sum(expert.summary.plane_bytes + expert.summary.branch_bytes for expert in numbers.experts)
    found = [
        (f"{stored / bf16:.1%}".replace("%", " %"), "of the bytes in bf16"),
        (format_bytes(stored), f"experts as stored, {format_bytes(bf16)} in bf16"),
        (f"{len(quantized)} of {len(linears)}", "linears in 4 bits"),
    ]
    if weights:
        found.append((f"{8 * packed / weights:.2f}", "bits a quantized weight, side branches included"))
    sqnr = [linear.sqnr for linear in quantized if linear.sqnr is not None]
    if sqnr:
        found.append((f"{min(sqnr):.1f} dB", "lowest SQNR of a linear's output"))
    return found


def _summary(numbers: ArtifactNumbers) -> list[tuple[str, list[str]]]:
    """(what, its value in each expert); rows without any value are left out."""
    rows: list[tuple[str, Callable[[ExpertNumbers], str]]] = [
        ("recipe", lambda expert: f"{expert.recipe.get('name', '')}: {expert.recipe.get('description', '')}"),
        ("bytes", lambda expert: format_bytes(expert.summary.file_bytes)),
        ("in bf16", lambda expert: format_bytes(expert.summary.bf16_bytes)),
        ("ratio", lambda expert: f"{expert.summary.ratio:.1%}".replace("%", " %")),
        ("linears", lambda expert: _precisions(expert)),
        ("bits a quantized weight", lambda expert: f"{expert.summary.bits_per_weight:.2f}"),
        ("channel masks", lambda expert: _masks(expert)),
        ("channel shifts", lambda expert: _count(expert.summary.resolved.shifts)),
        ("rotation", lambda expert: ", ".join(f"Hadamard {width}" for width in expert.summary.resolved.rotations)),
        ("rounding", lambda expert: ", ".join(f"{n} {name}" for name, n in expert.summary.resolved.roundings.items())),
        ("low-rank branches", lambda expert: _rank(expert)),
        ("SQNR of the linears", _sqnr),
        ("bf16 activations", _bf16_steps),
        ("programs", lambda expert: ", ".join(["main", *expert.variants])),
        ("nodes", lambda expert: f"{expert.summary.nodes:,}"),
        ("calibration", _calibration),
        ("LoRAs", _loras),
        ("model", _config),
    ]
    found = [(name, [value(expert) for expert in numbers.experts]) for name, value in rows]
    return [(name, cells) for name, cells in found if any(cells)]


def _precisions(expert: ExpertNumbers) -> str:
    names = {"w4a4": "W4A4", "w4a16": "W4A16", "high": "high"}
    found = expert.summary.precisions
    return ", ".join(f"{found[key]} {name}" for key, name in names.items() if key in found)


def _masks(expert: ExpertNumbers) -> str:
    found = expert.summary.resolved
    if not found.masks:
        return ""
    alphas = f", alpha {found.alphas[0]:g} to {found.alphas[-1]:g}" if found.alphas else ""
    return f"{found.masks} inputs, {found.folded} of them folded{alphas}"


def _count(value: int) -> str:
    return f"{value} inputs" if value else ""


def _rank(expert: ExpertNumbers) -> str:
    found = expert.summary.resolved
    parts = [f"up to rank {found.rank}"] if found.rank else []
    return ", ".join(parts + ([f"{found.outlier_columns} columns in 16 bits"] if found.outlier_columns else []))


def _sqnr(expert: ExpertNumbers) -> str:
    found = expert.summary.resolved
    if found.sqnr_median is None or found.sqnr_min is None:
        return ""
    return f"median {found.sqnr_median:.1f} dB, lowest {found.sqnr_min:.1f} dB"


def _bf16_steps(expert: ExpertNumbers) -> str:
    if not expert.variants:
        return ""
    ranges = ", ".join(f"{low:g} to {high:g}" for low, high in expert.bf16_timesteps)
    return f"at timesteps {ranges}" if ranges else "at no timestep"


def _calibration(expert: ExpertNumbers) -> str:
    if expert.calibration is None:
        return "none"
    parts = []
    for run in expert.calibration.get("runs", []):
        kind = "clips" if run.get("source") == "clips" else "prompts"
        parts.append(f"{len(run.get(kind, ()))} {kind}, seed {run.get('seed', '?')}")
    return f"{'; '.join(parts) or 'no run recorded'} (sha256 {str(expert.calibration.get('sha256', ''))[:12]})"


def _loras(expert: ExpertNumbers) -> str:
    return "; ".join(f"{item['file']} times {item['scale']:g}, {item['tensors']} tensors" for item in expert.loras)


def _config(expert: ExpertNumbers) -> str:
    config = expert.config
    return (
        f"{config.get('num_layers')} layers, {config.get('num_attention_heads')} heads of "
        f"{config.get('attention_head_dim')}, ffn {config.get('ffn_dim')}"
    )


def _about(numbers: ArtifactNumbers) -> list[tuple[str, str]]:
    targets = [f"{name} ({format_bytes(size)})" if size else name for name, size in numbers.targets.items()]
    rows = [
        ("targets", ", ".join(targets)),
        ("compiled with", ", ".join(f"{name} {version}" for name, version in numbers.versions.items())),
        ("all files", f"{len(numbers.files)}, {format_bytes(numbers.total_bytes)}"),
        ("format version", str(numbers.format_version)),
        ("manifest", numbers.digest),
    ]
    if numbers.boundary_ratio is not None:
        rows.insert(0, ("experts change at", f"{numbers.boundary_ratio:g} of the timesteps"))
    return rows


def _worst(expert: ExpertNumbers) -> list[tuple[str, str, str, str]]:
    """The worst channels of all inputs: those furthest above the median of their input."""
    found = [(channel, group.name) for group in expert.groups for channel in group.worst if channel.ratio is not None]
    found.sort(key=lambda item: (-(item[0].ratio or 0), item[1], item[0].index))
    return [
        (name, str(channel.index), f"{channel.maximum:.4g}", f"{channel.ratio:.3g}") for channel, name in found[:_WORST]
    ]


def _write(output: Path, page: bytes) -> None:
    try:
        write_durably(output, page)
    except OSError as error:
        raise Hif4Error(f"{output} cannot be written ({error.strerror}); choose another place with --html.") from error
