"""LoRA: low-rank changes of a model's weights, added to the checkpoint's tensors as they are read.

W' = W + scale · (alpha / rank) · up · down, and W' = W + scale · diff for the differences of whole tensors that some
files hold. It is computed in float32, in the order in which the files were given, and rounded once to the dtype of the
checkpoint. Formula: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hif4c.compiler.checkpoint import WEIGHT_DTYPES, Checkpoint
from hif4c.compiler.lora_alpha import AlphaRules
from hif4c.compiler.lora_names import LoraKey, Role, find_targets, is_image_module, parse_key
from hif4c.runtime.artifact import sha256_file
from hif4c.runtime.components import EXPERT_NAMES
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.safetensors_stream import DTYPE_NAMES, TensorFile

__all__ = ["FusedCheckpoint", "LoraFile", "fuse_loras", "parse_loras"]

_SCALE = re.compile(r"(?P<path>.+):(?P<scale>[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)", re.DOTALL)
_BLOCK_ELEMENTS = 4 << 20


@dataclass(frozen=True)
class _Change:
    """What a file does to one tensor of the model.

    Attributes:
        module: the module's path as the file has it, without prefixes.
        leaf: "weight", "bias" or "modulation".
        keys: names in the file: (up, down), or one whole difference.
        factor: alpha / rank; 1 for a difference.
    """

    module: LoraKey
    leaf: str
    keys: tuple[str, ...]
    factor: float


class LoraFile:
    """A checked LoRA file; see `hif4c.compiler.lora_names` for what it may hold.

    Args:
        path: a .safetensors file.
        scale: how much of it is added; 1 is as it was trained.

    Attributes:
        sha256: of the file.
        changes: what it does to the model's tensors.

    Raises:
        Hif4Error: it is damaged, holds NaN, infinite or quantized values, half a pair, factors that do not fit each
            other, or what is not fused (DoRA, LoHa, LoKr).
    """

    def __init__(self, path: Path, scale: float = 1.0) -> None:
        if not math.isfinite(scale) or scale == 0:
            raise Hif4Error(f"{path}: scale {scale:g} cannot be applied; give a number other than 0.")
        self.path, self.scale = path, scale
        self._file = TensorFile(path)
        self._check_values()
        self.changes = self._read_changes()
        self.sha256 = sha256_file(path)

    def for_expert(self, expert: str) -> list[_Change]:
        """The changes for one expert: all of them, unless the file's names tell its experts apart."""
        if not any(change.module.expert == EXPERT_NAMES[1] for change in self.changes):
            return self.changes
        return [change for change in self.changes if change.module.expert in (None, expert)]

    def shape(self, change: _Change, wanted: Sequence[int]) -> tuple[int, ...]:
        """The shape of the tensor that a change fits; factors of a linear and of a convolution look alike but for it.

        Args:
            change: one of this file's.
            wanted: shape of the model's tensor, which is what factors of the right sizes are reshaped to.
        """
        shapes = [self._file.info(key)[1] for key in change.keys]
        if len(shapes) == 1:
            return shapes[0]
        up, down = shapes
        found = (up[0], *down[1:])
        # A linear's factors are sometimes stored as those of a convolution of size 1.
        return tuple(wanted) if _trimmed(found) == _trimmed(wanted) else found

    def add_to(self, rows: torch.Tensor, change: _Change, first: int) -> None:
        """Add a change to some rows of a tensor in place.

        Args:
            rows: [rows, ...] float32, the tensor's rows from `first` on.
            change: one of this file's, which fits the tensor.
            first: index of the first row.
        """
        tensors = [self._file.read(key) for key in change.keys]
        mine = tensors[0][first : first + len(rows)].float()
        if len(tensors) == 2:
            mine = (mine.flatten(1) @ tensors[1].float().flatten(1)).view(rows.shape)
        rows.add_(mine, alpha=self.scale * change.factor)

    def release(self, change: _Change) -> None:
        """Give the memory of a change's tensors back to the system."""
        for key in change.keys:
            self._file.release(key)

    def close(self) -> None:
        """Give up the map of the file."""
        self._file.close()

    def _check_values(self) -> None:
        allowed = ", ".join(DTYPE_NAMES[dtype] for dtype in WEIGHT_DTYPES)
        if not self._file.names:
            raise Hif4Error(f"{self.path}: holds no tensor; it is no LoRA.")
        if unknown := [key for key in self._file.names if parse_key(key) is None]:
            raise Hif4Error(
                f"{self.path}: holds {_some(unknown, 'tensor')} of a kind that cannot be fused (plain LoRA factors and "
                "differences can); use a plain LoRA."
            )
        for key in self._file.names:
            dtype, shape = self._file.info(key)
            scalar = key.endswith(".alpha")
            if scalar and math.prod(shape) != 1:
                raise Hif4Error(f"{self.path}: {key} is {list(shape)} where one number belongs; fetch the file again.")
            if not scalar and dtype not in WEIGHT_DTYPES:
                raise Hif4Error(
                    f"{self.path}: {key} is {DTYPE_NAMES[dtype]} where only {allowed} can be fused; "
                    "use a LoRA that was not quantized."
                )
            tensor = self._file.read(key)
            if tensor.numel() and not all(torch.isfinite(edge.float()) for edge in torch.aminmax(tensor)):
                raise Hif4Error(f"{self.path}: {key} holds NaN or infinite values; fetch the file again.")
            self._file.release(key)

    def _read_changes(self) -> list[_Change]:
        modules: dict[tuple[str | None, str], dict[Role, str]] = {}
        for key in self._file.names:
            parsed = parse_key(key)
            assert parsed is not None
            roles = modules.setdefault((parsed.expert, parsed.module), {})
            if parsed.role in roles:
                raise Hif4Error(f"{self.path}: {roles[parsed.role]} and {key} are the same; keep one.")
            roles[parsed.role] = key
        rules = AlphaRules(self.path, self._file.metadata, self._file.names)
        changes = []
        for (expert, module), roles in modules.items():
            where = LoraKey(expert, module, "weight")
            factor = self._factor(where, roles, rules)
            if factor is not None:
                changes.append(_Change(where, "weight", (roles["up"], roles["down"]), factor))
            if "up_bias" in roles:
                changes.append(_Change(where, "bias", (roles["up_bias"],), 1.0 if factor is None else factor))
            for leaf in ("weight", "bias", "modulation"):
                if leaf in roles:
                    changes.append(_Change(where, leaf, (roles[leaf],), 1.0))
        return changes

    def _factor(self, where: LoraKey, roles: Mapping[Role, str], rules: AlphaRules) -> float | None:
        """alpha / rank of a pair of factors; None where there is none."""
        if not roles.keys() & {"up", "down", "alpha", "up_bias"}:
            return None
        lacking = [role for role in ("down", "up") if role not in roles]
        if lacking:
            there = next(iter(roles.values()))
            raise Hif4Error(f"{self.path}: holds {there} without its {' and '.join(lacking)} factor; fetch it again.")
        up, down = (self._file.info(roles[role])[1] for role in ("up", "down"))
        if len(up) < 2 or len(down) < 2 or up[1] != down[0] or math.prod(up[2:]) != 1 or 0 in (*up, *down):
            raise Hif4Error(
                f"{self.path}: {roles['up']} {list(up)} and {roles['down']} {list(down)} are not two factors of one "
                "matrix; fetch the file again."
            )
        if "alpha" in roles:
            return float(self._file.read(roles["alpha"]).reshape(()).item()) / down[0]
        return rules.factor(where, down[0])


class FusedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are read with LoRAs added to them; its fingerprint is that of the fused weights.

    A tensor that a LoRA changes is computed anew whenever it is read, in memory of its own: beside it, no more than the
    LoRA's factors and a few rows in float32 are held. The same bits whatever the number of threads.

    Attributes:
        notes: sentences on what was left out.
        record: for the manifest, a LoRA an entry, in order: file name, sha256, scale, number of tensors changed.
    """

    def __init__(self, base: Checkpoint, loras: Sequence[LoraFile], expert: str) -> None:
        self.__dict__.update(vars(base))  # the same open files
        self._base, self._loras = base, tuple(loras)
        self._changes: dict[str, list[tuple[LoraFile, _Change]]] = {}
        self.notes: list[str] = []
        self.record: list[dict[str, Any]] = []
        targets = find_targets(base.names)
        for lora in loras:
            self._add(lora, expert, targets)

    @property
    def changed(self) -> list[str]:
        """The tensors that any LoRA changes, under diffusers' names."""
        return list(self._changes)

    @property
    def summary(self) -> str:
        """The LoRAs in a few words."""
        return ", ".join(f"{item['file']} at {item['scale']:g} (tensors: {item['tensors']})" for item in self.record)

    def read(self, name: str, *, validate: bool = False) -> torch.Tensor:
        """As Checkpoint.read; raises Hif4Error when a sum is too large for the dtype that the tensor is stored in."""
        stored = self._base.read(name, validate=validate)
        changes = self._changes.get(name)
        if not changes:
            return stored
        result = torch.empty_like(stored)
        step = max(1, _BLOCK_ELEMENTS // max(1, stored[0].numel()))
        for first in range(0, len(stored), step):
            rows = stored[first : first + step].to(torch.float32, copy=True)
            for lora, change in changes:
                lora.add_to(rows, change, first)
            result[first : first + step] = rows
        if not all(torch.isfinite(edge) for edge in torch.aminmax(result)):
            files = ", ".join(str(lora.path) for lora, _ in changes)
            raise Hif4Error(
                f"{files}: {name} overflows {DTYPE_NAMES[stored.dtype]} with it at this scale; choose a smaller one."
            )
        return result

    def release(self, name: str) -> None:
        """As Checkpoint.release; gives back the LoRAs' factors as well."""
        self._base.release(name)
        for lora, change in self._changes.get(name, ()):
            lora.release(change)

    def copy_into(self, model: nn.Module) -> None:
        """Give a transformer of diffusers the fused weights, in the dtypes of its parameters."""
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name in self._changes:
                parameters[name].copy_(self.read(name))
                self.release(name)

    def close(self) -> None:
        """Give up the maps of the checkpoint and of the LoRAs."""
        self._base.close()
        for lora in self._loras:
            lora.close()

    def _add(self, lora: LoraFile, expert: str, targets: Mapping[tuple[str, str], str]) -> None:
        changes = lora.for_expert(expert)
        image = [change for change in changes if is_image_module(change.module.flat)]
        rest = [change for change in changes if change not in image]
        found = [(targets.get((change.module.flat, change.leaf)), change) for change in rest]
        unknown = [change.keys[0] for target, change in found if target is None]
        if not changes or len(unknown) == len(rest):
            names = unknown or [change.keys[0] for change in image or lora.changes]
            raise Hif4Error(
                f"{lora.path}: changes no tensor of {expert} in {self.folder}, it holds {_some(names, 'change')}; "
                "use a LoRA that was made for this model."
            )
        if unknown:
            raise Hif4Error(
                f"{lora.path}: holds {_some(unknown, 'change')} that {expert} in {self.folder} has no tensor for; "
                "use a LoRA that was made for this model."
            )
        wrong = []
        seen: dict[tuple[str, int], str] = {}
        for target, change in found:
            assert target is not None
            if (first := seen.setdefault((target, len(change.keys)), change.keys[0])) != change.keys[0]:
                raise Hif4Error(f"{lora.path}: {first} and {change.keys[0]} both change {target}; keep one.")
            shape = tuple(self.shape(target))
            if lora.shape(change, shape) != shape:
                wrong.append(f"{change.keys[0]} makes {list(lora.shape(change, shape))}, {target} is {list(shape)}")
        if wrong:
            more = f" (and {len(wrong) - 2} more)" if len(wrong) > 2 else ""
            raise Hif4Error(f"{lora.path}: does not fit {expert}: {'; '.join(wrong[:2])}{more}; use one that does.")
        for target, change in found:
            self._changes.setdefault(str(target), []).append((lora, change))
        entry = {"file": lora.path.name, "sha256": lora.sha256, "scale": lora.scale}
        self.record.append({**entry, "tensors": len({target for target, _ in found})})
        if image:
            names = [change.keys[0] for change in image]
            self.notes.append(
                f"{lora.path.name}: {_some(names, 'change')} of Wan2.1's image attention left out, Wan2.2 has none"
            )


def fuse_loras(checkpoint: Checkpoint, loras: Sequence[tuple[Path, float]], expert: str) -> Checkpoint:
    """The checkpoint with LoRAs added to its tensors: a FusedCheckpoint, or the same one where there is no LoRA.

    Args:
        checkpoint: of one expert; the result's `close` closes it.
        loras: file and scale, in the order in which they are added.
        expert: "transformer" or "transformer_2".

    Raises:
        Hif4Error: as LoraFile; or a file changes nothing, changes what the model does not have, or has other shapes.
    """
    return FusedCheckpoint(checkpoint, [LoraFile(*item) for item in loras], expert) if loras else checkpoint


def parse_loras(values: Iterable[str], experts: Sequence[str]) -> dict[str, tuple[tuple[Path, float], ...]]:
    """Turn `--lora` values, each "[EXPERT=]FILE[:scale]", into the LoRAs of every expert that has any.

    Without EXPERT a file is for all experts, or for those that the names of its tensors say when they tell
    transformer and transformer_2 apart. A last colon followed by a number is the scale.

    Args:
        values: as typed, in the order in which they are added.
        experts: those that are worked on.

    Raises:
        Hif4Error: an expert that is not among them, or a file that cannot be read or is for none of them.
    """
    found: dict[str, list[tuple[Path, float]]] = {}
    for value in values:
        expert, equals, rest = value.partition("=")
        named = bool(equals) and expert in EXPERT_NAMES
        if named and expert not in experts:
            raise Hif4Error(f"--lora {value}: there is no {expert} here, only {', '.join(experts)}.")
        match = _SCALE.fullmatch(rest if named else value)
        path = Path(match["path"] if match else rest if named else value)
        chosen = [expert] if named else _experts_of(path, experts)
        for name in chosen:
            found.setdefault(name, []).append((path, float(match["scale"]) if match else 1.0))
    return {name: tuple(found[name]) for name in experts if name in found}


def _experts_of(path: Path, experts: Sequence[str]) -> list[str]:
    with TensorFile(path) as file:
        named = {parsed.expert for key in file.names if (parsed := parse_key(key))}
    if EXPERT_NAMES[1] not in named or None in named:
        return list(experts)
    if not (chosen := [name for name in experts if name in named]):
        raise Hif4Error(f"{path}: its tensors are for {EXPERT_NAMES[1]}, which is not among {', '.join(experts)}.")
    return chosen


def _trimmed(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without the ones at its end."""
    sizes = list(shape)
    while len(sizes) > 2 and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)


def _some(names: Sequence[str], what: str) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({shown}{', ...' if len(names) > 3 else ''})"
