"""Write clips for people: mp4, gif, and a contact sheet of all frames as PNG."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hif4c.runtime.errors import Hif4Error

__all__ = ["check_clip_path", "contact_sheet", "save_clip", "save_comparison", "to_pixels"]

Frames = npt.NDArray[np.uint8]
# Clips smaller than this are enlarged by whole factors, so that a toy's 32 pixels can be seen.
MIN_SIDE = 256
GAP = 4


def to_pixels(frames: npt.NDArray[np.floating]) -> Frames:
    """[F, H, W, 3] in 0..1 -> uint8."""
    return np.round(np.clip(np.nan_to_num(frames), 0, 1) * 255).astype(np.uint8)


def check_clip_path(path: Path) -> None:
    """Make the clip's folder, before any time is spent on sampling.

    Raises:
        Hif4Error: the path does not end in .mp4, or cannot be written.
    """
    if path.suffix != ".mp4":
        raise Hif4Error(f"{path}: the output must end in .mp4.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK) or path.is_dir():
            raise PermissionError(errno.EACCES, "not writable")
    except OSError as error:
        raise Hif4Error(f"{path}: the clip cannot be written there ({error.strerror}).") from None


def save_clip(frames: npt.NDArray[np.floating], path: Path, fps: int) -> list[Path]:
    """Write PATH (mp4), and beside it a gif and a contact sheet.

    Args:
        frames: [F, H, W, 3] in 0..1.
        path: ends in .mp4.
        fps: frames a second.

    Returns:
        The three files.
    """
    import imageio.v3 as iio

    pixels = _enlarged(to_pixels(frames))
    even = pixels[:, : pixels.shape[1] // 2 * 2, : pixels.shape[2] // 2 * 2]  # 4:2:0 video has even sides
    gif, sheet = path.with_suffix(".gif"), path.with_suffix(".png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        iio.imwrite(path, even, plugin="pyav", codec="libx264", fps=fps)
        iio.imwrite(gif, pixels, plugin="pillow", duration=1000 / fps, loop=0)
        iio.imwrite(sheet, contact_sheet(pixels))
    except OSError as error:
        raise Hif4Error(f"{path}: the clip cannot be written ({error.strerror or error}).") from None
    return [path, gif, sheet]


def contact_sheet(pixels: Frames, columns: int = 9) -> Frames:
    """All frames of a clip in one picture, left to right, then down. pixels: [F, H, W, 3]; returns [H', W', 3]."""
    columns = min(columns, len(pixels))
    rows = -(-len(pixels) // columns)
    height, width = pixels.shape[1:3]
    sheet = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), 255, np.uint8)
    for index, frame in enumerate(pixels):
        top = GAP + index // columns * (height + GAP)
        left = GAP + index % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = frame
    return sheet


def save_comparison(clips: Sequence[tuple[str, npt.NDArray[np.floating]]], path: Path, columns: int = 9) -> None:
    """One picture: for each (title, frames [F, H, W, 3] in 0..1) the title over a strip of evenly chosen frames."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=16)
    strips = []
    for _, frames in clips:
        chosen = np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)
        pixels = to_pixels(frames[chosen])
        strips.append(contact_sheet(_enlarged(pixels, 96), columns))
    line = 26
    width = max(strip.shape[1] for strip in strips)
    picture = Image.new("RGB", (width, sum(strip.shape[0] + line for strip in strips)), "white")
    draw = ImageDraw.Draw(picture)
    top = 0
    for (title, _), strip in zip(clips, strips, strict=True):
        draw.text((GAP, top + 4), title, fill="black", font=font)
        picture.paste(Image.fromarray(strip), (0, top + line))
        top += strip.shape[0] + line
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except OSError as error:
        raise Hif4Error(f"{path}: the picture cannot be written ({error.strerror or error}).") from None


def _enlarged(pixels: Frames, min_side: int = MIN_SIDE) -> Frames:
    factor = max(1, -(-min_side // min(pixels.shape[1:3])))
    return pixels.repeat(factor, axis=1).repeat(factor, axis=2)
