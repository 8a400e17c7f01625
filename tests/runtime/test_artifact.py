"""Artifacts as untrusted input: whatever is done to one, opening, verifying or loading it raises Hif4Error."""

import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from hif4c.runtime.artifact import manifest_digest, open_artifact, sha256_file
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.kernel_files import cpu_target
from hif4c.runtime.transformer import load
from hif4c.runtime.verify import verify_artifact
from tests.support.forging import forge

FILES = [
    "golden/transformer.safetensors", "golden/transformer_2.safetensors",
    f"kernels/{cpu_target()}/hif4_cpu.so", f"kernels/{cpu_target()}/kernels.json",
    "manifest.json", "report.html", "report.json",
    "transformer/graph.json", "transformer/weights.safetensors",
    "transformer_2/graph.json", "transformer_2/weights.safetensors",
]  # fmt: skip
FLIPS_A_FILE = 12


@pytest.fixture
def rtn(artifacts):
    return artifacts("t2v", "rtn")


@pytest.fixture
def artifact(rtn, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(rtn, tmp_path / "artifact")


def refusal(path, expert="transformer"):
    """Open, load and verify must all agree that something is wrong; returns what the last of them said."""
    with pytest.raises(Hif4Error):
        verify_artifact(path)
    with pytest.raises(Hif4Error) as caught:
        load(path, expert)
    return str(caught.value)


def test_an_artifact_holds_these_files_and_no_others(artifact):
    found = sorted(path.relative_to(artifact).as_posix() for path in artifact.rglob("*") if path.is_file())
    assert found == FILES
    opened = open_artifact(artifact)
    assert sorted([*opened.files, "manifest.json"]) == FILES
    opened.verify()
    assert list(opened.experts) == ["transformer", "transformer_2"]
    for relative, (size, digest) in opened.files.items():
        assert (artifact / relative).stat().st_size == size
        assert sha256_file(artifact / relative) == digest
    assert opened.manifest["digest"] == manifest_digest(opened.manifest)


def test_what_it_says_of_itself(artifact):
    opened = open_artifact(artifact)
    expected = {
        "source": "t2v",
        "pipeline_class": "WanPipeline",
        "boundary_ratio": 0.875,
        "expand_timesteps": False,
        "experts": ["transformer", "transformer_2"],
    }
    assert opened.manifest["model"].items() >= expected.items()
    text = (artifact / "manifest.json").read_text()
    assert str(artifact.parent) not in text
    assert "/tmp" not in text
    for name, info in opened.experts.items():
        assert (info.name, info.dtype, info.recipe["name"]) == (name, torch.bfloat16, "rtn")
        assert len(info.linears) == 26
        assert all(linear["reason"] for linear in info.linears)
    assert opened.experts["transformer"].fingerprint != opened.experts["transformer_2"].fingerprint


def test_forging_without_a_change_is_accepted(artifact):
    """So that the refusals below are of what was changed."""
    graph = (artifact / "transformer/graph.json").read_bytes()
    forge(artifact, **{"transformer/graph.json": graph})
    load(artifact)
    assert all(check.passed for check in verify_artifact(artifact))


@pytest.mark.parametrize("relative", FILES)
def test_a_flipped_byte_anywhere_is_noticed(artifact, relative):
    """By the hashes of the manifest, and for the manifest by its own digest. Positions are sampled, ends included."""
    path = artifact / relative
    data = path.read_bytes()
    choose = random.Random(relative)
    for position in [0, len(data) - 1, *(choose.randrange(len(data)) for _ in range(FLIPS_A_FILE))]:
        damaged = bytearray(data)
        damaged[position] ^= 1 << choose.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(Hif4Error, match=r"artifact"):
            open_artifact(artifact).verify()
        if relative.startswith("transformer/"):
            with pytest.raises(Hif4Error):
                load(artifact)
    path.write_bytes(data)
    open_artifact(artifact).verify()


@pytest.mark.parametrize("relative", FILES)
def test_a_truncated_or_longer_or_missing_file_is_noticed(artifact, relative):
    path = artifact / relative
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], data[:-1], b"", data + b"\n"):
        path.write_bytes(damaged)
        with pytest.raises(Hif4Error) as caught:
            open_artifact(artifact)
        assert path.name in str(caught.value)
    path.unlink()
    assert path.name in refusal(artifact)


def test_files_that_are_not_listed(artifact):
    extra = artifact / "transformer" / "extra.py"
    extra.write_text("import os\n")
    assert f"{extra}: is not listed in the manifest" in refusal(artifact)
    extra.unlink()
    extra.symlink_to(artifact.parent, target_is_directory=True)
    assert f"{extra}: is not listed in the manifest" in refusal(artifact)
    extra.unlink()
    outside = artifact / "note.txt"
    outside.write_text("")
    with pytest.raises(Hif4Error, match=r"note.txt: is not listed"):
        verify_artifact(artifact)


def test_a_link_instead_of_a_file(artifact, tmp_path):
    for relative in ("transformer/graph.json", "transformer/weights.safetensors"):
        path = artifact / relative
        moved = tmp_path / path.name
        shutil.move(path, moved)
        path.symlink_to(moved)  # of the very same content
        assert f"{path}: is not a plain file inside the artifact" in refusal(artifact)
        path.unlink()
        shutil.move(moved, path)
    path = artifact / "transformer/graph.json"
    path.unlink()
    path.symlink_to("../transformer_2/graph.json")  # inside, and of the same content: still no plain file
    assert path.read_bytes() == (artifact / "transformer_2/graph.json").read_bytes()
    assert f"{path}: is not a plain file inside the artifact" in refusal(artifact)
    folder, elsewhere = artifact / "transformer", tmp_path / "elsewhere"
    shutil.move(folder, elsewhere)
    folder.symlink_to(elsewhere, target_is_directory=True)
    assert "is not a plain file inside the artifact" in refusal(artifact)


def test_a_directory_or_a_pipe_instead_of_a_file(artifact):
    path = artifact / "report.json"
    path.unlink()
    path.mkdir()
    assert "is not a plain file" in refusal(artifact)
    path.rmdir()
    os.mkfifo(path)  # reading it would wait for ever
    assert "is not a plain file" in refusal(artifact)


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        "../x.json",
        "transformer/../../x.json",
        "a\\..\\x",
        "a/./../x",
        "",
        "x\0y",
        "x\ud800",
        "a\nb",
        "a\n.json",
    ],
)
def test_paths_that_leave_the_artifact(artifact, name):
    (artifact.parent / "x").write_bytes(b"")
    entry = {"bytes": 0, "sha256": sha256_file(artifact.parent / "x")}
    forge(artifact, lambda manifest: manifest["files"].update({name: entry}))
    message = refusal(artifact)
    assert "manifest.json" in message
    assert "is not a path inside the artifact" in message


@pytest.mark.parametrize(
    "name", ["run.py", "pipeline/vae/model.bin", "model.pkl", "model.pt", "x.so", "json", "a.json.py", "x.JSON", "x "]
)
def test_files_that_are_no_data(artifact, name):
    """Pickles and code are refused by name, whatever they hold and though they are listed."""
    forge(artifact, **{name: b""})
    message = refusal(artifact)
    assert "manifest.json" in message
    assert f"{name!r} is not a data file" in message


@pytest.mark.parametrize(
    "name",
    [
        "kernels/x.so", "kernels/cpu-x86-64-linux/x.cubin", "kernels/cuda-sm80/x.so", "kernels/cuda-sm80/deep/x.cubin",
        "kernels/rocm-gfx942/x.hsaco", "kernels/hip-gfx942/.hsaco", "kernels/cuda-sm80/x.py", "kernels/other.json",
        "kernels/cuda-sm80/other.json", "transformer/kernels/cuda-sm80/x.cubin",
    ],
)  # fmt: skip
def test_kernels_have_one_place(artifact, name):
    forge(artifact, **{name: b"x"})
    assert f"{name!r} is not a data file" in refusal(artifact)


def test_kernels_in_their_place_are_accepted(artifact):
    names = ["cpu-x86-64-linux/a.so", "cuda-sm80/a.b-1.cubin", "hip-gfx942/a_b.hsaco", "cuda-sm80/kernels.json"]
    forge(artifact, **{f"kernels/{name}": b"x" for name in names})
    assert {f"kernels/{name}" for name in names} <= open_artifact(artifact).files.keys()


def test_older_formats_are_read(artifact):
    for version in (1, 2):
        forge(artifact, lambda manifest, version=version: manifest.update(format_version=version))
        assert open_artifact(artifact).manifest["format_version"] == version


def test_a_newer_format(artifact):
    forge(artifact, lambda manifest: manifest.update(format_version=4))
    assert "format version 4 and this hif4c reads up to 3; upgrade hif4c" in refusal(artifact)


@pytest.mark.parametrize("version", ["1", 1.5, True, None, 0, -1])
def test_a_format_version_that_is_no_number(artifact, version):
    forge(artifact, lambda manifest: manifest.update(format_version=version))
    assert f"format version {version!r}" in refusal(artifact)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("files"),
        lambda manifest: manifest.update(files=[]),
        lambda manifest: manifest["files"].update(x=1),
        lambda manifest: manifest["files"].update(x={"bytes": "many", "sha256": ""}),
        lambda manifest: manifest.pop("model"),
        lambda manifest: manifest.update(model=[]),
        lambda manifest: manifest.pop("experts"),
        lambda manifest: manifest.update(experts=["transformer"]),
        lambda manifest: manifest.update(experts={}),
        lambda manifest: manifest["experts"]["transformer"].update(dtype="float8"),
        lambda manifest: manifest["experts"]["transformer"].update(linears=[1]),
        lambda manifest: manifest["experts"]["transformer"].update(config=3),
        lambda manifest: manifest["experts"]["transformer"]["config"].pop("in_channels"),
        lambda manifest: manifest.update(format="another"),
        lambda manifest: manifest["model"].pop("pipeline_class"),
        lambda manifest: manifest["model"].update(pipeline_class="DiffusionPipeline"),
        lambda manifest: manifest["model"].update(pipeline_class=["WanPipeline"]),
        lambda manifest: manifest["model"].update(expand_timesteps=0),
        lambda manifest: manifest["model"].update(experts=["transformer"]),
        lambda manifest: manifest["model"].pop("sampling"),
    ],
)
def test_manifests_of_another_structure(artifact, change):
    forge(artifact, change)
    assert str(artifact) in refusal(artifact)


def linear(**values):
    return lambda manifest: manifest["experts"]["transformer_2"]["linears"][7].update(values)


def expert(**values):
    return lambda manifest: manifest["experts"]["transformer_2"].update(values)


def lora(**values):
    return expert(loras=[{"file": "a", "sha256": "0", "scale": 1, "tensors": 2} | values])


def without(*path):
    def change(manifest):
        *places, key = path
        for place in places:
            manifest = manifest[place]
        del manifest[key]

    return change


LINEAR = ("experts", "transformer_2", "linears", 7)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        *((without(*LINEAR, name), f"has no {name}") for name in (
            "path", "precision", "reason", "in_features", "out_features", "mask", "hadamard")),
        (linear(path="blocks.0.attn1.to_q"), "two linears have the same path"),
        (linear(path=["a"]), "path of the linear"),
        (linear(precision="w2"), 'precision of the linear "blocks.0.attn1.to_v" cannot be "w2"'),
        (linear(reason=None), "reason of the linear"),
        (linear(in_features="128"), 'in_features of the linear "blocks.0.attn1.to_v" cannot be "128"'),
        (linear(out_features=-1), "out_features of the linear"),
        (linear(hadamard=True), "hadamard of the linear"),
        (linear(mask={}), "mask of the linear"),
        (linear(shift=[]), "shift of the linear"),
        (linear(mask_folded=0), "mask_folded of the linear"),
        (linear(rank=None), "rank of the linear"),
        (linear(rounding=1), "rounding of the linear"),
        (linear(alpha="x"), "alpha of the linear"),
        (linear(sqnr=10**400), "sqnr of the linear"),
        (linear(errors=3), "errors of the linear"),
        (linear(errors={"w4a4": []}), "errors of the linear"),
        (linear(outlier_columns=0.5), "outlier_columns of the linear"),
        (expert(linears={"a": 1}), "linears is not a list of objects"),
        (without("experts", "transformer_2", "recipe", "name"), "its recipe has no name"),
        (expert(recipe=[["name", "rtn"]]), "recipe of an expert"),
        (expert(calibration=[]), "calibration of an expert"),
        (expert(calibration={"sha256": "0"}), "its calibration has no runs"),
        (expert(calibration={"sha256": 0, "runs": []}), "sha256 of its calibration"),
        (expert(calibration={"sha256": "0", "runs": [{"prompts": 3}]}), "prompts of a run of its calibration"),
        (expert(step_errors=[[]]), "step_errors of an expert"),
        (expert(loras=3), "loras of an expert"),
        (expert(loras=[{}]), "one of its LoRAs has no file"),
        (lora(scale="x"), "scale of one of its LoRAs"),
        (lora(tensors=None), "tensors of one of its LoRAs"),
        (lambda manifest: manifest.update(targets="portable"), "targets of the manifest"),
        (lambda manifest: manifest.update(versions=[]), "versions of the manifest"),
        (lambda manifest: manifest["model"].update(source=None), "source of its model"),
        (lambda manifest: manifest["model"].update(boundary_ratio="x"), "boundary_ratio of its model"),
    ],
)  # fmt: skip
def test_what_is_told_to_people_is_checked_where_it_is_opened(rtn, tmp_path, change, told):
    """The summary, the report and the comparisons read it without looking."""
    (tmp_path / "manifest.json").write_bytes((rtn / "manifest.json").read_bytes())
    forge(tmp_path, change)
    with pytest.raises(Hif4Error) as caught:
        open_artifact(tmp_path)
    assert told in str(caught.value)
    assert len(str(caught.value)) < 400


def test_what_older_versions_did_not_have(artifact):
    """Version 1 said less of a linear, and nothing of targets."""
    first = {"path", "precision", "reason", "mask", "hadamard", "in_features", "out_features"}

    def change(manifest):
        manifest["format_version"] = 1
        for name in ("targets", "versions"):
            manifest.pop(name, None)
        for entry in manifest["experts"].values():
            for linear in entry["linears"]:
                for name in linear.keys() - first:
                    del linear[name]

    forge(artifact, change)
    opened = open_artifact(artifact)
    assert all(linear.keys() == first for linear in opened.experts["transformer"].linears)
    load(artifact)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"1", b"\xff", b"[" * 100_000, b'{"format":"hif4c-artifact","format_version":1}',
        b'{"format":"hif4c-artifact","format_version":1,"digest":NaN}',
        b'{"format":"hif4c-artifact","format_version":1,"x":1e999}',
        b'{"format":"hif4c-artifact","format_version":1,"x":' + b"[" * 900 + b"]" * 900 + b"}",
    ],
)  # fmt: skip
def test_manifests_that_are_none(artifact, data):
    (artifact / "manifest.json").write_bytes(data)
    assert "manifest.json" in refusal(artifact)


def test_a_manifest_in_another_spelling(artifact):
    """The same content with other white space: there is one spelling, so that equal artifacts have equal bytes."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    assert "does not match its own digest" in refusal(artifact)


def test_directories_that_are_no_artifact(tmp_path):
    assert "there is no such directory" in refusal(tmp_path / "absent")
    assert "holds no manifest.json" in refusal(tmp_path)
    (tmp_path / "file").write_text("")
    assert "there is no such directory" in refusal(tmp_path / "file")


def edit_graph(artifact, change):
    values = json.loads((artifact / "transformer/graph.json").read_text())
    change(values)
    forge(artifact, **{"transformer/graph.json": json.dumps(values).encode()})


def set_at(*path):
    *places, key, value = path

    def change(values):
        place = values
        for item in places:
            place = place[item]
        place[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_at("targets", 0, "aten.set_.source_Tensor"), "calls 'aten.set_.source_Tensor', which is not an operator"),
        (set_at("targets", 0, "builtins.eval"), "calls 'builtins.eval'"),
        (set_at("nodes", 0, 1, 0, "%100000"), "is not in [0,"),
        (set_at("types", 0, 0, "complex64"), "unknown dtype 'complex64'"),
        (set_at("nodes", 0, 1, 0, [[[[[[1]]]]]]), "nested too deeply"),
        (set_at("schema", 99), "schema 99"),
        (lambda values: values["inputs"].pop(), "is not in [0,"),
        (set_at("inputs", 0, 0, "pixels"), "does not have the inputs and output of a transformer"),
        (set_at("outputs", [0, 1]), "does not have the inputs and output of a transformer"),
        (set_at("tensors", 0, 0, "another.weight"), "program and weights disagree about"),
        (set_at("tensors", 0, 0, "../../x"), "program and weights disagree about"),
        (set_at("tensors", 0, 1, 0), "but the program reads"),
    ],
)
def test_forged_programs(artifact, change, words):
    edit_graph(artifact, change)
    assert words in refusal(artifact)


def test_forged_programs_that_are_not_json(artifact):
    for data in (b"", b"\x80\x04K\x01.", b"[" * 200_000, b"null"):
        forge(artifact, **{"transformer/graph.json": data})
        assert "transformer/graph.json" in refusal(artifact)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("proj_out.bias"), "disagree about proj_out.bias"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "disagree about extra"),
        (
            lambda tensors: tensors.update({"proj_out.bias": torch.zeros(7).bfloat16()}),
            "proj_out.bias is torch.bfloat16 [7]",
        ),
        (lambda tensors: tensors.update({"proj_out.bias": torch.zeros(64)}), "proj_out.bias is torch.float32 [64]"),
        (
            lambda tensors: tensors.update(
                {"blocks.0.attn1.to_q.weight.codes": tensors["blocks.0.attn1.to_q.weight.codes"].view(torch.int8)}
            ),
            "blocks.0.attn1.to_q.weight.codes is torch.int8",
        ),
    ],
    ids=["missing", "extra", "shape", "wider", "dtype"],
)
def test_tensors_that_do_not_match_the_program(artifact, change, words, tmp_path):
    path = artifact / "transformer/weights.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, tmp_path / "forged")
    forge(artifact, **{"transformer/weights.safetensors": (tmp_path / "forged").read_bytes()})
    assert words in refusal(artifact)


def test_a_tensor_with_the_name_of_a_method_takes_nothing_over(artifact, tmp_path):
    path = artifact / "transformer/weights.safetensors"
    tensors = load_file(path)
    tensors["forward"] = tensors.pop("proj_out.bias")
    save_file(tensors, tmp_path / "forged")

    def rename(values):
        (entry,) = (item for item in values["tensors"] if item[0] == "proj_out.bias")
        entry[0] = "forward"

    edit_graph(artifact, rename)
    forge(artifact, **{"transformer/weights.safetensors": (tmp_path / "forged").read_bytes()})
    model = load(artifact)
    assert callable(model.forward)
    video, text = torch.zeros(1, 16, 1, 2, 2), torch.zeros(1, 1, 64)
    assert model(video, torch.tensor([1]), text).sample.shape == (1, 16, 1, 2, 2)


def test_swapped_weights_are_noticed_without_hashes_by_the_golden_output(artifact):
    """Both experts' files have the same size. With forged hashes only what is computed can tell."""
    other = (artifact / "transformer_2/weights.safetensors").read_bytes()
    forge(artifact, **{"transformer/weights.safetensors": other})
    first, second = verify_artifact(artifact)
    assert not first.passed
    assert first.replay.distance > 0.1
    assert second.passed


def test_an_expert_that_is_not_there(artifact):
    with pytest.raises(Hif4Error, match=r"holds no expert 'transformer_3'; it holds transformer, transformer_2"):
        load(artifact, "transformer_3")


def test_loading_unpickles_nothing(artifacts, monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    first, second = load(artifacts("t2v", "rtn")), load(artifacts("t2v", "rtn"))
    assert all(check.passed for check in verify_artifact(artifacts("t2v", "rtn")))
    for one, other in zip(first.buffers(), second.buffers(), strict=True):
        assert torch.equal(one, other)


def test_the_runtime_stands_alone(artifacts):
    """Loading and running in a fresh process imports neither the compiler nor diffusers, and writes nothing."""
    code = (
        "import sys, torch; from hif4c.runtime.transformer import load;"
        "from hif4c.runtime.verify import verify_artifact;"
        "model = load(sys.argv[1]);"
        "model(torch.zeros(1, 16, 1, 2, 2), torch.tensor([3]), torch.zeros(1, 2, 64));"
        "assert all(check.passed for check in verify_artifact(sys.argv[1]));"
        "bad = [name for name in sys.modules if name.split('.')[0] in ('diffusers', 'transformers', 'accelerate')"
        " or name.startswith(('hif4c.compiler', 'hif4c.passes', 'hif4c.tools'))];"
        "assert not bad, bad"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, artifacts("t2v", "rtn")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
