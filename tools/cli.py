"""The `hif4c` command."""

from __future__ import annotations

import typer

from hif4c.tools.bench import app as bench
from hif4c.tools.calibrate import calibrate
from hif4c.tools.compile import compile_command
from hif4c.tools.console import run
from hif4c.tools.evaluate import evaluate
from hif4c.tools.export_onnx import export_onnx_command
from hif4c.tools.inspect import inspect
from hif4c.tools.plan import plan
from hif4c.tools.sample import sample
from hif4c.tools.trust import trust
from hif4c.tools.verify import verify

__all__ = ["app", "main"]

app = typer.Typer(
    name="hif4c",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="""Compile Wan2.2 video diffusion models to 4 bits (HiFloat4), once, ahead of time.

A first round, with the small model that ships with hif4c:

  hif4c plan wan-tiny                   what will be quantized, and why not the rest

  hif4c compile wan-tiny -o tiny.hif4   make the artifact

  hif4c verify tiny.hif4                hashes, programs, golden outputs

  hif4c sample tiny.hif4 --prompt "a red triangle moving left on a black background" -o clip.mp4

  hif4c evaluate tiny.hif4 --against wan-tiny

  hif4c inspect tiny.hif4 --html report.html     what became of every linear and block, as a page

  hif4c export-onnx tiny.hif4 -o model.onnx      for stock onnxruntime, the weights still in 4 bits

An artifact that was compiled elsewhere brings kernels for its targets, which run once you trust them:

  hif4c compile MODEL --target cpu,cuda-sm89 -o OUT

  hif4c trust OUT                       on the other machine: what would run, and one question

A large model is calibrated first, by sampling on a GPU or from clips:

  hif4c calibrate MODEL -o calib.safetensors

  hif4c compile MODEL --calibration calib.safetensors -o OUT

MODEL is a diffusers directory (or Wan's own layout), a built-in name, or a hub id.""",
)
app.command("plan")(plan)
app.command("calibrate")(calibrate)
app.command("compile")(compile_command)
app.command("verify")(verify)
app.command("trust")(trust)
app.command("sample")(sample)
app.command("inspect")(inspect)
app.command("evaluate")(evaluate)
app.command("export-onnx")(export_onnx_command)
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point of the console script."""
    run(app)


if __name__ == "__main__":
    main()
