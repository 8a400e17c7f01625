"""LoRAs against the formula in float64, in every style of names that there is."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hif4c.compiler import lora as lora_module
from hif4c.compiler.checkpoint import Checkpoint
from hif4c.compiler.lora import FusedCheckpoint, LoraFile, fuse_loras, parse_loras
from hif4c.compiler.wan_names import to_original_name
from hif4c.runtime.errors import Hif4Error
from tests.support.checkpoints import write_diffusers_model

Tensors = dict[str, torch.Tensor]

MODULES = ("blocks.0.attn1.to_q", "blocks.1.attn2.to_out.0", "blocks.1.ffn.net.0.proj", "condition_embedder.time_proj")
RANK, ALPHA, SCALE = 4, 6.0, 0.7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert in float32: what is added is seen to the last bits."""
    path = tmp_path_factory.mktemp("lora") / "model"
    write_diffusers_model(path, "t2v", experts=1, dtype=torch.float32, num_layers=2)
    return path / "transformer"


@pytest.fixture(scope="module")
def weights(folder: Path) -> Tensors:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def factors(weights: Tensors) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module -> up [out, rank], down [rank, in]."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    shapes = {module: weights[f"{module}.weight"].shape for module in MODULES}
    return {module: (draw(rows, RANK), draw(RANK, columns)) for module, (rows, columns) in shapes.items()}


def original(module: str) -> str:
    return str(to_original_name(f"{module}.weight")).removesuffix(".weight")


def flat(module: str) -> str:
    return original(module).replace(".", "_")


STYLES: dict[str, tuple[Callable[[str], str], str, str]] = {
    "diffusers": (lambda module: f"transformer.{module}", "lora_A.weight", "lora_B.weight"),
    "diffusers without a prefix": (lambda module: module, "lora.down.weight", "lora.up.weight"),
    "PEFT": (lambda module: f"base_model.model.{module}", "lora_A.default.weight", "lora_B.default.weight"),
    "PEFT of a pipeline": (lambda module: f"base_model.model.transformer.{module}", "lora_A.weight", "lora_B.weight"),
    "kohya": (lambda module: f"lora_unet_{flat(module)}", "lora_down.weight", "lora_up.weight"),
    "VideoX-Fun": (lambda module: f"lora_unet__{flat(module)}", "lora_down.weight", "lora_up.weight"),
    "ComfyUI": (lambda module: f"diffusion_model.{original(module)}", "lora_A.weight", "lora_B.weight"),
    "lightx2v": (lambda module: f"diffusion_model.{original(module)}", "lora_down.weight", "lora_up.weight"),
    "Wan": (original, "lora_A", "lora_B"),
}


def file_of(path: Path, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], style: str, *, alpha: bool) -> Path:
    name, down, up = STYLES[style]
    tensors = {}
    for module, pair in factors.items():
        tensors |= {f"{name(module)}.{up}": pair[0], f"{name(module)}.{down}": pair[1]}
        if alpha:
            tensors[f"{name(module)}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, path)
    return path


def fused(folder: Path, *loras: tuple[Path, float], expert: str = "transformer") -> FusedCheckpoint:
    checkpoint = fuse_loras(Checkpoint(folder), loras, expert)
    assert isinstance(checkpoint, FusedCheckpoint)
    return checkpoint


def check_formula(checkpoint: FusedCheckpoint, weights: Tensors, deltas: Tensors) -> None:
    """Every tensor is weight + delta, given in float64; those without a delta are untouched."""
    assert sorted(checkpoint.changed) == sorted(deltas)
    for name, weight in weights.items():
        found = checkpoint.read(name)
        assert found.dtype == weight.dtype
        if name not in deltas:
            assert torch.equal(found, weight), name
            continue
        expected = weight.double() + deltas[name]
        # The product of RANK terms, its scaling, the sum and its rounding: RANK + 3 roundings of float32, of values no
        # larger than the largest of the tensors.
        bound = (RANK + 3) * 2**-24 * (weight.abs().max() + deltas[name].abs().max())
        assert (found.double() - expected).abs().max() <= bound, name
        assert not torch.equal(found, weight), name


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_every_style_of_names(style, alpha, folder, weights, factors, tmp_path):
    path = file_of(tmp_path / "lora.safetensors", factors, style, alpha=alpha)
    factor = SCALE * (ALPHA / RANK if alpha else 1.0)
    deltas = {f"{name}.weight": factor * up.double() @ down.double() for name, (up, down) in factors.items()}
    checkpoint = fused(folder, (path, SCALE))
    check_formula(checkpoint, weights, deltas)
    (entry,) = checkpoint.record
    assert entry == {"file": path.name, "sha256": entry["sha256"], "scale": SCALE, "tensors": len(MODULES)}
    assert len(entry["sha256"]) == 64


def test_differences_of_whole_tensors_as_lightx2v_writes_them(folder, weights, tmp_path):
    """Of norms, biases, modulation tables, the patch embedding and the head."""
    names = {
        "norm3.diff": "norm2.weight", "norm3.diff_b": "norm2.bias", "self_attn.norm_q.diff": "attn1.norm_q.weight",
        "ffn.0.diff_b": "ffn.net.0.proj.bias", "diff_m": "scale_shift_table",
    }  # fmt: skip
    names = {f"blocks.1.{key}": f"blocks.1.{name}" for key, name in names.items()}
    names |= {
        "patch_embedding.diff": "patch_embedding.weight", "head.head.diff": "proj_out.weight",
        "head.diff_m": "scale_shift_table", "time_embedding.0.diff_b": "condition_embedder.time_embedder.linear_1.bias",
    }  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    changes = {key: torch.randn(weights[name].shape, generator=generator) for key, name in names.items()}
    path = tmp_path / "lora.safetensors"
    save_file({f"diffusion_model.{key}": value for key, value in changes.items()}, path)
    deltas = {name: SCALE * changes[key].double() for key, name in names.items()}
    check_formula(fused(folder, (path, SCALE)), weights, deltas)


def test_a_convolution_s_factors_and_the_up_factor_s_bias(folder, weights, tmp_path):
    generator = torch.Generator().manual_seed(6)
    size = weights["patch_embedding.weight"].shape
    down = torch.randn(RANK, *size[1:], generator=generator)
    up = torch.randn(size[0], RANK, 1, 1, 1, generator=generator)
    bias = torch.randn(size[0], generator=generator)
    path, name = tmp_path / "lora.safetensors", "diffusion_model.patch_embedding"
    save_file(
        {
            f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up,
            f"{name}.lora_up.bias": bias, f"{name}.alpha": torch.tensor(2),
        },
        path,
    )  # fmt: skip
    factor = SCALE * 2 / RANK
    product = torch.einsum("or,rcthw->octhw", up[..., 0, 0, 0].double(), down.double())
    deltas = {"patch_embedding.weight": factor * product, "patch_embedding.bias": factor * bias.double()}
    check_formula(fused(folder, (path, SCALE)), weights, deltas)


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"lora_alpha": 10}, 10 / RANK),
        ({"lora_alpha": 10, "use_rslora": True}, 10 / math.sqrt(RANK)),
        ({"lora_alpha": 10, "alpha_pattern": {"blocks.1.attn2.to_out.0": 4, "blocks.9.attn2": 5}}, 4 / RANK),
        ({"lora_alpha": 10, "alpha_pattern": {"^blocks.1.attn2.to_out.0": 4}}, 4 / RANK),
        ({"lora_alpha": 10, "alpha_pattern": {"^attn2.to_out.0": 4, "attn2.to_out.0": 3}}, 3 / RANK),
    ],
)
@pytest.mark.parametrize("where", ["metadata", "adapter_config.json"])
def test_alpha_of_the_settings(where, settings, factor, folder, weights, factors, tmp_path):
    """diffusers keeps PEFT's settings in the file's metadata, PEFT itself in a file beside it."""
    module, path = MODULES[1], tmp_path / "adapter_model.safetensors"
    up, down = factors[module]
    prefix = "transformer." if where == "metadata" else "base_model.model."
    metadata = None
    if where == "metadata":
        text = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
        metadata = {"lora_adapter_metadata": text}
    else:
        (tmp_path / where).write_text(json.dumps(settings))
    save_file({f"{prefix}{module}.lora_A.weight": down, f"{prefix}{module}.lora_B.weight": up}, path, metadata=metadata)
    check_formula(fused(folder, (path, 1.0)), weights, {f"{module}.weight": factor * up.double() @ down.double()})


def test_several_loras_are_rounded_once(tmp_path):
    """Three times 2^-9 on 1: added up 1 + 3/512, for bfloat16 nearer to 1 + 4/512 than to 1. Rounded each for itself,
    every sum would fall back to 1, whose next value is 4/512 away."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    name = "blocks.0.attn1.to_q.weight"
    save_file({name: torch.ones(8, 8, dtype=torch.bfloat16)}, folder / "diffusion_pytorch_model.safetensors")
    loras = []
    for index in range(3):
        path = tmp_path / f"{index}.safetensors"
        save_file({"blocks.0.attn1.to_q.diff": torch.full((8, 8), 2.0**-8)}, path)
        loras.append((path, 0.5))
    checkpoint = fused(folder, *loras)
    assert torch.equal(checkpoint.read(name), torch.full((8, 8), 1 + 2.0**-7, dtype=torch.bfloat16))
    assert [entry["file"] for entry in checkpoint.record] == ["0.safetensors", "1.safetensors", "2.safetensors"]
    assert torch.equal(Checkpoint(folder).read(name), torch.ones(8, 8, dtype=torch.bfloat16))


def test_pieces_of_a_tensor(folder, weights, factors, tmp_path, monkeypatch):
    """Several pieces of 7 rows, the last one smaller."""
    monkeypatch.setattr(lora_module, "_BLOCK_ELEMENTS", 1000)
    path = file_of(tmp_path / "lora.safetensors", factors, "ComfyUI", alpha=False)
    deltas = {f"{name}.weight": SCALE * up.double() @ down.double() for name, (up, down) in factors.items()}
    check_formula(fused(folder, (path, SCALE)), weights, deltas)


def test_same_bits_with_any_number_of_threads(tmp_path):
    """Large enough for torch to share a product between threads, and for a second piece."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    size, name = 2100, "blocks.0.attn1.to_q.weight"
    generator = torch.Generator().manual_seed(7)
    save_file({name: torch.randn(size, size, generator=generator)}, folder / "diffusion_pytorch_model.safetensors")
    pair = {
        "blocks.0.attn1.to_q.lora_A": torch.randn(64, size, generator=generator),
        "blocks.0.attn1.to_q.lora_B": torch.randn(size, 64, generator=generator),
    }
    save_file(pair, tmp_path / "lora.safetensors")
    checkpoint = fused(folder, (tmp_path / "lora.safetensors", SCALE))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(checkpoint.read(name))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_stands_for_a_checkpoint_that_was_fused_before(folder, weights, factors, tmp_path):
    path = file_of(tmp_path / "lora.safetensors", factors, "kohya", alpha=False)
    checkpoint = fused(folder, (path, SCALE))
    before = tmp_path / "before"
    before.mkdir()
    tensors = {name: checkpoint.read(name).clone() for name in checkpoint.names}
    save_file(tensors, before / "diffusion_pytorch_model.safetensors")
    for name in checkpoint.names:
        checkpoint.release(name)
    with Checkpoint(before) as other, Checkpoint(folder) as base:
        assert checkpoint.fingerprint() == other.fingerprint() != base.fingerprint()
        assert (sorted(checkpoint.names), checkpoint.total_bytes) == (sorted(other.names), other.total_bytes)
        other.check({name: checkpoint.shape(name) for name in checkpoint.names})
        assert fuse_loras(base, (), "transformer") is base
    checkpoint.close()


def test_copy_into_a_model_of_diffusers(factors, tmp_path):
    (model,) = write_diffusers_model(tmp_path / "model", "t2v", experts=1, dtype=torch.float32).values()
    path = file_of(tmp_path / "lora.safetensors", factors, "diffusers", alpha=False)
    checkpoint = fused(tmp_path / "model" / "transformer", (path, SCALE))
    checkpoint.copy_into(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, checkpoint.read(name)), name


def two_experts(path: Path, weights: Tensors) -> Path:
    """One file for both experts, which its names tell apart."""
    bias = torch.ones_like(weights["proj_out.bias"])
    save_file({"transformer.proj_out.diff_b": bias, "transformer_2.proj_out.diff_b": 2 * bias}, path)
    return path


def test_a_file_that_names_its_experts(folder, weights, tmp_path):
    path = two_experts(tmp_path / "lora.safetensors", weights)
    for expert, amount in (("transformer", 1), ("transformer_2", 2)):
        found = fused(folder, (path, 1.0), expert=expert).read("proj_out.bias")
        assert torch.equal(found, weights["proj_out.bias"] + amount)


def test_parse_loras(folder, weights, factors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    both = two_experts(Path("both.safetensors"), weights)
    save_file({"transformer_2.proj_out.diff_b": torch.ones(4)}, "low.safetensors")
    plain = file_of(Path("a=b:c.safetensors"), factors, "diffusers", alpha=False)
    experts = ["transformer", "transformer_2"]
    assert parse_loras([], experts) == {}
    assert parse_loras([str(plain), f"{both}:-2.5e-1"], experts) == dict.fromkeys(
        experts, ((plain, 1.0), (both, -0.25))
    )
    assert parse_loras([f"transformer_2={plain}:.5", f"transformer={both}:1."], experts) == {
        "transformer": ((both, 1.0),),
        "transformer_2": ((plain, 0.5),),
    }
    assert parse_loras(["low.safetensors:2"], experts) == {"transformer_2": ((Path("low.safetensors"), 2.0),)}
    with pytest.raises(Hif4Error, match="there is no transformer_2 here, only transformer"):
        parse_loras([f"transformer_2={plain}"], ["transformer"])
    with pytest.raises(Hif4Error, match="for transformer_2, which is not among transformer"):
        parse_loras(["low.safetensors"], ["transformer"])
    with pytest.raises(Hif4Error, match=r"missing\.safetensors: cannot be read"):
        parse_loras(["missing.safetensors:2"], experts)


Q = "diffusion_model.blocks.0.self_attn.q"
UP, DOWN = torch.ones(128, RANK), torch.ones(RANK, 128)

BAD_FILES: dict[str, tuple[Tensors, str]] = {
    "down without up": ({f"{Q}.lora_A.weight": DOWN}, r"self_attn\.q\.lora_A\.weight without its up factor"),
    "alpha alone": ({f"{Q}.alpha": torch.tensor(1.0)}, r"q\.alpha without its down and up factor"),
    "ranks": (
        {f"{Q}.lora_A.weight": DOWN[:3], f"{Q}.lora_B.weight": UP},
        r"lora_B\.weight \[128, 4\] and .*lora_A\.weight \[3, 128\] are not two factors of one matrix",
    ),
    "alpha of two": (
        {f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UP, f"{Q}.alpha": torch.ones(2)},
        r"q\.alpha is \[2\] where one number belongs",
    ),
    "NaN": ({f"{Q}.diff": torch.full((128, 128), torch.nan)}, r"q\.diff holds NaN or infinite values"),
    "8 bits": ({f"{Q}.diff": torch.ones(128, 128).to(torch.float8_e4m3fn)}, r"q\.diff is F8_E4M3 where only"),
    "DoRA": (
        {f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UP, f"{Q}.dora_scale": torch.ones(128)},
        r"1 tensor \(.*q\.dora_scale\) of a kind that cannot be fused",
    ),
    "LoHa, LoKr": (
        {f"{Q}.{name}": torch.ones(4, 4) for name in ("hada_w1_a", "lokr_w1", "lora_mid.weight", "lora_A.bias")},
        r"4 tensors \(.*\.\.\.\) of a kind that cannot be fused",
    ),
    "twice": (
        {f"{Q}.diff_b": torch.ones(128), "transformer.blocks.0.attn1.to_q.diff_b": torch.ones(128)},
        r"both change blocks\.0\.attn1\.to_q\.bias",
    ),
    "nothing matches": (
        {"lora_unet_blocks_7_self_attn_q.diff_b": torch.ones(128)},
        r"changes no tensor of transformer in .*1 change \(lora_unet_blocks_7_self_attn_q\.diff_b\)",
    ),
    "only image attention": (
        {"diffusion_model.blocks.0.cross_attn.k_img.diff_b": torch.ones(128)},
        r"changes no tensor of transformer in .*k_img",
    ),
    "one does not match": (
        {f"{Q}.diff_b": torch.ones(128), "lora_te_q.diff": torch.ones(2), f"{Q}.diff_m": torch.ones(2)},
        r"2 changes \(.*\) that transformer in .* has no tensor for",
    ),
    "shape": (
        {f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": torch.ones(64, RANK), f"{Q}.diff_b": torch.ones(3)},
        r"q\.lora_B\.weight makes \[64, 128\], blocks\.0\.attn1\.to_q\.weight is \[128, 128\]; .*diff_b makes \[3\]",
    ),
    "empty": ({}, "holds no tensor"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_what_is_wrong_with_a_file_is_named(case, folder, tmp_path):
    tensors, sentence = BAD_FILES[case]
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    with pytest.raises(Hif4Error, match=sentence) as found:
        fused(folder, (path, 1.0))
    assert str(found.value).startswith(str(path))
    assert str(found.value).endswith(".")


@pytest.mark.parametrize("scale", [0.0, math.inf, math.nan])
def test_a_scale_that_cannot_be_applied(scale, tmp_path):
    save_file({f"{Q}.diff_b": torch.ones(128)}, tmp_path / "lora.safetensors")
    with pytest.raises(Hif4Error, match=r"scale .* cannot be applied"):
        LoraFile(tmp_path / "lora.safetensors", scale)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "lora_adapter_metadata is damaged"),
        ("[]", "lora_adapter_metadata is damaged"),
        ('{"transformer.lora_alpha": "4"}', "lora_alpha is damaged"),
        ('{"transformer.lora_alpha": 1' + "0" * 400 + "}", "lora_alpha is damaged"),
        ('{"transformer.use_dora": true}', "this is a DoRA"),
    ],
)
def test_damaged_settings(text, sentence, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UP}, path, metadata={"lora_adapter_metadata": text})
    with pytest.raises(Hif4Error, match=sentence):
        LoraFile(path)


def test_wan_2_1_image_attention_is_left_out_with_a_note(folder, weights, tmp_path):
    path, attention = tmp_path / "lora.safetensors", "diffusion_model.blocks.0.cross_attn"
    names = [f"{attention}.k_img.diff_b", f"{attention}.norm_k_img.diff", "diffusion_model.img_emb.proj.1.diff_b"]
    save_file({**{name: torch.ones(128) for name in names}, f"{Q}.diff_b": torch.ones(128)}, path)
    checkpoint = fused(folder, (path, 1.0))
    assert checkpoint.changed == ["blocks.0.attn1.to_q.bias"]
    (note,) = checkpoint.notes
    assert note.startswith("lora.safetensors: 3 changes (")
    assert all(name in note for name in names)


def test_a_sum_too_large_for_its_dtype(tmp_path):
    folder = tmp_path / "transformer"
    folder.mkdir()
    weight = {"proj_out.bias": torch.full((4,), 6e4, dtype=torch.float16)}
    save_file(weight, folder / "diffusion_pytorch_model.safetensors")
    save_file({"proj_out.diff_b": torch.full((4,), 6e4)}, tmp_path / "lora.safetensors")
    checkpoint = fused(folder, (tmp_path / "lora.safetensors", 1.0))
    with pytest.raises(Hif4Error, match=r"proj_out\.bias overflows F16"):
        checkpoint.read("proj_out.bias")
