"""alpha of a LoRA whose file holds no alpha tensors: in the file's own metadata, or in PEFT's adapter_config.json."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hif4c.compiler.lora_names import LoraKey
from hif4c.compiler.models import read_json_object
from hif4c.runtime.components import EXPERT_NAMES
from hif4c.runtime.errors import Hif4Error

__all__ = ["AlphaRules"]

_METADATA = "lora_adapter_metadata"
_PEFT_PREFIX = "base_model.model."
_PEFT_CONFIG = "adapter_config.json"


class AlphaRules:
    """What a file's settings say of the factor alpha / rank; without any it is 1.

    diffusers writes PEFT's settings into the metadata of the file, each under the name of its expert. PEFT writes them
    into a file beside it. Source: `LoraConfig` of huggingface/peft (lora_alpha, alpha_pattern, use_rslora, use_dora).

    Args:
        path: of the LoRA.
        metadata: of its header.
        keys: names of its tensors.

    Raises:
        Hif4Error: the settings are damaged, or say that it is a DoRA.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str], keys: Sequence[str]) -> None:
        self._where = str(path)
        self._settings: dict[str, Any] = {}
        beside = path.with_name(_PEFT_CONFIG)
        if _METADATA in metadata:
            try:
                found = json.loads(metadata[_METADATA])
            except (ValueError, RecursionError):
                found = None
            if not isinstance(found, dict):
                raise self._bad(_METADATA)
            self._settings = found
        elif beside.is_file() and any(key.startswith(_PEFT_PREFIX) for key in keys):
            self._where, self._settings = str(beside), read_json_object(beside)
        for name in ("", *(f"{expert}." for expert in EXPERT_NAMES)):
            if self._settings.get(f"{name}use_dora"):
                raise Hif4Error(f"{self._where}: says that this is a DoRA, which cannot be fused; use a plain LoRA.")

    def factor(self, module: LoraKey, rank: int) -> float:
        """alpha / rank of a module, alpha / sqrt(rank) for a rank-stabilized LoRA."""
        alpha = self._setting(module, "lora_alpha")
        patterns = self._setting(module, "alpha_pattern")
        if isinstance(patterns, dict):
            # PEFT takes them for regular expressions; what is written is the end of a path, with ^ for a whole one.
            for pattern, value in patterns.items():
                whole = pattern.removeprefix("^")
                if module.module == whole or (whole == pattern and module.module.endswith(f".{pattern}")):
                    alpha = value
                    break
        if alpha is None:
            return 1.0
        if type(alpha) not in (int, float) or not abs(alpha) < 1e30:  # nor NaN, nor too long for a float
            raise self._bad("lora_alpha")
        return alpha / (math.sqrt(rank) if self._setting(module, "use_rslora") else rank)

    def _setting(self, module: LoraKey, name: str) -> Any:
        prefixed = f"{module.expert or EXPERT_NAMES[0]}.{name}"
        return self._settings.get(prefixed, self._settings.get(name))

    def _bad(self, what: str) -> Hif4Error:
        return Hif4Error(f"{self._where}: its {what} is damaged; fetch the file again.")
