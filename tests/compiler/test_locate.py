import json
import os
import subprocess
import sys
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from hif4c.compiler import locate
from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.locate import describe_model, locate_model
from hif4c.compiler.models import BUILTIN_NAMES, PipelineConfig, WanConfig
from hif4c.runtime.errors import Hif4Error
from tests.support.checkpoints import VARIANTS, small_config, write_diffusers_model, write_wan_model

HUB_ID = "some-org/Small-Wan"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def refusal(model, **options):
    with pytest.raises(Hif4Error) as caught:
        locate_model(str(model), **options)
    return str(caught.value)


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_directory(tmp_path, variant):
    models = write_diffusers_model(tmp_path / "my-model", variant)
    found = locate_model(str(tmp_path / "my-model"))
    assert (found.source, found.root, found.layout) == ("my-model", tmp_path / "my-model", "diffusers")
    assert found.experts == {name: tmp_path / "my-model" / name for name in models}
    assert list(found.experts) == (["transformer"] if variant == "ti2v" else ["transformer", "transformer_2"])
    assert found.configs == {name: WanConfig.from_dict(small_config(variant), "x") for name in models}
    ratio = {"t2v": 0.875, "i2v": 0.9, "ti2v": None}[variant]
    name = "WanImageToVideoPipeline" if variant == "i2v" else "WanPipeline"
    assert found.pipeline == PipelineConfig(name, ratio, variant == "ti2v")


@pytest.mark.parametrize("variant", VARIANTS)
def test_wan_directory_is_described_as_the_diffusers_one(tmp_path, variant):
    write_wan_model(tmp_path / "original", variant)
    write_diffusers_model(tmp_path / "converted", variant)
    original, converted = (locate_model(str(tmp_path / name)) for name in ("original", "converted"))
    assert (original.layout, original.source) == ("wan", "original")
    assert original.configs == converted.configs
    assert original.pipeline == converted.pipeline
    for name, folder in original.experts.items():
        with (
            Checkpoint(folder, original.configs[name], original.layout) as ours,
            Checkpoint(converted.experts[name]) as theirs,
        ):
            assert ours.fingerprint() == theirs.fingerprint()
    if variant != "ti2v":
        assert [folder.name for folder in original.experts.values()] == ["high_noise_model", "low_noise_model"]


def test_wan_published_config_uses_wans_defaults(tmp_path):
    published = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "dim": 5120,
        "eps": 1e-06,
        "ffn_dim": 13824,
        "freq_dim": 256,
        "in_dim": 36,
        "model_type": "i2v",
        "num_heads": 40,
        "num_layers": 40,
        "out_dim": 16,
        "text_len": 512,
    }
    for folder in ("high_noise_model", "low_noise_model"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(published))
    found = locate_model(str(tmp_path))
    builtin = describe_model("Wan2.2-I2V-A14B")
    assert found.configs == builtin.configs
    assert found.pipeline == builtin.pipeline


def test_one_expert_on_its_own(tmp_path):
    write_diffusers_model(tmp_path / "d")
    write_diffusers_model(tmp_path / "five", "ti2v")
    write_wan_model(tmp_path / "w")
    for folder in ("d/transformer_2", "w/low_noise_model"):
        found = locate_model(str(tmp_path / folder))
        assert found.experts == {"transformer": tmp_path / folder}
        assert found.source == Path(folder).name
        assert found.pipeline == PipelineConfig("WanPipeline", None, False)
    assert locate_model(str(tmp_path / "five" / "transformer")).pipeline.expand_timesteps


def test_absent_experts_are_null_or_not_named(tmp_path):
    write_diffusers_model(tmp_path)
    edit_json(tmp_path / "model_index.json", lambda index: index.update(transformer=[None, None]))
    assert list(locate_model(str(tmp_path)).experts) == ["transformer_2"]
    edit_json(tmp_path / "model_index.json", lambda index: index.pop("transformer_2"))
    assert "names neither transformer nor transformer_2" in refusal(tmp_path)


def test_source_never_holds_a_path(tmp_path, monkeypatch):
    write_diffusers_model(tmp_path / "my-model", experts=1)
    monkeypatch.chdir(tmp_path / "my-model")
    assert locate_model(".").source == "my-model"
    assert locate_model("transformer").source == "transformer"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "FluxPipeline"}, "pipeline class 'FluxPipeline' is not supported"),
        ({"transformer": ["diffusers", "FluxTransformer2DModel"]}, "hif4c compiles WanTransformer3DModel"),
        ({"transformer": "yes"}, "transformer is 'yes'"),
        ({"boundary_ratio": 2}, "boundary_ratio must be"),
        ({"boundary_ratio": None}, "boundary_ratio does not say where"),
    ],
)
def test_bad_model_index(tmp_path, change, message):
    write_diffusers_model(tmp_path)
    edit_json(tmp_path / "model_index.json", lambda index: index.update(change))
    text = refusal(tmp_path)
    assert str(tmp_path / "model_index.json") in text
    assert message in text


def test_missing_folder_and_config(tmp_path):
    write_diffusers_model(tmp_path)
    (tmp_path / "transformer" / "config.json").unlink()
    assert f"{tmp_path / 'transformer' / 'config.json'}: not found" in refusal(tmp_path)
    (tmp_path / "transformer").rename(tmp_path / "elsewhere")
    assert "the folder transformer/ is missing, though model_index.json names it" in refusal(tmp_path)


def test_missing_wan_expert(tmp_path):
    write_wan_model(tmp_path)
    (tmp_path / "low_noise_model" / "config.json").unlink()
    assert "low_noise_model/config.json is missing" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "Other"}, "model class 'Other' is not supported"),
        ({"model_type": "vace"}, "model_type 'vace' is not supported; of Wan2.2 hif4c compiles t2v, i2v, ti2v"),
        ({"model_type": ["t2v"]}, "model_type ['t2v'] is not supported"),
        ({"model_type": "i2v"}, "the two experts are of different models (i2v and t2v)"),
        ({"dim": 130}, "dim must be a positive multiple of num_heads"),
        ({"num_heads": 0}, "dim must be a positive multiple of num_heads"),
        ({"num_layers": -2}, "num_layers must be a whole number"),
    ],
)
def test_bad_wan_config(tmp_path, change, message):
    write_wan_model(tmp_path)
    edit_json(tmp_path / "low_noise_model" / "config.json", lambda config: config.update(change))
    assert message in refusal(tmp_path)


def test_two_wan_experts_of_a_single_model(tmp_path):
    for folder in ("high_noise_model", "low_noise_model"):
        write_wan_model(tmp_path / folder, "ti2v")
    assert "two experts, but ti2v models have one" in refusal(tmp_path)


def test_wan_config_without_a_key(tmp_path):
    write_wan_model(tmp_path, "ti2v")
    edit_json(tmp_path / "config.json", lambda config: config.pop("ffn_dim"))
    assert "ffn_dim is missing" in refusal(tmp_path)


def test_directory_that_is_no_model(tmp_path):
    assert f"{tmp_path}: not a model; expected model_index.json" in refusal(tmp_path)


@pytest.mark.parametrize("model", ["wan2.2-t2v-14b", "Wan2.2-T2V-A14"])
def test_near_misses_are_suggested(model):
    text = refusal(model)
    assert "did you mean Wan2.2-T2V-A14B" in text
    assert all(name in text for name in BUILTIN_NAMES)


@pytest.mark.parametrize("model", ["./models/wan", "/no/such/dir", "", "a/b/c", "qqqqqqq", "../x/y", "org/na me"])
def test_what_is_neither_directory_nor_name_nor_id(model):
    text = refusal(model)
    assert "no such directory or model; give" in text
    assert all(name in text for name in BUILTIN_NAMES)


def test_a_revision_is_only_for_the_hub(tmp_path):
    write_diffusers_model(tmp_path, experts=1)
    assert "a local model has no revision 'main'" in refusal(tmp_path, revision="main")


def test_a_directory_goes_before_a_builtin_name(tmp_path, monkeypatch):
    write_diffusers_model(tmp_path / "Wan2.2-TI2V-5B", experts=1)
    monkeypatch.chdir(tmp_path)
    assert locate_model("Wan2.2-TI2V-5B").root == Path("Wan2.2-TI2V-5B")
    assert describe_model("Wan2.2-TI2V-5B").configs["transformer"].num_layers == 2


def test_wan_tiny_is_a_directory_of_the_package(tmp_path, monkeypatch):
    write_diffusers_model(tmp_path / "wan_tiny", experts=1)
    monkeypatch.setattr(locate, "tiny_directory", lambda: tmp_path / "wan_tiny")
    found = locate_model("wan-tiny")
    assert (found.source, found.root) == ("wan-tiny", tmp_path / "wan_tiny")
    assert describe_model("wan-tiny").configs == found.configs
    monkeypatch.setattr(locate, "tiny_directory", lambda: tmp_path / "gone")
    assert "wan-tiny: its files are not at" in refusal("wan-tiny")


def test_builtin_names_are_described_without_files_or_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    for name in BUILTIN_NAMES[1:]:
        found = describe_model(name)
        assert found.source == name
        assert found.configs["transformer"].num_layers in (30, 40)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache, and no way to the network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def fill_cache(cache, hub_id=HUB_ID, **options):
    """The hub's layout on disk: refs/BRANCH holds a commit, snapshots/COMMIT links to blobs."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    snapshot = repository / "snapshots" / COMMIT
    models = write_diffusers_model(snapshot, shards=True, **options)
    for i, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        path.rename(repository / "blobs" / str(i))
        path.symlink_to(os.path.relpath(repository / "blobs" / str(i), path.parent))
    return models, snapshot


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_hub_id_from_the_cache(cache, revision):
    models, snapshot = fill_cache(cache)
    found = locate_model(HUB_ID, revision=revision)
    assert found.source == f"{HUB_ID}@{COMMIT}"
    assert found.root == snapshot
    for name, model in models.items():
        with Checkpoint(found.experts[name], found.configs[name], found.layout) as checkpoint:
            assert set(checkpoint.names) == set(model.state_dict())
    assert describe_model(HUB_ID).configs == found.configs


def test_builtin_name_from_the_cache(cache):
    fill_cache(cache, "Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    assert locate_model("Wan2.2-T2V-A14B").source == f"Wan-AI/Wan2.2-T2V-A14B-Diffusers@{COMMIT}"


def test_offline_and_not_in_the_cache(cache):
    text = refusal(HUB_ID, revision="v9")
    assert f"{HUB_ID} at revision v9: not (completely) in the local cache {cache}" in text
    assert "unset HF_HUB_OFFLINE" in text


def test_environment_decides_as_for_every_user_of_the_hub(tmp_path):
    fill_cache(tmp_path / "hub")
    script = (
        "import sys\n"
        "from hif4c.compiler.locate import locate_model\n"
        "from hif4c.runtime.errors import Hif4Error\n"
        "for model in sys.argv[1:]:\n"
        "    try: print(locate_model(model).source)\n"
        "    except Hif4Error as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    run = subprocess.run(
        [sys.executable, "-c", script, HUB_ID, "some-org/absent"], env=environment, capture_output=True, text=True
    )
    first, second = run.stdout.splitlines()
    assert first == f"{HUB_ID}@{COMMIT}", run.stderr
    assert second.startswith(f"some-org/absent: not (completely) in the local cache {tmp_path / 'hub'}")


def response(status):
    return httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co/x"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError("gated", response=response(403)), "access is gated; accept its conditions on https"),
        (errors.RepositoryNotFoundError("no", response=response(404)), "neither a directory here nor a model on the"),
        (errors.RevisionNotFoundError("no", response=response(404)), "has no revision 'v1' on the hub"),
        (errors.LocalEntryNotFoundError("no"), "the hub cannot be reached and the local cache"),
        (errors.HfHubHTTPError("500\nServer Error", response=response(500)), "the download failed (500); run it again"),
        (httpx2.ReadTimeout("timed out"), "the download failed (timed out)"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (errors.HFValidationError("bad id"), "not a hub id (bad id)"),
    ],
)
def test_errors_of_the_hub_are_one_sentence(monkeypatch, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    text = refusal(HUB_ID, revision="v1")
    assert text.startswith(HUB_ID)
    assert message in text
    assert "\n" not in text


PUBLISHED = [
    *("README.md", "model_index.json", "assets/a.png", "config.json", "configuration.json", "Wan2.2_VAE.pth"),
    *("transformer/config.json", "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"),
    *("transformer_2/diffusion_pytorch_model.safetensors.index.json", "low_noise_model/config.json"),
    *("text_encoder/model-00001-of-00003.safetensors", "text_encoder/config.json", "vae/config.json"),
    *("vae/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-00001-of-00003.safetensors"),
    *("diffusion_pytorch_model.safetensors.index.json", "transformer/diffusion_pytorch_model.bin"),
]


def test_only_what_is_needed_is_downloaded(monkeypatch, tmp_path):
    write_diffusers_model(tmp_path)
    asked = []

    def download(hub_id, *, revision, allow_patterns):
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    locate_model(HUB_ID)
    describe_model(HUB_ID)
    locate_model(HUB_ID, expert_files_only=False)
    experts, configs, everything = asked
    assert everything is None
    wanted = set(huggingface_hub.utils.filter_repo_objects(PUBLISHED, allow_patterns=experts))
    assert wanted == {
        *("model_index.json", "config.json", "transformer/config.json"),
        *("transformer/diffusion_pytorch_model-00001-of-00002.safetensors", "low_noise_model/config.json"),
        *("transformer_2/diffusion_pytorch_model.safetensors.index.json",),
        *("diffusion_pytorch_model-00001-of-00003.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
    }
    small = set(huggingface_hub.utils.filter_repo_objects(PUBLISHED, allow_patterns=configs))
    assert small == {"model_index.json", "config.json", "transformer/config.json", "low_noise_model/config.json"}
