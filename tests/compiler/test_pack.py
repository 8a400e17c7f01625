import hashlib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.models import WanConfig
from hif4c.compiler.pack import stored_tensors, write_weights
from hif4c.compiler.pipeline import run_passes
from hif4c.compiler.plan import make_plan
from hif4c.compiler.recipe import load_recipe
from hif4c.passes.program import Program
from hif4c.runtime.format import quantize
from tests.support.checkpoints import small_config, write_diffusers_model


@pytest.fixture(scope="module")
def packed(captures):
    def get(recipe="rtn"):
        config = WanConfig.from_dict(small_config("t2v"), "config.json")
        program = captures.variant("t2v")
        run_passes(program, make_plan(config, load_recipe(recipe)), load_recipe(recipe))
        return program

    return get


def checkpoint_of(models):
    return Checkpoint(models["t2v"].directory / "transformer", models["t2v"].config, "diffusers")


@pytest.mark.parametrize(("recipe", "hadamard"), [("rtn", 0), ("rotate", 64)])
def test_planes_are_the_quantized_weights_and_the_rest_is_copied(packed, models, tmp_path, recipe, hadamard):
    program = packed(recipe)
    read = []
    with checkpoint_of(models) as checkpoint:
        files, fingerprint = write_weights(program, checkpoint, tmp_path, read.append)
        assert fingerprint == checkpoint.fingerprint()
        assert sum(read) == checkpoint.total_bytes
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
    for name, (size, digest) in files.items():
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
