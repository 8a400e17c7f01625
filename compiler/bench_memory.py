"""What the weights of a transformer take in memory, measured in a fresh process of its own.

Run as a module it is that process: it loads one model, touches every page of its weights, runs it, and prints JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from hif4c.compiler.bench_inputs import Latent, random_inputs
from hif4c.runtime.errors import Hif4Error

__all__ = ["Memory", "measure_memory"]

DIFFUSERS, COMPILED = "diffusers", "compiled"
_PAGE = 4096
_SMALL = Latent(1, 4, 4)


@dataclass(frozen=True)
class Memory:
    """Bytes. What the system would not say is None.

    Attributes:
        weights: of all parameters and buffers.
        quantized: of those of the linears that are 4 bits in the artifact; in diffusers' model, of the same linears.
        resident: growth of the process's resident memory from before loading until every page of the weights was
            touched and a small call has returned: what the weights take, with anything that is kept beside them.
        peak: further growth while a whole step runs: activations and scratch.
    """

    weights: int
    quantized: int
    resident: int | None
    peak: int | None


def measure_memory(kind: str, model: Path, artifact: Path, latent: Latent, text: int, kernels: str) -> Memory:
    """Measure one model in a fresh process.

    Args:
        kind: "diffusers" for the bf16 model, "compiled" for the artifact.
        model: the pipeline's directory.
        artifact: its artifact.
        latent: of the step.
        text: tokens of text.
        kernels: as in `hif4c.runtime.load`.

    Raises:
        Hif4Error: the process failed.
    """
    arguments = [kind, str(model), str(artifact), str(latent), str(text), kernels, str(torch.get_num_threads())]
    # -P: nothing in the user's current directory may stand in for a module of the standard library.
    command = [sys.executable, "-P", "-m", "hif4c.compiler.bench_memory", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise Hif4Error(f"the memory of the {kind} model could not be measured: {lines[-1]}")
    return Memory(**json.loads(result.stdout.strip().splitlines()[-1]))


def _measure(kind: str, model: Path, artifact: Path, latent: Latent, text: int, kernels: str) -> Memory:
    # Everything that is not the model comes first: libraries, threads, the kernels and their scratch.
    from diffusers import WanTransformer3DModel

    from hif4c.runtime.artifact import open_artifact
    from hif4c.runtime.native import select
    from hif4c.runtime.transformer import load

    select(kernels)
    info = open_artifact(artifact).expert("transformer")
    small = random_inputs(_SMALL, info.config["in_channels"], info.config["text_dim"], text)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(256, 256, dtype=dtype)
        torch.nn.functional.linear(x, x)
    torch.ops.hif4.linear(*torch.ops.hif4.quantize(x), *torch.ops.hif4.quantize(x))
    before = _resident()
    module: torch.nn.Module
    if kind == DIFFUSERS:
        module = WanTransformer3DModel.from_pretrained(model / "transformer", torch_dtype=torch.bfloat16).eval()
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    else:
        # Hashing reads every file, and what it has read would count as resident or not as the system likes.
        module = load(artifact, kernels=kernels, verify=False)
        named = {name.replace("/", "."): value for name, value in module.named_buffers()}
    quantized = {str(item["path"]) for item in info.linears if item["precision"] != "high"}
    with torch.inference_mode():
        _touch(named.values())
        module(*small)
        resident = _growth(before)
        loaded = _resident()
        _reset_peak()
        module(*random_inputs(latent, info.config["in_channels"], info.config["text_dim"], text))
        peak = _status("VmHWM")
    return Memory(
        weights=sum(value.nbytes for value in named.values()),
        quantized=sum(value.nbytes for name, value in named.items() if _owner(name) in quantized),
        resident=resident,
        peak=None if peak is None or loaded is None else max(0, peak - loaded),
    )


def _owner(name: str) -> str:
    """The linear that a tensor belongs to: "weights.PATH.weight.codes" and "PATH.weight" are PATH's."""
    return name.removeprefix("weights.").partition(".weight")[0].removesuffix(".bias")


def _touch(tensors: Iterable[torch.Tensor]) -> None:
    for tensor in tensors:
        if tensor.nbytes:
            tensor.detach().contiguous().view(-1).view(torch.uint8)[::_PAGE].sum()


def _resident() -> int | None:
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory otherwise
    return _status("VmRSS")


def _growth(before: int | None) -> int | None:
    now = _resident()
    return None if before is None or now is None else now - before


def _status(key: str) -> int | None:
    """A size of this process, as Linux tells it."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    sizes = [line.split()[1] for line in text.splitlines() if line.startswith(f"{key}:")]
    return int(sizes[0]) * 1024 if sizes else None


def _reset_peak() -> None:
    with contextlib.suppress(OSError):  # the peak then includes loading
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    _kind, _model, _artifact, _latent, _text, _kernels, _threads = sys.argv[1:]
    torch.set_num_threads(int(_threads))
    _memory = _measure(_kind, Path(_model), Path(_artifact), Latent.parse(_latent), int(_text), _kernels)
    sys.stdout.write(json.dumps(vars(_memory)) + "\n")
