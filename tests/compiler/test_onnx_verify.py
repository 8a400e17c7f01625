"""What `verify_onnx` finds in sound exports, and that it finds what is wrong in others."""

import dataclasses
import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from hif4c.compiler.onnx_export import export_onnx
from hif4c.compiler.onnx_parts import find_linears
from hif4c.compiler.onnx_verify import PROGRAM_ERROR, linear_tolerance, verify_onnx
from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.golden import FLIP_MARGIN


@pytest.fixture(scope="module")
def with_branches(models, quick_compile, tmp_path_factory):
    """W4A4 with rotation and a side branch at every 4-bit linear."""
    folder = tmp_path_factory.mktemp("branches")
    recipe = folder / "branches.toml"
    recipe.write_text('description = "Side branches."\nhadamard = 32\nrank = 8\n')
    return quick_compile(models["t2v"].directory, folder / "out", str(recipe))


@pytest.fixture(scope="module")
def exported(artifacts, with_branches, tmp_path_factory):
    """kind, options -> artifact and the paths of its main programs; shared, copy a file before changing it."""
    made = {}

    def get(kind, **options):
        key = (kind, *options.items())
        if key not in made:
            path = with_branches if kind == "branches" else artifacts(*kind.split("/"))
            artifact = open_artifact(path)
            output = tmp_path_factory.mktemp("onnx") / "model.onnx"
            made[key] = artifact, [item.path for item in export_onnx(artifact, output, **options)]
        return made[key]

    return get


@pytest.mark.parametrize("kind", ["t2v/rtn", "ti2v/rtn", "t2v/weight-only", "branches", "branches/qdq"])
def test_a_sound_export(kind, exported):
    name, qdq = (kind.removesuffix("/qdq"), True) if kind.endswith("/qdq") else (kind, False)
    artifact, paths = exported(name, qdq=qdq)
    events = []
    checks = verify_onnx(artifact, paths, on_event=lambda *event: events.append(event))
    assert events == [("verifying", path) for path in paths]
    assert [check.path for check in checks] == paths
    for check in checks:
        assert check.passed, check
        graph = artifact.graph(check.expert, check.variant)
        assert check.linears == sum(node.target in ("hif4.linear", "hif4.linear_w4") for node in graph.nodes) > 0
        assert check.codes_differ == 0
        assert check.linear_error <= 1
        assert 0 < check.recorded < 0.5  # float32 is not the bf16 that was recorded
        assert (check.activations == 0) == (check.variant == "bf16" or "weight-only" in kind)
        assert 0 < check.program_error <= PROGRAM_ERROR
        assert check.flips or 0 < check.distance < PROGRAM_ERROR


@pytest.fixture
def changed(exported, tmp_path):
    """Copy an export, change the copy, and verify the main program of the first expert."""

    def run(kind, change_model=None, change_data=None):
        artifact, paths = exported(kind)
        path = shutil.copy(paths[0], tmp_path)
        model = onnx.load(path, load_external_data=False)
        metadata = json.loads(model.metadata_props[0].value)
        for item in metadata["data"]:
            data = shutil.copy(paths[0].parent / item["location"], tmp_path)
        if change_model is not None:
            change_model(artifact, model)
            onnx.save(model, path)
        if change_data is not None:
            change_data(artifact, model, data)
        (check,) = verify_onnx(artifact, [tmp_path / paths[0].name])
        return check

    return run


def linears_of(artifact, model):
    return find_linears(model, artifact.graph("transformer"))


def test_one_wrong_nibble_of_one_weight_is_found_and_named(changed):
    def flip(artifact, model, data):
        name = f"{linears_of(artifact, model)[5].node.module}.weight.codes"
        (tensor,) = (item for item in model.graph.initializer if item.name == name)
        offset = int({item.key: item.value for item in tensor.external_data}["offset"])
        with open(data, "r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 0x7]))

    check = changed("t2v/rtn", change_data=flip)
    assert not check.passed
    assert check.linear_error > 10
    assert check.codes_differ == 0
    assert "attn" in check.worst or "ffn" in check.worst


def test_one_threshold_of_the_quantizer_that_is_off_shows_in_the_codes(changed):
    def move(artifact, model):
        (table,) = (item for item in model.graph.initializer if item.name == "hif4.thresholds")
        table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table) * np.float32(1.1), table.name))

    check = changed("t2v/rtn", move)
    assert not check.passed
    assert check.codes_differ > 0


@pytest.mark.parametrize("kind", ["t2v/rtn", "t2v/weight-only"])
def test_an_operator_that_is_left_out_shows_in_the_whole_and_not_in_the_linears(kind, changed):
    def leave_out(artifact, model):
        """The activation of the first feed-forward layer."""
        gelu = next(node for node in model.graph.node if node.op_type == "Gelu" and "ffn" in node.name)
        gelu.op_type = "Identity"
        del gelu.attribute[:]

    check = changed(kind, leave_out)
    assert not check.passed
    assert check.codes_differ == 0
    assert check.linear_error <= 1
    assert check.program_error > 100 * PROGRAM_ERROR
    assert (check.flips > 0) == (kind == "t2v/rtn")


def test_flips_are_counted(changed):
    """The first activations get other codes and the output moves by some of what last-bit changes in bf16 do."""

    def nudge(artifact, model):
        """Every value behind the patch embedding by 2^-12: 1/16 of the last place of bf16."""
        convolution = next(node for node in model.graph.node if node.op_type == "Conv")
        before, convolution.output[0] = convolution.output[0], "nudged"
        factor = numpy_helper.from_array(np.float32(1 + 2.0**-12), "factor")
        model.graph.initializer.append(factor)
        at = list(model.graph.node).index(convolution)
        model.graph.node.insert(at + 1, onnx.helper.make_node("Mul", ["nudged", "factor"], [before]))

    check = changed("t2v/rtn", nudge)
    assert 0 < check.flips < check.activations / 2
    assert 1e-5 < check.distance < FLIP_MARGIN * check.flip_distance
    assert check.program_error > PROGRAM_ERROR  # which is not for want of equal activations


def test_a_linear_that_is_not_as_the_artifact_has_it(changed):
    def take_away(artifact, model):
        part = linears_of(artifact, model)[0]
        node = next(node for node in model.graph.node if part.values in node.output)
        node.op_type = "Relu"
        node.domain = ""
        del node.input[1:]

    with pytest.raises(Hif4Error, match=r"the \.onnx file does not have the linear as the artifact's program has it"):
        changed("t2v/rtn", take_away)


def test_what_was_exported_from_another_artifact(exported):
    artifact, paths = exported("t2v/rtn")
    other, _ = exported("t2v/weight-only")
    with pytest.raises(Hif4Error, match="was exported from another artifact"):
        verify_onnx(other, paths)
    files = {name: entry for name, entry in artifact.files.items() if not name.startswith("golden/")}
    with pytest.raises(Hif4Error, match="only what has golden outputs can be verified"):
        verify_onnx(dataclasses.replace(artifact, files=files), paths)


@pytest.mark.parametrize("k", [64, 1024])
def test_additions_in_the_worst_order_stay_within_the_tolerance(k):
    """One after the other, in float32, against float64; in pairs, as good as libraries do, ten times below."""
    generator = torch.Generator().manual_seed(k)
    terms = torch.randn(400, k, generator=generator)
    exact = terms.double().sum(1)
    total = torch.zeros(400)
    for column in terms.T:
        total += column
    error = float((total.double() - exact).norm() / exact.norm())
    assert linear_tolerance(k) / 10 < error < linear_tolerance(k)
