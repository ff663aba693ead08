"""The order in which images are seen, and batches that are ready before they are wanted.

An epoch is two random numbers, so its order, and who is mirrored in it, are known ahead and can be written down in a
checkpoint. Both numbers, and all that follows from them, are those that torch's DataLoader draws from the global
generator with ``shuffle=True`` and one worker for each core: the same ``torch.manual_seed``, the same images.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import cpu_count
from typing import Any

import torch
from torch import Tensor
from torch.utils import data

Fetch = Callable[[list[int], "list[bool] | None"], Tensor]


@dataclass(frozen=True)
class Share:
    """Which part of the batches a process takes.

    Attributes:
        rank: number of the process, 0..processes-1.
        split: batches are cut into ``processes`` parts; otherwise each process takes one whole batch of that many.
    """

    rank: int = 0
    processes: int = 1
    split: bool = True


@dataclass(frozen=True)
class Epoch:
    """One pass over all images.

    Attributes:
        seed: of the order: the permutation that torch.randperm draws with it.
        base_seed: of the flips: batch number k is that of worker w = k mod workers, whose generator is seeded with
            base_seed + w, and draws one uniform number for each image of its batches; below 1/2 the image is mirrored.
        count: images. batch_size: images of a batch before it is shared; the last batch may be smaller.
        workers: see base_seed.
    """

    seed: int
    base_seed: int
    count: int
    batch_size: int
    workers: int

    @staticmethod
    def draw(count: int, batch_size: int) -> Epoch:
        """The next epoch, by two draws from the global generator."""
        base_seed, seed = (int(torch.empty((), dtype=torch.int64).random_()) for _ in range(2))
        return Epoch(seed, base_seed, count, batch_size, cpu_count())

    def order(self) -> list[int]:
        """The images in the order in which they are seen."""
        order: list[int] = torch.randperm(self.count, generator=_seeded(self.seed)).tolist()
        return order

    def flips(self) -> list[bool]:
        """Whether each of them is mirrored, in the same order."""
        worker = torch.arange(self.count) // self.batch_size % self.workers
        flips = torch.empty(self.count, dtype=torch.bool)
        for w in range(min(self.workers, -(-self.count // self.batch_size))):
            mine = worker == w
            flips[mine] = torch.rand(int(mine.sum()), generator=_seeded(self.base_seed + w)) < 0.5
        found: list[bool] = flips.tolist()
        return found

    def batches(self, share: Share) -> list[list[int]]:
        """Places in the order, batch by batch, of one process; all processes have as many batches of the same size.

        Where there are several processes, what is missing in the last batches is taken from the start of the order.
        """
        places = list(range(self.count))
        if share.processes > 1:
            whole = self.batch_size * (1 if share.split else share.processes)
            places += [i % self.count for i in range(-self.count % whole)]
        whole_batches = [places[i : i + self.batch_size] for i in range(0, len(places), self.batch_size)]
        if share.processes == 1:
            return whole_batches
        if not share.split:
            return whole_batches[share.rank :: share.processes]
        part = self.batch_size // share.processes
        return [batch[share.rank * part : (share.rank + 1) * part] for batch in whole_batches]


class Batches:
    """Endless batches on a device.

    Args:
        fetch: gives the images of a list of indices, and whether each is mirrored (None: none is), on the host.
        count: images that there are. batch_size: of a batch before it is shared.
        device: where batches are wanted.
        finish: what becomes of a batch on the device.
        flips: whether images are mirrored at random.
        threads: that fetch, as many batches ahead of the one in use; 0 fetches a batch when it is wanted.
        share: which part is wanted. agree: makes the numbers of an epoch those of the first process.
    """

    def __init__(
        self,
        fetch: Fetch,
        count: int,
        batch_size: int,
        device: torch.device,
        *,
        finish: Callable[[Tensor], Tensor] = lambda batch: batch,
        flips: bool = False,
        threads: int = 0,
        share: Share = Share(),
        agree: Callable[[Epoch], Epoch] = lambda epoch: epoch,
    ) -> None:
        self.fetch, self.count, self.batch_size, self.device, self.finish = fetch, count, batch_size, device, finish
        self.flips, self.threads, self.share, self.agree = flips, threads, share, agree
        self._epoch: Epoch | None = None
        self._taken = 0  # batches of it
        self._left: deque[tuple[list[int], list[bool] | None]] = deque()
        self._ahead: deque[Future[Tensor]] = deque()
        self._pool = ThreadPoolExecutor(threads, "fastddpm-images") if threads else None

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if not self._left and not self._ahead:
            self._begin(self.agree(Epoch.draw(self.count, self.batch_size)), taken=0)
        if self._pool is None:
            batch = self.fetch(*self._left.popleft())
        else:
            # never past the end of an epoch: the numbers of the next one are drawn after its last batch
            while self._left and len(self._ahead) <= self.threads:
                self._ahead.append(self._pool.submit(self.fetch, *self._left.popleft()))
            batch = self._ahead.popleft().result()
        self._taken += 1
        if self.device.type == "cuda" and not batch.is_cuda:
            batch = batch.pin_memory()
        return self.finish(batch.to(self.device, non_blocking=True))

    def state(self) -> dict[str, int] | None:
        """The place in the epoch, as plain numbers; None before the first batch."""
        if self._epoch is None:
            return None
        return {"seed": self._epoch.seed, "base_seed": self._epoch.base_seed, "count": self.count,
                "batch_size": self.batch_size, "workers": self._epoch.workers, "taken": self._taken}  # fmt: skip

    def go_on(self, state: dict[str, int] | None) -> None:
        """Go on at a place that `state` gave; from the start of an epoch where it was of other images or batches."""
        self._drop()
        if state is not None and (state["count"], state["batch_size"]) == (self.count, self.batch_size):
            numbers = (state[name] for name in ("seed", "base_seed", "count", "batch_size", "workers"))
            self._begin(Epoch(*numbers), state["taken"])

    def _begin(self, epoch: Epoch, taken: int) -> None:
        self._epoch, self._taken = epoch, taken
        order = epoch.order()
        flips = epoch.flips() if self.flips else None
        self._left.clear()
        for places in epoch.batches(self.share)[taken:]:
            mirrored = None if flips is None else [flips[place] for place in places]
            self._left.append(([order[place] for place in places], mirrored))

    def _drop(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._left.clear()
        self._epoch = None


class Indices(data.Sampler[list[int]]):
    """The same order as a batch sampler, for a dataset of any kind in a torch DataLoader."""

    def __init__(self, count: int, batch_size: int, share: Share, agree: Callable[[Epoch], Epoch]) -> None:
        self.count, self.batch_size, self.share, self.agree = count, batch_size, share, agree
        self._first = True

    def __iter__(self) -> Iterator[list[int]]:
        draws = 1 if self._first else 2  # the seed of new processes, which the loader draws the first time alone
        seed = [int(torch.empty((), dtype=torch.int64).random_()) for _ in range(draws)][-1]
        self._first = False
        epoch = self.agree(Epoch(seed, 0, self.count, self.batch_size, 1))
        order = epoch.order()
        for places in epoch.batches(self.share):
            yield [order[place] for place in places]

    def __len__(self) -> int:
        return len(Epoch(0, 0, self.count, self.batch_size, 1).batches(self.share))


def of_dataset(
    dataset: data.Dataset[Any] | Sequence[Any],
    batch_size: int,
    device: torch.device,
    share: Share,
    agree: Callable[[Epoch], Epoch],
) -> Iterator[Tensor]:
    """Endless batches of any dataset with a length, by processes that live as long, one for each core."""
    count = len(dataset)  # type: ignore[arg-type]
    loader: data.DataLoader[Tensor] = data.DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=Indices(count, batch_size, share, agree),
        num_workers=cpu_count(),
        pin_memory=device.type == "cuda",
        persistent_workers=True,
    )
    while True:
        for batch in loader:
            yield batch.to(device, non_blocking=True)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
