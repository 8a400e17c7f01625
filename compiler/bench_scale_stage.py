"""One stage of `hif4c bench scale` in a process of its own, so that its time, its reads and its memory are its alone.

Run as a module it is that process: it does one thing and prints a JSON object a line. {"step": sentence, "at": seconds,
"read": bytes, "written": bytes, "resident": bytes} begins a step; the last line has {"result": ...} instead of it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["read_counters", "status_bytes"]


def status_bytes(key: str, process: int | str = "self") -> int:
    """A size of a process as Linux tells it in its status ("VmRSS", "VmHWM"); 0 where it says nothing."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def read_counters(process: int | str = "self") -> tuple[int, int]:
    """Bytes that a process and its finished children had read from and written to disks; page faults count."""
    try:
        text = Path(f"/proc/{process}/io").read_text(encoding="ascii")
    except OSError:
        return 0, 0
    values = dict(line.split(": ") for line in text.splitlines())
    # What was written to files and removed before it reached the disk is counted as cancelled.
    return int(values["read_bytes"]), int(values["write_bytes"]) - int(values["cancelled_write_bytes"])


def _print(values: dict[str, Any]) -> None:
    read, written = read_counters()
    line = {**values, "at": time.perf_counter(), "read": read, "written": written, "resident": status_bytes("VmRSS")}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _compile(model: str, output: str, recipe: str, experts: list[str], calibration: str | None) -> dict[str, Any]:
    from hif4c.compiler.compile import CompileOptions, compile_model
    from hif4c.compiler.recipe import load_recipe

    def show(event: str, value: Any) -> None:
        if event == "step":
            _print({"step": value})

    recipes = {name: load_recipe(recipe) for name in experts}
    path = None if calibration is None else Path(calibration)
    compile_model(model, output, CompileOptions(recipes, components="none", calibration=path), show)
    return {}


def _verify(artifact: str) -> dict[str, Any]:
    from hif4c.runtime.verify import verify_artifact

    _print({"step": "verifying"})
    return {"passed": all(check.passed for check in verify_artifact(artifact))}


def _forward(artifact: str, expert: str, latent: str, text: int) -> dict[str, Any]:
    """Load an expert and run one step: first from a cold disk, then again."""
    import torch

    from hif4c.compiler.bench_inputs import Latent, random_inputs
    from hif4c.runtime.artifact import open_artifact
    from hif4c.runtime.native import select
    from hif4c.runtime.transformer import load

    opened = open_artifact(artifact)
    config = opened.expert(expert).config
    size = Latent.parse(latent)
    video, timestep, embeddings = random_inputs(size, config["in_channels"], config["text_dim"], text)
    if opened.expand_timesteps:
        timestep = timestep.expand(1, size.tokens)
    select("auto", opened)  # kernels are built here, if they are
    _print({"step": f"loading {expert}"})
    model = load(artifact, expert, verify=False)
    with torch.inference_mode():
        _print({"step": f"first step of {size.tokens} tokens"})
        output = model(video, timestep, embeddings, return_dict=False)[0]
        _print({"step": f"second step of {size.tokens} tokens"})
        model(video, timestep, embeddings, return_dict=False)
    return {"finite": bool(torch.isfinite(output).all())}


def _main(arguments: dict[str, Any]) -> None:
    from hif4c.compiler.memory_use import peak_rss

    _print({"step": "starting"})
    result = _STAGES[arguments.pop("stage")](**arguments)
    _print({"result": result | {"peak_rss": peak_rss()}})


_STAGES: dict[str, Callable[..., dict[str, Any]]] = {"compile": _compile, "verify": _verify, "forward": _forward}


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
