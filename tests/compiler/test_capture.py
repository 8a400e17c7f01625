import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from hif4c.compiler.capture import build_transformer
from hif4c.compiler.choose import Choices
from hif4c.compiler.models import WanConfig
from hif4c.compiler.pipeline import run_passes
from hif4c.compiler.plan import make_plan
from hif4c.compiler.recipe import Recipe
from hif4c.passes.program import module_path
from tests.support import checkpoints
from tests.support.checkpoints import VARIANTS, small_config

# (batch, frames, height, width, text tokens); the trace used (2, 3, 8, 10, 7). Ones everywhere, odd patch counts, a
# wide one, and sizes that are equal where the trace's differed.
SHAPES = [(1, 1, 2, 2, 1), (1, 1, 2, 2, 5), (2, 3, 8, 10, 7), (3, 2, 6, 4, 12), (1, 5, 4, 14, 3), (4, 4, 8, 8, 4)]


def marked(captures, variant, dtype=torch.bfloat16):
    """The program just before the passes that change numbers."""
    program = captures.variant(variant, dtype)
    config = WanConfig.from_dict(small_config(variant), "config.json")
    run_passes(program, Choices(make_plan(config, Recipe("rtn"))), Recipe("rtn"), stop_after="mark_boundaries")
    return program


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_program_is_the_model_bit_for_bit(variant, captures, models, bound, inputs):
    """In the mixed precision of from_pretrained(torch_dtype=bfloat16), on sizes that the trace did not see."""
    model = models[variant].experts["transformer"]
    executor = bound(marked(captures, variant), model.state_dict())
    for shape in SHAPES:
        sample = inputs(variant, *shape)
        with torch.no_grad():
            expected = model(*sample, return_dict=False)[0]
        (found,) = executor(*sample)
        assert found.dtype == expected.dtype == torch.bfloat16
        assert expected.isfinite().all()
        assert torch.equal(found, expected), shape


def test_a_float32_program_is_the_float32_model_bit_for_bit(captures, bound, inputs):
    model = checkpoints.build_transformer("t2v")
    executor = bound(marked(captures, "t2v", torch.float32), model.state_dict())
    video, timestep, text = inputs("t2v", 1, 2, 4, 6, 9)
    sample = (video.float(), timestep, text.float())
    with torch.no_grad():
        expected = model(*sample, return_dict=False)[0]
    (found,) = executor(*sample)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_weight_is_loaded(variant, captures, models):
    """Every tensor is fake, with name, shape and dtype of the loaded model's; only the RoPE tables are real."""
    program = captures.variant(variant)
    state = models[variant].experts["transformer"].state_dict()
    sources = {spec.source: spec for spec in program.tensors.values() if spec.source is not None}
    assert sources.keys() == {name for name in state if not name.startswith("rope.")}
    for name, spec in sources.items():
        assert (spec.dtype, spec.shape, spec.value) == (state[name].dtype, tuple(state[name].shape), None)
    real = {spec.name for spec in program.tensors.values() if spec.value is not None}
    assert real == {"rope.freqs_cos", "rope.freqs_sin"}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch.Tensor):
            assert isinstance(value, FakeTensor), node.name


def test_the_module_has_no_storage():
    """14 billion parameters would not fit; built from the published config, none takes a byte."""
    config = WanConfig.from_dict(small_config("t2v", num_layers=1, ffn_dim=2**20, text_dim=2**20), "config.json")
    model = build_transformer(config)
    assert sum(parameter.numel() for parameter in model.parameters()) > 4e8
    assert all(isinstance(parameter, FakeTensor) for parameter in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_linear_has_its_path(variant, captures, models):
    program = captures.variant(variant)
    model = models[variant].experts["transformer"]
    expected = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = [program.linear_path(node) for node in program.linears()]
    assert sorted(found) == sorted(expected)
    assert [module_path(node) for node in program.linears()] == found


def test_sizes_have_names_for_people(captures):
    program = captures.variant("t2v")
    assert set(program.symbols.values()) == {"b", "f", "h", "w", "text"}
    assert program.inputs == ["hidden_states", "timestep", "encoder_hidden_states"]


@pytest.mark.slow
def test_the_largest_expert_is_captured_in_little_memory():
    """A14B's expert has 28.6 GB of weights in bf16. Imports alone take some 500 MB; 1 GB leaves no room for any weight
    matrix of the model beside them (ffn: 142 MB in bf16, each of 80)."""
    code = (
        "import resource; from hif4c.compiler.capture import capture; from hif4c.compiler.locate import describe_model;"
        "program = capture(describe_model('Wan2.2-T2V-A14B').configs['transformer']);"
        "assert sum(1 for _ in program.linears()) == 406;"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    kilobytes = int(result.stdout.split()[-1])
    assert kilobytes < 1_000_000, f"{kilobytes} kB"
