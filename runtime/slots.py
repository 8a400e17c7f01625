"""Room on a device for parts of the weights that take turns: the copies into it, and who waits for whom."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Protocol

import torch

__all__ = ["SLOTS", "OrderedSlots", "Slots", "StreamSlots", "make_slots"]

SLOTS = 2
Parts = Sequence[tuple[int, torch.Tensor]]
"""(offset in bytes, tensor on the CPU): what goes into a slot."""


class Slots(Protocol):
    """`SLOTS` pieces of memory, filled by one thread and read by another."""

    def begin(self) -> None:
        """A call begins; nobody reads a slot any more, except for work that the device still has to do."""
        ...

    def fill(self, slot: int, parts: Parts) -> list[torch.Tensor]:
        """Copy the parts; returns them on the device. In the filling thread, for a slot that was left."""
        ...

    def enter(self, slot: int) -> None:
        """What the device is given from now on may read the slot. In the reading thread, after `fill` returned."""
        ...

    def leave(self, slot: int) -> None:
        """What the device is given from now on does not read the slot."""
        ...


class OrderedSlots:
    """On the CPU, where copies and kernels are complete when they return, or a device that does all work in order."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(SLOTS)]

    def begin(self) -> None:
        """Nothing to wait for."""

    def fill(self, slot: int, parts: Parts) -> list[torch.Tensor]:
        """Copy the parts."""
        return _copy(self._buffers[slot], parts)

    def enter(self, slot: int) -> None:
        """Nothing to wait for."""

    def leave(self, slot: int) -> None:
        """Nothing to wait for."""


class StreamSlots:
    """On a GPU: by way of pinned memory and a stream of its own, so that copies go on while kernels run.

    A slot is overwritten only after the kernels that read it (event `read`), a pinned buffer only after the copy from
    it, and kernels start only after the copy to the slot (event `copied`).

    Args:
        nbytes: of a slot.
        device: the GPU.
        module: the device's kind of streams and events, such as torch.cuda.
        pinned: memory for copies that do not wait, if the device has such.
    """

    def __init__(self, nbytes: int, device: torch.device, module: ModuleType | Any, *, pinned: bool = True) -> None:
        self._module = module
        self._device = device
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._staging = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(SLOTS)]
        self._stream = self._module.Stream(device)
        self._copied = [self._module.Event() for _ in range(SLOTS)]
        self._read = [self._module.Event() for _ in range(SLOTS)]

    def begin(self) -> None:
        """The stream of this call may be another than the last one's."""
        for slot in range(SLOTS):
            self.leave(slot)

    def fill(self, slot: int, parts: Parts) -> list[torch.Tensor]:
        """Copy the parts into pinned memory, and let the device copy from there."""
        self._copied[slot].synchronize()
        staging, buffer = self._staging[slot], self._buffers[slot]
        _copy(staging, parts)
        end = max(offset + tensor.nbytes for offset, tensor in parts)
        self._stream.wait_event(self._read[slot])
        with self._module.stream(self._stream):
            buffer[:end].copy_(staging[:end], non_blocking=True)
        self._copied[slot].record(self._stream)
        return [_view(buffer, offset, tensor) for offset, tensor in parts]

    def enter(self, slot: int) -> None:
        """Kernels wait for the copy."""
        self._module.current_stream(self._device).wait_event(self._copied[slot])

    def leave(self, slot: int) -> None:
        """The next copy waits for the kernels so far."""
        self._read[slot].record(self._module.current_stream(self._device))


def make_slots(nbytes: int, device: torch.device) -> Slots:
    """The slots that a device can have."""
    module = None if device.type == "cpu" else torch.get_device_module(device)
    with torch.inference_mode(False):  # another thread could not write to what inference mode makes
        if hasattr(module, "Stream") and hasattr(module, "Event"):
            return StreamSlots(nbytes, device, module)
        return OrderedSlots(nbytes, device)


def _copy(buffer: torch.Tensor, parts: Parts) -> list[torch.Tensor]:
    views = [_view(buffer, offset, tensor) for offset, tensor in parts]
    for view, (_, tensor) in zip(views, parts, strict=True):
        view.copy_(tensor)
    return views


def _view(buffer: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    count = math.prod(like.shape) * like.dtype.itemsize
    return buffer[offset : offset + count].view(like.dtype).view(like.shape)
