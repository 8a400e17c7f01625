import pytest

from hif4c.compiler.models import tiny_directory
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.onnx_pipeline import load_onnx_pipeline
from tests.support.small_onnx import MODEL, write_small_onnx

BOTH = {"model": {**MODEL, "experts": ["transformer", "transformer_2"]}}


def test_experts_go_into_diffusers_pipeline_with_the_components_of_the_original(tmp_path):
    paths = [
        write_small_onnx(tmp_path / "b.onnx", expert="transformer_2", **BOTH),
        write_small_onnx(tmp_path / "a.onnx", **BOTH),
    ]
    pipeline = load_onnx_pipeline(tiny_directory(), paths)
    assert type(pipeline).__name__ == "WanPipeline"
    assert [pipeline.transformer.expert, pipeline.transformer_2.expert] == ["transformer", "transformer_2"]
    assert pipeline.vae is not None
    assert pipeline.to("cpu") is pipeline
    with pytest.raises(Hif4Error, match="lack transformer; a pipeline needs every expert"):
        load_onnx_pipeline(tiny_directory(), paths[:1])


def test_what_is_missing_is_one_sentence(tmp_path):
    with pytest.raises(Hif4Error, match=r"there is no \.onnx file"):
        load_onnx_pipeline(tiny_directory(), [])
    path = write_small_onnx(tmp_path / "a.onnx")
    with pytest.raises(Hif4Error, match="holds no text encoder, VAE and scheduler"):
        load_onnx_pipeline(tmp_path, [path])
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": ["evil.py", "Pipeline"]}')
    with pytest.raises(Hif4Error, match="is not supported"):
        load_onnx_pipeline(tmp_path, [path])
