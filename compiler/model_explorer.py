"""Files for Model Explorer: every program as a graph, and node data that it colours the nodes by.

The fields are those of `graph_builder.py` and `node_data_builder.py` in the package ai-edge-model-explorer
(https://github.com/google-ai-edge/model-explorer, schema of 0.1.34), which needs not be installed to write them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hif4c.compiler.journal import write_durably
from hif4c.compiler.model_explorer_graph import METRICS, describe_programs
from hif4c.runtime.artifact import Artifact
from hif4c.runtime.errors import Hif4Error

__all__ = ["ExplorerFiles", "write_model_explorer"]

# ColorBrewer's RdYlBu and Blues, which people of all kinds of sight tell apart.
_PRECISION_COLOURS = {"w4a4": "#2c7bb6", "w4a16": "#abd9e9", "high": "#fdae61"}
_SQNR_COLOURS = ((15, "#d7191c"), (20, "#fdae61"), (25, "#ffffbf"), (30, "#abd9e9"), (1000, "#2c7bb6"))
_BYTES_COLOURS = ((0, "#eff3ff"), (0.5, "#6baed6"), (1, "#08519c"))


@dataclass(frozen=True)
class ExplorerFiles:
    """What was written: the graphs, and a file for each metric that the artifact has.

    `missing` are the metrics that no linear has: SQNR, where nothing was calibrated.
    """

    graphs: Path
    node_data: dict[str, Path]
    missing: tuple[str, ...]

    @property
    def command(self) -> tuple[str, ...]:
        """The command line that opens them."""
        return "model-explorer", str(self.graphs), "--node_data_paths=" + ",".join(map(str, self.node_data.values()))


def write_model_explorer(artifact: Artifact, output: Path) -> ExplorerFiles:
    """Write `NAME.json` with a graph for each program, and beside it `NAME.METRIC.json` for each of METRICS.

    Existing files are replaced, each as a whole.

    Raises:
        Hif4Error: a program or a header is damaged, the name does not end in .json, or a file cannot be written.
    """
    if output.suffix != ".json":
        raise Hif4Error(f"{output}: Model Explorer tells what a file is by its name; choose one that ends in .json.")
    if output.resolve().is_relative_to(artifact.root.resolve()):
        raise Hif4Error(f"{output}: lies inside the artifact, whose files are all listed; choose another folder.")
    programs = describe_programs(artifact)
    experts = ", ".join(f"{name}: {info.recipe['name']}" for name, info in artifact.experts.items())
    label = f"{artifact.manifest['model']['source']} ({experts})"
    graphs = [item.graph for item in programs]
    contents: dict[Path, Any] = {output: {"label": label, "graphs": graphs, "graphSorting": "name_asc"}}
    node_data: dict[str, Path] = {}
    for metric in METRICS:
        found = {item.graph["id"]: _node_data(metric, item.data[metric]) for item in programs if item.data[metric]}
        if found:
            node_data[metric] = output.with_name(f"{output.stem}.{metric}.json")
            contents[node_data[metric]] = found
    _write({path: json.dumps(value, separators=(",", ":")).encode() for path, value in contents.items()})
    return ExplorerFiles(output, node_data, tuple(metric for metric in METRICS if metric not in node_data))


def _write(contents: Mapping[Path, bytes]) -> None:
    """Write all files, or none that was not there before."""
    made: list[Path] = []
    for path, data in contents.items():
        new = not path.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path, data)
        except OSError as error:
            for other in made:
                with contextlib.suppress(OSError):
                    other.unlink()
            raise Hif4Error(
                f"{path}: cannot be written ({error.strerror}); free some space or choose another name."
            ) from error
        made += [path] if new else []


def _node_data(metric: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A metric of one graph, as GraphNodeData."""
    results: dict[str, Any] = {node: {"value": value} for node, value in values.items()}
    if metric == "precision":
        for result in results.values():
            result["bgColor"] = _PRECISION_COLOURS[result["value"]]
        return {
            "name": "precision",
            "results": results,
            "hideInAggregatedStatsTable": True,
            "showExpandedSummaryOnGroupNode": True,
            "showLabelCountColumnsInChildrenStatsTable": True,
        }
    if metric == "sqnr":
        thresholds = [{"value": value, "bgColor": colour} for value, colour in _SQNR_COLOURS]
        return {"name": "SQNR, dB", "results": results, "thresholds": thresholds, "hideAggregatedStats": ["sum"]}
    gradient = [{"stop": stop, "bgColor": colour} for stop, colour in _BYTES_COLOURS]
    return {"name": "stored bytes", "results": results, "gradient": gradient}
