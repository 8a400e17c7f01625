import hashlib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.choose import Choices
from hif4c.compiler.models import WanConfig
from hif4c.compiler.output_error import error_energy
from hif4c.compiler.pack import stored_tensors, write_weights
from hif4c.compiler.pipeline import run_passes
from hif4c.compiler.plan import make_plan
from hif4c.compiler.planes import InputStatistics, make_planes, whole_tensor
from hif4c.compiler.recipe import Recipe, load_recipe
from hif4c.compiler.synthetic import synthetic_layer
from hif4c.passes.program import Program, TensorSource
from hif4c.runtime.format import dequantize, quantize
from hif4c.runtime.rotation import block_hadamard
from tests.passes.builder import evaluate, stored
from tests.support.checkpoints import small_config, write_diffusers_model


@pytest.fixture(scope="module")
def packed(captures):
    def get(recipe="rtn"):
        config = WanConfig.from_dict(small_config("t2v"), "config.json")
        program = captures.variant("t2v")
        run_passes(program, Choices(make_plan(config, load_recipe(recipe))), load_recipe(recipe))
        return program

    return get


def checkpoint_of(models):
    return Checkpoint(models["t2v"].directory / "transformer", models["t2v"].config, "diffusers")


@pytest.mark.parametrize(("recipe", "hadamard"), [("rtn", 0), ("rotate", 64)])
def test_planes_are_the_quantized_weights_and_the_rest_is_copied(packed, models, tmp_path, recipe, hadamard):
    program = packed(recipe)
    events = []
    with checkpoint_of(models) as checkpoint:
        written = write_weights(program, checkpoint, tmp_path, lambda *event: events.append(event))
        assert written.fingerprint == checkpoint.fingerprint()
        assert events[:2] == [("total", checkpoint.total_bytes), ("unit", "bytes")]
        assert {name for name, _ in events[2:]} == {"bytes"}
        assert sum(value for _, value in events[2:]) == checkpoint.total_bytes
    original = load_file(models["t2v"].directory / "transformer" / "diffusion_pytorch_model.safetensors")
    stored = load_file(tmp_path / "weights.safetensors")
    planes = {name: value for name, value in stored.items() if name.endswith((".codes", ".scales"))}
    assert len(planes) == 2 * 20
    for name in {name.rpartition(".")[0] for name in planes}:
        codes, scales = quantize(original[name], None, hadamard)
        assert torch.equal(stored[f"{name}.codes"], codes)
        assert torch.equal(stored[f"{name}.scales"], scales)
        assert name not in stored
        # Exactly 4.5 bits a weight.
        assert 16 * (codes.nbytes + scales.nbytes) == 9 * original[name].numel()
    copied = [name for name in stored if name in original]
    assert len(copied) == len(original) - 20
    for name in copied:
        assert stored[name].dtype == original[name].dtype  # bf16 stays bf16, although norms compute in fp32
        assert torch.equal(stored[name], original[name])
    for name, (size, digest) in written.files.items():
        data = (tmp_path / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (size, digest)


def test_a_float32_checkpoint_is_quantized_in_the_dtype_of_the_program(packed, captures, tmp_path):
    """The model computes in bf16, so bf16 weights are what is quantized; what it computes in fp32 stays fp32."""
    config = WanConfig.from_dict(small_config("t2v"), "config.json")
    written = write_diffusers_model(tmp_path / "model", "t2v", experts=1, dtype=torch.float32)["transformer"]
    state = written.state_dict()
    with Checkpoint(tmp_path / "model" / "transformer", config, "diffusers") as checkpoint:
        write_weights(packed(), checkpoint, tmp_path)
    stored = load_file(tmp_path / "weights.safetensors")
    name = "blocks.0.attn1.to_q.weight"
    assert torch.equal(stored[f"{name}.codes"], quantize(state[name].bfloat16())[0])
    assert not torch.equal(stored[f"{name}.codes"], quantize(state[name])[0])  # the test can tell
    assert stored["blocks.0.scale_shift_table"].dtype == torch.float32
    assert torch.equal(stored["blocks.0.scale_shift_table"], state["blocks.0.scale_shift_table"])
    assert torch.equal(stored["proj_out.weight"], state["proj_out.weight"].bfloat16())


def test_a_mask_divides_the_columns(packed, models, tmp_path):
    program = packed()
    mask = torch.linspace(0.5, 2, 128)
    name = "blocks.1.attn1.to_q.weight"
    program = Program(program.graph, dict(program.tensors), program.inputs, program.fake_mode, masks={"m": mask})
    for key, spec in program.tensors.items():
        if spec.source == name:
            program.tensors[key] = replace(spec, mask="m", hadamard=32)
    with checkpoint_of(models) as checkpoint:
        original = checkpoint.read(name).clone()
        write_weights(program, checkpoint, tmp_path)
    stored = load_file(tmp_path / "weights.safetensors")
    codes, scales = quantize(original, 1.0 / mask, 32)
    assert torch.equal(stored[f"{name}.codes"], codes)
    assert torch.equal(stored[f"{name}.scales"], scales)
    assert not torch.equal(codes, quantize(original)[0])


def test_headers_are_known_before_the_weights_are_read(packed, models, tmp_path):
    program = packed()
    with checkpoint_of(models) as checkpoint:
        specs = stored_tensors(program, checkpoint)
        write_weights(program, checkpoint, tmp_path)
    stored = load_file(tmp_path / "weights.safetensors")
    assert [spec.name for spec in specs] == [spec.name for spec in program.tensors.values()]
    assert {spec.name: (spec.dtype, spec.shape) for spec in specs} == {
        name: (value.dtype, tuple(value.shape)) for name, value in stored.items()
    }


# Planes of one weight.

N, K = 48, 256
OUTLIERS = [3, 130, 131]


def empty_program(**tables: dict[str, torch.Tensor]) -> Program:
    return Program(fx.Graph(), {}, [], FakeTensorMode(), **tables)


def made_planes(masked: str, rotation: int, rank: int, rounding: str):
    """(source, program, weight, statistics, planes) of a weight of rows of several sizes, and a row mask on top."""
    x, weight = synthetic_layer("attn2.q", 512, K, N, seed=4)
    weight[:, 7] *= 20
    generator = torch.Generator().manual_seed(5)
    mask = 2.0 ** torch.randn(K, generator=generator)
    mask[11] *= -1
    if masked == "zeros":
        mask[OUTLIERS] = 0
    rows = 2.0 ** torch.randn(N, generator=generator)
    program = empty_program(masks={"m": mask, "rows": rows})
    source = TensorSource(
        "w.codes", torch.uint8, (N, K // 2), source="w", plane="codes", mask=None if masked == "none" else "m",
        hadamard=rotation, packed_from=torch.bfloat16, row_mask="rows", rank=rank, rounding=rounding,
        mask_folded=masked == "folded",
    )  # fmt: skip
    seen = x.float() if masked == "none" else x.float() * mask
    seen = block_hadamard(seen, rotation) if rotation else seen
    hessian = seen.T @ seen
    statistics = InputStatistics(hessian.diagonal(), len(seen), hessian)
    return source, program, weight.float() * rows[:, None], statistics, make_planes(source, weight, program, statistics)


@pytest.mark.parametrize("masked", ["none", "plain", "zeros", "folded"])
@pytest.mark.parametrize("rotation", [0, 64, 256])
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("rounding", ["nearest", "search", "gptq"])
def test_planes_hold_the_weight_but_for_the_rounding(masked, rotation, rank, rounding):
    """In the coordinates of x: side branch plus decoded planes are W, off by what the rounding of a residual costs.

    The residual is made here in float64 from the formula in `TensorSource`, of the side branch as it is stored. Its
    error, by the objective of the rounding, is at most that of plain rounding (for "nearest" it is that).
    """
    _, program, weight, statistics, planes = made_planes(masked, rotation, rank, rounding)
    mask = torch.ones(K).double() if masked == "none" else program.masks["m"].double()
    inverse = torch.where(mask == 0, 0.0, 1 / mask)
    seen = torch.ones(K).double() if masked == "folded" else mask  # what `down` reads, in units of x * m
    weight = weight.double()
    assert planes.keys() == {"codes", "scales"} | ({"down"} if rank else set()) | (
        {"up"} if rank or masked == "zeros" else set()
    )
    low_rank = torch.zeros(N, K).double()
    if rank:
        down, up = planes["down"].double(), planes["up"][:rank].double()
        assert (planes["down"].dtype, planes["down"].shape) == (torch.bfloat16, (rank, K))
        assert (planes["down"][:, mask == 0] == 0).all()
        low_rank = up.T @ torch.where(seen == 0, 0.0, down / seen)  # in the coordinates of x * m
    if "up" in planes:
        columns = planes["up"][rank:]
        assert planes["up"].dtype == torch.bfloat16
        assert torch.equal(columns, weight[:, mask == 0].T.to(torch.bfloat16))
    residual = weight * inverse - low_rank
    rotated = block_hadamard(residual, rotation) if rotation else residual
    codes, scales = planes["codes"], planes["scales"]
    decoded = dequantize(codes, scales, K, torch.float64)
    # The whole: what the program computes with, taken back to x.
    unrotated = block_hadamard(decoded, rotation) if rotation else decoded
    effective = (unrotated + low_rank) * mask
    if masked == "zeros":
        effective[:, mask == 0] = planes["up"][rank:].T.double()
    off = (effective - weight) * inverse
    off = block_hadamard(off, rotation) if rotation else off
    exact = torch.eye(K) if rounding == "nearest" else statistics.hessian
    exact = torch.diag(statistics.energy) if rounding == "search" else exact
    objective = ((off @ exact.double()) * off).sum()
    plain = error_energy(rotated.float(), quantize(rotated.float()), exact).sum()
    # fp32 products in the search and in the residual: some 1e-6 of what they are compared with.
    assert objective <= plain * (1 + 1e-4)
    if rounding == "nearest":
        packed = error_energy(rotated.float(), (codes, scales), exact).sum()
        assert packed == pytest.approx(float(plain), rel=1e-4)
    else:
        assert objective < 0.97 * plain


@pytest.mark.parametrize("masked", ["none", "plain", "zeros", "folded"])
def test_the_low_rank_part_is_nearly_the_best(masked):
    """Against the singular values in float64, of the masked weight without its outlier columns."""
    _, program, weight, _, planes = made_planes(masked, 0, 5, "nearest")
    mask = torch.ones(K).double() if masked == "none" else program.masks["m"].double()
    masked_weight = weight.double() * torch.where(mask == 0, 0.0, 1 / mask)
    seen = torch.ones(K).double() if masked == "folded" else mask
    low_rank = planes["up"][:5].double().T @ torch.where(seen == 0, 0.0, planes["down"].double() / seen)
    best = torch.linalg.svdvals(masked_weight)[5:].square().sum()
    left = (masked_weight - low_rank).square().sum()
    # bf16 factors are off by 2^-9 of each value, 2^-17 of the energy of both; the random projection by some 1e-3.
    assert best <= left < 1.01 * best + 2.0**-17 * masked_weight.square().sum()
    assert best < 0.9 * masked_weight.square().sum()


def test_equal_weights_give_equal_planes():
    """The random projection has a seed of its own and leaves the caller's alone."""
    torch.manual_seed(1)
    first = made_planes("plain", 64, 5, "gptq")[-1]
    after = torch.rand(1)
    torch.manual_seed(2)
    second = made_planes("plain", 64, 5, "gptq")[-1]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)


def test_a_rank_as_large_as_the_weight_leaves_nothing():
    """With the full rank, what is left to pack is what bf16 factors lose."""
    _, _, weight, _, planes = made_planes("none", 0, N, "nearest")
    left = weight.double() - planes["up"].double().T @ planes["down"].double()
    assert left.norm() < 2.0**-7 * weight.double().norm()
    decoded = dequantize(planes["codes"], planes["scales"], K, torch.float64)
    assert (decoded - left).norm() < 0.1 * left.norm()


def test_roundings_without_statistics_are_a_mistake_of_the_compiler():
    source, program, weight, statistics, _ = made_planes("none", 0, 0, "nearest")
    with pytest.raises(ValueError, match="w: rounding search needs statistics of the input"):
        make_planes(replace(source, rounding="search"), weight, program)
    with pytest.raises(ValueError, match="w: rounding gptq needs statistics of the input"):
        make_planes(replace(source, rounding="gptq"), weight, program, replace(statistics, hessian=None))


# Tensors that are stored whole.


class Tensors:
    """A checkpoint in memory."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = {name.replace("__", "."): value for name, value in tensors.items()}

    def read(self, name: str, validate: bool = False) -> torch.Tensor:
        return self.tensors[name]

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def release(self, name: str) -> None:
        pass


def test_a_bias_with_everything():
    """((b + W s) - t) * m, each in fp32 and W s in fp64."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 64, generator=generator).bfloat16()
    bias = torch.randn(6, generator=generator).bfloat16()
    shift, taken, mask = (torch.randn(size, generator=generator) * 3 for size in (64, 6, 6))
    program = empty_program(masks={"m": mask}, shifts={"s": shift, "t": taken})
    spec = TensorSource("l.bias", torch.float32, (6,), source="l.bias", packed_from=torch.bfloat16)
    checkpoint = Tensors(l__weight=weight, l__bias=bias)
    moved = (weight.double() @ shift.double()).float()
    for changes, expected in (
        ({}, bias),
        ({"input_shift": "s"}, bias.float() + moved),
        ({"row_shifts": ((0, "t"),)}, bias.float() - taken),
        ({"row_mask": "m"}, bias.float() * mask),
        ({"input_shift": "s", "row_shifts": ((0, "t"),), "row_mask": "m"}, ((bias.float() + moved) - taken) * mask),
    ):
        assert torch.equal(whole_tensor(replace(spec, **changes), program, checkpoint), expected)


def test_wide_weights_are_read_in_parts():
    """More rows than are in float64 at once."""
    generator = torch.Generator().manual_seed(0)
    weight, shift = torch.randn(1100, 64, generator=generator), torch.randn(64, generator=generator)
    program = empty_program(shifts={"s": shift})
    spec = TensorSource("l.bias", torch.float32, (1100,), source="l.bias", packed_from=torch.float32, input_shift="s")
    found = whole_tensor(spec, program, Tensors(l__weight=weight, l__bias=torch.zeros(1100)))
    torch.testing.assert_close(found, (weight.double() @ shift.double()).float(), rtol=1e-6, atol=1e-6)


def test_a_row_of_the_modulation_table():
    table = torch.arange(24.0).view(1, 6, 4)
    shifts = {"first": torch.tensor([1.0, 2, 3, 4]), "second": torch.full((4,), 10.0)}
    spec = TensorSource(
        "b.scale_shift_table", torch.float32, (1, 6, 4), source="b.scale_shift_table", packed_from=torch.float32,
        row_shifts=((0, "first"), (3, "second")),
    )  # fmt: skip
    found = whole_tensor(spec, empty_program(shifts=shifts), Tensors(b__scale_shift_table=table))
    expected = table.clone()
    expected[0, 0] -= shifts["first"]
    expected[0, 3] -= 10
    assert torch.equal(found, expected)
    assert torch.equal(table, torch.arange(24.0).view(1, 6, 4))  # the mapped file is not written to


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32])
def test_stored_dtypes(kept):
    """16 bits in the file where nothing is changed, the program's dtype where numbers are new."""
    specs = {
        "copied": TensorSource("n.weight", torch.float32, (4,), source="n.weight"),
        "masked": TensorSource(
            "n.bias", torch.float32, (4,), source="n.bias", packed_from=torch.float32, row_mask="m"
        ),
        "shifted": TensorSource(
            "l.bias", torch.bfloat16, (4,), source="l.bias", packed_from=torch.bfloat16, row_shifts=((0, "t"),)
        ),
        "constant": TensorSource("m", torch.float32, (4,), value=torch.ones(4)),
    }  # fmt: skip
    program = empty_program(masks={"m": torch.full((4,), 3.0)}, shifts={"t": torch.ones(4)})
    program.tensors.update(specs)
    checkpoint = Tensors(**dict.fromkeys(("n__weight", "n__bias", "l__bias"), torch.full((4,), 1.25, dtype=kept)))
    found = {spec.name: spec.dtype for spec in stored_tensors(program, checkpoint)}
    assert found == {"n.weight": kept, "n.bias": torch.float32, "l.bias": torch.bfloat16, "m": torch.float32}
    assert torch.equal(whole_tensor(specs["masked"], program, checkpoint), torch.full((4,), 3.75))


# A whole calibrated model.

EVERYTHING = Recipe(
    "everything", shift=True, mask_percentile=99.9, alpha="search", hadamard=64, rank=3, bf16_layers=0.1
)
CHOSEN = (
    EVERYTHING,
    replace(EVERYTHING, alpha=0.25, outlier_columns=2, hadamard="largest"),
    Recipe("folded", shift=True, mask_percentile=100.0, average_bits=5.0),
)


@pytest.mark.parametrize("recipe", CHOSEN, ids=lambda recipe: recipe.name)
def test_what_is_chosen_keeps_the_function(calibrated, inputs, recipe):
    """With quantizers that do not round, in float64: shifts, masks, folded or not, rotations, side branches."""
    plain = calibrated.program(Recipe("plain"), stop_after="choose_precision")
    program = calibrated.program(recipe, stop_after="add_side_branches")
    assert any(decision.shift for decision in program.decisions.values())
    assert any(decision.mask for decision in program.decisions.values())
    if not recipe.outlier_columns:
        assert any(decision.mask_folded for decision in program.decisions.values())
    state, sample = calibrated.state(), inputs(seed=21)
    (expected,), (found,) = evaluate(plain, state, sample), evaluate(program, state, sample)
    # float64 through two blocks, with masks of some 2^10 and massive channels.
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-10


def test_what_is_written_is_what_the_sources_state(calibrated, tmp_path):
    """Every tensor of a model with shifts and masks, against the definition in the tests' own builder."""
    program = calibrated.program(CHOSEN[-1])
    write_weights(program, calibrated.checkpoint, tmp_path)
    found, expected = load_file(tmp_path / "weights.safetensors"), stored(program, calibrated.state())
    assert found.keys() == expected.keys()
    changed = [spec for spec in program.tensors.values() if spec.changed and spec.plane == "whole"]
    assert {spec.name for spec in changed} >= {f"blocks.0.{name}" for name in ("norm2.bias", "attn1.to_v.bias")}
    for spec in program.tensors.values():
        if spec.plane == "whole" and spec.changed:
            assert found[spec.name].dtype == spec.dtype
        # fp32 sums in another order; a bias in bf16 may round to a neighbour.
        precise = 2.0**-7 if spec.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(
            found[spec.name].to(spec.dtype), expected[spec.name], rtol=precise if spec.changed else 0, atol=precise
        )
