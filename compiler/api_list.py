"""What belongs to the API, by the places in the source: parts of docs/python-api.md, each with a sentence and entries.

An entry is a definition below the packages, "runtime.transformer.load". " as NAME" gives it another name on the page,
" with PLACE" the docstring of another definition.
"""

from __future__ import annotations

__all__ = ["PARTS"]

PARTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "Run a compiled model",
        "`load` gives one expert, `load_pipeline` a whole diffusers pipeline. They need no compiler and no "
        "full-precision weights.",
        (
            "runtime.transformer.load",
            "runtime.pipeline.load_pipeline",
            "runtime.transformer.CompiledTransformer",
            "runtime.transformer.TransformerOutput",
            "runtime.errors.Hif4Error",
        ),
    ),
    (
        "Open and verify an artifact",
        "An artifact as data; [its format](artifact.md), byte by byte. Only `verify_artifact` runs a program.",
        (
            "runtime.artifact.open_artifact",
            "runtime.artifact.Artifact",
            "runtime.artifact.ExpertInfo",
            "runtime.verify.verify_artifact",
            "runtime.verify.ExpertCheck",
            "runtime.golden.Replay",
            "runtime.stored_weights.StoredWeights",
            "runtime.graph.Graph",
            "runtime.graph.Node",
            "runtime.graph.InputType",
            "runtime.graph.TensorType",
            "runtime.graph.Ref",
            "runtime.graph_text.program_lines",
            "runtime.graph_text.count_targets",
        ),
    ),
    (
        "The HiF4 format",
        "On tensors of any device. A unit is 64 channels that share one scale.",
        (
            "runtime.format.quantize",
            "runtime.format.dequantize",
            "runtime.format.in_unit_integers",
            "runtime.format.unit_scales",
            "runtime.format.packed_shapes",
            "runtime.rotation.block_hadamard",
        ),
    ),
    (
        "Operators",
        "Registered with torch by `import hif4c.runtime`; they have fake implementations, so `torch.export` and "
        "`torch.compile` trace them, and no gradient. Without a `dtype`, `linear` gives the bias's (float32 where "
        "there is none) and `linear_w4` that of x. `torch.ops.hif4.quantize` and `dequantize` are the functions above.",
        (
            "runtime.ops._linear with runtime.reference.linear as torch.ops.hif4.linear",
            "runtime.ops._linear_w4 with runtime.reference.linear_w4 as torch.ops.hif4.linear_w4",
            "runtime.rows.norm as torch.ops.hif4.norm",
            "runtime.rows.norm_quantize as torch.ops.hif4.norm_quantize",
            "runtime.rows.rms_rotary as torch.ops.hif4.rms_rotary",
            "runtime.rows.attention as torch.ops.hif4.attention",
        ),
    ),
    (
        "Kernels and trust",
        "Which kernels run on the CPU is a choice of the whole process; `load` makes it. Kernels of an artifact run "
        "only when the user's trust file has their hashes.",
        (
            "runtime.native.registry.select",
            "runtime.native.registry.native_kernels",
            "runtime.native.registry.portable_kernels",
            "runtime.kernel_files.kernel_targets",
            "runtime.kernel_files.trust_entries",
            "runtime.trust.TrustEntry",
            "runtime.trust.record_trust",
            "runtime.trust.revoke_trust",
            "runtime.trust.trusted_hashes",
            "runtime.trust.trust_path",
        ),
    ),
    (
        "Compile",
        "Needs `pip install 'hif4c[compile]'`.",
        (
            "compiler.compile.compile_model",
            "compiler.compile.CompileOptions",
            "compiler.experts.Events",
            "compiler.recipe.Recipe",
            "compiler.recipe.load_recipe",
            "compiler.recipe.builtin_recipes",
            "compiler.recipe.resolve_recipes",
            "compiler.kernels.resolve_targets",
            "compiler.lora.parse_loras",
            "compiler.locate.describe_model",
            "compiler.locate.ModelDescription",
            "compiler.plan.make_plan",
            "compiler.plan.ExpertPlan",
            "compiler.plan.PlannedLinear",
            "passes.program.Decision",
            "compiler.ranks.start_ranks",
            "compiler.ranks.Ranks",
        ),
    ),
    (
        "Calibrate",
        "A calibration is made once for a model and serves every recipe.",
        (
            "compiler.calibration_run.run_calibration",
            "compiler.calibration_run.CalibrationOptions",
            "compiler.locate.locate_model",
            "compiler.locate.ModelLocation",
            "compiler.calibration.Calibration",
            "compiler.calibration.ExpertCalibration",
            "compiler.calibration_writer.merge_calibrations",
        ),
    ),
    (
        "Look inside",
        "What `hif4c inspect` shows, as data.",
        (
            "compiler.report.summarize",
            "compiler.report.ExpertSummary",
            "compiler.report.Resolved",
            "compiler.inspection.graph_at_stage",
            "compiler.report_numbers.artifact_numbers",
            "compiler.report_numbers.ArtifactNumbers",
            "compiler.report_numbers.ExpertNumbers",
            "compiler.report_numbers.LinearNumbers",
            "compiler.activation_statistics.GroupNumbers",
            "compiler.report_page.write_report_page",
            "compiler.artifact_diff.compare_artifacts",
            "compiler.artifact_diff.ExpertDifference",
            "compiler.artifact_diff.LinearDifference",
            "compiler.artifact_diff.Change",
            "compiler.model_explorer.write_model_explorer",
            "compiler.model_explorer.ExplorerFiles",
        ),
    ),
    (
        "ONNX",
        "An artifact as .onnx files that stock onnxruntime runs. Needs `pip install 'hif4c[onnx]'`.",
        (
            "compiler.onnx_export.export_onnx",
            "compiler.onnx_export.ExportedProgram",
            "compiler.onnx_verify.verify_onnx",
            "compiler.onnx_verify.OnnxCheck",
            "runtime.onnx_transformer.OnnxTransformer",
            "runtime.onnx_transformer.open_experts",
            "runtime.onnx_pipeline.load_onnx_pipeline",
        ),
    ),
)
