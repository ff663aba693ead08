"""Images of a folder, and sequences of a tensor, as the trainers take them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils import data

from ...sampling.memory import available_memory

UInt8Array = npt.NDArray[np.uint8]

EXTENSIONS = ["jpg", "jpeg", "png", "tiff"]
_DEEP = ("I", "F")  # 16 and 32 bits a pixel


class Dataset(data.Dataset[Tensor]):
    """The images of a folder and of the folders in it: resized, flipped at random, cropped at the centre, in [0, 1].

    An ``image_size`` (H, W) is resized to as it is, whatever the proportions of the image; for a number s the shorter
    side becomes s, the longer one floor(s longer / shorter), and a square is cropped. The filter is bilinear, over as
    many pixels as the image has for one of the result.

    Args:
        folder: searched for files whose names end in one of ``exts``, in the order in which the file system tells them.
        image_size: (H, W), or a number; see above.
        exts: endings without the dot; "JPG" is another one than "jpg".
        augment_horizontal_flip: mirror each second image, by torch's global generator.
        convert_image_to: a mode of Pillow, such as "L", "RGB" or "RGBA"; None leaves images as they are.

    Returns: by index, float32 [C, H, W].

    Raises:
        ValueError: an image that cannot be read, or of more than 8 bits a channel; the error names it.
    """

    def __init__(
        self,
        folder: str | Path,
        image_size: int | Sequence[int],
        exts: Sequence[str] = EXTENSIONS,
        augment_horizontal_flip: bool = False,
        convert_image_to: str | None = None,
    ) -> None:
        super().__init__()
        self.folder, self.image_size = folder, image_size
        self.augment_horizontal_flip, self.convert_image_to = augment_horizontal_flip, convert_image_to
        root = Path(folder)
        self.paths = [path for ending in exts for path in root.glob(f"**/*.{ending}")]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        flip = self.augment_horizontal_flip and float(torch.rand(1)) < 0.5
        return torch.from_numpy(np.array(self.finish(self.resized(index), flip))).float() / 255

    def resized(self, index: int) -> UInt8Array:
        """Image number ``index`` at its new size, before what is random: [C, H, W]."""
        path = self.paths[index]
        try:
            with Image.open(path) as opened:
                image: Image.Image = opened
                if self.convert_image_to not in (None, image.mode):
                    image = image.convert(self.convert_image_to)
                if image.mode.startswith(_DEEP):
                    raise ValueError(f"pixels of more than 8 bits (mode {image.mode})")
                height, width = resized_size(image.height, image.width, self.image_size)
                pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.uint8)
                if image.mode == "1":
                    pixels = pixels * np.uint8(255)
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"Dataset: expected images that Pillow reads, 8 bits a channel, got {error} in {path}; "
                "repair, convert or remove it, or set convert_image_to"
            ) from error
        return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))

    def finish(self, pixels: UInt8Array, flip: bool) -> UInt8Array:
        """A resized image [C, H, W] mirrored, or not, then cropped at the centre; nothing is copied."""
        if flip:
            pixels = pixels[:, :, ::-1]
        height, width = _pair(self.image_size)
        top, left = (round((have - want) / 2) for have, want in zip(pixels.shape[1:], (height, width), strict=True))
        return pixels[:, top : top + height, left : left + width]


class Dataset1D(data.Dataset[Tensor]):
    """The rows of a tensor.

    Args:
        tensor: [N, C, L], or [N, L, C] for a diffusion with channel_first=False; a copy is kept.
    """

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor.clone()

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, idx: int) -> Tensor:
        return self.tensor[idx].clone()


class Pixels:
    """Batches of the images of a `Dataset`, each file decoded once where memory allows.

    Args:
        dataset: its images. channels: C, which all of them must have.
        memory: bytes in which images are kept when they have been resized; None takes half of what is free. Those that
            find no room are decoded each time.
    """

    def __init__(self, dataset: Dataset, channels: int, memory: int | None = None) -> None:
        self.dataset, self.channels = dataset, channels
        self.room = available_memory() // 2 if memory is None else memory
        self.kept: dict[int, UInt8Array] = {}

    def batch(self, indices: Sequence[int], flips: Sequence[bool] | None = None) -> UInt8Array:
        """The images of these indices, mirrored where ``flips`` says so: [B, C, H, W]. Any thread may call it."""
        flips = [False] * len(indices) if flips is None else flips
        return np.stack([self.dataset.finish(self._resized(i), bool(f)) for i, f in zip(indices, flips, strict=True)])

    def _resized(self, index: int) -> UInt8Array:
        pixels = self.kept.get(index)
        if pixels is None:
            pixels = self.dataset.resized(index)
            if len(pixels) != self.channels:
                raise ValueError(
                    f"Trainer: expected images of {self.channels} channels, got {len(pixels)} in "
                    f"{self.dataset.paths[index]}; set convert_image_to, or the channels of the network"
                )
            if pixels.nbytes <= self.room:
                self.room -= pixels.nbytes
                self.kept[index] = pixels
        return pixels


def resized_size(height: int, width: int, size: int | Sequence[int]) -> tuple[int, int]:
    """(H, W) that an image is resized to; see `Dataset`."""
    if not isinstance(size, int) and len(size) == 2:
        return _pair(size)
    side = _pair(size)[0]
    longer = side * max(height, width) // min(height, width)
    return (side, longer) if height <= width else (longer, side)


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    return int(height), int(width)
