"""Batches for the training loop: from memory of the device, or gathered on the host while the device computes."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from .data import ImageDataset, batch_indices

SHARE_OF_DEVICE = 0.25


class Batch(NamedTuple):
    """Images uint8 [N, C, H, W], labels int64 [N] or None, and which rows of both: int64 [B], or None for all."""

    images: Tensor
    labels: Tensor | None
    rows: Tensor | None

    def copy_(self, other: Batch) -> None:
        """Take the numbers of another batch of the same run, where these lie; what all batches share stays."""
        for own, new in zip(self, other, strict=True):
            if own is not None and new is not None and own is not new:
                own.copy_(new)

    def part(self, start: int, stop: int) -> Batch:
        """Rows start..stop-1 of the batch."""
        if self.rows is not None:
            return self._replace(rows=self.rows[start:stop])
        return Batch(self.images[start:stop], None if self.labels is None else self.labels[start:stop], None)


class Batches:
    """The batches of a run, each a function of the seed and the images seen before it.

    Args:
        data: the images. with_labels: whether batches have labels.
        seed: of the order. batch_size: >= 1.
        device: where batches are wanted.
        data_on: "device" copies all images there once; "host" gathers each batch in a thread, one batch ahead; "auto"
            copies if they fill at most a quarter of its memory, and always takes "device" where that is the host.
    """

    def __init__(
        self,
        data: ImageDataset,
        *,
        with_labels: bool,
        seed: int,
        batch_size: int,
        device: torch.device,
        data_on: str = "auto",
    ) -> None:
        self.seed, self.batch_size, self.device, self.count = seed, batch_size, device, len(data)
        self.images = data.tensor()
        self.labels = torch.from_numpy(data.labels) if with_labels and data.labels is not None else None
        self.on_device = data_on == "device" or (data_on == "auto" and self._fits())
        if self.on_device:
            self.images = self.images.to(device)
            self.labels = None if self.labels is None else self.labels.to(device)
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, Future[Batch]] | None = None

    def get(self, images_seen: int) -> Batch:
        """The batch that follows on ``images_seen`` images."""
        if self.on_device:
            return Batch(self.images, self.labels, self._to_device(self._index(images_seen)))
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "fastddpm-batches")
        if self._ahead is not None and self._ahead[0] == images_seen:
            host = self._ahead[1].result()
        else:
            host = self._gather(images_seen)
        following = images_seen + self.batch_size
        self._ahead = following, self._pool.submit(self._gather, following)
        return Batch(self._to_device(host.images), None if host.labels is None else self._to_device(host.labels), None)

    def close(self) -> None:
        """End the thread; a later `get` starts another."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool, self._ahead = None, None

    def _index(self, images_seen: int) -> Tensor:
        return batch_indices(self.seed, images_seen, self.batch_size, self.count)

    def _gather(self, images_seen: int) -> Batch:
        index = self._index(images_seen)
        return Batch(self.images[index], None if self.labels is None else self.labels[index], None)

    def _to_device(self, x: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return x.to(self.device)
        return x.pin_memory().to(
            self.device, non_blocking=True
        )  # from pageable memory the host would wait for the device

    def _fits(self) -> bool:
        if self.device.type != "cuda":
            return True
        free, _ = torch.cuda.mem_get_info(self.device)
        return self.images.nbytes <= SHARE_OF_DEVICE * free
