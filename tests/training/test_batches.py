"""Batches from a file that is mapped: the right ones, in time, from wherever a run goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import pytest
import torch

from fastddpm.training import ImageDataset, load_images
from fastddpm.training.batches import AHEAD, Batches
from fastddpm.training.data import batch_indices

COUNT, BATCH = 50, 8


@pytest.fixture
def data(tmp_path: Path) -> ImageDataset:
    path = tmp_path / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (COUNT, 3, 4, 6), dtype=np.uint8))
    return load_images(path, labels=list(range(COUNT)), channels=3)


@pytest.fixture
def batches(data: ImageDataset) -> Iterator[Batches]:
    made = Batches(data, with_labels=True, seed=3, batch_size=BATCH, device=torch.device("cpu"), data_on="host")
    yield made
    made.close()


@pytest.mark.parametrize("start", [0, 5 * BATCH])
def test_each_batch_is_a_function_of_the_images_before_it(data: ImageDataset, batches: Batches, start: int) -> None:
    assert isinstance(data.images, np.memmap) or isinstance(data.images.base, np.memmap)
    for k in range(15):  # two epochs
        seen = start + BATCH * k
        index = batch_indices(3, seen, BATCH, COUNT)
        found = batches.get(seen)
        assert found.rows is None and found.labels is not None
        assert torch.equal(found.images, torch.from_numpy(np.array(data.images))[index])
        assert torch.equal(found.labels, index)
    elsewhere = batches.get(7)
    assert torch.equal(elsewhere.labels, batch_indices(3, 7, BATCH, COUNT)), "not the one that was ahead"  # type: ignore[arg-type]


def test_the_next_batches_are_there_before_they_are_wanted(batches: Batches) -> None:
    batches.get(0)
    waiting = [future for _, future in batches._ahead]
    assert [seen for seen, _ in batches._ahead] == [BATCH * k for k in range(1, AHEAD + 1)]
    assert not wait(waiting, timeout=5).not_done
    threads = {t.name for t in threading.enumerate() if t.name.startswith("fastddpm-batches")}
    for k in range(1, 10):
        batches.get(BATCH * k)
    assert {t.name for t in threading.enumerate() if t.name.startswith("fastddpm-batches")} >= threads, "they persist"
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("fastddpm-batches")]
    assert batches.get(0).labels is not None, "and start again"


def test_what_a_thread_meets_is_told_where_the_batch_is_wanted(batches: Batches) -> None:
    batches.images = batches.images[:10]
    with pytest.raises(IndexError):
        for k in range(6):
            batches.get(BATCH * k)
