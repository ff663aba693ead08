"""Batches for the training loop: from memory of the device, or gathered on the host while the device computes."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .data import ImageDataset, batch_indices

SHARE_OF_DEVICE = 0.25
WORKERS, AHEAD = 2, 4
"""Threads that gather batches, and how many batches before their turn."""


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
        data_on: "device" copies all images there once; "host" gathers batches in threads, some ahead, which suits
            images mapped from a file of any size; "auto" copies if they fill at most a quarter of its memory, and
            always takes "device" where that is the host.

    A thread spends its time in memcpy and page faults, without Python's lock, and writes to pinned memory, from which a
    GPU copies on a stream of its own. No process is started, and nothing is pickled.
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
        self._pinned = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._pinned and not self.on_device else None
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[tuple[int, Future[Batch]]] = deque()

    def get(self, images_seen: int) -> Batch:
        """The batch that follows on ``images_seen`` images."""
        if self.on_device:
            return Batch(self.images, self.labels, self._to_device(self._pin(self._index(images_seen))))
        if self._pool is None:
            self._pool = ThreadPoolExecutor(WORKERS, "fastddpm-batches")
        if self._ahead and self._ahead[0][0] != images_seen:
            self._drop()
        while len(self._ahead) <= AHEAD:
            due = self._ahead[-1][0] + self.batch_size if self._ahead else images_seen
            self._ahead.append((due, self._pool.submit(self._gather, due)))
        host = self._ahead.popleft()[1].result()
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            images, labels = self._to_device(host.images), None if host.labels is None else self._to_device(host.labels)
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            for copied in (images, labels):
                if copied is not None:
                    copied.record_stream(current)  # its memory is taken again when this stream is done with it
        return Batch(images, labels, None)

    def close(self) -> None:
        """End the threads; a later `get` starts others."""
        self._drop()
        if self._pool is not None:
            self._pool.shutdown()
        self._pool = None

    def _drop(self) -> None:
        for _, batch in self._ahead:
            batch.cancel()
        self._ahead.clear()

    def _index(self, images_seen: int) -> Tensor:
        return batch_indices(self.seed, images_seen, self.batch_size, self.count)

    def _gather(self, images_seen: int) -> Batch:
        index = self._index(images_seen)
        labels = None if self.labels is None else self._rows(self.labels, index)
        return Batch(self._rows(self.images, index), labels, None)

    def _rows(self, x: Tensor, index: Tensor) -> Tensor:
        out = torch.empty((len(index), *x.shape[1:]), dtype=x.dtype, pin_memory=self._pinned)
        return torch.index_select(x, 0, index, out=out)

    def _pin(self, x: Tensor) -> Tensor:
        return x.pin_memory() if self._pinned else x  # from pageable memory the host would wait for the device

    def _to_device(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=self._pinned)

    def _fits(self) -> bool:
        if self.device.type != "cuda":
            return True
        free, _ = torch.cuda.mem_get_info(self.device)
        return self.images.nbytes <= SHARE_OF_DEVICE * free
