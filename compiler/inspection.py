"""The program of a compiled expert at any stage of the pipeline, from the manifest alone."""

from __future__ import annotations

from hif4c.compiler.capture import capture
from hif4c.compiler.emit import to_graph
from hif4c.compiler.models import WanConfig
from hif4c.compiler.pipeline import PASS_NAMES, run_passes
from hif4c.compiler.plan import make_plan
from hif4c.compiler.recipe import Recipe
from hif4c.runtime.artifact import Artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.graph import Graph

__all__ = ["graph_at_stage"]


def graph_at_stage(artifact: Artifact, expert: str, stage: str) -> Graph:
    """Trace the expert's config again and run the passes up to and including `stage`.

    Raises:
        Hif4Error: no pass has that name, or the manifest's config or recipe cannot be used.
    """
    if stage not in PASS_NAMES:
        raise Hif4Error(f"no pass is called {stage!r}; the passes are {', '.join(PASS_NAMES)}.")
    info = artifact.expert(expert)
    where = f"{artifact.root}/manifest.json"
    config = WanConfig.from_dict(info.config, where)
    try:
        recipe = Recipe(**{**info.recipe, "keep_high": tuple(info.recipe["keep_high"])})
    except (KeyError, TypeError) as error:
        raise Hif4Error(f"{where}: its recipe is not one of this hif4c ({error}); compile the model again.") from None
    program = capture(config, info.dtype, artifact.expand_timesteps)
    run_passes(program, make_plan(config, recipe, info.dtype), recipe, stop_after=stage)
    return to_graph(program)
