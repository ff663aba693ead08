"""Grids, films and curves."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from fastddpm.pictures import image_grid, is_signed, plot_loss, save_film, save_grid


def test_grid_shows_each_image_at_its_place_enlarged() -> None:
    images = torch.zeros(5, 1, 8, 8)
    images[3] = 1.0
    images[4, 0, 0, 0] = 0.5
    picture = np.asarray(image_grid(images, columns=2))
    tile, gap = 64, 2
    assert picture.shape == (3 * (tile + gap) + gap, 2 * (tile + gap) + gap, 3)
    corner = lambda i: (gap + i // 2 * (tile + gap), gap + i % 2 * (tile + gap))  # noqa: E731
    top, left = corner(3)
    assert (picture[top : top + tile, left : left + tile] == 255).all()
    top, left = corner(4)
    assert (picture[top : top + 8, left : left + 8] == 128).all()
    assert (picture[top + 8 : top + tile, left : left + tile] == 0).all()
    assert (picture[:gap] == 255).all(), "the frame"


def test_grid_keeps_every_value_of_stored_pixels() -> None:
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    picture = np.asarray(image_grid(values, scale=1))
    assert (picture[2:18, 2:18, 0].reshape(-1) == np.arange(256)).all()
    as_float = np.asarray(image_grid(values / 255, scale=1))
    assert (picture == as_float).all()
    assert np.asarray(image_grid(torch.full((1, 1, 1, 1), 16, dtype=torch.uint8), levels=17, scale=1))[2, 2, 0] == 255


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.zeros(1, 2, 8, 8), {}, r"expected images of shape \[N, 1 or 3, H, W\], got \[1, 2, 8, 8\]"),
        (torch.zeros(0, 3, 8, 8), {}, "expected images of shape"),
        (torch.zeros(8, 8), {}, "expected images of shape"),
        (torch.zeros(1, 1, 8, 8), {"columns": 0}, "expected columns >= 1, got 0"),
        (torch.zeros(1, 1, 8, 8), {"scale": 0}, "expected scale >= 1, got 0"),
        (torch.zeros(1, 1, 8, 8), {"levels": 1}, "expected levels >= 2, got 1"),
    ],
)
def test_grid_refuses_what_it_cannot_show(images: torch.Tensor, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_grid(images, **options)


def test_grid_refuses_other_dtypes() -> None:
    with pytest.raises(TypeError, match=r"expected uint8 images or float ones in \[0, 1\], got torch.int64"):
        image_grid(torch.zeros(1, 1, 8, 8, dtype=torch.int64))


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_film_has_all_frames_and_holds_the_last(tmp_path: Path, suffix: str) -> None:
    frames = [torch.full((4, 1, 8, 8), value) for value in (0.0, 0.5, 1.0)]
    with Image.open(save_film(frames, tmp_path / "new" / f"film{suffix}", milliseconds=50, hold=800)) as film:
        assert film.n_frames == 3
        times = []
        for i in range(3):
            film.seek(i)
            film.load()
            times.append(film.info["duration"])
        assert times == [50, 50, 800]


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_equal_frames_keep_their_time(tmp_path: Path, suffix: str) -> None:
    frames = [torch.full((4, 1, 8, 8), value) for value in (0.0, 0.5, 0.5, 1.0, 1.0)]
    shown: dict[int, int] = {}  # grey level to milliseconds
    with Image.open(save_film(frames, tmp_path / f"film{suffix}", milliseconds=50, hold=800)) as film:
        for frame in ImageSequence.Iterator(film):
            grey = frame.convert("L").getpixel((film.width // 4, film.height // 4))
            shown[grey] = shown.get(grey, 0) + frame.info["duration"]
    assert list(shown.values()) == [50, 100, 850]


def test_film_refuses_other_formats_no_frames_and_no_time(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected path to end in .gif or .webp, got .*film.mp4; rename it"):
        save_film([torch.zeros(1, 1, 8, 8)], tmp_path / "film.mp4")
    with pytest.raises(ValueError, match="expected at least one frame, got none"):
        save_film([], tmp_path / "film.gif")
    with pytest.raises(ValueError, match="expected milliseconds and hold >= 1, got 0 and 1500"):
        save_film([torch.zeros(1, 1, 8, 8)], tmp_path / "film.gif", milliseconds=0)


def test_curves_are_drawn_from_metrics(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    record = {"images": 10, "loss": 0.5, "timesteps": [0, 5], "loss_by_t": [0.7, None]}
    metrics.write_text(
        json.dumps(record) + "\n" + json.dumps({**record, "images": 20, "loss": 0.25}) + '\n{"images": 3'
    )
    path = plot_loss(metrics, tmp_path / "new" / "loss.png", "a title")
    with Image.open(path) as picture:
        assert picture.width > 800


def test_curves_need_a_line_and_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("")
    with pytest.raises(ValueError, match="expected at least one line in"):
        plot_loss(metrics, tmp_path / "loss.png")
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"expected the package matplotlib, got none; pip install 'fastddpm\[plot\]'"):
        plot_loss(metrics, tmp_path / "loss.png")


def test_grid_is_written_where_no_directory_was(tmp_path: Path) -> None:
    with Image.open(save_grid(torch.zeros(4, 3, 8, 8), tmp_path / "a" / "b.png")) as picture:
        assert picture.size == (134, 134)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp", ".tif", ".gif"])
def test_pictures_are_known_as_ours(tmp_path: Path, suffix: str) -> None:
    path = save_grid(torch.zeros(4, 3, 8, 8), tmp_path / f"a{suffix}")
    assert is_signed(path)
    Image.new("RGB", (8, 8)).save(tmp_path / f"c{suffix}")
    assert not is_signed(tmp_path / f"c{suffix}")


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_films_are_known_as_ours(tmp_path: Path, suffix: str) -> None:
    frames = [torch.full((1, 1, 8, 8), value) for value in (0.0, 1.0)]
    assert is_signed(save_film(frames, tmp_path / f"film{suffix}"))


def test_what_is_no_picture_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("fastddpm")
    assert not is_signed(tmp_path / "a.png")
    assert not is_signed(tmp_path / "none.png")


def test_a_grid_of_no_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"save_grid: expected path to end in .png, .jpg, .*, got .*a.xyz; rename it"):
        save_grid(torch.zeros(4, 3, 8, 8), tmp_path / "new" / "a.xyz")
    assert not (tmp_path / "new").exists()
