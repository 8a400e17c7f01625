import hashlib
import json
import mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hif4c.compiler import checkpoint as checkpoint_module
from hif4c.compiler.checkpoint import Checkpoint, Fingerprint
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.safetensors_stream import StreamingWriter, TensorFile, TensorSpec
from tests.support.checkpoints import VARIANTS, build_transformer, write_diffusers_model, write_wan_model

INDEX = "diffusion_pytorch_model.safetensors.index.json"


def assert_holds(checkpoint, model):
    state = model.state_dict()
    assert set(checkpoint.names) == set(state)
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in state.values())
    checkpoint.check({name: tuple(tensor.shape) for name, tensor in state.items()})
    for name, tensor in state.items():
        assert (checkpoint.dtype(name), checkpoint.shape(name)) == (tensor.dtype, tensor.shape)
        assert torch.equal(checkpoint.read(name, validate=True), tensor), name
        checkpoint.release(name)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shards", [False, True])
def test_diffusers_layout(tmp_path, variant, shards):
    for name, model in write_diffusers_model(tmp_path, variant, shards=shards).items():
        with Checkpoint(tmp_path / name) as checkpoint:
            assert checkpoint.layout == "diffusers"
            assert (tmp_path / name / INDEX).exists() == shards
            assert_holds(checkpoint, model)


@pytest.mark.parametrize("shards", [False, True])
def test_wan_layout(tmp_path, shards):
    models = write_wan_model(tmp_path, "t2v", shards=shards)
    for folder, name in (("high_noise_model", "transformer"), ("low_noise_model", "transformer_2")):
        with Checkpoint(tmp_path / folder, layout="wan") as checkpoint:
            assert checkpoint.layout == "wan"
            assert_holds(checkpoint, models[name])


def test_wan_single_model_beside_other_files(tmp_path):
    models = write_wan_model(tmp_path, "ti2v", shards=True)
    (tmp_path / "Wan2.2_VAE.pth").write_bytes(b"x")
    with Checkpoint(tmp_path) as checkpoint:
        assert_holds(checkpoint, models["transformer"])


def test_any_base_name(tmp_path):
    model = build_transformer()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        assert_holds(checkpoint, model)


def test_fingerprint_knows_the_weights_and_nothing_else(tmp_path):
    fingerprints = set()
    for shards in (False, True):
        write_diffusers_model(tmp_path / f"d{shards}", shards=shards)
        write_wan_model(tmp_path / f"w{shards}", shards=shards)
        for folder in (f"d{shards}/transformer", f"w{shards}/high_noise_model"):
            with Checkpoint(tmp_path / folder) as checkpoint:
                fingerprints.add(checkpoint.fingerprint())
    assert len(fingerprints) == 1
    streamed = Fingerprint()
    for name, tensor in reversed(build_transformer(dtype=torch.bfloat16).state_dict().items()):
        streamed.add(name, tensor)
    assert fingerprints == {streamed.hexdigest()}
    with Checkpoint(tmp_path / "dTrue" / "transformer_2") as checkpoint:
        assert checkpoint.fingerprint() not in fingerprints


def test_fingerprint_sees_name_dtype_shape_and_bits():
    def of(name, tensor):
        result = Fingerprint()
        result.add(name, tensor)
        return result.hexdigest()

    zeros = torch.zeros(2, 3)
    variants = [
        of("a", zeros),
        of("b", zeros),
        of("a", zeros.int()),
        of("a", zeros.reshape(3, 2)),
        of("a", -zeros),
        Fingerprint().hexdigest(),
    ]
    assert len(set(variants)) == len(variants)
    twice = Fingerprint()
    twice.add("a", zeros)
    with pytest.raises(ValueError, match="twice"):
        twice.add("a", zeros)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
def test_resident_memory_does_not_grow_with_the_tensors_read(tmp_path):
    specs = [TensorSpec(f"blocks.{i}.x.weight", torch.float32, (1024, 512)) for i in range(48)]
    with StreamingWriter(tmp_path, specs, shard_bytes=20 << 20) as writer:
        for spec in specs:
            writer.write(spec.name, torch.full(spec.shape, 1.0))

    def growth(release):
        with Checkpoint(tmp_path) as checkpoint:
            checkpoint.read(checkpoint.names[0], validate=True)
            checkpoint.release(checkpoint.names[0])
            before = peak = resident_bytes()
            for name in checkpoint.names:
                assert checkpoint.read(name).sum() == 1024 * 512
                peak = max(peak, resident_bytes())
                if release:
                    checkpoint.release(name)
        return (peak - before) / (2 << 20)  # in tensors

    assert growth(release=True) < 6
    assert growth(release=False) > 40  # or the measurement would not see what it is there to see


def test_a_digest_is_that_of_the_bytes_and_sees_what_is_not_finite(tmp_path, monkeypatch):
    """In pieces, the last of them shorter."""
    monkeypatch.setattr(checkpoint_module, "_PIECE_BYTES", 1 << 12)
    tensors = {"a": torch.arange(3000.0).view(3, 1000), "b": torch.ones(5000).bfloat16(), "empty": torch.empty(0, 3)}
    tensors["b"][-1] = torch.inf
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        for name in ("a", "empty"):
            checkpoint.prefetch(name)
            found = checkpoint.digest(name, checkpoint.read(name))
            assert found == hashlib.sha256(tensors[name].numpy().tobytes()).hexdigest()
        with pytest.raises(Hif4Error, match="b holds NaN or infinite values"):
            checkpoint.digest("b", checkpoint.read("b"))


def test_the_cache_forgets_what_was_released_some_tensors_ago(tmp_path, monkeypatch):
    """But not what was read again, and each only once."""
    monkeypatch.setattr(checkpoint_module, "_KEPT_BYTES", 800)
    forgotten = []
    monkeypatch.setattr(TensorFile, "forget", lambda self, name: forgotten.append(name))
    save_file({name: torch.zeros(100) for name in "abcde"}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        for name, expected in (("a", ""), ("b", ""), ("a", ""), ("c", "b"), ("d", "ba"), ("d", "ba")):
            checkpoint.release(name)
            assert "".join(forgotten) == expected
        checkpoint.read("c")
        checkpoint.release("e")
        assert "".join(forgotten) == "ba"


def test_check_reports_each_kind_in_one_message(tmp_path):
    state = build_transformer().state_dict()
    state["scale_shift_table"] = state["scale_shift_table"].long()
    save_file({**state, "lora.down": torch.zeros(1)}, tmp_path / "model.safetensors")
    expected = {name: list(tensor.shape) for name, tensor in state.items()}
    expected["proj_out.bias"] = [65]
    expected |= {f"blocks.2.ffn.{i}": [1] for i in range(5)}
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(Hif4Error) as caught:
        checkpoint.check(expected)
    assert str(caught.value) == (
        f"{tmp_path}: the checkpoint lacks 5 tensors (blocks.2.ffn.0, blocks.2.ffn.1, blocks.2.ffn.2, ...) that the "
        "configuration asks for; it holds 1 tensor (lora.down) that the configuration has no place for; it has other "
        "shapes for 1 tensor (proj_out.bias [64] where the configuration makes [65]); it stores 1 tensor "
        "(scale_shift_table I64) where only F32, BF16, F16 can be compiled; use the weights of this very model."
    )


def test_quantized_weights_are_refused(tmp_path):
    save_file({"a": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(Hif4Error, match=r"stores 1 tensor \(a F8_E4M3\)"):
        checkpoint.check({"a": [4]})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("position", [(0, 0), (3, 2), (6, 4)])
def test_validation_names_tensor_and_file(tmp_path, value, dtype, position):
    state = {"good": torch.ones(3, dtype=dtype), "none": torch.ones(0, dtype=dtype)}
    state["blocks.0.bad.weight"] = torch.ones(7, 5, dtype=dtype)
    state["blocks.0.bad.weight"][position] = value
    save_file(state, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        checkpoint.read("good", validate=True)
        checkpoint.read("none", validate=True)
        assert checkpoint.read("blocks.0.bad.weight").shape == (7, 5)
        with pytest.raises(Hif4Error, match=r"model\.safetensors: tensor blocks\.0\.bad\.weight holds NaN or infinite"):
            checkpoint.read("blocks.0.bad.weight", validate=True)


@pytest.fixture
def sharded(tmp_path):
    write_diffusers_model(tmp_path, experts=1, shards=True)
    return tmp_path / "transformer"


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def refusal(folder, **options):
    with pytest.raises(Hif4Error) as caught:
        Checkpoint(folder, **options)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_missing_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard}: missing, though {INDEX} lists it" in refusal(sharded)


def test_truncated_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert f"{shard}: is truncated: 100 bytes are missing" in refusal(sharded)


@pytest.mark.parametrize(
    "home", ["../other.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", 3, None, "weights.bin"]
)
def test_index_that_leaves_the_folder(sharded, home):
    save_file({"proj_out.bias": torch.zeros(64)}, sharded.parent / "other.safetensors")
    edit_index(sharded, lambda index: index["weight_map"].update({"proj_out.bias": home}))
    assert f"proj_out.bias is said to be in {home!r}, which is not a file name in this folder" in refusal(sharded)


def test_tensor_that_is_only_in_the_index(sharded):
    edit_index(sharded, lambda index: index["weight_map"].update({"ghost": index["weight_map"]["proj_out.bias"]}))
    assert f"lacks 1 tensor (ghost) that {INDEX} lists in it" in refusal(sharded)


def test_tensor_that_the_index_does_not_know(sharded):
    edit_index(sharded, lambda index: index["weight_map"].pop("proj_out.bias"))
    assert f"holds 1 tensor (proj_out.bias) that {INDEX} does not list in it" in refusal(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, ["a"], "a"])
def test_index_without_a_map(sharded, weight_map):
    edit_index(sharded, lambda index: index.update(weight_map=weight_map))
    assert f"{INDEX}: has no weight_map" in refusal(sharded)


def test_index_that_is_not_json(sharded):
    (sharded / INDEX).write_text("{")
    assert f"{INDEX}: not valid JSON" in refusal(sharded)


def test_shards_without_their_index(sharded):
    (sharded / INDEX).unlink()
    assert "no index says how they belong together" in refusal(sharded)


def test_shards_may_be_links_as_in_the_hub_cache(sharded, tmp_path):
    (tmp_path / "blobs").mkdir()
    for i, shard in enumerate(sorted(sharded.glob("*.safetensors"))):
        shard.rename(tmp_path / "blobs" / str(i))
        shard.symlink_to(tmp_path / "blobs" / str(i))
    with Checkpoint(sharded) as checkpoint:
        assert_holds(checkpoint, build_transformer(dtype=torch.bfloat16))


def test_folders_without_weights(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "holds no .safetensors file" in refusal(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"")
    assert "only pickled .bin weights" in refusal(tmp_path)


def test_layout_that_contradicts_the_configuration(tmp_path):
    write_wan_model(tmp_path, "ti2v")
    assert "named as in the wan layout, but config.json is of the diffusers" in refusal(tmp_path, layout="diffusers")


def test_wan_layout_with_foreign_or_doubled_names(tmp_path):
    write_wan_model(tmp_path, "ti2v")
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file({**state, "img_emb.proj.0.weight": torch.zeros(1)}, path)
    assert "holds 1 tensor (img_emb.proj.0.weight) that Wan2.2 does not have" in refusal(tmp_path)
    save_file({**state, "model.diffusion_model.head.head.bias": torch.zeros(1)}, path)
    assert "are the same tensor" in refusal(tmp_path)


def test_unknown_tensor(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(Hif4Error, match="holds no tensor b"):
        checkpoint.read("b")
