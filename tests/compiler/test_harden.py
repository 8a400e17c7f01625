"""Hardened models: the same function, outliers where they should be, and nothing left behind by what fails."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.evaluation import latent_snr
from hif4c.compiler.harden import PROFILES, RECORD, SITES, Outliers, choose_injections, harden_model
from hif4c.compiler.locate import locate_model
from hif4c.compiler.models import TINY_NAME, WanConfig, tiny_directory
from hif4c.runtime import load
from hif4c.runtime.errors import Hif4Error
from tests.support.checkpoints import random_inputs, small_config, write_diffusers_model, write_wan_model

EXPERTS = ("transformer", "transformer_2")
FILE = "diffusion_pytorch_model.safetensors"


def add_vae(directory: Path) -> Path:
    """The component that the small models' model_index.json names, in the least form that is one."""
    (directory / "vae").mkdir()
    (directory / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan"}))
    save_file({"weight": torch.ones(3)}, directory / "vae" / FILE)
    return directory


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A sharded model of one expert with a timestep per token; all its weights are random."""
    directory = tmp_path_factory.mktemp("small") / "ti2v"
    write_diffusers_model(directory, "ti2v", shards=True)
    return add_vae(directory)


@pytest.fixture(scope="module")
def hardened(small, tmp_path_factory):
    """(model, profile) -> (original directory, hardened directory, record)."""
    made = {}

    def get(model, profile):
        if (model, profile) not in made:
            original = small if model == "small" else tiny_directory()
            output = tmp_path_factory.mktemp("hardened") / profile
            source = TINY_NAME if model == TINY_NAME else str(small)
            made[model, profile] = (original, output, harden_model(source, output, profile=profile))
        return made[model, profile]

    return get


def sample_inputs(model):
    if model == "small":
        return random_inputs("ti2v")
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 8, 5, 16, 16, generator=generator),
        "timestep": torch.tensor([950.0, 400.0]),
        "encoder_hidden_states": torch.randn(2, 9, 64, generator=generator),
    }


def run(folder, inputs, dtype):
    """The output of an expert in float32, and what its blocks' linears read."""
    model = WanTransformer3DModel.from_pretrained(folder, dtype=dtype).eval()
    seen = {}
    for name, module in model.blocks.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].double()}))
    cast = {key: value if key == "timestep" else value.to(dtype) for key, value in inputs.items()}
    with torch.no_grad():
        return model(**cast, return_dict=False)[0].float(), seen


CASES = [
    ("small", "x32", "transformer"),
    ("small", "x128", "transformer"),
    (TINY_NAME, "x128", "transformer"),
    (TINY_NAME, "x32", "transformer_2"),
    (TINY_NAME, "wan2.2", "transformer_2"),
]


@pytest.mark.parametrize(("model", "profile", "expert"), CASES)
def test_the_function_is_the_same(hardened, model, profile, expert):
    original, output, _ = hardened(model, profile)
    inputs = sample_inputs(model)
    exact, _ = run(original / expert, inputs, torch.float32)
    again, _ = run(output / expert, inputs, torch.float32)
    # Powers of two commute with every rounding but those of 1 + scale: some 2^-24 at a few channels (measured: 133 dB
    # or equal bits). A table in bf16, 2^-9, is caught.
    assert latent_snr(exact, again) > 110
    mixed, _ = run(original / expert, inputs, torch.bfloat16)
    mixed_again, _ = run(output / expert, inputs, torch.bfloat16)
    # Measured: equal bits. Rounding to bf16 may flip where float32 differs, one value in some 2^15; that must stay far
    # below what bf16 itself costs (41 dB on wan-tiny).
    assert latent_snr(mixed, mixed_again) > latent_snr(exact, mixed) + 20


@pytest.mark.parametrize(("model", "profile", "expert"), CASES)
def test_the_inputs_carry_the_outliers(hardened, model, profile, expert):
    original, output, record = hardened(model, profile)
    inputs = sample_inputs(model)
    _, before = run(original / expert, inputs, torch.float32)
    _, after = run(output / expert, inputs, torch.float32)
    layers = max(int(name.split(".")[0]) for name in before) + 1
    factors = {name: torch.ones(value.shape[-1], dtype=torch.float64) for name, value in before.items()}
    for item in record["experts"][expert]["injections"]:
        chosen = PROFILES[profile][item["site"]]
        assert item["factor"] == chosen.factor
        assert len(item["channels"]) == chosen.count(128)
        assert len(set(item["channels"])) == len(item["channels"])
        for block in item["blocks"]:
            for reader in SITES[item["site"]]:
                factors[f"{block}.{reader}"][list(item["channels"])] = item["factor"]
    for site in SITES:
        expected = PROFILES[profile].get(site)
        for block in range(layers):
            factor = factors[f"{block}.{site}"]
            assert int((factor > 1).sum()) == (expected.count(128) if expected else 0)
    for name, value in before.items():
        # The float32 rounding of the modulation (2^-24) reaches all later inputs, grown by the blocks between.
        torch.testing.assert_close(after[name], value * factors[name], rtol=1e-4, atol=1e-5 * float(value.abs().max()))


def test_outliers_stand_out_of_the_other_channels(hardened):
    original, output, _ = hardened(TINY_NAME, "x128")
    inputs = sample_inputs(TINY_NAME)

    def spread(folder):
        _, seen = run(folder / "transformer", inputs, torch.bfloat16)
        sizes = {name: value.flatten(0, -2).square().mean(0).sqrt() for name, value in seen.items()}
        return {name: float(size.max() / size.median()) for name, size in sizes.items()}

    before, after = spread(original), spread(output)
    for name in before:
        if name.endswith("ffn.net.2"):  # after the GELU, where nothing can be injected
            assert after[name] == pytest.approx(before[name], rel=1e-2)
        else:
            # The chosen channels are any, a quiet one may be among them: an eighth of 128 is far above what was there.
            assert after[name] > 16
            assert after[name] > 2 * before[name]


@pytest.mark.parametrize("expert", EXPERTS)
def test_weights_are_exact_and_keep_their_dtypes(hardened, expert):
    original, output, record = hardened(TINY_NAME, "x32")
    changed = set()
    with Checkpoint(original / expert) as before, Checkpoint(output / expert) as after:
        assert after.names == before.names
        assert before.fingerprint() == record["experts"][expert]["fingerprint"]
        for name in before.names:
            old, new = before.read(name), after.read(name)
            if not torch.equal(old, new.to(old.dtype)):
                changed.add(name)
            if name.startswith("blocks.") and name.endswith("scale_shift_table"):
                assert new.dtype == torch.float32
                continue
            assert new.dtype == old.dtype
            exponents = torch.log2((new.double() / old.double())[old != 0])
            assert set(exponents.tolist()) <= {-5.0, 0.0, 5.0}
            assert bool((new[old == 0] == 0).all())
    assert {name.removeprefix("blocks.0.") for name in changed if name.startswith("blocks.0.")} == {
        *(f"{attn}.to_{part}.weight" for attn in ("attn1", "attn2") for part in ("q", "k", "v", "out.0")),
        *("attn1.to_v.bias", "attn2.to_v.bias", "norm2.weight", "norm2.bias"),
        *("ffn.net.0.proj.weight", "scale_shift_table"),
    }
    assert {name for name in changed if not name.startswith("blocks.")} == {
        f"condition_embedder.{module}.{leaf}"
        for module in ("time_proj", "text_embedder.linear_2")
        for leaf in ("weight", "bias")
    }


def test_the_rest_of_the_pipeline_is_copied(hardened):
    original, output, record = hardened(TINY_NAME, "x32")
    changed = {f"{expert}/{FILE}" for expert in EXPERTS}
    files = {path.relative_to(original).as_posix() for path in original.rglob("*") if path.is_file()}
    assert {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()} == files | {RECORD}
    for name in files - changed:
        assert (output / name).read_bytes() == (original / name).read_bytes(), name
    assert json.loads((output / RECORD).read_text()) == json.loads(json.dumps(record))
    assert (record["source"], record["profile"], record["seed"]) == (TINY_NAME, "x32", 0)
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_a_seed_is_a_choice_of_channels(small, hardened, tmp_path):
    _, first, record = hardened("small", "x32")
    again = harden_model(locate_model(str(small)), tmp_path / "again", profile="x32")
    other = harden_model(str(small), tmp_path / "other", profile="x32", seed=1)
    assert again == record
    assert (tmp_path / "again" / "transformer" / FILE).read_bytes() == (first / "transformer" / FILE).read_bytes()
    assert other["experts"] != record["experts"]


def test_channels_are_shared_over_blocks_only_where_they_must_be():
    config = WanConfig.from_dict(small_config(num_layers=8), "config.json")
    injections = choose_injections(config, "x32", "0")
    groups = {site: [item for item in injections if item.site == site] for site in SITES}
    for site, items in groups.items():
        assert sorted(block for item in items for block in item.blocks) == list(range(8))
        assert (len(items) == 1) == (site in ("attn1.to_q", "attn2.to_k", "ffn.net.0.proj"))
        # 8 draws of 2 of 128 channels: all equal only if they were one draw.
        assert len(items) == 1 or len({item.channels for item in items}) > 1
    width = choose_injections(WanConfig.from_dict(small_config(num_attention_heads=40), ""), "x32", "0")
    assert {len(item.channels) for item in width} == {1280 // 64}
    bare = WanConfig.from_dict(small_config(cross_attn_norm=False), "config.json")
    assert {item.site for item in choose_injections(bare, "x32", "0")} == SITES.keys() - {"attn2.to_q"}


def test_a_hardened_model_compiles_and_is_harder(small, hardened, quick_compile, tmp_path):
    _, output, _ = hardened("small", "x128")
    inputs = sample_inputs("small")
    reference, _ = run(small / "transformer", inputs, torch.bfloat16)
    snr = {}
    for name, directory in (("original", small), ("hardened", output)):
        expert = load(quick_compile(directory, tmp_path / name), kernels="portable")
        cast = {key: value if key == "timestep" else value.bfloat16() for key, value in inputs.items()}
        snr[name] = latent_snr(reference, expert(**cast, return_dict=False)[0].float())
    # Measured: 20.6 and 6.6 dB.
    assert snr["hardened"] < snr["original"] - 8, snr


def test_unknown_profile_names_the_known_ones(small, tmp_path):
    with pytest.raises(Hif4Error, match=r"'x33'.*x32, x128, wan2\.2"):
        harden_model(str(small), tmp_path / "out", profile="x33")
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_refused(small, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(Hif4Error, match="out: already exists"):
        harden_model(str(small), tmp_path / "out", profile="x32")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_layouts_are_refused(small, tmp_path):
    write_wan_model(tmp_path / "wan", "ti2v")
    for model in (tmp_path / "wan", small / "transformer"):
        with pytest.raises(Hif4Error, match=r"only a diffusers pipeline \(with model_index.json\)"):
            harden_model(str(model), tmp_path / "deep" / "out", profile="x32")
        assert not (tmp_path / "deep").exists()


def test_a_missing_component_leaves_nothing_behind(small, tmp_path):
    model = shutil.copytree(small, tmp_path / "model")
    shutil.rmtree(model / "vae")
    with pytest.raises(Hif4Error, match="vae"):
        harden_model(str(model), tmp_path / "out", profile="x32")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_weights_that_would_lose_bits_are_refused(tmp_path):
    """Divided by 128, small float16 values become subnormal and lose digits; bfloat16 has exponents to spare."""
    write_diffusers_model(tmp_path / "model", "ti2v", dtype=torch.float16)
    add_vae(tmp_path / "model")
    with pytest.raises(Hif4Error, match="is F16, in which it cannot be scaled by"):
        harden_model(str(tmp_path / "model"), tmp_path / "out", profile="x128")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("factor", [0, 1, 3, 100])
def test_factors_are_powers_of_two(factor):
    with pytest.raises(ValueError, match="not a power of two"):
        Outliers(factor)
