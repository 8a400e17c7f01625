"""Exports of artifacts: what is in the files, what onnxruntime makes of them, and what is refused."""

import errno
import io
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.external_data_helper import ExternalDataInfo

from hif4c.compiler import onnx_export
from hif4c.compiler.float32_program import float32_executor
from hif4c.compiler.onnx_export import DEFAULT_OPSET, MAX_OPSET, MIN_OPSET, ExportedProgram, export_onnx
from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.onnx_file import METADATA_KEY, open_onnx
from hif4c.runtime.safetensors_stream import StreamingWriter, TensorFile, TensorSpec
from tests.support.forging import forge

# Float32 in another order through 2 layers of some 10^2 operators: each adds roundings of 2^-24 of its values, some
# 1e-6 in all.
PROGRAM_ERROR = 1e-5


@pytest.fixture
def beside(artifacts, tmp_path):
    """(variant, recipe) -> an artifact of this test's own, beside which an .onnx may refer to it."""

    def make(variant: str = "t2v", recipe: str = "rtn") -> Path:
        return shutil.copytree(artifacts(variant, recipe), tmp_path / "out.hif4", dirs_exist_ok=True)

    return make


def export(artifact: Path, output: Path, **options: Any) -> list[ExportedProgram]:
    return export_onnx(open_artifact(artifact), output, **options)


def metadata(model: onnx.ModelProto) -> Any:
    (entry,) = model.metadata_props
    assert entry.key == METADATA_KEY
    return json.loads(entry.value)


def read(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


def external(model: onnx.ModelProto) -> dict[str, tuple[str, int, int]]:
    """Initializers that are external: name -> location, offset, length."""
    return {
        item.name: (info.location, info.offset, info.length)
        for item in model.graph.initializer
        if item.data_location == onnx.TensorProto.EXTERNAL
        for info in [ExternalDataInfo(item)]
    }


def feeds(sample: Any) -> dict[str, Any]:
    names = ("hidden_states", "timestep", "encoder_hidden_states")
    return {name: value.float().numpy() for name, value in zip(names, sample, strict=True)}


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def references(artifact: Path, samples: list[Any]) -> list[Any]:
    """What the program computes in float32, in torch."""
    opened = open_artifact(artifact)
    graph = opened.graph("transformer")
    executor = float32_executor(graph, opened.tensors("transformer", graph.tensors))
    return [executor(*sample)[0].numpy() for sample in samples]


def test_a_weight_only_program_computes_what_the_runtime_does(beside, inputs, tmp_path):
    """At three sizes, none of them known at export; in the first, last and usual opset."""
    artifact = beside("t2v", "weight-only")
    sizes = ((2, 3, 8, 6, 7), (1, 1, 4, 4, 1), (3, 2, 4, 10, 12))
    samples = [[value.float() for value in inputs("t2v", *size)] for size in sizes]
    expected = references(artifact, samples)
    for opset in sorted({MIN_OPSET, DEFAULT_OPSET, MAX_OPSET}):
        (program,) = export(artifact, tmp_path / f"{opset}.onnx", opset=opset, experts=["transformer"])
        running = session(program.path)
        for sample, want in zip(samples, expected, strict=True):
            (found,) = running.run(["sample"], feeds(sample))
            assert found.dtype == np.float32
            assert np.abs(found - want).max() <= PROGRAM_ERROR * np.abs(want).max()


def test_every_value_has_the_shape_that_the_file_says(beside, inputs, tmp_path):
    """Values of the main graph, all made outputs, at two sizes."""
    (program, *_) = export(beside(), tmp_path / "model.onnx")
    model = read(program.path)
    shapes = {
        item.name: [dim.dim_param or dim.dim_value for dim in item.type.tensor_type.shape.dim]
        for item in (*model.graph.input, *model.graph.value_info, *model.graph.output)
    }
    computed = [name for node in model.graph.node for name in node.output]
    assert set(computed) <= set(shapes)
    outputs = [item for item in model.graph.value_info if item.name in computed]
    model.graph.output.extend(outputs)
    (tmp_path / "all.onnx").write_bytes(model.SerializeToString())
    running = session(tmp_path / "all.onnx")
    names = [item.name for item in outputs]
    for b, f, h, w, text in ((2, 3, 4, 3, 7), (1, 2, 2, 5, 3)):
        sizes = {"b": b, "f": f, "h": h, "w": w, "text": text}
        found = running.run(names, feeds(inputs("t2v", b, f, 2 * h, 2 * w, text)))
        for name, value in zip(names, found, strict=True):
            said = [eval(size, {}, sizes) if isinstance(size, str) else size for size in shapes[name]]
            assert list(value.shape) == said, name


def test_what_is_in_the_files(beside, tmp_path):
    artifact = beside()
    exported = export(artifact, tmp_path / "model.onnx")
    opened = open_artifact(artifact)
    assert [(item.expert, item.variant) for item in exported] == [("transformer", None), ("transformer_2", None)]
    assert [item.path.name for item in exported] == ["model.transformer.onnx", "model.transformer_2.onnx"]
    for program in exported:
        model = read(program.path)
        assert program.onnx_bytes == program.path.stat().st_size
        assert program.nodes == len(model.graph.node)
        assert [item.name for item in model.graph.input] == ["hidden_states", "timestep", "encoder_hidden_states"]
        assert [item.name for item in model.graph.output] == ["sample"]
        assert {item.type.tensor_type.elem_type for item in (*model.graph.input, *model.graph.output)} == {
            onnx.TensorProto.FLOAT
        }
        assert metadata(model) == {
            "expert": program.expert,
            "variant": None,
            "config": opened.expert(program.expert).config,
            "expand_timesteps": False,
            "bf16_timesteps": [],
            "model": opened.manifest["model"],
            "digest": opened.manifest["digest"],
            "form": "lean",
            "opset": DEFAULT_OPSET,
            "data": [{"location": location, "bytes": size} for location, size in program.data],
        }
        # Nothing is written twice, and all but the smallest of what is stored is read: of rotary tables e.g. a half.
        places = external(model)
        assert {location for location, _, _ in places.values()} == {f"out.hif4/{program.expert}/weights.safetensors"}
        stored = TensorFile(artifact / program.expert / "weights.safetensors")
        assert {name: place[1:] for name, place in places.items()} == {name: stored.place(name) for name in places}
        referenced = sum(length for _, _, length in places.values())
        assert referenced == pytest.approx(sum(stored.nbytes(name) for name in stored.names), rel=0.02)
        inline = sum(len(item.raw_data) for item in model.graph.initializer)
        assert program.onnx_bytes < 1 << 20 > inline
        kinds = {item.name: item.data_type for item in model.graph.initializer}
        assert kinds["blocks.0.attn1.to_q.weight.codes"] == onnx.TensorProto.UINT8
        assert kinds["proj_out.weight"] == onnx.TensorProto.BFLOAT16
        assert {node.op_type for node in model.graph.node if node.domain} == {"QuantizeDequantize", "Linear"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.transformer.onnx",
        "model.transformer_2.onnx",
        "out.hif4",
    ]


def test_quantizers_are_named_with_their_readers(beside, tmp_path):
    """13 of a model of 2 blocks: six a block, and the text, which both read."""
    program, _ = export(beside(), tmp_path / "model.onnx")
    assert len(program.quantized) == 2 * 6 + 1
    assert program.quantized[0] == ("blocks.0.attn1.to_q", "blocks.0/QuantizeDequantize")
    qdq, _ = export(tmp_path / "out.hif4", tmp_path / "qdq.onnx", qdq=True)
    assert [module for module, _ in qdq.quantized] == [module for module, _ in program.quantized]
    model = read(qdq.path)
    assert metadata(model)["form"] == "qdq"
    outputs = {node.output[0]: node.op_type for node in model.graph.node}
    assert {outputs[value] for _, value in qdq.quantized} == {"Dequantize"}


def test_weights_are_copied_where_onnx_cannot_reach_them(artifacts, inputs, tmp_path):
    artifact = artifacts("t2v", "rtn")
    (tmp_path / "a").mkdir()
    program, second = export(artifact, tmp_path / "a" / "model.onnx")
    assert sorted(os.listdir(tmp_path / "a")) == [
        "model.transformer.onnx",
        "model.transformer.safetensors",
        "model.transformer_2.onnx",
        "model.transformer_2.safetensors",
    ]
    original = artifact / "transformer" / "weights.safetensors"
    copied = tmp_path / "a" / "model.transformer.safetensors"
    assert copied.read_bytes() == original.read_bytes()
    assert program.data == (("model.transformer.safetensors", original.stat().st_size),)
    assert second.data[0][0] == "model.transformer_2.safetensors"
    # The folder may be moved: it needs nothing from outside.
    (tmp_path / "a").rename(tmp_path / "b")
    sample = feeds(inputs())
    found = session(tmp_path / "b" / "model.transformer.onnx").run(None, sample)
    # One program in all has the name that was asked for; and the same numbers, wherever its weights are.
    beside = shutil.copytree(artifact, tmp_path / "out.hif4")
    (alone,) = export(beside, tmp_path / "alone.onnx", experts=["transformer"])
    assert alone.path == tmp_path / "alone.onnx"
    np.testing.assert_array_equal(found, session(alone.path).run(None, sample))
    (again,) = export(beside, tmp_path / "copied.onnx", experts=["transformer"], weights="copy")
    assert again.data[0][0] == "copied.safetensors"


def test_shards_and_a_second_program(beside, tmp_path):
    """Files are numbered; both programs of an expert read the same."""
    artifact = beside()
    whole = TensorFile(artifact / "transformer" / "weights.safetensors")
    tensors = {name: whole.read(name).clone() for name in whole.names}
    specs = [TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]
    (artifact / "transformer" / "weights.safetensors").unlink()
    with StreamingWriter(artifact / "transformer", specs, base_name="weights", shard_bytes=200_000) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
    files = {f"transformer/{name}": (artifact / "transformer" / name).read_bytes() for name in writer.files}
    files["transformer/graph.bf16.json"] = (artifact / "transformer" / "graph.json").read_bytes()
    count = sum(name.endswith(".safetensors") for name in writer.files)
    assert count > 1

    def change(manifest):
        del manifest["files"]["transformer/weights.safetensors"]
        manifest["experts"]["transformer"]["bf16_timesteps"] = [[0, 299]]

    forge(artifact, change, **files)
    main, bf16 = export(artifact, tmp_path / "m.onnx", experts=["transformer"], weights="copy")
    assert [item.path.name for item in (main, bf16)] == ["m.transformer.onnx", "m.transformer.bf16.onnx"]
    names = [f"m.transformer-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    assert [location for location, _ in main.data] == names
    assert main.data == bf16.data
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == names
    assert bf16.variant == "bf16"
    assert metadata(read(bf16.path))["variant"] == "bf16"
    assert metadata(read(bf16.path))["bf16_timesteps"] == [[0, 299]]
    assert {location for location, _, _ in external(read(main.path)).values()} == set(names)


def test_equal_inputs_give_equal_bytes(beside, tmp_path):
    artifact = beside()
    for name in ("a", "b"):
        export(artifact, tmp_path / f"{name}.onnx")
    for expert in ("transformer", "transformer_2"):
        a, b = ((tmp_path / f"{name}.{expert}.onnx").read_bytes() for name in "ab")
        assert a == b


def test_events(beside, tmp_path):
    """Bars that reach their end."""
    events: list[Any] = []
    artifact = beside()
    export(artifact, tmp_path / "model.onnx", weights="copy", on_event=lambda *event: events.append(event))
    steps = [value for name, value in events if name == "step"]
    assert steps == [f"comparing hashes of {artifact}", f"copying weights to {tmp_path}", "writing programs"]
    totals = [value for name, value in events if name == "total"]
    assert sum(value for name, value in events if name == "bytes") == sum(totals)


# Refusals. None leaves anything behind.


@pytest.fixture
def refusal(beside, tmp_path):
    """The sentence of an export that must fail and leave the folder as it was."""

    def check(artifact: Path | None = None, output: Path = tmp_path / "model.onnx", **options: Any) -> str:
        artifact = beside() if artifact is None else artifact
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(Hif4Error) as error:
            export(artifact, output, **options)
        assert sorted(tmp_path.rglob("*")) == before
        return str(error.value)

    return check


def test_an_artifact_that_does_not_verify(beside, refusal):
    artifact = beside()
    weights = artifact / "transformer_2" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert refusal(artifact) == (
        f"{weights}: its content does not match the manifest; the file was damaged or changed, copy the artifact again."
    )


def test_programs_that_do_not_fit(beside, refusal):
    """The hashes are right, what is hashed is not."""
    artifact = beside()
    text = (artifact / "transformer" / "graph.json").read_text()
    forge(artifact, **{"transformer/graph.json": text.replace("hif4.linear", "hif4.norm").encode()})
    assert "has no form in ONNX" in refusal(artifact)
    forge(artifact, **{"transformer/graph.json": text.replace("blocks.1.attn1.to_q.bias", "hif4.bias").encode()})
    assert "program and weights disagree about" in refusal(artifact)
    huge = text.replace('"float32","b",1,128', f'"float32","b",1,{2**63}')
    assert huge != text
    forge(artifact, **{"transformer/graph.json": huge.encode()})
    assert "ONNX cannot hold the program (Value out of range: 9223372036854775808)" in refusal(artifact)
    wrong = text.replace('"bfloat16","b","f*h*w",128', '"bfloat16","b","f*h*w",192')
    assert wrong != text
    forge(artifact, **{"transformer/graph.json": wrong.encode()})
    assert refusal(artifact)


@pytest.mark.parametrize("opset", [0, MIN_OPSET - 1, MAX_OPSET + 1])
def test_an_opset_that_is_not_supported(opset, refusal):
    assert refusal(opset=opset) == (f"ONNX opset {opset} is not supported; choose one from {MIN_OPSET} to {MAX_OPSET}.")


def test_an_opset_that_the_installed_onnx_does_not_know(refusal, monkeypatch):
    monkeypatch.setattr(onnx.defs, "onnx_opset_version", lambda: 23)
    assert refusal(opset=24) == (
        f"ONNX opset 24 is newer than the package onnx {onnx.__version__} knows; upgrade it, or choose one from "
        f"{MIN_OPSET} to 23."
    )


def test_wrong_arguments(beside, refusal, tmp_path):
    artifact = beside()
    assert refusal(artifact, weights="link") == "--weights link: is none of auto, artifact, copy."
    assert "holds no expert 'vae'; it holds transformer, transformer_2" in refusal(artifact, experts=["vae"])
    for name in ("model.pb", "model", ".onnx"):
        assert f"{tmp_path / name}: is not the name of an ONNX file" in refusal(artifact, tmp_path / name)
    missing = tmp_path / "missing" / "model.onnx"
    assert refusal(artifact, missing, weights="copy") == (
        f"{missing.parent}: there is no such folder; make it, or choose another place for the output."
    )


def test_an_output_in_the_artifact(beside, refusal):
    """It would not verify any more."""
    artifact = beside()
    for folder in (artifact, artifact / "transformer"):
        assert refusal(artifact, folder / "model.onnx") == (
            f"{folder / 'model.onnx'}: lies in the artifact, which holds nothing but what its manifest lists; write it "
            "beside the artifact."
        )


def test_what_is_there_already(beside, refusal, tmp_path):
    artifact = beside()
    for name in ("model.transformer_2.onnx", "model.transformer.safetensors"):
        (tmp_path / name).write_text("mine")
        sentence = f"{tmp_path / name}: already exists; choose another output or remove it."
        assert refusal(artifact, weights="copy") == sentence
        (tmp_path / name).unlink()


def test_weights_that_onnx_cannot_reach(artifacts, refusal, tmp_path):
    artifact = artifacts("t2v", "rtn")
    assert refusal(artifact, weights="artifact") == (
        f"{artifact}: does not lie below {tmp_path}, and ONNX finds weights only below its file's folder; write the "
        ".onnx beside the artifact, or copy them with --weights copy."
    )


def test_weights_with_several_hard_links(beside, refusal, tmp_path):
    """Nor do ONNX and onnxruntime take such files."""
    artifact = beside()
    weights = artifact / "transformer_2" / "weights.safetensors"
    os.link(weights, tmp_path / "another name")
    assert refusal(artifact, weights="artifact") == (
        f"{weights}: has several hard links, and ONNX refuses such files; copy the weights with --weights copy."
    )
    assert export(artifact, tmp_path / "m.onnx", experts=["transformer"])[0].data[0][0].startswith("out.hif4/")
    assert export(artifact, tmp_path / "n.onnx", experts=["transformer_2"])[0].data[0][0] == "n.safetensors"


def test_weights_whose_name_an_onnx_file_cannot_hold(beside, refusal, tmp_path):
    artifact = beside().rename(tmp_path / "out*.hif4")
    weights = artifact / "transformer" / "weights.safetensors"
    assert refusal(artifact, weights="artifact") == (
        f"{weights}: is not a name that an .onnx file may refer to; rename the artifact's folder, or copy the weights "
        "with --weights copy."
    )
    assert export(artifact, tmp_path / "m.onnx", experts=["transformer"])[0].data[0][0] == "m.safetensors"
    open_onnx(tmp_path / "m.onnx")


def test_a_link_in_place_of_a_partial_file_is_not_followed(artifacts, tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".m.onnx.partial").symlink_to(tmp_path / "mine")
    export(artifacts("t2v", "rtn"), tmp_path / "m.onnx", experts=["transformer"])
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_disk_that_is_too_small(beside, refusal, monkeypatch, tmp_path):
    """Known before anything is read or written."""
    artifact = beside()
    usage = SimpleNamespace(total=10**9, used=10**9 - 1000, free=1000)
    monkeypatch.setattr("hif4c.compiler.disk_space.shutil.disk_usage", lambda path: usage)
    sentence = refusal(artifact, weights="copy")
    assert sentence.startswith(f"{tmp_path / 'model.onnx'}: exporting needs ")
    assert "and 1.0 kB are free" in sentence


@pytest.mark.parametrize("left", [0, 1, 2, 3])
def test_a_disk_that_fills_up(left, beside, refusal, monkeypatch, tmp_path):
    """While weights are copied (2 writes) or programs are written: what was finished before goes as well."""
    writes = [left]

    class FullDisk(io.FileIO):
        def write(self, data: Any) -> int:
            writes[0] -= 1
            if writes[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def opened(path: Path, mode: str, **options: Any) -> Any:
        return FullDisk(path, mode) if mode == "xb" else open(path, mode, **options)

    artifact = beside()
    monkeypatch.setattr(onnx_export, "open", opened, raising=False)
    target = ("model.transformer.safetensors", "model.transformer_2.safetensors", "model.transformer.onnx",
              "model.transformer_2.onnx")[left]  # fmt: skip
    assert refusal(artifact, weights="copy") == (
        f"{tmp_path / target}: writing failed (No space left on device); free some space or choose another output."
    )


def test_without_onnx(beside, refusal, monkeypatch):
    artifact = beside()
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert refusal(artifact) == "export to ONNX needs the package onnx; install it with `pip install 'hif4c[onnx]'`."
