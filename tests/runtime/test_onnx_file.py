import os
import sys

import pytest
from onnx import SparseTensorProto, helper

from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.onnx_file import open_onnx
from tests.support.small_onnx import CONFIG, MODEL, write_small_onnx


def place(key, value):
    """Change where the weight says that its data is."""

    def change(model):
        (weight,) = model.graph.initializer
        (entry,) = (item for item in weight.external_data if item.key == key)
        entry.value = value

    return change


def test_what_a_file_says_of_itself(tmp_path):
    path = write_small_onnx(tmp_path / "m.onnx", variant="bf16", bf16_timesteps=[[0, 299]], expert="transformer_2")
    opened = open_onnx(str(path))
    assert (opened.path, opened.expert, opened.variant) == (path, "transformer_2", "bf16")
    assert opened.config == CONFIG
    assert opened.bf16_timesteps == ((0.0, 299.0),)
    assert opened.expand_timesteps is False
    assert opened.model == MODEL
    assert opened.digest == opened.metadata["digest"] == "0" * 64


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"expert": "../transformer"}, "expert or variant is not known"),
        ({"variant": "fp8"}, "expert or variant is not known"),
        ({"expand_timesteps": 1}, "is of another type"),
        ({"digest": None}, "is of another type"),
        ({"bf16_timesteps": [[5, 3]]}, r"\[5, 3\] is not a range"),
        ({"bf16_timesteps": [["a", 3]]}, "is not a pair of numbers"),
        ({"model": "small"}, "TypeError"),
        ({"model": {**MODEL, "experts": ["vae"]}}, "experts of its model are not known"),
        ({"model": {**MODEL, "pipeline_class": "os.system"}}, "pipeline class or sampling settings"),
        ({"model": {**MODEL, "sampling": []}}, "pipeline class or sampling settings"),
        ({"config": []}, "config is not an object"),
        ({"config": {**CONFIG, "in_channels": "3"}}, "in_channels is of another type"),
        ({"config": {**CONFIG, "patch_size": [0, 2, 2]}}, "patch_size is not a size"),
        ({"config": {**CONFIG, "patch_size": [2]}}, "patch_size is not a size"),
        ({"config": {**CONFIG, "text_dim": True}}, "text_dim is of another type"),
        ({"config": {key: value for key, value in CONFIG.items() if key != "text_dim"}}, "KeyError: 'text_dim'"),
    ],
)
def test_metadata_that_are_not_those_of_an_export(tmp_path, metadata, words):
    with pytest.raises(Hif4Error, match=rf"m\.onnx: its metadata are not .*{words}.*; export it again\.$"):
        open_onnx(write_small_onnx(tmp_path / "m.onnx", **metadata))


def test_files_that_are_not_of_hif4c(tmp_path):
    path = tmp_path / "m.onnx"
    with pytest.raises(Hif4Error, match="cannot be read"):
        open_onnx(path)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(Hif4Error, match="is not an ONNX file, or is damaged"):
        open_onnx(path)
    write_small_onnx(path, change=lambda model: helper.set_model_props(model, {"other": "{}"}))
    with pytest.raises(Hif4Error, match="was not written by hif4c"):
        open_onnx(path)
    write_small_onnx(path, change=lambda model: helper.set_model_props(model, {"hif4c": "[" * 100_000}))
    with pytest.raises(Hif4Error, match="metadata are not those of hif4c"):
        open_onnx(path)
    write_small_onnx(path, change=lambda model: setattr(model.graph.input[0], "name", "x"))
    with pytest.raises(Hif4Error, match="does not have the inputs"):
        open_onnx(path)


def test_weights_that_are_not_there(tmp_path):
    path = write_small_onnx(tmp_path / "m.onnx")
    data = tmp_path / "m.bin"
    os.truncate(data, 75)
    with pytest.raises(Hif4Error, match=r"m\.bin: has 75 bytes, but m\.onnx reads 76; it is incomplete"):
        open_onnx(path)
    data.unlink()
    with pytest.raises(Hif4Error, match=r"m\.bin: is missing, and m\.onnx reads weights from it"):
        open_onnx(path)
    data.mkdir()
    with pytest.raises(Hif4Error, match="is not a plain file"):
        open_onnx(path)


@pytest.mark.parametrize("location", ["/etc/passwd", "../m.bin", "a/../../m.bin", "a\\m.bin", "", "m\n.bin", "*/m.bin"])
def test_weights_outside_the_folder(tmp_path, location):
    with pytest.raises(Hif4Error, match="is not a place in its own folder; do not use this file"):
        open_onnx(write_small_onnx(tmp_path / "m.onnx", change=place("location", location)))


def test_a_link_to_weights_outside_the_folder(tmp_path):
    (tmp_path / "inside").mkdir()
    path = write_small_onnx(tmp_path / "inside" / "m.onnx")
    (tmp_path / "inside" / "m.bin").rename(tmp_path / "m.bin")
    (tmp_path / "inside" / "m.bin").symlink_to(tmp_path / "m.bin")
    with pytest.raises(Hif4Error, match=r"is not a plain file in the folder of m\.onnx"):
        open_onnx(path)


@pytest.mark.parametrize(("key", "value"), [("offset", "-1"), ("length", "x"), ("length", ""), ("offset", "9" * 30)])
def test_a_place_that_is_none(tmp_path, key, value):
    with pytest.raises(Hif4Error, match="neither where it begins nor how long it is"):
        open_onnx(write_small_onnx(tmp_path / "m.onnx", change=place(key, value)))


def test_external_data_hidden_in_a_function_or_a_subgraph_is_looked_at(tmp_path):
    def hide(inside):
        def change(model):
            weight = model.graph.initializer[0]
            hidden = type(weight)()
            hidden.CopyFrom(weight)
            hidden.external_data[0].value = "other.bin"
            constant = helper.make_node("Constant", [], ["c"], value=hidden)
            if inside == "sparse attribute":
                sparse = SparseTensorProto(values=hidden, dims=[3])
                model.graph.node.append(helper.make_node("Constant", [], ["c"], sparse_value=sparse))
                return
            if inside == "function":
                model.functions.append(helper.make_function("hif4", "F", [], ["c"], [constant], model.opset_import))
            elif inside == "subgraph":
                graph = helper.make_graph([constant], "g", [], [])
                model.graph.node.append(helper.make_node("If", ["t"], ["y"], then_branch=graph, else_branch=graph))
            else:
                graph = helper.make_graph([], "g", [], [], [hidden])
                model.graph.node.append(helper.make_node("If", ["t"], ["y"], then_branch=graph, else_branch=graph))

        return change

    for inside in ("function", "subgraph", "initializers of a subgraph", "sparse attribute"):
        with pytest.raises(Hif4Error, match=r"other\.bin: is missing"):
            open_onnx(write_small_onnx(tmp_path / "m.onnx", change=hide(inside)))


def test_without_the_package_onnx(tmp_path, monkeypatch):
    path = write_small_onnx(tmp_path / "m.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(Hif4Error, match=r"needs the package onnx; install it with `pip install 'hif4c\[onnx\]'`"):
        open_onnx(path)
