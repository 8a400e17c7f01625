"""docs/artifact.md is enough to read an artifact: a reader written from it agrees with the runtime number by number."""

import json
import math
import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from hif4c.compiler import calibrate as calibrate_module
from hif4c.compiler.calibrate import calibrate
from hif4c.compiler.calibration_inputs import Call
from hif4c.compiler.locate import locate_model
from hif4c.runtime import dequantize, quantize
from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.graph import DTYPES, TARGETS, Ref, TensorType
from hif4c.runtime.ops import _SCHEMAS
from hif4c.runtime.safetensors_stream import TensorFile
from tests.support import independent_reader as reader
from tests.support.checkpoints import write_diffusers_model

PAGE = (Path(__file__).parents[2] / "docs" / "artifact.md").read_text(encoding="utf-8")
RECIPE = """
shift = true
mask_percentile = 99.9
hadamard = 32
rounding = "search"
rank = 4
outlier_columns = 2
bf16_steps = 0.5
"""


@pytest.fixture(scope="module")
def rich(captures, quick_compile, inputs, tmp_path_factory):
    """An artifact of all that there can be: shifts, masks, rotation, both parts of side branches, a second program."""
    folder = tmp_path_factory.mktemp("rich")
    write_diffusers_model(folder / "model", "t2v", experts=1)
    calls = []
    for seed, timestep in ((11, 900.0), (12, 100.0)):
        video, _, text = inputs(batch=1, frames=1, seed=seed)
        calls.append(Call(video, torch.full((1,), timestep), text))
    path = folder / "calibration.safetensors"
    with mock.patch.object(calibrate_module, "capture", captures):
        run = {"source": "trajectory", "prompts": ["a"], "timesteps": [900.0, 100.0], "seed": 0}
        calibrate(locate_model(str(folder / "model")), {"transformer": calls}, path, [run])
    (folder / "rich.toml").write_text(RECIPE)
    return quick_compile(folder / "model", folder / "rich.hif4", str(folder / "rich.toml"), calibration=path)


@pytest.fixture(params=["rich", "wan_tiny_artifact"])
def artifact(request):
    return request.getfixturevalue(request.param)


def programs(path):
    """(expert, variant) of every program."""
    opened = open_artifact(path)
    return [(name, variant) for name in opened.experts for variant in (None, *opened.variants(name))]


def test_manifest_and_files(artifact):
    manifest = reader.read_manifest(artifact)
    reader.check_files(artifact, manifest)
    assert manifest == open_artifact(artifact).manifest


def test_a_changed_file_is_noticed(rich, tmp_path):
    """So that the test above is one."""
    path = shutil.copytree(rich, tmp_path / "changed")
    manifest = path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"rounding": "search"', b'"rounding": "gptq"', 1))
    with pytest.raises(AssertionError):
        reader.read_manifest(path)
    weights = bytearray((path / "transformer/weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (path / "transformer/weights.safetensors").write_bytes(weights)
    with pytest.raises(AssertionError):
        reader.check_files(path, json.loads((rich / "manifest.json").read_text()))


def test_programs(artifact):
    """Every value, argument and type of every node is what the runtime reads."""

    def plain(value):
        if isinstance(value, Ref):
            return ("value", value.index)
        if isinstance(value, torch.dtype):
            return ("dtype", str(value).removeprefix("torch."))
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    def kind(value):
        if isinstance(value, TensorType):
            return [value.dtype, *value.shape]
        return [kind(item) for item in value] if isinstance(value, tuple) else value

    for expert, variant in programs(artifact):
        found, _ = reader.open_expert(artifact, expert, variant)
        graph = open_artifact(artifact).graph(expert, variant)
        assert found.inputs == {item.name: kind(item.type) for item in graph.inputs}
        assert found.tensors == {item.name: kind(item.type) for item in graph.tensors}
        assert found.outputs == [ref.index for ref in graph.outputs]
        assert found.nodes == [
            (node.target, plain(node.args), plain(node.kwargs), node.module, kind(node.type)) for node in graph.nodes
        ]


def test_every_tensor(artifact):
    """Names, shapes, dtypes and values; 4-bit weights as the runtime decodes them."""
    for expert in open_artifact(artifact).experts:
        program, files = reader.open_expert(artifact, expert)
        assert list(files) == list(program.tensors)
        stored = TensorFile(artifact / expert / "weights.safetensors")
        decoded = 0
        for name, (dtype, *shape) in program.tensors.items():
            found = files[name].read(name)
            assert files[name].shape(name) == list(shape)
            expected = stored.read(name)
            in_program = {"U8": "uint8", "I64": "int64", "BF16": "bfloat16", "F32": "float32"}[files[name].dtype(name)]
            assert DTYPES[in_program] == expected.dtype
            assert in_program == dtype or (in_program, dtype) == ("bfloat16", "float32")
            assert np.array_equal(found, expected.float().numpy() if expected.is_floating_point() else expected.numpy())
            if name.endswith(".weight.codes"):
                scales = name.removesuffix("codes") + "scales"
                values = reader.dequantize(found, files[scales].read(scales))
                k = values.shape[1]
                runtime = dequantize(expected, stored.read(scales), k, torch.float32)
                assert np.array_equal(values, runtime.numpy())
                decoded += 1
        linears = open_artifact(artifact).expert(expert).linears
        assert decoded == sum(linear["precision"] != "high" for linear in linears) > 0


def test_golden_linears(artifact):
    """Every 4-bit linear of every program, computed from the page alone, gives what is recorded."""
    kinds = set()
    for expert, variant in programs(artifact):
        program, files = reader.open_expert(artifact, expert, variant)
        label = expert if variant is None else f"{expert}.{variant}"
        golden = reader.TensorFile(artifact / "golden" / f"{label}.safetensors")
        row = golden.read("row")
        for plane, expected in zip(reader.quantize(row), ("row.codes", "row.scales"), strict=True):
            assert np.array_equal(plane, golden.read(expected))
        for target, args, _, module, _ in program.nodes:
            if target not in ("hif4.linear", "hif4.linear_w4"):
                continue
            found, features = run_linear(program, files, golden, target, args, module, row)
            expected = golden.read(f"linear.{module}")
            # The bound of the page: float32 additions.
            assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected), (label, module)
            kinds |= {(target, *features)}
    wanted = {("hif4.linear", True, True, True), ("hif4.linear_w4", True, True, True)}
    assert wanted <= kinds or "wan-tiny" in str(artifact)


def run_linear(program, files, golden, target, args, module, row):
    """Output of one linear for the row, and what it has: mask, rotation, side branch."""

    def tensor(argument):
        name = program.name(argument)
        return None if name is None else files[name].read(name)

    args = [*args, *([None] * 12)]
    first = 2 if target == "hif4.linear" else 1
    w_codes, w_scales, bias = (tensor(argument) for argument in args[first : first + 3])
    at = 7 if target == "hif4.linear" else 8
    side = golden.read(f"side.{module}").reshape(-1) if args[at] is not None else None
    side_weight = None if side is None else tensor(args[at + 1])
    if target == "hif4.linear":
        getitem = program.node(args[0][1])
        quantizer, given, *_ = program.node(getitem[1][0][1])
        given = [*given, None, 0]
        mask, hadamard = given[1:3] if quantizer == "hif4.quantize" else given[7:9]
    else:
        mask, hadamard = args[4:6]
    has = (mask is not None, hadamard > 1, side is not None)
    # The number of channels is in the type of what the quantizer reads; here no K needs padding.
    x, mask = row[: 2 * w_codes.shape[1]], tensor(mask)
    if target == "hif4.linear":
        planes = reader.quantize(x, mask, hadamard)
        return reader.linear(*planes, w_codes, w_scales, bias, side, side_weight), has
    return reader.linear_w4(x, w_codes, w_scales, bias, mask, hadamard, side, side_weight), has


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize(("channels", "hadamard"), [(64, 0), (200, 0), (256, 64), (1024, 1024)])
def test_quantizing_as_the_page_says(scale, channels, hadamard):
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(5, channels, generator=generator) * scale
    x[0], x[1, :7] = 0, 0.5 * scale
    mask = torch.rand(channels, generator=generator) + 0.5
    for plane, expected in zip(
        reader.quantize(x.numpy(), mask.numpy(), hadamard), quantize(x, mask, hadamard), strict=True
    ):
        assert np.array_equal(plane, expected.numpy())


def example(name):
    """The lines of an example block of the page."""
    (block,) = re.findall(rf"<!-- example: {name} -->\n```\n(.*?)```", PAGE, re.DOTALL)
    return block.splitlines()


def channels(lines):
    values = np.zeros(64, np.float32)
    for line in lines:
        first, last, numbers = re.fullmatch(r"channels +(\d+) to +(\d+): +(.*)", line).groups()
        values[int(first) : int(last) + 1] = [float(number) for number in numbers.split()]
    return values


def test_the_example_of_the_page():
    planes = [np.array([int(byte, 16) for byte in line.split()[1:]], np.uint8) for line in example("bytes")]
    codes, scales = planes[0], planes[1].reshape(1, 4)
    values, decoded = channels(example("values")), channels(example("decoded"))
    assert np.array_equal(reader.dequantize(codes, scales), decoded)
    runtime = dequantize(torch.from_numpy(codes), torch.from_numpy(scales), 64, torch.float32).numpy()
    assert np.array_equal(runtime, decoded)
    assert [math.copysign(1, value) for value in runtime[:16]] == [math.copysign(1, value) for value in decoded[:16]]
    for found in (reader.quantize(values), [plane.numpy() for plane in quantize(torch.from_numpy(values))]):
        assert all(np.array_equal(a, b) for a, b in zip(found, (codes, scales), strict=True))


def keys_of(value):
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from keys_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from keys_of(item)


def test_every_key_of_a_manifest_is_on_the_page(rich, wan_tiny_artifact):
    """File names and the names of experts and packages aside."""
    for path in (rich, wan_tiny_artifact):
        manifest = reader.read_manifest(path)
        keys = set(keys_of({key: value for key, value in manifest.items() if key != "files"}))
        keys |= set(keys_of(list(manifest["files"].values())))
        if path == rich:
            assert {"bf16_timesteps", "step_errors", "calibration", "alpha", "sqnr", "errors"} <= keys
        absent = sorted(key for key in keys if f"`{key}`" not in PAGE and f'"{key}"' not in PAGE)
        assert not absent, f"docs/artifact.md does not name these keys of a manifest: {', '.join(absent)}"
        for sidecar in path.glob("kernels/*/kernels.json"):
            assert not [key for key in keys_of(json.loads(sidecar.read_text())) if not named(key)]
        report = json.loads((path / "report.json").read_text())
        assert not [key for key in (*report, *report["experts"]["transformer"]) if f"`{key}`" not in PAGE]


def named(key):
    return f"`{key}`" in PAGE or key == "c++"  # a tool with its version


def test_every_operator_is_on_the_page_once():
    rows = re.findall(r"^\| `((?:aten|hif4|size)\.[\w.]+|getitem)` \|", PAGE, re.MULTILINE)
    assert sorted(rows) == sorted(TARGETS)


def test_arguments_of_hif4_operators_are_in_order_on_the_page():
    for name, schema in _SCHEMAS.items():
        (row,) = re.findall(rf"^\| `hif4\.{name}` \| (.*?) \|", PAGE, re.MULTILINE)
        arguments = re.findall(r"(?:Tensor|int|SymInt|ScalarType|str|float)\??\s(\w+)", schema.partition("->")[0])
        if name == "norm_quantize":
            arguments = ["hif4.norm", "mask", "hadamard"]  # "those of", then its own
        places = [re.search(rf"(?<![\w.]){re.escape(item)}(?!\w)", row) for item in arguments]
        assert all(places), (name, row)
        starts = [place.start() for place in places]
        assert starts == sorted(starts), (name, row)


def test_golden_tensors_are_on_the_page(rich):
    names = reader.TensorFile(rich / "golden/transformer.safetensors").names
    assert any(name.startswith("side.") for name in names)
    for name in names:
        known = re.sub(r"^(linear|side)\..*", r"\1.PATH", name)
        assert f"`{known}`" in PAGE, name
