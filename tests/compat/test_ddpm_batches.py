"""The images that the trainers of compat.denoising_diffusion_pytorch see, their order, and how often files are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils import data

from fastddpm.compat.denoising_diffusion_pytorch import batches as module
from fastddpm.compat.denoising_diffusion_pytorch.batches import Batches, Epoch, Share, of_dataset
from fastddpm.compat.denoising_diffusion_pytorch.dataset import (
    Dataset,
    Dataset1D,
    Pixels,
    resized_size,
)
from fastddpm.sampling.memory import available_memory

CPU = torch.device("cpu")
COUNT, BATCH, WORKERS = 23, 4, 3


class IndexAndDraw(data.Dataset[Tensor]):
    """Each item is its own index, and whether the generator of the process that makes it mirrors it."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, int(torch.rand(1) < 0.5)])


def endless(loader: data.DataLoader[Tensor]) -> Iterator[Tensor]:
    while True:
        yield from loader


def pairs(indices: list[int], flips: list[bool] | None) -> Tensor:
    return torch.tensor([indices, [0] * len(indices) if flips is None else flips]).T


@pytest.fixture(scope="module")
def of_dataloader() -> list[tuple[Tensor, Tensor]]:
    """Three epochs of a shuffled DataLoader after seed 3: its batches, and the state of the global generator."""
    loader = data.DataLoader(IndexAndDraw(), batch_size=BATCH, shuffle=True, num_workers=WORKERS)
    torch.manual_seed(3)
    batches = endless(loader)
    return [(next(batches), torch.get_rng_state()) for _ in range(3 * len(loader))]


@pytest.mark.parametrize("threads", [0, 2])
def test_order_and_flips_are_those_of_a_shuffled_dataloader(
    monkeypatch: pytest.MonkeyPatch, of_dataloader: list[tuple[Tensor, Tensor]], threads: int
) -> None:
    monkeypatch.setattr(module, "cpu_count", lambda: WORKERS)
    torch.manual_seed(3)
    ours = Batches(pairs, COUNT, BATCH, CPU, flips=True, threads=threads)
    for batch, state in of_dataloader:
        assert torch.equal(next(ours), batch)
        assert torch.equal(torch.get_rng_state(), state)


def test_order_of_any_dataset_is_that_of_a_shuffled_dataloader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cpu_count", lambda: 1)
    loader = data.DataLoader(IndexAndDraw(), batch_size=BATCH, shuffle=True, num_workers=1)
    torch.manual_seed(3)
    theirs = endless(loader)
    expected = [(next(theirs)[:, 0], torch.get_rng_state()) for _ in range(2 * len(loader))]
    torch.manual_seed(3)
    ours = of_dataset(IndexAndDraw(), BATCH, CPU, Share(), lambda epoch: epoch)
    for indices, state in expected:
        assert torch.equal(next(ours)[:, 0], indices)
        assert torch.equal(torch.get_rng_state(), state)


def test_a_place_in_the_epoch_can_be_taken_up_again() -> None:
    torch.manual_seed(0)
    whole = Batches(pairs, COUNT, BATCH, CPU, flips=True, threads=1)
    for _ in range(8):
        next(whole)
    state, generator = whole.state(), torch.get_rng_state()
    expected = [next(whole) for _ in range(10)]
    again = Batches(pairs, COUNT, BATCH, CPU, flips=True, threads=1)
    next(again)  # what it had begun is dropped
    again.go_on(state)
    torch.set_rng_state(generator)
    assert all(torch.equal(next(again), batch) for batch in expected)


def test_a_place_among_other_images_is_not_taken_up() -> None:
    torch.manual_seed(0)
    whole = Batches(pairs, COUNT, BATCH, CPU)
    next(whole)
    other = Batches(pairs, COUNT + 1, BATCH, CPU)
    other.go_on(whole.state())
    seen = torch.cat([next(other)[:, 0] for _ in range(6)])
    assert sorted(seen.tolist()) == list(range(COUNT + 1))
    assert Batches(pairs, COUNT, BATCH, CPU).state() is None


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_an_epoch_evenly(processes: int, split: bool) -> None:
    epoch = Epoch(seed=1, base_seed=2, count=COUNT, batch_size=BATCH, workers=1)
    parts = [epoch.batches(Share(rank, processes, split)) for rank in range(processes)]
    assert {place for part in parts for batch in part for place in batch} == set(range(COUNT))
    if processes > 1:
        assert {len(batch) for part in parts for batch in part} == {BATCH // processes if split else BATCH}
        assert len({len(part) for part in parts}) == 1
    first = [place for part in parts for place in part[0]]
    assert first == list(range(BATCH if split else BATCH * processes))


def test_dataset_1d_gives_copies_of_a_copy() -> None:
    rows = torch.arange(6.0).reshape(3, 1, 2)
    dataset = Dataset1D(rows)
    dataset[0].zero_()
    rows.zero_()
    assert len(dataset) == 3
    assert torch.equal(torch.stack([dataset[i] for i in range(3)]), torch.arange(6.0).reshape(3, 1, 2))


# --- images ---


def save(path: Path, pixels: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_dataset_finds_files_by_their_endings(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg", "c.jpeg", "d.tiff", "e.bmp", "in/side/f.png", "g.PNG"):
        save(tmp_path / name, noise(4, 4))
    (tmp_path / "notes.txt").write_text("no image")
    names = [path.name for path in Dataset(tmp_path, 4).paths]
    assert names[:3] == ["b.jpg", "c.jpeg", *sorted(names[2:4])[:1]]  # the order of the endings
    assert sorted(names) == ["a.png", "b.jpg", "c.jpeg", "d.tiff", "f.png"]
    assert [path.name for path in Dataset(tmp_path, 4, exts=["bmp"]).paths] == ["e.bmp"]


def test_an_image_of_the_right_size_is_what_is_in_the_file(tmp_path: Path) -> None:
    pixels = noise(5, 7)
    save(tmp_path / "a.png", pixels)
    found = Dataset(tmp_path, (5, 7))[0]
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.from_numpy(pixels).permute(2, 0, 1) / 255)


@pytest.mark.parametrize(
    ("height", "width", "size", "resized"),
    [(8, 8, (4, 6), (4, 6)), (9, 6, 4, (6, 4)), (6, 9, 4, (4, 6)), (7, 13, 5, (5, 9)), (10, 10, 3, (3, 3)),
     (13, 7, [5], (9, 5))],
)  # fmt: skip
def test_sizes(height: int, width: int, size: int | tuple[int, int], resized: tuple[int, int]) -> None:
    """A pair is taken as it is; by a number the shorter side, and the longer one rounded down: 13 5 / 7 = 9.28."""
    assert resized_size(height, width, size) == resized


def test_an_image_is_resized_then_mirrored_then_cropped(tmp_path: Path) -> None:
    """An image whose columns are of one colour each: by a margin of 3 columns, the crop begins at column 2 (1.5, to the
    even one), in the mirrored image as well, which is column 5 - 2 = 1 from the other side of the plain one."""
    columns = np.tile(np.arange(7, dtype=np.uint8)[None, :, None], (4, 1, 3))
    save(tmp_path / "a.png", columns)
    dataset = Dataset(tmp_path, 4)
    resized = dataset.resized(0)
    assert resized.shape == (3, 4, 7)
    assert dataset.finish(resized, flip=False)[0, 0].tolist() == [2, 3, 4, 5]
    assert dataset.finish(resized, flip=True)[0, 0].tolist() == [4, 3, 2, 1]


def test_bilinear_resizing_averages_what_a_pixel_covers(tmp_path: Path) -> None:
    """Half the size, in one dimension: a triangle over four pixels, weights 1/8, 3/8, 3/8, 1/8 (3/7, 3/7, 1/7 at the
    edge)."""
    row = np.array([0, 80, 240, 160, 40, 120], np.uint8)
    save(tmp_path / "a.png", np.tile(row[None, :, None], (4, 1, 3)))
    found = Dataset(tmp_path, (4, 3)).resized(0)[0, 0]
    expected = [(3 * 0 + 3 * 80 + 240) / 7, (80 + 3 * 240 + 3 * 160 + 40) / 8, (160 + 3 * 40 + 3 * 120) / 7]
    assert np.abs(found - np.array(expected)).max() <= 0.51


@pytest.mark.parametrize(
    ("mode", "convert", "channels"),
    [("L", "RGB", 3), ("RGB", "L", 1), ("RGBA", "RGBA", 4), ("P", "RGB", 3), ("1", None, 1), ("LA", None, 2)],
)
def test_modes_of_images(tmp_path: Path, mode: str, convert: str | None, channels: int) -> None:
    save(tmp_path / "a.png", noise(6, 6), mode)
    found = Dataset(tmp_path, (6, 6), convert_image_to=convert)[0]
    with Image.open(tmp_path / "a.png") as image:
        expected = np.asarray(image.convert(convert or mode), dtype=np.float32)
    expected = expected.reshape(6, 6, channels) / (1 if mode == "1" else 255)
    assert torch.equal(found, torch.from_numpy(expected).permute(2, 0, 1))


def test_the_dataset_mirrors_by_the_global_generator(tmp_path: Path) -> None:
    pixels = noise(4, 4)
    save(tmp_path / "a.png", pixels)
    dataset = Dataset(tmp_path, (4, 4), augment_horizontal_flip=True)
    plain = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    draws = torch.rand(20)
    torch.manual_seed(0)  # as the fixture of all tests did
    assert torch.equal(torch.rand(20), draws)
    torch.manual_seed(0)
    for draw in draws:
        assert torch.equal(dataset[0], plain.flip(2) if draw < 0.5 else plain)


def test_errors_of_images_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"expected images that Pillow reads.*broken\.png"):
        Dataset(tmp_path, 4)[0]
    (tmp_path / "broken.png").unlink()
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"8 bits a channel.*I;16.*deep\.png; .*convert_image_to"):
        Dataset(tmp_path, 4)[0]
    assert Dataset(tmp_path, 4, convert_image_to="L")[0].shape == (1, 4, 4)
    with pytest.raises(ValueError, match=r"Trainer: expected images of 3 channels, got 1 in .*deep\.png"):
        Pixels(Dataset(tmp_path, 4, convert_image_to="L"), 3).batch([0])


@pytest.mark.parametrize("size", [(4, 4), 4])
def test_files_are_decoded_once_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | tuple[int, int]
) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.png", noise(6 + i, 7))
    dataset = Dataset(tmp_path, size)
    wanted = [(2, False), (0, True), (2, True), (1, False), (0, False)]
    expected = np.stack([dataset.finish(dataset.resized(i), flip) for i, flip in wanted])
    read: list[int] = []
    resized = Dataset.resized
    monkeypatch.setattr(Dataset, "resized", lambda self, index: (read.append(index), resized(self, index))[1])
    indices, flips = [i for i, _ in wanted], [flip for _, flip in wanted]
    with_room = Pixels(dataset, 3)
    for _ in range(2):
        assert np.array_equal(with_room.batch(indices, flips), expected)
    assert read == [2, 0, 1]
    read.clear()
    without = Pixels(dataset, 3, memory=3 * 4 * 4 - 1)
    assert np.array_equal(without.batch(indices, flips), expected)
    assert read == indices


def test_memory_that_is_free_is_told() -> None:
    assert 2**24 < available_memory() < 2**50
