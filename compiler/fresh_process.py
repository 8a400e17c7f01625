"""Verify an artifact in processes that have nothing of the compile in them, one for each expert."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from hif4c.compiler.staging import UnpublishedError
from hif4c.runtime.artifact import Artifact
from hif4c.runtime.errors import Hif4Error

__all__ = ["verify_in_fresh_processes"]

# One thread, as when the outputs were recorded: then every bit is the same.
_CODE = """
import sys, torch
torch.set_num_threads(1)
from hif4c.runtime.verify import verify_artifact
def on_node(total):
    sys.stdout.write(".")
    sys.stdout.flush()
checks = verify_artifact(sys.argv[1], kernels="portable", experts=sys.argv[2:], on_node=on_node)
wrong = [check for check in checks if check.replay and not check.replay.identical]
sys.exit(str(wrong[0]) if wrong else 0)
"""


def verify_in_fresh_processes(artifact: Artifact, events: Callable[[str, Any], None]) -> None:
    """An artifact that does not load is no artifact: what was written is verified, to the last bit of its outputs.

    Args:
        artifact: complete.
        events: progress, see `hif4c.compiler.experts.Events`.

    Raises:
        Hif4Error: it does not verify.
        UnpublishedError: a process that verifies it was killed, so nobody knows.
    """
    programs = [(name, variant) for name in artifact.experts for variant in (None, *artifact.variants(name))]
    recorded = [item for item in programs if f"golden/{'.'.join(filter(None, item))}.safetensors" in artifact.files]
    if recorded:
        events("total", sum(len(artifact.graph(*item).nodes) for item in recorded))
        events("unit", "pieces")
    lock = threading.Lock()
    running: list[subprocess.Popen[bytes]] = []

    def verify(expert: str) -> str | None:
        # -P: nothing in the user's current directory may stand in for a module of the standard library.
        command = [sys.executable, "-P", "-c", _CODE, str(artifact.root), expert]
        with (
            tempfile.TemporaryFile() as said,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said) as process,
        ):
            running.append(process)
            assert process.stdout is not None
            while process.stdout.read(1):
                with lock:
                    events("bytes", 1)
            status = process.wait()
            if status < 0:  # not what was written is at fault: the machine may have had no memory left
                raise UnpublishedError(
                    f"a process that verifies the artifact was ended by {signal.Signals(-status).name}; see whether "
                    "the machine has enough memory, and continue with --resume."
                )
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
        return None if status == 0 else (lines or [f"exit status {status}"])[-1]

    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        try:
            sentences = list(pool.map(verify, artifact.experts))
        except BaseException:
            for process in running:
                process.kill()  # else leaving the pool would wait for them
            raise
    for sentence in filter(None, sentences):
        raise Hif4Error(f"the written artifact does not verify in a fresh process, so it was not kept: {sentence}")
