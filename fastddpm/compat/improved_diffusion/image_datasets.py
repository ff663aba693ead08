"""Batches of images from a folder, cropped and resized as the original does, in its order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...training.decode import usable_cores
from .dist_util import rank_and_size

ENDINGS = (".jpg", ".jpeg", ".png", ".gif")
MOST_WORKERS = 4


def load_data(
    *, data_dir: str, batch_size: int, image_size: int, class_cond: bool = False, deterministic: bool = False
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Batches of all images in a folder and its sub-folders, again and again.

    Which images come together, torch's generator decides, as in the original. Processes that read, up to four, are kept
    from one pass to the next.

    Args:
        data_dir: the folder; .jpg, .jpeg, .png and .gif files, those of several processes dealt out in turns.
        batch_size: images of a batch; what is left at the end of a pass is left out.
        image_size: height and width, see `ImageDataset`.
        class_cond: labels, from what stands before the first "_" of a file's name, in alphabetical order.
        deterministic: in the order of the files' names.

    Yields: images float32 [B, 3, H, W] in [-1, 1], and {"y": int64 [B]} with class_cond, else {}.

    Raises:
        ValueError: no folder, or fewer images than a batch has (an endless wait in the original).
    """
    if not data_dir:
        raise ValueError("load_data: expected data_dir, got none; pass the folder of the images")
    files = _images_in(Path(data_dir))
    labels = None
    if class_cond:
        names = [file.name.split("_")[0] for file in files]
        number = {name: i for i, name in enumerate(sorted(set(names)))}
        labels = [number[name] for name in names]
    rank, size = rank_and_size()
    dataset = ImageDataset(image_size, [str(file) for file in files], labels, rank, size)
    if len(dataset) < batch_size:
        raise ValueError(
            f"load_data: expected at least {batch_size} images, a batch, in {data_dir}, got {len(dataset)} for process "
            f"{rank} of {size}; pass the folder of the images, or a smaller batch_size"
        )
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=not deterministic,
        num_workers=max(1, min(MOST_WORKERS, usable_cores() - 1)),
        drop_last=True,
        persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
    )
    while True:
        yield from loader
        torch.empty((), dtype=torch.int64).random_()  # what a loader draws whose workers start anew with each pass


class ImageDataset(Dataset[tuple[npt.NDArray[np.float32], dict[str, Any]]]):
    """Images of files: halved by averaging while they are twice as large as needed, then resized by cubic interpolation
    so that the shorter side fits, then cropped at the centre.

    Args:
        resolution: height and width. image_paths: files. classes: a label for each, or None.
        shard, num_shards: take every num_shards-th file, from number ``shard``.
    """

    def __init__(
        self,
        resolution: int,
        image_paths: Sequence[str],
        classes: Sequence[int] | None = None,
        shard: int = 0,
        num_shards: int = 1,
    ) -> None:
        super().__init__()
        self.resolution = resolution
        self.local_images = image_paths[shard::num_shards]
        self.local_classes = None if classes is None else classes[shard::num_shards]

    def __len__(self) -> int:
        return len(self.local_images)

    def __getitem__(self, idx: int) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        with Image.open(self.local_images[idx]) as opened:
            opened.load()
            image: Image.Image = opened
            while min(image.size) >= 2 * self.resolution:
                image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
            scale = self.resolution / min(image.size)
            if scale != 1:  # the filter would give back what it got
                size = round(image.width * scale), round(image.height * scale)
                image = image.resize(size, Image.Resampling.BICUBIC)
            pixels = np.asarray(image.convert("RGB"))
        top, left = ((length - self.resolution) // 2 for length in pixels.shape[:2])
        cropped = pixels[top : top + self.resolution, left : left + self.resolution]
        values = np.ascontiguousarray(cropped.transpose(2, 0, 1), dtype=np.float32) / 127.5 - 1
        if self.local_classes is None:
            return values, {}
        return values, {"y": np.array(self.local_classes[idx], dtype=np.int64)}


def _images_in(folder: Path) -> list[Path]:
    """All images of a folder, each sub-folder where its name stands in the order of names."""
    found: list[Path] = []
    for entry in sorted(folder.iterdir(), key=lambda path: path.name):
        if entry.suffix.lower() in ENDINGS:
            found.append(entry)
        elif entry.is_dir():
            found += _images_in(entry)
    return found
