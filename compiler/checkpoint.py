"""One expert's weights as they lie on the disk: memory-mapped, read one tensor at a time, under diffusers' names."""

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Self

import torch

from hif4c.compiler.models import WanConfig, read_json_object
from hif4c.compiler.wan_names import is_original_layout, to_diffusers_name
from hif4c.compiler.workers import in_order
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.safetensors_stream import DTYPE_NAMES, TensorFile, tensor_bytes

__all__ = ["WEIGHT_DTYPES", "Checkpoint", "Fingerprint"]

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What a weight may be stored in; anything else was quantized already."""

_PIECE_BYTES = 8 << 20
"""How much of a tensor is in this process's memory at once while it is hashed."""
_KEPT_BYTES = 1 << 30
"""What was released stays in the system's cache up to this: a tensor that is soon read again comes from there."""

_BASE_NAME = "diffusion_pytorch_model"
_INDEX_SUFFIX = ".safetensors.index.json"


class Fingerprint:
    """The identity of a set of weights, whatever their order, their files or the layout of their names.

    Tensors can be added in any order, as they stream by.
    """

    def __init__(self) -> None:
        self._entries: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Count one tensor in, under its diffusers name."""
        self.add_digest(name, tensor.dtype, tensor.shape, hashlib.sha256(tensor_bytes(tensor)).hexdigest())

    def add_digest(self, name: str, dtype: torch.dtype, shape: Sequence[int], digest: str) -> None:
        """Count one tensor in by the sha256 of its bytes."""
        if name in self._entries:
            raise ValueError(f"tensor {name} twice")
        self._entries[name] = json.dumps([name, DTYPE_NAMES[dtype], list(shape), digest])

    def hexdigest(self) -> str:
        """sha256 over (name, dtype, shape, sha256 of the data) of all tensors, sorted by name."""
        lines = "\n".join(entry for _, entry in sorted(self._entries.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


class Checkpoint:
    """The safetensors files of one expert's folder, sharded or not.

    All headers are checked when it is opened (Hif4Error); data is touched only by `read`.

    Args:
        folder: holds `BASE.safetensors.index.json` and its shards, or one `BASE.safetensors`.
        config: the expert's configuration, kept for the caller.
        layout: "diffusers" or "wan", the layout of the names in the files; found out from the names when None.
    """

    def __init__(self, folder: Path | str, config: WanConfig | None = None, layout: str | None = None) -> None:
        self.folder = Path(folder)
        self.config = config
        self._files: dict[Path, TensorFile] = {}
        self._places: dict[str, tuple[TensorFile, str]] = {}
        self._released: dict[str, int] = {}
        self._lock = threading.Lock()
        stored = self._open_files()
        found = "wan" if is_original_layout(stored) else "diffusers"
        if layout not in (None, found):
            raise Hif4Error(
                f"{self.folder}: the weights are named as in the {found} layout, but config.json is of the {layout} "
                "layout; fetch both from one place."
            )
        self.layout = found
        self._map_names(stored)

    @property
    def names(self) -> list[str]:
        """All tensors, under diffusers' names, in the order of the files: read in it to read a disk in sequence."""
        return list(self._places)

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return list(self._files)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.dtype(name).itemsize * self.shape(name).numel() for name in self._places)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype a tensor is stored in."""
        file, stored = self._place(name)
        return file.info(stored)[0]

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor."""
        file, stored = self._place(name)
        return torch.Size(file.info(stored)[1])

    def read(self, name: str, *, validate: bool = False) -> torch.Tensor:
        """A read-only view of one tensor in the mapped file; call `release` when done with it.

        Args:
            name: diffusers' name.
            validate: raise Hif4Error when the tensor holds a NaN or an infinity.
        """
        file, stored = self._place(name)
        with self._lock:
            self._released.pop(name, None)
        tensor = file.read(stored)
        if validate:
            self._check_finite(name, tensor)
        return tensor

    def prefetch(self, name: str) -> None:
        """Begin to read a tensor from the disk, without waiting for it."""
        file, stored = self._place(name)
        file.prefetch(stored)

    def digest(self, name: str, tensor: torch.Tensor) -> str:
        """sha256 of the bytes of a tensor that was read; Hif4Error when it holds a NaN or an infinity.

        Its memory is given back piece by piece; the tensor stays valid.
        """
        result, flat = hashlib.sha256(), tensor.reshape(-1)
        for piece in flat.split(max(1, _PIECE_BYTES // flat.itemsize)) if flat.numel() else ():
            self._check_finite(name, piece)
            result.update(tensor_bytes(piece))
            self.release(name)
        return result.hexdigest()

    def release(self, name: str) -> None:
        """Give the memory of a tensor that was read back to the system; reading it again is allowed.

        The system's cache forgets it as well, some tensors later: a checkpoint that is larger than the memory would
        else drive everything out that others use.
        """
        file, stored = self._place(name)
        file.release(stored)
        with self._lock:
            self._released.pop(name, None)
            self._released[name] = file.nbytes(stored)
            forgotten = []
            while sum(self._released.values()) > _KEPT_BYTES:
                oldest = next(iter(self._released))
                del self._released[oldest]
                forgotten.append(oldest)
        for oldest in forgotten:
            file, stored = self._places[oldest]
            file.forget(stored)

    def check(self, expected: Mapping[str, Sequence[int]]) -> None:
        """Compare with the model's parameters, diffusers' name -> shape.

        Raises Hif4Error for missing, additional, misshapen or already quantized tensors, each kind in a sentence of its
        own with its count and first names; when several kinds occur, all are in one message.
        """
        wrong = []
        if missing := [name for name in expected if name not in self._places]:
            wrong.append(f"lacks {_some(missing)} that the configuration asks for")
        if extra := [name for name in self._places if name not in expected]:
            wrong.append(f"holds {_some(extra)} that the configuration has no place for")
        both = [name for name in expected if name in self._places]
        shapes = [
            f"{name} {list(self.shape(name))} where the configuration makes {list(expected[name])}"
            for name in both
            if tuple(self.shape(name)) != tuple(expected[name])
        ]
        if shapes:
            wrong.append(f"has other shapes for {_some(shapes)}")
        dtypes = [f"{name} {DTYPE_NAMES[self.dtype(name)]}" for name in both if self.dtype(name) not in WEIGHT_DTYPES]
        if dtypes:
            allowed = ", ".join(DTYPE_NAMES[dtype] for dtype in WEIGHT_DTYPES)
            wrong.append(f"stores {_some(dtypes)} where only {allowed} can be compiled")
        if wrong:
            raise Hif4Error(f"{self.folder}: the checkpoint {'; it '.join(wrong)}; use the weights of this very model.")

    def fingerprint(self) -> str:
        """The Fingerprint of all tensors; reads every byte, on all cores, memory stays constant.

        Raises Hif4Error where one holds a NaN or an infinity.
        """
        result = Fingerprint()
        with closing(in_order(lambda name: self.digest(name, self.read(name)), self._places)) as digests:
            for name, digest in zip(self._places, digests, strict=True):
                result.add_digest(name, self.dtype(name), self.shape(name), digest)
        return result.hexdigest()

    def close(self) -> None:
        """Give up the maps; tensors that are still referenced keep theirs."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_finite(self, name: str, tensor: torch.Tensor) -> None:
        # Minimum and maximum show a NaN or an infinity anywhere in one pass, ten times faster than isfinite.
        if tensor.numel() and not all(torch.isfinite(edge) for edge in torch.aminmax(tensor)):
            file, stored = self._place(name)
            raise Hif4Error(f"{file.path}: tensor {stored} holds NaN or infinite values; fetch the file again.")

    def _place(self, name: str) -> tuple[TensorFile, str]:
        try:
            return self._places[name]
        except KeyError:
            raise Hif4Error(f"{self.folder}: the checkpoint holds no tensor {name}.") from None

    def _open_files(self) -> dict[str, TensorFile]:
        """Stored name -> file."""
        if not self.folder.is_dir():
            raise Hif4Error(f"{self.folder}: no such folder; it should hold the weights of an expert.")
        if index := self._choose(_INDEX_SUFFIX):
            return self._open_shards(index)
        if single := self._choose(".safetensors"):
            file = self._files[single] = TensorFile(single)
            return dict.fromkeys(file.names, file)
        if any(self.folder.glob("*.bin")):
            raise Hif4Error(f"{self.folder}: holds only pickled .bin weights; use a copy that has .safetensors files.")
        raise Hif4Error(f"{self.folder}: holds no .safetensors file; the weights were not fetched.")

    def _choose(self, suffix: str) -> Path | None:
        """The one file with that ending; where there are several, the one with diffusers' standard name."""
        found = sorted(path for path in self.folder.iterdir() if path.name.endswith(suffix))
        standard = self.folder / f"{_BASE_NAME}{suffix}"
        if standard in found:
            return standard
        if len(found) > 1:
            listed = ", ".join(path.name for path in found[:4])
            raise Hif4Error(
                f"{self.folder}: {len(found)} files could be the weights ({listed}) and no index says how they belong "
                "together; fetch the missing index file or keep one."
            )
        return found[0] if found else None

    def _open_shards(self, index: Path) -> dict[str, TensorFile]:
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise Hif4Error(f"{index}: has no weight_map; fetch the file again.")
        for name, shard in weight_map.items():
            # The index is outside input: it may name files beside it and nothing else.
            if not isinstance(shard, str) or not shard.endswith(".safetensors") or Path(shard).name != shard:
                raise Hif4Error(f"{index}: {name} is said to be in {shard!r}, which is not a file name in this folder.")
        shards = {shard: self._open_shard(index, shard) for shard in sorted(set(weight_map.values()))}
        stored: dict[str, TensorFile] = {}
        for shard, file in shards.items():
            inside = set(file.names)
            if absent := [name for name, home in weight_map.items() if home == shard and name not in inside]:
                raise Hif4Error(f"{file.path}: lacks {_some(absent)} that {index.name} lists in it; fetch both again.")
            if unlisted := [name for name in file.names if weight_map.get(name) != shard]:
                raise Hif4Error(f"{file.path}: holds {_some(unlisted)} that {index.name} does not list in it.")
            stored.update(dict.fromkeys(file.names, file))
        return stored

    def _open_shard(self, index: Path, shard: str) -> TensorFile:
        path = self.folder / shard
        if not path.is_file():
            raise Hif4Error(f"{path}: missing, though {index.name} lists it; the download is incomplete, run it again.")
        file = self._files[path] = TensorFile(path)
        return file

    def _map_names(self, stored: Mapping[str, TensorFile]) -> None:
        unknown: list[str] = []
        for name, file in stored.items():
            ours = name if self.layout == "diffusers" else to_diffusers_name(name)
            if ours is None:
                unknown.append(name)
            elif ours in self._places:
                raise Hif4Error(f"{self.folder}: {name} and {self._places[ours][1]} are the same tensor; keep one.")
            else:
                self._places[ours] = (file, name)
        if unknown:
            raise Hif4Error(
                f"{self.folder}: holds {_some(unknown)} that Wan2.2 does not have; use the weights of Wan2.2."
            )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown}{', ...' if len(names) > 3 else ''})"
