from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from hif4c.compiler import gptq as gptq_module
from hif4c.compiler import solve as solve_module
from hif4c.compiler.calibration import Calibration
from hif4c.compiler.emit import to_graph
from hif4c.compiler.journal import Journal
from hif4c.compiler.output_error import error_energy
from hif4c.compiler.pack import write_weights
from hif4c.compiler.planes import InputStatistics, Planes, make_planes, prepared_weight
from hif4c.compiler.recipe import Recipe, load_recipe
from hif4c.compiler.second_moments import second_moments
from hif4c.compiler.solve import SolvedPlanes, solve
from hif4c.compiler.steps import measure_steps
from hif4c.passes.program import Program, TensorSource, inverse_mask
from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.executor import Executor
from hif4c.runtime.format import dequantize, quantize
from hif4c.runtime.graph import Graph
from hif4c.runtime.native import native_kernels
from hif4c.runtime.rotation import block_hadamard
from hif4c.runtime.transformer import load_expert
from tests.support.forked_ranks import in_ranks

TEXT = [f"blocks.{block}.attn2.to_{name}.weight" for block in (0, 1) for name in "kv"]
RECIPE = """
shift = true
mask_percentile = 99.9
hadamard = 64
rounding = "gptq"
bf16_steps = 0.34
"""


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    """Those that the compiler uses: norms and attention agree between backends to the last bits only."""
    with native_kernels():
        yield


@dataclass
class Solution:
    """What one run of `solve` did.

    Attributes:
        planes: what it kept.
        outputs: of the program, for every call.
        seen: checkpoint tensor -> its source and statistics as they were rounded with.
        told: events, those that count added up.
    """

    program: Program
    graph: Graph
    planes: SolvedPlanes
    outputs: list[torch.Tensor]
    seen: dict[str, tuple[TensorSource, InputStatistics]]
    told: dict[str, int | str]


def run(calibrated, recipe: Recipe, journal: Journal, **options) -> Solution:
    program = calibrated.program(recipe)
    graph = to_graph(program)
    seen, outputs, told = {}, [], {}

    def record(event: str, value) -> None:
        told[event] = told.get(event, 0) + value if event in ("bytes", "skipped") else value

    def watched_planes(source: TensorSource, tensor, program, statistics=None, *arguments, **keywords) -> Planes:
        assert source.source not in seen
        seen[source.source] = (source, statistics)
        return make_planes(source, tensor, program, statistics, *arguments, **keywords)

    def watched_run(*arguments, **keywords):
        outputs.extend(original(*arguments, **keywords)[0])

    original = solve_module.interpret
    with (
        mock.patch.object(solve_module, "make_planes", watched_planes),
        mock.patch.object(solve_module, "interpret", watched_run),
    ):
        planes = SolvedPlanes(journal, "gptq")
        solve(program, graph, calibrated.checkpoint, calibrated.calls, planes, record, **options)
    return Solution(program, graph, planes, outputs, seen, told)


@pytest.fixture(scope="module")
def solution(calibrated, tmp_path_factory: pytest.TempPathFactory) -> Solution:
    folder = tmp_path_factory.mktemp("solved")
    (folder / "mine.toml").write_text(RECIPE)
    return run(calibrated, load_recipe(str(folder / "mine.toml")), Journal())


@pytest.fixture(scope="module")
def artifact(calibrated, quick_compile, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("compiled")
    (folder / "mine.toml").write_text(RECIPE)
    return open_artifact(
        quick_compile(
            calibrated.directory,
            folder / "out",
            str(folder / "mine.toml"),
            calibration=calibrated.path,
            golden=False,
        )
    )


def moments_by_hand(graph: Graph, executor: Executor, calls) -> dict[str, tuple[torch.Tensor, int]]:
    """Checkpoint tensor -> X^T X in float64 and tokens of what meets that weight, run with the stored weights."""
    names = [item.name for item in graph.tensors]
    found: dict[str, tuple[torch.Tensor, int]] = {}
    for call in calls:
        values = [*call.inputs, *executor.tensors, *executor.trace(*call.inputs)]
        for node in graph.nodes:
            if node.target not in ("hif4.linear", "hif4.linear_w4"):
                continue
            if node.target == "hif4.linear":
                codes, scales = (values[ref.index] for ref in node.args[:2])
                x, weight = dequantize(codes, scales, codes.shape[-1] * 2, torch.float64), node.args[2]
            else:
                x, weight = values[node.args[0].index].double(), node.args[1]
            name = names[weight.index - len(graph.inputs)].removesuffix(".codes")
            x = x.reshape(-1, x.shape[-1])
            total, tokens = found.get(name, (0.0, 0))
            found[name] = (total + x.T @ x, tokens + len(x))
    return found


def assert_moments(solution: Solution, executor: Executor, calls) -> None:
    expected = moments_by_hand(solution.graph, executor, calls)
    assert solution.seen.keys() == expected.keys()
    assert len(expected) == 20
    for name, (_, statistics) in solution.seen.items():
        total, tokens = expected[name]
        assert statistics.tokens == tokens == (42 if name in TEXT else 216)
        # Sums of 216 products in fp32: at most 216 roundings of 2^-24, and far fewer as they are random.
        assert float((statistics.hessian.double() - total).norm() / total.norm()) < 1e-6
        assert torch.equal(statistics.energy, statistics.hessian.diagonal())


def test_hessians_are_those_of_the_inputs_behind_rounded_layers(solution, artifact, calibrated):
    """By hand, in the finished artifact: what lies before a weight is there what it was when the weight was rounded."""
    executor = load_expert(artifact, "transformer").variant(None).executor
    assert_moments(solution, executor, calibrated.calls)


def test_readers_of_one_input_share_one_hessian(solution):
    text = [solution.seen[name][1] for name in TEXT]
    assert all(statistics is text[0] for statistics in text)
    first, other = (solution.seen[f"blocks.{block}.attn1.to_q.weight"][1] for block in (0, 1))
    assert first is solution.seen["blocks.0.attn1.to_v.weight"][1]
    assert first is not other


def test_the_artifact_holds_the_solved_planes_and_computes_the_same(solution, artifact, calibrated):
    stored = load_file(artifact.root / "transformer" / "weights.safetensors")
    for name in solution.seen:
        planes = solution.planes.get(name)
        assert planes.keys() == {"codes", "scales"}
        for plane, value in planes.items():
            assert torch.equal(value, stored[f"{name}.{plane}"])
    expert = load_expert(artifact, "transformer").variant(None)
    for call, output in zip(calibrated.calls, solution.outputs, strict=True):
        assert torch.equal(expert(*call.inputs, return_dict=False)[0], output)
    nbytes = sum(calibrated.weight(name.removesuffix(".weight")).nbytes for name in solution.seen)
    assert solution.told == {"total": nbytes, "unit": "bytes", "bytes": nbytes}
    assert solution.planes.get("proj_out.weight") is None


def test_no_linear_is_worse_than_nearest_on_its_calibration(solution, calibrated):
    """The objective that the calibration states, in every linear: below plain rounding in sum, and no row above it."""
    for name, (source, statistics) in solution.seen.items():
        weight = prepared_weight(source, calibrated.checkpoint.read(name), solution.program)[:]
        mask = inverse_mask(solution.program.masks[source.mask])
        target = block_hadamard(weight * mask, 64)
        planes = solution.planes.get(name)
        found = error_energy(target, (planes["codes"], planes["scales"]), statistics.hessian)
        plain = error_energy(target, quantize(target), statistics.hessian)
        # Energies are fp32 products; they order rows within this share.
        assert (found <= plain * (1 + 1e-5)).all()
        assert found.sum() < 0.8 * plain.sum(), name


@pytest.mark.parametrize("activations", ["hif4", "bf16"])
def test_side_branches_are_made_when_the_input_is_known(calibrated, tmp_path, activations):
    """The branch reads its factor before the 4-bit linear does, and the residual needs the Hessian by then."""
    recipe = Recipe("branches", activations=activations, rank=2, rounding="gptq")
    solution = run(calibrated, recipe, Journal())
    (tmp_path / "file").mkdir()
    write_weights(solution.program, calibrated.checkpoint, tmp_path / "file", solved=solution.planes.get)
    tensors = load_file(tmp_path / "file" / "weights.safetensors")
    specs = {spec.name: spec.dtype for spec in solution.program.tensors.values()}
    executor = Executor(
        solution.graph, {name: tensors[name].to(dtype) for name, dtype in specs.items()}, torch.device("cpu")
    )
    assert solution.planes.get("blocks.0.ffn.net.2.weight").keys() == {"codes", "scales", "down", "up"}
    assert_moments(solution, executor, calibrated.calls)
    for call, output in zip(calibrated.calls, solution.outputs, strict=True):
        assert torch.equal(executor(*call.inputs)[0], output)


def test_only_weights_that_ask_for_it_are_solved(calibrated):
    """The others are packed as they are, so that the program can run, and not kept."""
    recipe = Recipe("plain", keep_high=("blocks.1.*",))
    solution = run(calibrated, recipe, Journal())
    assert len(solution.seen) == 10
    assert all(statistics is None for _, statistics in solution.seen.values())
    assert solution.planes.get("blocks.0.attn1.to_q.weight") is None
    assert solution.told == {"total": 0, "unit": "bytes"}


def test_neither_ranks_nor_an_earlier_run_change_a_bit(calibrated, tmp_path, monkeypatch):
    """Two calls on three ranks, of which one has none; then two ranks go on from some of the planes."""
    recipe = Recipe("masks", mask_percentile=99.9, rounding="gptq")
    program = calibrated.program(recipe)
    graph = to_graph(program)
    monkeypatch.setattr(gptq_module, "_ROWS", 64)  # so that there are rows to share
    moments = []
    monkeypatch.setattr(solve_module, "second_moments", lambda *a, **k: moments.append(1) or second_moments(*a, **k))

    def run(folder, ranks):
        told = []
        journal = SolvedPlanes(Journal(folder), "gptq")
        solve(
            program, graph, calibrated.checkpoint, calibrated.calls[:2], journal,
            lambda *event: told.append(event), scratch=tmp_path / "scratch", memory=0, ranks=ranks,
        )  # fmt: skip
        return told, len(moments)

    def files(folder):
        return {path.name: path.read_bytes() for path in (folder / "gptq").iterdir()}

    for name in ("alone", "shared", "scratch"):
        (tmp_path / name).mkdir()
    ((told, count),) = in_ranks(1, partial(run, tmp_path / "alone"))
    # Inputs of a block: one for q, k, v; two outputs; a query; two of the feed-forward; and the text, for both blocks.
    assert count == 2 * 6 + 1
    nbytes = dict(told)["total"]
    assert sum(size for event, size in told if event == "bytes") == nbytes
    assert "skipped" not in dict(told)
    expected = files(tmp_path / "alone")
    assert len(expected) == 20

    assert in_ranks(3, partial(run, tmp_path / "shared")) == [(told, count)] * 3
    assert files(tmp_path / "shared") == expected

    lost = [name for name in expected if name.startswith("blocks.1") or "to_v" in name]
    before = {}
    for path in (tmp_path / "shared" / "gptq").iterdir():
        if path.name in lost:
            path.unlink()
        else:
            before[path] = path.stat().st_mtime_ns
    for told, count in in_ranks(2, partial(run, tmp_path / "shared")):
        assert count == 6 + 1 + 1  # those of the second block, of the first block's value projection, and of the text
        left = sum(size for event, size in told if event == "bytes")
        assert dict(told)["total"] == nbytes == left + dict(told)["skipped"]
        assert left == sum(calibrated.weight(name.removesuffix(".weight.safetensors")).nbytes for name in lost)
    assert files(tmp_path / "shared") == expected
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert not any((tmp_path / "scratch").iterdir())


def test_a_rank_that_fails_ends_the_others(calibrated, tmp_path):
    program = calibrated.program(Recipe("plain", rounding="gptq"))

    def run(ranks):
        planes = SolvedPlanes(Journal(), "gptq")
        scratch = tmp_path if ranks.first else tmp_path / "gone"
        solve(
            program, to_graph(program), calibrated.checkpoint, calibrated.calls, planes,
            scratch=scratch, memory=0, ranks=ranks,
        )  # fmt: skip

    first, second = in_ranks(2, run)
    assert isinstance(second, Hif4Error)
    assert "gone: writing" in str(second)
    assert str(first) == f"rank 1 failed: {second}"


def test_calls_are_needed(calibrated):
    program = calibrated.program(Recipe("plain", rounding="gptq"))
    with pytest.raises(ValueError, match="needs calls"):
        solve(program, to_graph(program), calibrated.checkpoint, [], SolvedPlanes(Journal(), "gptq"))


def test_steps_are_measured_with_both_programs(artifact, calibrated):
    """The manifest's figures, and the ranges that follow from them."""
    model = load_expert(artifact, "transformer")
    progress = []
    with Calibration(calibrated.path) as calibration:
        errors = measure_steps("transformer", model, calibration.expert("transformer"), progress.append)
        recorded = list(calibration.expert("transformer").calls())
    assert progress == [1, 1, 1]
    assert [error.timestep for error in errors] == [900, 500, 100]
    for error, (call, expected) in zip(errors, recorded, strict=True):
        assert error.expert == "transformer"
        for found, name in ((error.w4a4, None), (error.w4a16, "bf16")):
            output = model.variant(name)(*call.inputs, return_dict=False)[0].double()
            noise, signal = (output - expected.double()).square().sum(), expected.double().square().sum()
            assert found == pytest.approx(float(noise / signal), rel=1e-12)
    entry = artifact.manifest["experts"]["transformer"]
    assert [item["w4a4"] for item in entry["step_errors"]] == [error.w4a4 for error in errors]
    # A third of three steps, and the ends lie midway between timesteps.
    (chosen,) = entry["bf16_timesteps"]
    assert chosen in ([700, 1000], [300, 700], [0, 300])
    assert model.bf16_timesteps == (tuple(chosen),)
