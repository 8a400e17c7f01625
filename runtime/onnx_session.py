"""Sessions of onnxruntime, with its errors as sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.onnx_file import INSTALL

__all__ = ["CPU", "check_providers", "make_session", "make_session_of_part", "run_session"]

CPU = ("CPUExecutionProvider",)

_FOLDER = "session.model_external_initializers_file_folder_path"


def check_providers(providers: Sequence[str]) -> None:
    """Raise Hif4Error where onnxruntime is not installed, or lacks one of these."""
    there = _onnxruntime().get_available_providers()
    if missing := [name for name in providers if name not in there]:
        raise Hif4Error(f"onnxruntime has no provider {', '.join(missing)} here; it has {', '.join(there)}.")


def make_session(path: Path, providers: Sequence[str] = CPU, session_options: Any = None) -> Any:
    """An `onnxruntime.InferenceSession` of a file. Hif4Error where it cannot be had.

    Without options, the default ones less the memory pattern: it plans one block for a call of the same shapes, which
    holds several decoded weights at a time (2.2 GB more for an expert of A14B) and is not faster.
    """
    if session_options is None:
        session_options = _onnxruntime().SessionOptions()
        session_options.enable_mem_pattern = False
    return _make(str(path), providers, session_options, path)


def make_session_of_part(model: bytes, path: Path, providers: Sequence[str] = CPU) -> Any:
    """A session of a serialized model whose external data are where those of the file `path` are.

    It gives memory back as soon as it can: for a single run, an arena would only keep the most of everything.
    """
    options = _onnxruntime().SessionOptions()
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry(_FOLDER, str(path.parent))
    return _make(model, providers, options, path)


def run_session(session: Any, feeds: Mapping[str, npt.NDArray[Any]], path: Path) -> dict[str, npt.NDArray[Any]]:
    """Output name -> array; `path` is what to call the model in errors (Hif4Error)."""
    names = [item.name for item in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))
    except Exception as error:  # onnxruntime's errors have no common class of their own
        raise Hif4Error(f"{path}: onnxruntime cannot run it ({_first_line(error)}).") from error


def _make(source: str | bytes, providers: Sequence[str], options: Any, path: Path) -> Any:
    onnxruntime = _onnxruntime()
    try:
        return onnxruntime.InferenceSession(source, sess_options=options, providers=list(providers))
    except Exception as error:
        raise Hif4Error(f"{path}: onnxruntime cannot load it ({_first_line(error)}).") from error


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise Hif4Error(f"running .onnx files needs the package onnxruntime; {INSTALL}.") from None
    return onnxruntime


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
