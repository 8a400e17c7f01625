"""From what a person types as MODEL to folders of weights: a directory, a built-in name, or a hub id."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hif4c.compiler.models import (
    BUILTIN_NAMES,
    EXPERT_NAMES,
    TINY_NAME,
    PipelineConfig,
    WanConfig,
    load_builtin,
    read_json_object,
    tiny_directory,
)
from hif4c.runtime.errors import Hif4Error

__all__ = ["ModelDescription", "ModelLocation", "describe_model", "locate_model"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

# Wan's own layout: which folder is which of diffusers' experts, and what its inference code sets by model type.
_WAN_FOLDERS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
_WAN_PIPELINES = {
    "t2v": PipelineConfig("WanPipeline", boundary_ratio=0.875),
    "i2v": PipelineConfig("WanImageToVideoPipeline", boundary_ratio=0.9),
    "ti2v": PipelineConfig("WanPipeline", expand_timesteps=True),
}
_WAN_KEYS = {
    "num_heads": "num_attention_heads",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "freq_dim": "freq_dim",
    "ffn_dim": "ffn_dim",
    "num_layers": "num_layers",
    "eps": "eps",
}
# Wan's code leaves these out of config.json, because they are the same in all its models.
_WAN_DEFAULTS = {"patch_size": [1, 2, 2], "text_dim": 4096, "cross_attn_norm": True}

_CONFIG_FILES = ["model_index.json", "config.json"]
_EXPERT_FOLDERS = [*EXPERT_NAMES, *_WAN_FOLDERS.values()]
_CONFIG_PATTERNS = [*_CONFIG_FILES, *(f"{folder}/config.json" for folder in _EXPERT_FOLDERS)]
_EXPERT_PATTERNS = [
    *_CONFIG_FILES,
    *(f"{folder}/*.{ending}" for folder in _EXPERT_FOLDERS for ending in ("json", "safetensors")),
    "diffusion_pytorch_model*.safetensors",
    "diffusion_pytorch_model*.json",
]


@dataclass(frozen=True)
class ModelDescription:
    """What a model is, as far as a plan needs it."""

    source: str
    """For the manifest, never an absolute path: a built-in name, `org/name@commit`, or a directory's own name."""
    configs: Mapping[str, WanConfig]
    """The experts that there are, by diffusers' names, in the order of sampling."""
    pipeline: PipelineConfig


@dataclass(frozen=True)
class ModelLocation(ModelDescription):
    """A model whose files are on this machine."""

    root: Path
    layout: str
    """Of the folders and weight names: "diffusers" or "wan" (Wan's own release)."""
    experts: Mapping[str, Path]
    """For each expert the folder with its config.json and weights."""


def describe_model(model: str, *, revision: str | None = None) -> ModelDescription:
    """The configuration of MODEL without its weights; for a built-in name no file and no network is needed.

    Raises Hif4Error as `locate_model` does.
    """
    if model in BUILTIN_NAMES and model != TINY_NAME and not Path(model).is_dir():
        builtin = load_builtin(model)
        return ModelDescription(builtin.name, builtin.experts, builtin.pipeline)
    return _locate(model, revision, _CONFIG_PATTERNS)


def locate_model(model: str, *, revision: str | None = None, expert_files_only: bool = True) -> ModelLocation:
    """Find MODEL's files, downloading them when MODEL is on the hub and they are not in its cache.

    Args:
        model: an existing directory; else a built-in name; else a hub id `org/name`.
        revision: branch, tag or commit on the hub.
        expert_files_only: leave text encoder, VAE and the like on the hub.

    Raises:
        Hif4Error: nothing of that name, a model that hif4c does not compile, or files that cannot be had.
    """
    return _locate(model, revision, _EXPERT_PATTERNS if expert_files_only else None)


def _locate(model: str, revision: str | None, patterns: list[str] | None) -> ModelLocation:
    local = Path(model) if model and Path(model).is_dir() else tiny_directory() if model == TINY_NAME else None
    if local is not None and not local.is_dir():
        raise Hif4Error(f"{model}: its files are not at {local}; install hif4c with its data.")
    if local is not None:
        if revision is not None:
            raise Hif4Error(f"{model}: a local model has no revision {revision!r}; leave the revision out.")
        return _inspect(local, TINY_NAME if model == TINY_NAME else local.resolve().name)
    if model in BUILTIN_NAMES:
        hub_id = load_builtin(model).hub_id
    elif _HUB_ID.fullmatch(model):
        hub_id = model
    else:
        close = difflib.get_close_matches(model.lower(), [name.lower() for name in BUILTIN_NAMES], n=2, cutoff=0.5)
        names = [name for name in BUILTIN_NAMES if name.lower() in close]
        hint = f" (did you mean {' or '.join(names)}?)" if names else ""
        raise Hif4Error(
            f"{model}: no such directory or model{hint}; give a directory, a hub id such as "
            f"{load_builtin(BUILTIN_NAMES[1]).hub_id}, or one of {', '.join(BUILTIN_NAMES)}."
        )
    root = _fetch(hub_id, revision, patterns)
    return _inspect(root, f"{hub_id}@{root.name}")


def _fetch(hub_id: str, revision: str | None, patterns: list[str] | None) -> Path:
    # Imported here: the hub's client is slow to import, and a local model does not need it.
    from huggingface_hub import constants, errors, snapshot_download

    # The HTTP library's own error; which library that is depends on the client's version.
    http_error = cast(type[Exception], errors.HfHubHTTPError.__bases__[0])
    what = hub_id if revision is None else f"{hub_id} at revision {revision}"
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise Hif4Error(
            f"{hub_id}: access is gated; accept its conditions on https://huggingface.co/{hub_id} and log in with "
            "`hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise Hif4Error(f"{hub_id}: has no revision {revision!r} on the hub; check the spelling.") from error
    except errors.RepositoryNotFoundError as error:
        raise Hif4Error(
            f"{hub_id}: neither a directory here nor a model on the hub; check the spelling, or log in with "
            "`hf auth login` if it is private."
        ) from error
    except errors.HFValidationError as error:
        raise Hif4Error(f"{hub_id}: not a hub id ({error}).") from error
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise Hif4Error(
                f"{what}: not (completely) in the local cache {constants.HF_HUB_CACHE}, and offline mode is on; unset "
                "HF_HUB_OFFLINE, or run `hf download` for it where there is a network and set HF_HUB_CACHE to the copy."
            ) from error
        raise Hif4Error(
            f"{what}: the hub cannot be reached and the local cache {constants.HF_HUB_CACHE} does not have it; check "
            "the network, or give a local directory."
        ) from error
    except (OSError, http_error) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise Hif4Error(
            f"{what}: the download failed ({reason[0]}); run it again to go on where it stopped."
        ) from error


def _inspect(root: Path, source: str) -> ModelLocation:
    if (root / "model_index.json").is_file():
        return _inspect_pipeline(root, source)
    if all((root / folder / "config.json").is_file() for folder in _WAN_FOLDERS.values()):
        return _inspect_wan(root, source, {name: root / folder for name, folder in _WAN_FOLDERS.items()})
    for folder in _WAN_FOLDERS.values():
        if (root / folder).is_dir():
            missing = [name for name in _WAN_FOLDERS.values() if not (root / name / "config.json").is_file()]
            raise Hif4Error(f"{root}: {missing[0]}/config.json is missing; fetch both experts of the model.")
    if (root / "config.json").is_file():
        values = read_json_object(root / "config.json")
        if values.get("_class_name") == "WanModel":
            return _inspect_wan(root, source, {"transformer": root})
        config = WanConfig.from_dict(values, str(root / "config.json"))
        # A lone transformer does not say how it is sampled; of Wan2.2's models only TI2V-5B, alone in its 48 latent
        # channels, takes a timestep per token.
        pipeline = PipelineConfig(expand_timesteps=config.in_channels == config.out_channels == 48)
        return ModelLocation(source, {"transformer": config}, pipeline, root, "diffusers", {"transformer": root})
    raise Hif4Error(
        f"{root}: not a model; expected model_index.json (diffusers), high_noise_model/ and low_noise_model/ "
        "(Wan's own layout), or a transformer's config.json."
    )


def _inspect_pipeline(root: Path, source: str) -> ModelLocation:
    index = root / "model_index.json"
    values = read_json_object(index)
    pipeline = PipelineConfig.from_dict(values, str(index))
    experts: dict[str, Path] = {}
    for name in EXPERT_NAMES:
        entry = values.get(name)
        if entry is None or entry == [None, None]:
            continue
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] != "WanTransformer3DModel":
            raise Hif4Error(f"{index}: {name} is {entry!r}; hif4c compiles WanTransformer3DModel.")
        if not (root / name).is_dir():
            raise Hif4Error(f"{root}: the folder {name}/ is missing, though model_index.json names it; fetch it.")
        experts[name] = root / name
    if not experts:
        raise Hif4Error(f"{index}: names neither transformer nor transformer_2; there is nothing to compile.")
    if len(experts) == 2 and pipeline.boundary_ratio is None:
        raise Hif4Error(f"{index}: two experts, but boundary_ratio does not say where one hands over to the other.")
    configs = {
        name: WanConfig.from_dict(read_json_object(path / "config.json"), str(path / "config.json"))
        for name, path in experts.items()
    }
    return ModelLocation(source, configs, pipeline, root, "diffusers", experts)


def _inspect_wan(root: Path, source: str, experts: dict[str, Path]) -> ModelLocation:
    parsed = {name: _parse_wan_config(path / "config.json") for name, path in experts.items()}
    types = {model_type for model_type, _ in parsed.values()}
    if len(types) > 1:
        raise Hif4Error(f"{root}: the two experts are of different models ({' and '.join(sorted(types))}).")
    pipeline = _WAN_PIPELINES[types.pop()]
    if len(experts) == 2 and pipeline.boundary_ratio is None:
        raise Hif4Error(f"{root}: two experts, but ti2v models have one; give the folder of one model.")
    if len(experts) == 1:  # of a pair one folder can be given on its own
        pipeline = PipelineConfig(pipeline.class_name, None, pipeline.expand_timesteps)
    configs = {name: config for name, (_, config) in parsed.items()}
    return ModelLocation(source, configs, pipeline, root, "wan", experts)


def _parse_wan_config(path: Path) -> tuple[str, WanConfig]:
    """The model type and the configuration in diffusers' terms of a config.json with Wan's own keys."""
    values = read_json_object(path)
    if values.get("_class_name") != "WanModel":
        raise Hif4Error(f"{path}: model class {values.get('_class_name')!r} is not supported; Wan's own is WanModel.")
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in _WAN_PIPELINES:
        known = ", ".join(_WAN_PIPELINES)
        raise Hif4Error(f"{path}: model_type {model_type!r} is not supported; of Wan2.2 hif4c compiles {known}.")
    missing = [key for key in ("dim", *_WAN_KEYS) if key not in values]
    if missing:
        raise Hif4Error(f"{path}: {', '.join(missing)} is missing; is this the config.json of a Wan2.2 model?")
    dim, heads = values["dim"], values["num_heads"]
    if type(dim) is not int or type(heads) is not int or dim <= 0 or heads <= 0 or dim % heads:
        raise Hif4Error(f"{path}: dim must be a positive multiple of num_heads, got dim {dim!r}, num_heads {heads!r}.")
    ours: dict[str, Any] = {new: values[old] for old, new in _WAN_KEYS.items()}
    ours |= {key: values.get(key, default) for key, default in _WAN_DEFAULTS.items()}
    ours |= {"_class_name": "WanTransformer3DModel", "attention_head_dim": dim // heads}
    ours |= {"qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024}
    return model_type, WanConfig.from_dict(ours, str(path))
