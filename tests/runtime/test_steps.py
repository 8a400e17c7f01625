"""Two programs over one weight file: which of them runs at a timestep, and what is refused."""

import shutil

import pytest
import torch
from typer.testing import CliRunner

from hif4c.compiler.choose import Choices
from hif4c.compiler.emit import to_graph
from hif4c.compiler.models import WanConfig
from hif4c.compiler.pipeline import run_passes
from hif4c.compiler.plan import make_plan
from hif4c.compiler.recipe import load_recipe
from hif4c.passes.relax_activations import relax_activations
from hif4c.passes.verify import Stage, verify
from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.golden import make_golden
from hif4c.runtime.graph import Graph, InputType, Node, Ref, TensorType, decode, encode
from hif4c.runtime.safetensors_stream import StreamingWriter, TensorSpec
from hif4c.runtime.transformer import CompiledTransformer, load
from hif4c.runtime.verify import verify_artifact
from hif4c.tools.cli import app
from tests.support.checkpoints import small_config
from tests.support.forging import forge

RANGES = [[0, 100.5], [900.0, 1000]]
GRAPH = "transformer/graph.bf16.json"


@pytest.fixture(scope="module")
def relaxed(captures):
    """(variant, recipe) -> the bytes of graph.bf16.json."""
    made = {}

    def get(variant="t2v", recipe="rtn"):
        if (variant, recipe) not in made:
            program, chosen = captures.variant(variant), load_recipe(recipe)
            plan = make_plan(WanConfig.from_dict(small_config(variant), "config.json"), chosen)
            run_passes(program, Choices(plan), chosen)
            relax_activations(program)
            verify(program, Stage.FUSED)
            made[variant, recipe] = encode(to_graph(program))
        return made[variant, recipe]

    return get


@pytest.fixture
def stepwise(artifacts, relaxed, tmp_path):
    """A copy of an artifact to which the second program was added."""

    def make(variant="t2v", recipe="rtn", ranges=RANGES, **files):
        path = shutil.copytree(artifacts(variant, recipe), tmp_path / f"{variant}-{recipe}", dirs_exist_ok=True)
        files = {GRAPH: relaxed(variant, recipe), **files}
        forge(path, lambda manifest: manifest["experts"]["transformer"].update(bf16_timesteps=ranges), **files)
        return path

    return make


def at(sample, *timesteps):
    """The same sample at other timesteps, one a sample of the batch."""
    video, _, text = sample
    return video, torch.tensor(timesteps), text


@pytest.mark.parametrize(
    ("timesteps", "bf16"),
    [
        ((0, 0), True), ((100, 100), True), ((100.5, 1.0), True), ((100.6, 100.6), False), ((500, 500), False),
        ((899.9, 899.9), False), ((900, 900), True), ((1000, 1000), True),
        ((50, 500), False), ((500, 950), True), ((950, 50), True),
    ],
)  # fmt: skip
def test_the_largest_timestep_chooses_the_program(timesteps, bf16, stepwise, artifacts, inputs):
    """Both are known from artifacts of one program: the very W4A4 one, and the W4A16 one of the same weights."""
    model = load(stepwise())
    assert model.bf16_timesteps == ((0.0, 100.5), (900.0, 1000.0))
    sample = at(inputs(), *timesteps)
    assert model.uses_bf16(sample[1]) == bf16
    w4a4, w4a16 = (load(artifacts("t2v", recipe))(*sample).sample for recipe in ("rtn", "weight-only"))
    assert not torch.equal(w4a4, w4a16)
    assert torch.equal(model(*sample).sample, w4a16 if bf16 else w4a4)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64, torch.bfloat16])
def test_any_number_type_of_timestep(dtype, stepwise):
    model = load(stepwise())
    assert model.uses_bf16(torch.tensor([996]).to(dtype))  # exact in bf16
    assert not model.uses_bf16(torch.tensor([888]).to(dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1000.5])
def test_timesteps_in_no_range(value, stepwise):
    assert not load(stepwise()).uses_bf16(torch.tensor([value, value]))


def test_no_sample_at_all(stepwise):
    assert not load(stepwise()).uses_bf16(torch.empty(0))


def test_a_given_first_frame_does_not_hide_the_timestep(stepwise, artifacts, inputs):
    """TI2V: the tokens of a first frame that is given have timestep 0, which lies in the lower range."""
    model = load(stepwise("ti2v"))
    video, timestep, text = inputs("ti2v")
    for step, recipe in ((500.0, "rtn"), (950.0, "weight-only"), (40.0, "weight-only")):
        timestep = torch.full_like(timestep, step)
        timestep[:, :12] = 0.0
        expected = load(artifacts("ti2v", recipe))(video, timestep, text).sample
        assert torch.equal(model(video, timestep, text).sample, expected), step


def test_with_a_rotation_the_second_program_is_the_better_one(stepwise, models, inputs):
    """No artifact of one program has rotated weights and bf16 activations, so the original is the yardstick."""
    model = load(stepwise("t2v", "rotate"))
    sample = inputs()
    with torch.no_grad():
        expected = models["t2v"].experts["transformer"](*sample, return_dict=False)[0].double()
    errors = [
        float((model.variant(name)(*sample).sample.double() - expected).norm() / expected.norm())
        for name in (None, "bf16")
    ]
    assert 0.01 < errors[1] < 0.8 * errors[0] < 0.3, errors  # without the inputs' half of the noise: 0.7


def test_variants_run_one_program_at_every_timestep_on_the_same_tensors(stepwise, artifacts, inputs):
    model = load(stepwise())
    held = {buffer.data_ptr() for buffer in model.buffers()}
    for name, recipe, target in ((None, "rtn", "hif4.linear"), ("bf16", "weight-only", "hif4.linear_w4")):
        alone = model.variant(name)
        assert alone.bf16_timesteps == ()
        assert {node.target for node in alone.graph.nodes} & {"hif4.linear", "hif4.linear_w4"} == {target}
        assert alone.executor.graph is alone.graph
        assert {buffer.data_ptr() for buffer in alone.buffers()} == held
        assert {tensor.data_ptr() for tensor in alone.executor.tensors} == held
        for timestep in (50, 500):
            sample = at(inputs(), timestep, timestep)
            assert torch.equal(alone(*sample).sample, load(artifacts("t2v", recipe))(*sample).sample)
    with pytest.raises(Hif4Error, match=r"has no variant 'fp8'; it has bf16"):
        model.variant("fp8")
    with pytest.raises(Hif4Error, match=r"has no variant 'bf16'; it has none"):
        load(artifacts()).variant("bf16")


def test_the_main_program_stays_the_main_program(stepwise, artifacts, inputs):
    model, plain = load(stepwise()), load(artifacts())
    assert model.graph == plain.graph
    assert plain.bf16_graph is None
    assert model.executor.graph is model.graph
    before = model.executor
    model(*at(inputs(), 950, 950))
    assert model.executor is before
    buffers = [(name, buffer.dtype, buffer.shape) for name, buffer in model.named_buffers()]
    assert buffers == [(name, buffer.dtype, buffer.shape) for name, buffer in plain.named_buffers()]


def test_a_program_that_no_call_needed_is_not_bound(stepwise, inputs):
    model = load(stepwise())
    model(*at(inputs(), 500, 500))
    assert len(model._executors) == 1
    model(*at(inputs(), 950, 950))
    assert len(model._executors) == 2


def test_both_programs_follow_a_move(stepwise, inputs):
    model = load(stepwise())
    samples = [at(inputs(), step, step) for step in (500, 950)]
    expected = [model(*sample).sample for sample in samples]
    model._apply(torch.zeros_like)
    for sample, before in zip(samples, expected, strict=True):
        assert not torch.equal(model(*sample).sample, before)


def test_an_artifact_says_what_it_has(stepwise, artifacts):
    plain, opened = open_artifact(artifacts()), open_artifact(stepwise())
    assert plain.expert("transformer").bf16_timesteps == ()
    assert plain.variants("transformer") == []
    assert opened.variants("transformer") == ["bf16"]
    assert opened.variants("transformer_2") == []
    assert opened.expert("transformer").bf16_timesteps == ((0.0, 100.5), (900.0, 1000.0))
    assert opened.graph("transformer") == plain.graph("transformer")
    assert opened.graph("transformer", "bf16") != plain.graph("transformer")
    for name in ("transformer", "transformer_2"):
        with pytest.raises(Hif4Error, match=r"has no variant '\.\./x' of its program; it has (bf16|none)"):
            opened.graph(name, "../x")
    assert load(artifacts()).bf16_timesteps == ()


@pytest.mark.parametrize("ranges", [[], [[5, 5]], [[0, 1000]], [[0, 1], [2, 3], [4.5, 5]]])
def test_ranges_that_are_right(ranges, stepwise):
    model = load(stepwise(ranges=ranges))
    assert model.bf16_timesteps == tuple(map(tuple, ranges))
    assert model.uses_bf16(torch.tensor([5])) == bool(ranges)
    assert model.variant("bf16") is not None  # there is a program, though it may have no timesteps


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        (None, "bf16_timesteps is not a list of ranges"),
        ({"0": 1}, "bf16_timesteps is not a list of ranges"),
        ("0-100", "bf16_timesteps is not a list of ranges"),
        ([5], "5 is not a pair of numbers"),
        ([[]], "[] is not a pair of numbers"),
        ([[1, 2, 3]], "[1, 2, 3] is not a pair of numbers"),
        ([["0", "100"]], '["0", "100"] is not a pair of numbers'),
        ([[0, True]], "[0, true] is not a pair of numbers"),
        ([[0, None]], "[0, null] is not a pair of numbers"),
        ([[list(range(1000)), 5]], "... is not a pair of numbers"),
        ([[5, 4]], "[5, 4] is not a range in 0 to 1000"),
        ([[-1, 4]], "[-1, 4] is not a range in 0 to 1000"),
        ([[0, 1000.5]], "[0, 1000.5] is not a range in 0 to 1000"),
        ([[0, 10**400]], "... is not a range in 0 to 1000"),
        ([[10, 20], [0, 5]], "[0, 5] does not lie above the range before it"),
        ([[10, 20], [15, 25]], "[15, 25] does not lie above the range before it"),
        ([[10, 20], [20, 25]], "[20, 25] does not lie above the range before it"),
    ],
)
def test_ranges_that_are_none(ranges, words, stepwise):
    path = stepwise(ranges=ranges)
    for refuse in (open_artifact, load, verify_artifact, lambda path: load(path, "transformer_2")):
        with pytest.raises(Hif4Error) as caught:
            refuse(path)
        assert words in str(caught.value)
        assert "manifest.json" in str(caught.value)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_ranges_that_are_not_finite(number, stepwise):
    path = stepwise(ranges=[[0, 12345]]) / "manifest.json"
    path.write_text(path.read_text().replace("12345", number))
    with pytest.raises(Hif4Error, match=r"manifest.json: is not valid JSON"):
        open_artifact(path.parent)


def test_ranges_without_a_program(artifacts, tmp_path):
    path = shutil.copytree(artifacts(), tmp_path / "artifact")
    forge(path, lambda manifest: manifest["experts"]["transformer_2"].update(bf16_timesteps=[[0, 5]]))
    with pytest.raises(Hif4Error, match=r"transformer_2 has timesteps with bf16 activations, but no transformer_2/"):
        open_artifact(path)


def test_a_damaged_or_missing_second_program(stepwise):
    path = stepwise()
    (path / GRAPH).write_bytes((path / GRAPH).read_bytes()[:-2] + b" \n")
    with pytest.raises(Hif4Error, match=r"graph.bf16.json: its content does not match the manifest"):
        load(path)
    (path / GRAPH).unlink()
    with pytest.raises(Hif4Error, match=r"graph.bf16.json: is missing"):
        open_artifact(path)


def set_type(graph: Graph, name: str, kind: TensorType) -> None:
    place = next(number for number, item in enumerate(graph.tensors) if item.name == name)
    graph.tensors[place] = InputType(name, kind)


FORGED = {
    "not a program": (lambda graph: b"[]", r"graph.bf16.json does not have the structure of a program"),
    "another operator": (
        lambda graph: encode(graph).replace(b'"hif4.linear_w4"', b'"os.system"'),
        r"graph.bf16.json: the program calls 'os.system'",
    ),
    "an output less": (lambda graph: graph.outputs.clear(), "the program for bf16 steps does not have the inputs"),
    "another input": (
        lambda graph: graph.inputs.__setitem__(0, InputType("pixels", graph.inputs[0].type)),
        "the program for bf16 steps does not have the inputs and output",
    ),
    "another tensor": (
        lambda graph: graph.tensors.__setitem__(0, InputType("elsewhere", graph.tensors[0].type)),
        r"transformer: the program for bf16 steps reads elsewhere, which the main program does not",
    ),
    "another dtype": (
        lambda graph: set_type(graph, "proj_out.bias", TensorType("float32", (64,))),
        r"transformer: the program for bf16 steps reads proj_out.bias as float32\[64\], the main program as bfloat16",
    ),
    "another shape": (
        lambda graph: set_type(graph, "proj_out.bias", TensorType("bfloat16", (32,))),
        r"reads proj_out.bias as bfloat16\[32\], the main program as bfloat16\[64\]",
    ),
}


@pytest.mark.parametrize("what", FORGED)
@pytest.mark.parametrize("ranges", [RANGES, []])
def test_forged_second_programs(what, ranges, stepwise, relaxed):
    """Hashes fit, so it is what the program says that is refused, whether or not a timestep would ever run it."""
    change, words = FORGED[what]
    graph = decode(relaxed(), "graph")
    data = change(graph)
    path = stepwise(ranges=ranges, **{GRAPH: data if isinstance(data, bytes) else encode(graph)})
    for refuse in (load, verify_artifact):
        with pytest.raises(Hif4Error, match=words):
            refuse(path)


def test_a_second_program_may_read_fewer_tensors(artifacts, inputs):
    """Its tensors are found by name, not by position."""
    model = load(artifacts())
    names = [item.name for item in model.graph.tensors]
    tensors = dict(zip(names, model.executor.tensors, strict=True))
    bias = next(item for item in model.graph.tensors if item.name == "proj_out.bias")
    kind = TensorType("bfloat16", (64,))
    small = Graph(model.graph.inputs, [bias], [Node("aten.silu.default", (Ref(3),), {}, "", kind)], [Ref(4)])
    both = CompiledTransformer(
        model.graph, tensors, model.config, model.dtype, False, bf16_graph=small, bf16_timesteps=[(0, 10)]
    )
    assert torch.equal(both(*at(inputs(), 5, 5)).sample, torch.nn.functional.silu(tensors["proj_out.bias"]))
    assert [name for name, _ in both.variant("bf16").named_buffers()] == ["weights/proj_out/bias"]
    with pytest.raises(ValueError, match="but no program for them"):
        CompiledTransformer(model.graph, tensors, model.config, model.dtype, False, bf16_timesteps=[(0, 10)])


def record(path, name, model):
    """Golden outputs of a program, as the compiler stores them."""
    golden = make_golden(model)
    specs = [TensorSpec(key, value.dtype, tuple(value.shape)) for key, value in golden.items()]
    (path / "new").mkdir()
    with StreamingWriter(path / "new", specs, base_name=name) as writer:
        for key, value in golden.items():
            writer.write(key, value)
    data = (path / "new" / f"{name}.safetensors").read_bytes()
    shutil.rmtree(path / "new")
    forge(path, **{f"golden/{name}.safetensors": data})


def test_both_programs_are_replayed_alone(stepwise):
    """The golden timestep, 500, lies in the range here: the main program must be replayed nevertheless."""
    path = stepwise(ranges=[[0, 1000]])
    first, steps, second = verify_artifact(path, kernels="portable")
    assert [(check.expert, check.variant) for check in (first, steps, second)] == [
        ("transformer", None), ("transformer", "bf16"), ("transformer_2", None),
    ]  # fmt: skip
    assert first.replay.identical
    assert second.replay.identical
    assert steps.replay is None
    assert steps.passed
    assert steps.tensors == first.tensors
    assert steps.nodes < first.nodes
    record(path, "transformer.bf16", load(path, kernels="portable").variant("bf16"))
    steps = verify_artifact(path, kernels="portable")[1]
    assert steps.replay.identical
    assert steps.replay.linears == 20
    record(path, "transformer.bf16", load(path, kernels="portable").variant(None))
    steps = verify_artifact(path, kernels="portable")[1]
    assert not steps.passed
    assert steps.replay.distance > 0.01


def test_commands_show_the_second_program(stepwise):
    def output(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, (result.output, result.exception)
        return " ".join(result.stdout.split())

    path = stepwise()
    record(path, "transformer.bf16", load(path).variant("bf16"))
    verified = output("verify", path)
    assert "transformer, bf16 steps" in verified
    assert verified.count(" ok ") == 3
    assert verified.count("20: identical") == 3
    overview = output("inspect", path)
    assert "bf16 activations of transformer: at timesteps 0 to 100.5, 900 to 1000 (--variant bf16)" in overview
    assert "20 hif4.linear " in overview
    assert "hif4.linear_w4" not in overview
    block = output("inspect", path, "--block", "1", "--variant", "bf16")
    assert block.count("hif4.linear_w4(") == 10
    assert "quantize(" not in block
    assert block.count("hif4.norm(") == 3
    assert "blocks.0." not in block
    whole = output("inspect", path, "--variant", "bf16")
    assert whole.count("hif4.linear_w4(") == 20
    for arguments, words in (
        (("--variant", "fp8"), "has no variant 'fp8' of its program; it has bf16"),
        (("--variant", "bf16", "--expert", "transformer_2"), "transformer_2: has no variant 'bf16'"),
        (("--variant", "bf16", "--stage", "insert_qdq"), "leave out --stage insert_qdq"),
    ):
        result = CliRunner().invoke(app, ["inspect", str(path), *arguments])
        assert isinstance(result.exception, Hif4Error)
        assert words in str(result.exception)
    forge(path, lambda manifest: manifest["experts"]["transformer"].update(bf16_timesteps=[]))
    assert "bf16 activations of transformer: at no timestep" in output("inspect", path)
