"""Kernels on the GPU against the portable operators and fp64: every shipped binary, Triton's own, and the library."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from hif4c.compiler.gpu_kernels import compile_jobs, list_jobs
from hif4c.runtime import format as hif4_format
from hif4c.runtime import reference, rows
from hif4c.runtime.artifact import Artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.gpu import operators as operators_module
from hif4c.runtime.gpu.driver import Driver
from hif4c.runtime.gpu.epilogue import Epilogue
from hif4c.runtime.gpu.jit import Jit
from hif4c.runtime.gpu.launcher import Backend, Bundled
from hif4c.runtime.gpu.operators import Operators
from hif4c.runtime.gpu.products import Planes, Product
from hif4c.runtime.gpu.tuning import Candidate, Tuner, measure_on_device
from tests.support.gpu_tuners import Picked

GOLDEN = Path(__file__).parents[1] / "data" / "hif4_golden.safetensors"
ROTATIONS = (0, 2, 64, 128, 1024)


@pytest.fixture(scope="module", params=["bundled", "jit"])
def backend(request: pytest.FixtureRequest, driver: Driver) -> Backend:
    if request.param == "bundled":
        return Bundled(request.getfixturevalue("shipped"), driver, range(torch.cuda.device_count()))
    pytest.importorskip("triton", reason="Triton is not installed")
    return Jit()


@pytest.fixture
def operators(backend: Backend) -> Operators:
    """Each call is compared with the portable implementation, on some rows."""
    return Operators(backend, lambda device: Picked())


def randn(*shape: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Normal values whose channels differ in size, and some outliers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * torch.rand(shape[-1], generator=generator).exp()
    x.flatten()[:: 7 * 64 + 1] *= 50
    return x.to(device)


def golden() -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(GOLDEN, "pt") as file:
        for key in sorted(file.keys()):
            if key.endswith(".x"):
                yield key.removesuffix(".x"), file.get_tensor(key)


@pytest.mark.parametrize("name", [name for name, _ in golden()])
def test_quantize_gives_the_simulators_bits(operators: Operators, device: torch.device, name: str) -> None:
    x = dict(golden())[name]
    found = operators.quantize(x.to(device))
    for plane, expected in zip(found, hif4_format.quantize(x), strict=True):
        assert torch.equal(plane.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("hadamard", ROTATIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_quantize_with_mask_and_rotation(
    operators: Operators, device: torch.device, dtype: torch.dtype, hadamard: int, masked: bool
) -> None:
    x = randn(2, 517, 5120, device=device).to(dtype)
    mask = randn(5120, device=device, seed=1).abs() + 0.1 if masked else None
    found = operators.quantize(x, mask, hadamard)
    expected = hif4_format.quantize(x.cpu(), None if mask is None else mask.cpu(), hadamard)
    for plane, portable in zip(found, expected, strict=True):
        assert torch.equal(plane.cpu(), portable)


@pytest.mark.parametrize("channels", [64, 100, 192, 200])
def test_quantize_of_tails_and_strides(operators: Operators, device: torch.device, channels: int) -> None:
    x = randn(33, 3 * channels, device=device).bfloat16()[:, channels : 2 * channels]
    for plane, portable in zip(operators.quantize(x), hif4_format.quantize(x.cpu()), strict=True):
        assert torch.equal(plane.cpu(), portable)


@pytest.mark.parametrize("hadamard", [0, 64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
def test_norm_quantize_differs_by_code_flips_only(
    backend: Backend, device: torch.device, modulated: bool, masked: bool, hadamard: int
) -> None:
    """The order of the norm's sums may move a value to the next bf16, and that a code; almost none."""
    x, modulation = randn(2, 300, 1536, device=device).bfloat16(), randn(2, 6, 1536, device=device, seed=1)
    scale, shift = (modulation[:, 1:2], modulation[:, :1]) if modulated else (None, None)
    own = (None, None) if modulated else (modulation[0, 2], modulation[0, 3])
    mask = randn(1536, device=device, seed=2).abs() + 0.1 if masked else None
    end = (1e-6, torch.bfloat16)
    arguments = (x, *own, scale, shift)
    expected = rows.norm_quantize(
        *(None if item is None else item.cpu() for item in arguments), *end, None if mask is None else mask.cpu(),
        hadamard,
    )  # fmt: skip
    names = []

    class Each(Picked):
        def choose(self, key: str, candidates: Sequence[Candidate], *rest: Any) -> Candidate:
            if key.startswith("norm_quantize"):
                names.extend(item.name for item in candidates)
                self.prefix = "separate" if separate else ""
            else:
                self.prefix = ""
            return super().choose(key, candidates, *rest)

    for separate in (False, True):
        found = Operators(backend, lambda _: Each()).norm_quantize(*arguments, *end, mask, hadamard)
        differ = sum(int((a.cpu() != b).sum()) for a, b in zip(found, expected, strict=True))
        assert differ < 0.01 * sum(plane.numel() for plane in expected), separate
    assert len(set(names)) >= 2, "a kernel, and the two steps apart"


def epilogue(name: str, m: int, n: int, device: torch.device) -> Epilogue:
    bias, residual = randn(n, device=device, seed=3), randn(m, n, device=device, seed=4).bfloat16()
    gate = randn(2, n, device=device, seed=5)
    side = randn(m, 24, device=device, seed=6).bfloat16(), randn(24, n, device=device, seed=7).bfloat16()
    return {
        "bias": Epilogue(bias),
        "gelu": Epilogue(bias, "gelu_tanh"),
        "gated": Epilogue(bias, gate=gate, gate_rows=m // 2, residual=residual),
        "side": Epilogue(bias, None, *side),
    }[name]


@pytest.mark.parametrize("name", ["bias", "gelu", "gated", "side"])
@pytest.mark.parametrize(("m", "n", "k"), [(2, 96, 320), (334, 1536, 1536), (1024, 1600, 8960)])
def test_every_variant_launches_and_agrees(
    backend: Backend, device: torch.device, name: str, m: int, n: int, k: int
) -> None:
    """Int8 variants to the bit, as all add in the order of the units; others within summation error."""
    planes = Planes(*hif4_format.quantize(randn(m, k, device=device).bfloat16()))
    weight = Planes(*hif4_format.quantize(randn(n, k, device=device, seed=1) / k**0.5))
    out = torch.empty(m, n, dtype=torch.bfloat16, device=device)
    product = Product(backend, planes, None, weight, epilogue(name, m, n, device), out)
    exact: list[torch.Tensor] = []
    names = []
    for candidate in product.candidates():
        out.fill_(torch.nan)
        candidate.run()
        torch.cuda.synchronize()
        assert product.disagrees(out) is None, candidate.name
        names.append(candidate.name)
        if candidate.family == "int8":
            exact.append(out.clone())
            assert torch.equal(exact[0], exact[-1]), candidate.name
    assert len(names) >= 4
    assert len(set(names)) == len(names)


def test_every_shipped_binary_is_reached(shipped: Artifact, driver: Driver, device: torch.device) -> None:
    backend = Bundled(shipped, driver, [0])
    operators = Operators(backend, lambda _: Picked())
    for channels, name in ((128, "bias"), (128, "gelu"), (128, "gated")):
        planes = Planes(*hif4_format.quantize(randn(64, channels, device=device)))
        out = torch.empty(64, 64, dtype=torch.bfloat16, device=device)
        product = Product(backend, planes, None, planes, epilogue(name, 64, 64, device), out)
        for candidate in product.candidates():
            candidate.run()
    for dtype in (torch.bfloat16, torch.float32):
        for hadamard in (0, 64, 128, 256, 512, 1024):
            for mask in (None, torch.ones(1024, device=device)):
                x = randn(64, 1024, device=device).to(dtype)
                operators.quantize(x, mask, hadamard)
                operators.norm_quantize(x, None, None, None, None, 1e-6, torch.bfloat16, mask, hadamard)
    torch.cuda.synchronize()
    files = {path.rsplit("/", 1)[-1] for path in shipped.files if not path.endswith(".json")}
    assert {file for _, file in backend._functions} == files


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1536, 1536), (480, 8960, 1536), (257, 5120, 5120), (64, 5120, 13824)])
def test_linear_against_fp64(backend: Backend, device: torch.device, m: int, n: int, k: int) -> None:
    codes, scales = hif4_format.quantize(randn(m, k, device=device).bfloat16())
    weight = hif4_format.quantize(randn(n, k, device=device, seed=1) / k**0.5)
    a = hif4_format.dequantize(codes, scales, k, torch.float64)
    w = hif4_format.dequantize(*weight, k, torch.float64)
    exact, magnitudes = a @ w.t(), a.abs() @ w.abs().t()
    out = torch.empty(m, n, dtype=torch.bfloat16, device=device)
    product = Product(backend, Planes(codes, scales), None, Planes(*weight), Epilogue(), out)
    for candidate in product.candidates():
        candidate.run()
        # K additions in fp32, which matrix units may cut off instead of rounding, then half a last place of bf16.
        allowed = k * 2.0**-23 * magnitudes + 2.0**-8 * exact.abs()
        assert ((out.double() - exact).abs() <= allowed).all(), candidate.name
    if backend.name == "jit":  # which has fp32 outputs as well
        single = torch.empty(m, n, device=device)
        for candidate in Product(
            backend, Planes(codes, scales), None, Planes(*weight), Epilogue(), single
        ).candidates():
            if candidate.family == "int8":
                candidate.run()
                assert (single.double() - exact).norm() <= 1e-6 * exact.norm(), candidate.name


def test_weight_only_linear(operators: Operators, device: torch.device) -> None:
    x, weight = randn(3, 77, 1536, device=device).bfloat16(), hif4_format.quantize(randn(320, 1536, device=device))
    mask = randn(1536, device=device, seed=1).abs() + 0.1
    for prefix in ("linear_bf16", "library"):
        tuned = Operators(operators.backend, lambda _, prefix=prefix: Picked(prefix))
        found = tuned.linear_w4(x, *weight, randn(320, device=device), mask, 64, "gelu_tanh")
        expected = reference.linear_w4(
            x, *weight, randn(320, device=device), mask, 64, "gelu_tanh", torch.bfloat16
        )  # fmt: skip
        # 2^-7: two roundings to bf16; 2^-10 of the usual size: the order of the additions.
        size = expected.float().square().mean().sqrt()
        assert ((found.float() - expected.float()).abs() <= 2.0**-7 * expected.float().abs() + 2.0**-10 * size).all()


def test_nan_makes_its_row_and_column_nan(backend: Backend, device: torch.device) -> None:
    x, w = randn(130, 256, device=device), randn(160, 256, device=device)
    x[100, 3], w[7, 200] = torch.inf, torch.nan
    operators = Operators(backend, lambda _: Picked())
    y = operators.linear(*operators.quantize(x), *operators.quantize(w), dtype=torch.bfloat16)
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[100], expected[:, 7] = True, True
    assert torch.equal(y.isnan(), expected)


def test_activations_in_several_blocks(
    operators: Operators, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    planes = hif4_format.quantize(randn(2, 700, 512, device=device))
    weight = hif4_format.quantize(randn(128, 512, device=device))
    arguments: dict[str, Any] = {
        "gate": randn(2, 1, 128, device=device),
        "residual": randn(2, 700, 128, device=device).bfloat16(),
        "dtype": torch.bfloat16,
    }
    whole = operators.linear(*planes, *weight, **arguments)
    monkeypatch.setattr(operators_module, "_ROW_ELEMENTS", 256 * 512)
    assert torch.equal(operators.linear(*planes, *weight, **arguments), whole)


def test_a_choice_is_timed_once_and_kept(backend: Backend, device: torch.device, tmp_path: Path) -> None:
    timed = []

    def tuner(device: torch.device) -> Tuner:
        def measure(run: Any) -> float:
            timed.append(measure_on_device(device, run))
            return timed[-1]

        return Tuner(backend.identity(device), measure, tmp_path)

    planes = hif4_format.quantize(randn(2048, 1536, device=device))
    weight = hif4_format.quantize(randn(1536, 1536, device=device))
    first, second = Operators(backend, tuner), Operators(backend, tuner)
    y = first.linear(*planes, *weight, dtype=torch.bfloat16)
    count = len(timed)
    assert count >= 3
    assert all(0 < seconds < 1 for seconds in timed)
    assert torch.equal(first.linear(*planes, *weight, dtype=torch.bfloat16), y)
    assert torch.equal(second.linear(*planes, *weight, dtype=torch.bfloat16), y)
    assert len(timed) == count
    assert len(list(tmp_path.iterdir())) == 1


def test_kernels_run_on_the_current_stream(operators: Operators, device: torch.device) -> None:
    """Behind what the stream still has to do: a launch on another one would read zeros."""
    x = randn(512, 1024, device=device)
    expected = operators.quantize(x)  # loaded, so that nothing waits for the device below
    late, planes = torch.zeros_like(x), hif4_format.quantize(torch.zeros_like(x))
    kernels, values = operators._quantizers(late, None, 0, *planes)
    stream = torch.cuda.Stream(device)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        operators.backend.launch(kernels[0], device, values)
    stream.synchronize()
    assert all(map(torch.equal, planes, expected))


def test_a_captured_graph_replays(operators: Operators, device: torch.device) -> None:
    x, weight = randn(256, 512, device=device), hif4_format.quantize(randn(128, 512, device=device))

    def step() -> torch.Tensor:
        return operators.linear(*operators.quantize(x), *weight, dtype=torch.bfloat16)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    x.copy_(randn(256, 512, device=device, seed=9))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, step())


def test_two_devices(backend: Backend) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU only")
    if not backend.serves(torch.device("cuda", 1)):
        pytest.skip("the second GPU is of another architecture")
    operators = Operators(backend, lambda _: Picked())
    results = []
    for index in (0, 1, 0):  # the second is not the current device
        device = torch.device("cuda", index)
        planes = operators.quantize(randn(300, 512, device=device))
        results.append(operators.linear(*planes, *operators.quantize(randn(128, 512, device=device))).cpu())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    with pytest.raises(Hif4Error, match="the tensors of one call are on"):
        operators.quantize(torch.ones(4, 64, device="cuda:1"), torch.ones(64, device="cuda:0"))


def test_a_binary_for_another_architecture_is_refused_by_the_driver(driver: Driver, target: str) -> None:
    if target.startswith("hip"):
        image = b"\x7fELF" + b"\0" * 4096
    else:
        other = "cuda-sm90" if target in ("cuda-sm80", "cuda-sm89") else "cuda-sm80"
        job = next(job for job in list_jobs(other) if job.name == "expand_bf16")
        ((image, _),) = compile_jobs(other, [job], lambda text: None)
    with pytest.raises(Hif4Error, match=r"failed with \w+ \(\d+\): \w+"):
        driver.load(0, image)


def test_the_dispatcher_reaches_the_kernels(
    shipped: Artifact, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hif4c.runtime.gpu import registry

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    registry.select("bundled", shipped)
    try:
        x, w = randn(300, 512, device=device), randn(128, 512, device=device)
        quantize = torch.ops.hif4.quantize
        for found, expected in zip(quantize(x), quantize(x.cpu()), strict=True):
            assert torch.equal(found.cpu(), expected)
        run = functools.partial(torch.ops.hif4.linear, dtype=torch.bfloat16)
        found, expected = run(*quantize(x), *quantize(w)).cpu(), run(*quantize(x.cpu()), *quantize(w.cpu()))
        # Sums in another order, rounded to bf16.
        size = expected.float().square().mean().sqrt()
        difference = (found.float() - expected.float()).abs()
        assert (difference <= 2.0**-7 * expected.float().abs() + 2.0**-10 * size).all()
    finally:
        registry.select("portable")
