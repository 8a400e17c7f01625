"""Compiles Triton kernels: a script that `hif4c.compiler.gpu_kernels` runs in a process of its own.

    python gpu_worker.py FOLDER

FOLDER/work.json says what to compile. For each job the binary is written to FOLDER under the job's file name (and an
AMD kernel's assembly beside it, with .s), then a line of JSON with what Triton said about it goes to standard output.

It imports nothing of hif4c, whose runtime would bring torch along, which takes longer than to compile a kernel.
"""

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import passes
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compile_job(kernels: Any, target: GPUTarget, multiples_of_16: set[str], job: dict[str, Any], path: Path) -> Any:
    """Write the binary of a job (the fields of `hif4c.compiler.gpu_kernels.Job`) to `path`; returns its properties."""
    function = getattr(kernels, job["name"])
    constants = job["constants"]
    types = {name: job["types"].get(name, "i32") for name in function.arg_names if name not in constants}
    wide = {name for name, kind in types.items() if kind.startswith("*") or name in multiples_of_16}
    source = ASTSource(
        function,
        {name: types.get(name, "constexpr") for name in function.arg_names},
        constexprs=constants,
        attrs={(index,): [["tt.divisibility", 16]] for index, name in enumerate(function.arg_names) if name in wide},
    )
    # Contraction would round differently from the portable implementation.
    options = {"num_warps": job["warps"], "num_stages": job["stages"], "enable_fp_fusion": False}
    with without_prefetch() if job["name"] == "linear_int8" else contextlib.nullcontext():
        built = triton.compile(source, target=target, options=options)
    metadata = built.metadata
    for what in ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl"):
        if getattr(metadata, what, 0):
            raise RuntimeError(f"{job['file']} needs {what}, which the launcher does not provide")
    if metadata.num_ctas != 1:
        raise RuntimeError(f"{job['file']} needs a cluster of blocks, which the launcher does not launch")
    path.write_bytes(built.asm["cubin" if target.backend == "cuda" else "hsaco"])
    if target.backend == "hip":
        path.with_name(f"{path.name}.s").write_text(built.asm["amdgcn"])
    return {
        "entry": metadata.name,
        "num_warps": metadata.num_warps,  # not always the option
        "shared": metadata.shared,
        "arguments": [[name, kind, 16 if name in wide else 1] for name, kind in types.items()],
        "constants": constants,
    }


@contextlib.contextmanager
def without_prefetch() -> Iterator[None]:
    """Compile without the pass that keeps the next matrix fragments in registers.

    In Triton 3.9 it carries int8 fragments around the loop byte by byte, which doubles the loop's instructions; to 3.7
    it makes no difference.
    """
    original = passes.ttgpuir.add_prefetch
    passes.ttgpuir.add_prefetch = lambda manager: None
    try:
        yield
    finally:
        passes.ttgpuir.add_prefetch = original


def main(folder: Path) -> None:
    """Do what `folder`/work.json asks for; answers go to the standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print is no answer
    work = json.loads((folder / "work.json").read_text())
    spec = importlib.util.spec_from_file_location("kernels", work["kernels"])
    assert spec is not None
    assert spec.loader is not None
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    for job in work["jobs"]:
        properties = compile_job(
            kernels, GPUTarget(*work["target"]), set(work["multiples_of_16"]), job, folder / job["file"]
        )
        answers.write(json.dumps(properties) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
