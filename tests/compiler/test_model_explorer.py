"""Graphs for Model Explorer: valid by its schema, and the same programs and figures as the artifact's."""

import errno
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from safetensors.torch import load_file, save_file

from hif4c.compiler import model_explorer
from hif4c.compiler.model_explorer import write_model_explorer
from hif4c.compiler.model_explorer_graph import METRICS, describe_programs
from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.graph import Ref, refs
from tests.support.forging import forge

SCHEMA = json.loads((Path(__file__).parents[1] / "data" / "model_explorer.schema.json").read_text())


@pytest.fixture(scope="module")
def artifact(mixed):
    return open_artifact(mixed)


@pytest.fixture(scope="module")
def programs(artifact):
    """(graph, node data, the artifact's own program) by name."""
    own = {"transformer": artifact.graph("transformer"), "transformer.bf16": artifact.graph("transformer", "bf16")}
    found = {item.graph["id"]: item for item in describe_programs(artifact)}
    assert found.keys() == own.keys()
    return {name: (item.graph, item.data, own[name]) for name, item in found.items()}


@pytest.fixture(scope="module", params=["transformer", "transformer.bf16"])
def program(request, programs):
    return programs[request.param]


def errors_of(name, value):
    schema = {"$ref": f"#/$defs/{name}", "$defs": SCHEMA["$defs"]}
    return [error.message for error in Draft202012Validator(schema).iter_errors(value)]


def attributes(node):
    return {item["key"]: item["value"] for item in node["attrs"]}


def test_the_files_fit_the_schema(artifact, tmp_path):
    written = write_model_explorer(artifact, tmp_path / "new" / "out.json")
    names = ["out.json", "out.bytes.json", "out.sqnr.json", "out.precision.json"]
    assert {path.name for path in (tmp_path / "new").iterdir()} == set(names)
    assert written.command == (
        "model-explorer",
        str(tmp_path / "new" / "out.json"),
        "--node_data_paths=" + ",".join(str(tmp_path / "new" / name) for name in names[1:]),
    )
    assert written.missing == ()
    collection = json.loads(written.graphs.read_text())
    assert errors_of("GraphCollection", collection) == []
    graphs = {graph["id"]: {node["id"] for node in graph["nodes"]} for graph in collection["graphs"]}
    assert list(written.node_data) == list(METRICS)
    for path in written.node_data.values():
        for graph, data in json.loads(path.read_text()).items():
            assert errors_of("GraphNodeData", data) == []
            assert data["results"].keys() <= graphs[graph]
    # The schema is one that refuses: fields that nobody reads, and values of another type.
    node = collection["graphs"][0]["nodes"][0]
    assert errors_of("GraphNode", {**node, "nameSpace": ""})
    assert errors_of("GraphNode", {**node, "attrs": [{"key": "k", "value": 3}]})


def test_the_same_artifact_gives_the_same_bytes_and_replaces_files(artifact, tmp_path):
    output = tmp_path / "out.json"
    first = write_model_explorer(artifact, output)
    files = (first.graphs, *first.node_data.values())
    before = [path.read_bytes() for path in files]
    output.write_text("something else")
    write_model_explorer(artifact, output)
    assert [path.read_bytes() for path in files] == before
    assert len(list(tmp_path.iterdir())) == len(files)


def test_nodes_and_edges_are_those_of_the_program(program):
    graph, _, own = program
    first = own.first_node
    values = list(range(len(own.inputs))) + [
        first + number for number, node in enumerate(own.nodes) if node.target != "getitem"
    ]
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert list(nodes) == [*(f"%{value}" for value in values), "output"]
    assert len(nodes) == len(graph["nodes"])

    def source(ref):
        node = own.nodes[ref.index - first] if ref.index >= first else None
        if node is not None and node.target == "getitem":
            return f"%{node.args[0].index}", str(node.args[1])
        return f"%{ref.index}", "0"

    def edges(node):
        return [(edge["sourceNodeId"], edge["sourceNodeOutputId"]) for edge in node["incomingEdges"]]

    tensors = range(len(own.inputs), first)
    for number, node in enumerate(own.nodes, first):
        if node.target != "getitem":
            read = [source(ref) for ref in refs(list(node.args)) if ref.index not in tensors]
            assert edges(nodes[f"%{number}"]) == read, node
            assert [edge["targetNodeInputId"] for edge in nodes[f"%{number}"]["incomingEdges"]] == [
                str(position) for position in range(len(read))
            ]
    assert edges(nodes["output"]) == [source(ref) for ref in own.outputs]
    # Every edge starts at an output that is told of.
    for node in graph["nodes"]:
        for place, output in edges(node):
            assert output in [item["id"] for item in nodes[place]["outputsMetadata"]], node


def test_linears_are_where_their_modules_are_and_told_of(program, artifact):
    graph, _, own = program
    linears = {linear["path"]: linear for linear in artifact.expert("transformer").linears}
    found = {}
    for node in graph["nodes"]:
        told = attributes(node) if "attrs" in node else {}
        if "reason" in told:
            found[told["module"]] = (node, told)
    assert found.keys() == linears.keys()
    for path, (node, told) in found.items():
        assert node["namespace"] == path.replace(".", "/")
        assert told["features"] == f"{linears[path]['in_features']} to {linears[path]['out_features']}"
        assert told["reason"] == linears[path]["reason"]
        assert told.get("mask", "").endswith(linears[path]["mask"] or "")
        calls = own.nodes[int(node["id"][1:]) - own.first_node]
        assert told["operator"] == calls.target
        (output,) = node["outputsMetadata"]
        kind = calls.type
        assert {item["key"]: item["value"] for item in output["attrs"]} == {
            "dtype": kind.dtype,
            "shape": f"[{', '.join(map(str, kind.shape))}]",
        }
    # Alone in its module, a linear has the module's name, since its group is not drawn.
    kept = found["blocks.1.attn1.to_k"][0]
    assert kept["label"] == "to_k: aten.linear"


def test_stored_tensors_are_told_once_in_bytes_and_by_every_reader(program, artifact):
    graph, data, own = program
    stored = load_file(artifact.root / "transformer" / "weights.safetensors")
    sizes = {name: tensor.nbytes for name, tensor in stored.items()}
    first = own.first_node
    names = {len(own.inputs) + number: item.name for number, item in enumerate(own.tensors)}
    nodes = {node["id"]: node for node in graph["nodes"]}
    readers = Counter()
    for number, node in enumerate(own.nodes, first):
        read = [arg.index for arg in node.args if isinstance(arg, Ref) and arg.index in names]
        told = [value for value in attributes(nodes[f"%{number}"]).values() if " bytes, " in value] if read else []
        assert [re.fullmatch(r"\w+\[[\d, ]*\], ([\d,]+) bytes, (.+)", text).groups() for text in told] == [
            (f"{sizes[names[index]]:,}", names[index]) for index in read
        ]
        readers.update(names[index] for index in read)
    assert readers.keys() == sizes.keys()
    # With bf16 activations every reader of a masked input applies the mask: in the sum it counts once.
    assert (max(readers.values()) > 1) == (graph["id"] == "transformer.bf16")
    assert sum(data["bytes"].values()) == sum(sizes.values())


def test_node_data_are_the_manifests_figures(programs, artifact):
    linears = {linear["path"]: linear for linear in artifact.expert("transformer").linears}
    for name, (graph, data, _) in programs.items():
        modules = {node["id"]: attributes(node)["module"] for node in graph["nodes"] if node["id"] in data["precision"]}
        found = {modules[place]: value for place, value in data["precision"].items()}
        planned = {path: item["precision"] for path, item in linears.items()}
        relaxed = {path: "high" if precision == "high" else "w4a16" for path, precision in planned.items()}
        expected = planned if name == "transformer" else relaxed
        assert found == expected
        # Measured for the main program, so the other one has it where a linear is computed in the same way.
        sqnr = {modules[place]: value for place, value in data["sqnr"].items()}
        measured = {path: item["sqnr"] for path, item in linears.items() if item.get("sqnr") is not None}
        assert len(measured) == 19
        same = {path: value for path, value in measured.items() if expected[path] == planned[path]}
        assert 0 < len(same) <= 19
        assert sqnr == pytest.approx(same, abs=0.005)  # two decimals


def test_groups_are_told_what_is_in_them(programs, artifact):
    graph, data, _ = programs["transformer"]
    groups = graph["groupNodeAttributes"]
    stored = load_file(artifact.root / "transformer" / "weights.safetensors")
    assert groups[""]["model"] == artifact.manifest["model"]["source"]
    counts = Counter(linear["precision"] for linear in artifact.expert("transformer").linears)
    assert counts.keys() == {"high", "w4a16", "w4a4"}
    assert groups[""]["precision"] == ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    assert groups["blocks/1/attn1"]["precision"] == "1 high, 3 w4a4"
    values = [
        value
        for node in graph["nodes"]
        if node["namespace"].startswith("blocks/0/") and (value := data["sqnr"].get(node["id"])) is not None
    ]
    assert groups["blocks/0"]["SQNR, dB"].endswith(f"lowest {min(values):.1f}")
    # The mask is read before, where the input is quantized.
    inside = sum(
        tensor.nbytes
        for name, tensor in stored.items()
        if name.startswith("blocks.0.ffn.net.2.") and not name.endswith(".mask")
    )
    assert groups["blocks/0/ffn/net/2"]["stored"] in (f"{inside / 1e3:.1f} kB", f"{inside / 1e3:.0f} kB")


def test_without_a_calibration_there_is_no_sqnr(artifacts, tmp_path):
    written = write_model_explorer(open_artifact(artifacts("t2v", "rtn")), tmp_path / "out.json")
    assert written.missing == ("sqnr",)
    assert set(written.node_data) == {"bytes", "precision"}
    assert not (tmp_path / "out.sqnr.json").exists()


def test_where_it_cannot_be_written(artifact, tmp_path, monkeypatch):
    with pytest.raises(Hif4Error, match=r"ends in \.json"):
        write_model_explorer(artifact, tmp_path / "out.html")
    with pytest.raises(Hif4Error, match="inside the artifact"):
        write_model_explorer(artifact, artifact.root / "out.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(Hif4Error, match=r"out\.json: cannot be written \(File exists\)"):
        write_model_explorer(artifact, tmp_path / "file" / "out.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(Hif4Error, match=r"folder\.json: cannot be written"):
        write_model_explorer(artifact, tmp_path / "folder.json")
    write = model_explorer.write_durably

    def until_full(path, data):
        if "sqnr" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(model_explorer, "write_durably", until_full)
    (tmp_path / "full").mkdir()
    with pytest.raises(Hif4Error, match=r"out\.sqnr\.json: cannot be written \(No space left on device\)"):
        write_model_explorer(artifact, tmp_path / "full" / "out.json")
    assert list((tmp_path / "full").iterdir()) == []


def test_a_tensor_that_is_missing_is_one_sentence(artifact, tmp_path):
    path = shutil.copytree(artifact.root, tmp_path / "copy")
    weights = path / "transformer" / "weights.safetensors"
    tensors = load_file(weights)
    del tensors["proj_out.bias"]
    save_file(tensors, weights)
    forge(path, **{"transformer/weights.safetensors": weights.read_bytes()})
    with pytest.raises(Hif4Error, match=r"no file holds 'proj_out\.bias'"):
        write_model_explorer(open_artifact(path), tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
