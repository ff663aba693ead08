"""Encoded images to uint8 arrays, with Pillow."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from .sources import Source

UInt8Array = npt.NDArray[np.uint8]

_CHUNK = 32  # images that a thread decodes at a time
# Pixels below which several threads, handing the interpreter lock to and fro, are slower than one (measured on JPEG
# and PNG files: half as fast at 32 x 32, as fast at about 80 x 80, twice as fast at 128 x 128).
SMALL = 96 * 96
# What Pillow and zipfile raise on damaged contents; RuntimeError: encrypted, or an unknown compression.
_DAMAGED = (SyntaxError, ValueError, EOFError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile)
_TOO_LARGE = Image.DecompressionBombError


@dataclass(frozen=True)
class Settings:
    """How images are decoded.

    Attributes:
        image_size: (H, W), or None for the size they have.
        channels: 1, 3, or None for what they have.
        resize: "resize", or "refuse" to; refusing is the caller's part.
        levels: values a pixel may take.
    """

    image_size: tuple[int, int] | None
    channels: int | None
    resize: str
    levels: int


def decode(data: bytes, settings: Settings) -> UInt8Array:
    """One image [C, H, W]."""
    size = settings.image_size if settings.resize == "resize" else None
    with Image.open(io.BytesIO(data)) as opened:
        if size is not None:
            # a JPEG that is much larger is decoded at a half, a quarter or an eighth of its size, which is far faster
            opened.draft(None, (2 * max(size), 2 * max(size)))
        ImageOps.exif_transpose(opened, in_place=True)
        image: Image.Image = opened
        if image.mode.startswith("I;16") or (image.mode == "I" and opened.format == "PNG"):  # "I" before Pillow 11
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError(f"pixels of 32 bits (mode {image.mode})")
        grey = settings.channels == 1 or (settings.channels is None and image.mode in ("1", "L", "LA"))
        image = image.convert("L" if grey else "RGB")
        pixels = np.asarray(image) if size is None else fit(image, size, settings.levels)
    return np.ascontiguousarray(pixels[None] if grey else pixels.transpose(2, 0, 1))


def fit(image: Image.Image, size: tuple[int, int], levels: int) -> UInt8Array:
    """Crop at the centre to the proportions of (H, W), and resize; no value exceeds the largest of the image if there
    are fewer than 256 levels (the filter overshoots)."""
    height, width = size
    if image.size == (width, height):
        return np.asarray(image)
    fitted: UInt8Array = np.asarray(ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS))
    return fitted if levels == 256 else np.minimum(fitted, np.asarray(image).max())


def decode_all(source: Source, settings: Settings) -> Iterator[UInt8Array | str]:
    """Every image in order, or the reason why it is damaged; a few chunks ahead, so that memory stays bounded.

    Raises:
        ValueError: the system cannot read a file.
    """
    n = len(source.names)
    chunks = [range(start, min(start + _CHUNK, n)) for start in range(0, n, _CHUNK)]
    threads = usable_cores()
    if threads == 1 or _is_small(source):
        for chunk in chunks:
            yield from _decode_chunk(source, settings, chunk)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[list[UInt8Array | str]]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_decode_chunk, source, settings, chunk))
            if len(waiting) > 2 * threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decode_chunk(source: Source, settings: Settings, chunk: range) -> list[UInt8Array | str]:
    return [_decode_or_reason(source, settings, i) for i in chunk]


def _decode_or_reason(source: Source, settings: Settings, i: int) -> UInt8Array | str:
    try:
        return decode(source.read(i), settings)
    except OSError as error:
        if (
            error.errno is not None
        ):  # the system's: permissions, a link to nowhere, a failing disk; Pillow's have no number
            raise ValueError(
                f"load_images: expected to read {source.names[i]} of {source.where}, got {error}; "
                "change its permissions, or move it away"
            ) from error
        reason = str(error)
    except (*_DAMAGED, _TOO_LARGE) as error:
        reason = str(error) or type(error).__name__
    return f"{source.names[i]}: {reason}"


def _is_small(source: Source) -> bool:
    try:
        with Image.open(io.BytesIO(source.read(0))) as image:
            return bool(image.width * image.height < SMALL)
    except (OSError, *_DAMAGED, _TOO_LARGE):
        return False
