"""The functions of domain `hif4` in stock onnxruntime with default options, against the runtime's own arithmetic."""

import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors import safe_open

from hif4c.compiler.onnx_functions import DOMAIN, MAX_OPSET, MIN_OPSET, call, functions, hadamard, table_nodes, tables
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.format import MIN_E6M2, UNIT, dequantize, packed_shapes, quantize
from hif4c.runtime.rotation import block_hadamard

GOLDEN = Path(__file__).parents[1] / "data" / "hif4_golden.safetensors"
OPSET = 21
Run = Callable[..., list[np.ndarray]]


def golden_sets() -> list[str]:
    with safe_open(GOLDEN, "pt") as file:
        return sorted(key for key in file.keys() if key.endswith(".x"))  # noqa: SIM118


def model(
    nodes: list[Any],
    inputs: dict[str, tuple[int, list[Any]]],
    outputs: dict[str, tuple[int, list[Any]]],
    constants: dict[str, np.ndarray] | None = None,
    opset: int = OPSET,
    widths: Collection[int] = (),
) -> onnx.ModelProto:
    """A model of these nodes, with the functions and tables that they call."""
    called = {node.op_type for node in nodes if node.domain == DOMAIN}
    known = {f.name: f for qdq in (False, True) for f in functions(opset, widths, qdq=qdq)}
    values = [
        [helper.make_tensor_value_info(name, *kind) for name, kind in kinds.items()] for kinds in (inputs, outputs)
    ]
    initializers = [numpy_helper.from_array(a, n) for n, a in {**tables(called), **(constants or {})}.items()]
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(
        helper.make_graph([*(node for node, _ in table_nodes(called)), *nodes], "test", *values, initializers),
        functions=[known[name] for name in sorted(called)],
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets[:1]),
    )


def session(made: onnx.ModelProto, **options: Any) -> onnxruntime.InferenceSession:
    chosen = onnxruntime.SessionOptions()
    chosen.log_severity_level = 3
    for name, value in options.items():
        setattr(chosen, name, value)
    return onnxruntime.InferenceSession(made.SerializeToString(), chosen)


def quantizers(opset: int = OPSET) -> onnx.ModelProto:
    """x -> codes, scales, Dequantize(codes, scales), QuantizeDequantize(x)."""
    return model(
        [
            call("Quantize", ["x"], ["codes", "scales"]),
            call("Dequantize", ["codes", "scales"], ["decoded"]),
            call("QuantizeDequantize", ["x"], ["values"]),
        ],
        {"x": (TensorProto.FLOAT, ["b", "t", "k"])},
        {
            "codes": (TensorProto.UINT8, ["b", "t", "bytes"]),
            "scales": (TensorProto.UINT8, ["b", "t", "units", 4]),
            "decoded": (TensorProto.FLOAT, ["b", "t", "k"]),
            "values": (TensorProto.FLOAT, ["b", "t", "k"]),
        },
        opset=opset,
    )


@pytest.fixture(scope="module")
def run_quantizers() -> Run:
    loaded = session(quantizers())
    return lambda x: loaded.run(None, {"x": x})


def linear(weight: torch.Tensor, opset: int = OPSET, rows: Collection[Any] = ("b", "t")) -> onnx.ModelProto:
    codes, scales = quantize(weight)
    n, k = weight.shape
    return model(
        [call("Linear", ["x", "codes", "scales", "x"], ["y"])],
        {"x": (TensorProto.FLOAT, [*rows, k])},
        {"y": (TensorProto.FLOAT, [*rows, n])},
        {"codes": codes.numpy(), "scales": scales.numpy()},
        opset,
    )


def rotation(width: int, opset: int = OPSET) -> onnx.ModelProto:
    kind = {"x": (TensorProto.FLOAT, ["b", "t", "k"])}, {"y": (TensorProto.FLOAT, ["b", "t", "k"])}
    return model([call(hadamard(width), ["x"], ["y"])], *kind, opset=opset, widths=[width])


def same_bits(found: np.ndarray, expected: np.ndarray) -> bool:
    """Equal with the signs of zeros; one NaN is like another."""
    equal = (found.view(np.int32) == expected.view(np.int32)) | (np.isnan(found) & np.isnan(expected))
    return found.shape == expected.shape and bool(equal.all())


def check_quantizers(run: Run, x: torch.Tensor) -> None:
    """x [..., K] of any float: the planes of the runtime and the values that it decodes them to."""
    rows = x.float().reshape(1, -1, x.shape[-1])
    rows = torch.nn.functional.pad(rows, (0, -x.shape[-1] % UNIT))
    codes, scales = quantize(rows)
    values = dequantize(codes, scales, rows.shape[-1], torch.float32).numpy()
    found = run(rows.numpy())
    assert np.array_equal(found[0], codes.numpy())
    assert np.array_equal(found[1], scales.numpy())
    assert same_bits(found[2], values)
    assert same_bits(found[3], values)


@pytest.mark.parametrize("name", golden_sets())
def test_quantizers_are_bit_exact_on_every_golden_set(run_quantizers: Run, name: str):
    with safe_open(GOLDEN, "pt") as file:
        check_quantizers(run_quantizers, file.get_tensor(name))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    exponent=st.integers(-149, 127),
    special=st.lists(st.floats(width=32), max_size=8),
)
def test_quantizers_are_bit_exact_on_random_rows(run_quantizers: Run, seed: int, exponent: int, special: list[float]):
    """Normal numbers of any magnitude, a few of hypothesis' among them: subnormals, infinities, NaN, zeros."""
    generator = np.random.default_rng(seed)
    with np.errstate(over="ignore"):  # the largest become Inf
        x = np.ldexp(generator.standard_normal((6, 2 * UNIT)), exponent).astype(np.float32)
    x.reshape(-1)[generator.integers(0, x.size // 2, len(special))] = np.array(special, np.float32)
    check_quantizers(run_quantizers, torch.from_numpy(x))


def test_quantizers_are_bit_exact_on_any_bits(run_quantizers: Run):
    bits = np.random.default_rng(0).integers(0, 2**32, (400, UNIT), dtype=np.uint32)
    bits[::2] &= 0xBFFFFFFF  # no NaN or Inf in every other row, where large numbers hide small ones
    bits[1::4] &= 0x807FFFFF  # subnormals
    check_quantizers(run_quantizers, torch.from_numpy(bits.view(np.float32)))


def test_the_scale_changes_where_the_runtimes_does(run_quantizers: Run):
    """Every threshold of a unit's maximum and its neighbours, of both signs and at every place of the unit."""
    thresholds = tables(["Quantize"])["hif4.thresholds"]
    around = np.concatenate([thresholds, np.nextafter(thresholds, np.float32(0)), np.nextafter(thresholds, np.inf)])
    x = torch.zeros(2 * len(around), UNIT)
    place = torch.arange(len(x))
    x[place, place % UNIT] = torch.from_numpy(np.concatenate([around, -around]).astype(np.float32))
    check_quantizers(run_quantizers, x)
    _, scales = quantize(x)
    assert len(torch.unique(scales[..., 0])) == 256  # so none of the 256 bytes was left out


def test_units_beside_a_nan_are_not_touched(run_quantizers: Run):
    x = torch.randn(5, 3 * UNIT, generator=torch.Generator().manual_seed(0))
    x[0, UNIT], x[1, 0], x[2, 2 * UNIT + 7], x[3, 5] = torch.nan, torch.inf, -torch.inf, -0.0
    check_quantizers(run_quantizers, x)
    values = run_quantizers(x[None].numpy())[3]
    assert np.isnan(values[0, 0].reshape(3, UNIT)).all(-1).tolist() == [False, True, False]
    assert np.isfinite(values[0, 3:]).all()


def test_dequantize_reads_any_planes():
    """Also what `quantize` never writes: every byte of codes and exponents under every scale."""
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 256, (2, 256, 3 * UNIT // 2), dtype=np.uint8)
    scales = generator.integers(0, 256, (2, 256, 3, 4), dtype=np.uint8)
    scales[0, :, 0, :] = np.arange(256)[:, None]
    made = model(
        [call("Dequantize", ["codes", "scales"], ["values"])],
        {"codes": (TensorProto.UINT8, ["b", "t", "bytes"]), "scales": (TensorProto.UINT8, ["b", "t", "units", 4])},
        {"values": (TensorProto.FLOAT, ["b", "t", "k"])},
    )
    (values,) = session(made).run(None, {"codes": codes, "scales": scales})
    expected = dequantize(torch.from_numpy(codes), torch.from_numpy(scales), 3 * UNIT, torch.float32).numpy()
    assert same_bits(values, expected)


@pytest.mark.parametrize("width", [2**power for power in range(1, 11)])
def test_hadamard_is_exact(width: int):
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(2, 3, 1024, generator=generator) * torch.exp2(8 * torch.randn(2, 3, 1024, generator=generator))
    x[0, 0, 5] = 1e-42  # a subnormal must not be flushed
    x[1] = 0
    x[1, :, 1::2] = torch.randn(3, 512, generator=generator) * 1e-40
    loaded = session(rotation(width))
    assert np.array_equal(loaded.run(None, {"x": x.numpy()})[0], block_hadamard(x, width).numpy())
    x[0, 1, 3], x[0, 2, 7] = torch.inf, torch.nan
    (y,) = loaded.run(None, {"x": x.numpy()})
    assert np.array_equal(np.isfinite(y), torch.isfinite(block_hadamard(x, width)).numpy())


@pytest.mark.parametrize(("rows", "k", "n"), [((1, 1), 64, 1), ((2, 5), 320, 7), ((1, 33), 1152, 65)])
def test_linear_is_within_its_summation_error(rows: tuple[int, int], k: int, n: int):
    generator = torch.Generator().manual_seed(k)
    weight = torch.randn(n, k, generator=generator) * torch.exp2(6 * torch.randn(n, 1, generator=generator))
    values = dequantize(*quantize(weight), k, torch.float64)
    x = torch.randn(*rows, k, generator=generator)
    (y,) = session(linear(weight)).run(None, {"x": x.numpy()})
    # K products, each rounded, and their sum by K - 1 additions in any order: gamma(K) of the sum of magnitudes.
    u = 2.0**-24
    bound = k * u / (1 - k * u) * (x.double().abs() @ values.abs().t())
    assert y.shape == (*rows, n)
    assert ((torch.from_numpy(y) - x.double() @ values.t()).abs() <= bound).all()


def test_linear_decodes_its_weight_exactly():
    """One row of the unit matrix a channel: the product is the weight, as sums with zeros are exact."""
    weight = torch.randn(96, 192, generator=torch.Generator().manual_seed(0))
    (y,) = session(linear(weight)).run(None, {"x": np.eye(192, dtype=np.float32)[None]})
    assert np.array_equal(y[0].T, dequantize(*quantize(weight), 192, torch.float32).numpy())


@pytest.mark.parametrize("opset", range(MIN_OPSET, MAX_OPSET + 1))
def test_every_opset_is_valid_and_exact(opset: int):
    loaded = quantizers(opset)
    onnx.checker.check_model(loaded, full_check=True)
    ready = session(loaded)
    with safe_open(GOLDEN, "pt") as file:
        for name in ("wide.f32.x", "tiny.bf16.x", "huge.f32.x"):
            check_quantizers(lambda x: ready.run(None, {"x": x}), file.get_tensor(name))
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    values, one = dequantize(*quantize(weight), 128, torch.float32), torch.eye(128)
    for made, x, expected in ((linear(weight, opset), one, values.t()), (rotation(128, opset), values, None)):
        onnx.checker.check_model(made, full_check=True)
        (y,) = session(made).run(None, {"x": x[None].numpy()})
        assert np.array_equal(y[0], block_hadamard(x, 128).numpy() if expected is None else expected.numpy())


@pytest.mark.parametrize("opset", [MIN_OPSET - 1, MAX_OPSET + 1])
def test_another_opset_is_an_error(opset: int):
    with pytest.raises(Hif4Error, match=f"opset {opset} is not supported; choose one from {MIN_OPSET} to {MAX_OPSET}"):
        functions(opset, [64], qdq=False)


@pytest.mark.parametrize("width", [3, 2048])
def test_a_width_that_there_cannot_be_is_an_error(width: int):
    with pytest.raises(Hif4Error, match=f"Hadamard width {width}"):
        hadamard(width)


@pytest.mark.parametrize(
    ("qdq", "expected"),
    [
        (False, ["QuantizeDequantize", "Linear", "Hadamard64"]),
        (True, ["Quantize", "Dequantize", "Linear", "Hadamard64"]),
    ],
)
def test_functions_of_a_form(qdq: bool, expected: list[str]):
    made = functions(OPSET, [64, 64], qdq=qdq)
    assert [f.name for f in made] == expected
    assert {f.domain for f in made} == {DOMAIN}
    assert {(o.domain, o.version) for f in made for o in f.opset_import} == {("", OPSET)}
    assert {node.domain for f in made for node in f.node} == {""}


def chain(count: int, k: int, tokens: Any = "t") -> onnx.ModelProto:
    """`count` times rotate, quantize, multiply; as in a transformer, but nothing else."""
    generator = np.random.default_rng(0)
    nodes, constants, current = [], {}, "x"
    for i in range(count):
        constants[f"codes{i}"], constants[f"scales{i}"] = (
            generator.integers(0, 256, shape, dtype=np.uint8) for shape in packed_shapes((k, k))
        )
        constants[f"scales{i}"][..., 0] = 48 * 4 - 16  # about one over the root of k: results stay finite
        nodes += [
            call(hadamard(64), [current], [f"rotated{i}"]),
            call("QuantizeDequantize", [f"rotated{i}"], [f"values{i}"]),
            call("Linear", [f"values{i}", f"codes{i}", f"scales{i}", current], [f"y{i}"]),
        ]
        current = f"y{i}"
    made = model(
        nodes,
        {"x": (TensorProto.FLOAT, ["b", tokens, k])},
        {current: (TensorProto.FLOAT, ["b", tokens, k])},
        constants,
        widths=[64],
    )
    kinds = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", tokens, k]) for n in nodes for name in n.output
    ]
    made.graph.value_info.extend(kinds[:-1])
    return made


@pytest.mark.parametrize("rows", [("b", "t"), (1, 8)])
def test_a_default_session_does_not_unpack_weights_at_load(tmp_path: Path, rows: tuple[Any, Any]):
    """Also where every size is known, so that a fold could find the shapes constant."""
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "optimized.onnx"
    session(linear(weight, rows=rows), optimized_model_filepath=str(path))
    optimized = onnx.load(path)
    # Of what is not a table only the planes and shapes are left: 256 KiB of floats would be the weight.
    sizes = {item.name: item.ByteSize() for item in optimized.graph.initializer if not item.name.startswith("hif4.")}
    assert sizes.pop("codes") > 256 * 128
    assert sizes.pop("scales") > 256 * 4 * 4
    assert max(sizes.values()) < 256
    assert [node.op_type for node in optimized.graph.node if "MatMul" in node.op_type][-1] == "FusedMatMul"


def test_a_default_session_unpacks_one_weight_at_a_time(tmp_path: Path):
    """24 weights of 4 MiB unpacked are 96 MiB; one with its temporaries, in an arena that doubles, about a quarter."""
    path = tmp_path / "chain.onnx"
    onnx.save(chain(24, 1024), path)
    program = """
import sys, numpy, onnxruntime
def high_water():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
options = onnxruntime.SessionOptions()
session = onnxruntime.InferenceSession(sys.argv[1], options)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the high-water mark begins anew: the load held the file and its tensors at once
before = high_water()
session.run(None, {"x": numpy.ones((1, 8, 1024), numpy.float32)})
print(high_water() - before)
"""
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert 4 < float(done.stdout) < 96 / 2


def test_shapes_are_known_through_the_functions(tmp_path: Path):
    """onnxruntime's allocation planner takes quadratic time in values of unknown shape."""
    path = tmp_path / "optimized.onnx"
    level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # only standard operators, which `infer_shapes` knows
    session(chain(2, 128), optimized_model_filepath=str(path), graph_optimization_level=level)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path))
    known = {item.name: item.type.tensor_type.shape for item in [*inferred.graph.value_info, *inferred.graph.output]}
    outputs = [name for node in inferred.graph.node for name in node.output]
    assert len(outputs) > 60
    for name in outputs:
        sizes = [size.dim_param or size.dim_value for size in known[name].dim]
        assert all(sizes), name
        assert {size for size in sizes if isinstance(size, str)} <= {"b", "t"}, name


@pytest.mark.slow
def test_load_time_is_about_linear_in_the_number_of_calls():
    def seconds(count: int) -> float:
        made = chain(count, 128)
        start = time.perf_counter()
        session(made)
        return time.perf_counter() - start

    seconds(4)
    # 4 times the calls; a quadratic load would take 16 times as long. Measured: 3.6 to 4.6.
    assert seconds(240) < 8 * seconds(60)


def test_a_zero_unit_takes_the_least_scale():
    """Byte 0 is the last of the falling thresholds, and only it is 0: the table is sorted and has no gap."""
    thresholds = tables(["Quantize"])["hif4.thresholds"]
    assert thresholds[0] == np.inf
    assert thresholds[-1] == 0
    assert (np.diff(thresholds) < 0).all()
    assert thresholds[-2] > 7 * MIN_E6M2
