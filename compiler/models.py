"""The models hif4c knows by name, and the checked form of a transformer's and a pipeline's configuration."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Self

from hif4c.runtime.components import EXPERT_NAMES, PIPELINE_CLASSES
from hif4c.runtime.errors import Hif4Error

__all__ = [
    "BUILTIN_NAMES",
    "EXPERT_NAMES",
    "TINY_NAME",
    "BuiltinModel",
    "PipelineConfig",
    "WanConfig",
    "load_builtin",
    "read_json_object",
    "tiny_directory",
]

TINY_NAME = "wan-tiny"
"""The trained toy that ships with the project, weights and all."""

_HUB_NAMES = ("Wan2.2-T2V-A14B", "Wan2.2-I2V-A14B", "Wan2.2-TI2V-5B")
BUILTIN_NAMES = (TINY_NAME, *_HUB_NAMES)


_TRANSFORMER_CLASS = "WanTransformer3DModel"
_QK_NORM = "rms_norm_across_heads"
_MAX_SIZE = 1 << 20  # no dimension of a real model comes near; a hostile one must not make us count for hours


@dataclass(frozen=True)
class WanConfig:
    """The constructor arguments of diffusers' WanTransformer3DModel, checked."""

    patch_size: tuple[int, int, int]
    """Latent frames, height and width that become one token."""
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int
    ffn_dim: int
    num_layers: int
    cross_attn_norm: bool
    qk_norm: str
    eps: float
    rope_max_seq_len: int
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    pos_embed_seq_len: int | None = None
    private: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The keys of the file that begin with an underscore, such as `_diffusers_version`."""

    @property
    def inner_dim(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Self:
        """Check the content of a transformer's config.json; `where` names the file in errors (Hif4Error)."""
        found = values.get("_class_name")
        if found != _TRANSFORMER_CLASS:
            what = f"model class {found!r} is not supported" if "_class_name" in values else "no _class_name"
            raise Hif4Error(f"{where}: {what}; hif4c compiles {_TRANSFORMER_CLASS}.")
        known = [item.name for item in fields(cls) if item.name != "private"]
        private = {key: value for key, value in values.items() if key.startswith("_")}
        unknown = sorted(set(values) - set(known) - set(private))
        if unknown:
            raise Hif4Error(f"{where}: {_TRANSFORMER_CLASS} has no {', '.join(unknown)}; remove what is not its own.")
        checked: dict[str, Any] = {name: _CHECKS.get(name, _size)(values, name, where) for name in known}
        if checked["attention_head_dim"] % 2:
            raise Hif4Error(f"{where}: attention_head_dim must be even, got {checked['attention_head_dim']}.")
        if checked["patch_size"][0] != 1:
            raise Hif4Error(
                f"{where}: patch_size {list(checked['patch_size'])}: only a temporal patch of 1 is supported."
            )
        if checked["image_dim"] is not None or checked["added_kv_proj_dim"] is not None:
            raise Hif4Error(
                f"{where}: image_dim or added_kv_proj_dim is set, as in Wan2.1 image-to-video; only Wan2.2 is compiled."
            )
        return cls(**checked, private=private)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as config.json has it; of the private keys only the class name, so no path gets in."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "private"}
        return {"_class_name": _TRANSFORMER_CLASS, **values, "patch_size": list(self.patch_size)}


@dataclass(frozen=True)
class PipelineConfig:
    """What a compiler needs of a pipeline's model_index.json."""

    class_name: str = "WanPipeline"
    boundary_ratio: float | None = None
    """The fraction of the training timesteps at which `transformer` hands over to `transformer_2`."""
    expand_timesteps: bool = False
    """Whether the transformer is called with one timestep per token, [B, seq], instead of [B]."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Self:
        """Check the content of a model_index.json; components are not looked at (Hif4Error names `where`)."""
        class_name = values.get("_class_name")
        if class_name not in PIPELINE_CLASSES:
            supported = " and ".join(PIPELINE_CLASSES)
            raise Hif4Error(f"{where}: pipeline class {class_name!r} is not supported; hif4c compiles {supported}.")
        ratio = values.get("boundary_ratio")
        if ratio is not None and not (_is_number(ratio) and 0 < ratio < 1):
            raise Hif4Error(f"{where}: boundary_ratio must be null or a number between 0 and 1, got {ratio!r}.")
        expand = values.get("expand_timesteps", False)
        if not isinstance(expand, bool):
            raise Hif4Error(f"{where}: expand_timesteps must be true or false, got {expand!r}.")
        return cls(class_name, None if ratio is None else float(ratio), expand)


@dataclass(frozen=True)
class BuiltinModel:
    """A published model whose configuration ships with hif4c, so that it can be planned without a file."""

    name: str
    hub_id: str
    pipeline: PipelineConfig
    experts: Mapping[str, WanConfig]


def load_builtin(name: str) -> BuiltinModel:
    """The built-in description of a published model: any of BUILTIN_NAMES but wan-tiny, which is files."""
    if name not in _HUB_NAMES:
        raise Hif4Error(f"{name}: not a published model known by name; these are: {', '.join(_HUB_NAMES)}.")
    path = resources.files("hif4c.compiler") / "model_configs" / f"{name}.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    config = WanConfig.from_dict(values["transformer"], path.name)
    pipeline = PipelineConfig.from_dict(values["pipeline"], path.name)
    return BuiltinModel(name, values["hub_id"], pipeline, dict.fromkeys(values["experts"], config))


def tiny_directory() -> Path:
    """Where wan-tiny's files are installed."""
    return Path(str(resources.files("hif4c.compiler.tiny") / "wan_tiny"))


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file whose content is an object; Hif4Error says what is wrong with it otherwise."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Hif4Error(f"{path}: not found; the model's folder is incomplete.") from None
    except OSError as error:
        raise Hif4Error(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise Hif4Error(f"{path}: not valid JSON ({error}); fetch the file again.") from error
    if not isinstance(values, dict):
        raise Hif4Error(f"{path}: must hold a JSON object; fetch the file again.")
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _required(values: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in values:
        raise Hif4Error(f"{where}: {key} is missing; is this the config.json of a {_TRANSFORMER_CLASS}?")
    return values[key]


def _size(values: Mapping[str, Any], key: str, where: str) -> int:
    value = _required(values, key, where)
    if type(value) is not int or not 0 < value <= _MAX_SIZE:
        raise Hif4Error(f"{where}: {key} must be a whole number from 1 to {_MAX_SIZE}, got {value!r}.")
    return value


def _optional_size(values: Mapping[str, Any], key: str, where: str) -> int | None:
    return None if values.get(key) is None else _size(values, key, where)


def _patch_size(values: Mapping[str, Any], key: str, where: str) -> tuple[int, int, int]:
    value = _required(values, key, where)
    triple = isinstance(value, list | tuple) and len(value) == 3
    if not triple or not all(type(item) is int and 0 < item <= 64 for item in value):
        raise Hif4Error(f"{where}: {key} must be three whole numbers (frames, height, width), got {value!r}.")
    return (value[0], value[1], value[2])


def _flag(values: Mapping[str, Any], key: str, where: str) -> bool:
    value = _required(values, key, where)
    if not isinstance(value, bool):
        raise Hif4Error(f"{where}: {key} must be true or false, got {value!r}.")
    return value


def _eps(values: Mapping[str, Any], key: str, where: str) -> float:
    value = _required(values, key, where)
    if not _is_number(value) or not 0 < value < 1:
        raise Hif4Error(f"{where}: {key} must be a number between 0 and 1, got {value!r}.")
    return float(value)


def _qk_norm(values: Mapping[str, Any], key: str, where: str) -> str:
    value = _required(values, key, where)
    if value != _QK_NORM:
        raise Hif4Error(f"{where}: {key} {value!r} is not supported; hif4c compiles {_QK_NORM!r}.")
    return _QK_NORM


_CHECKS = {
    "patch_size": _patch_size,
    "cross_attn_norm": _flag,
    "qk_norm": _qk_norm,
    "eps": _eps,
    "image_dim": _optional_size,
    "added_kv_proj_dim": _optional_size,
    "pos_embed_seq_len": _optional_size,
}
