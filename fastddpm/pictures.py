"""Pictures that a person looks at: grids of images (PNG), films of sampling (GIF, WebP), curves of a training (PNG)."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

BACKGROUND = 255
LEAST_TILE = 64
"""Images smaller than this are enlarged by a whole factor, each pixel a square."""
USUAL_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FILM_SUFFIXES = (".gif", ".webp")
SIGNATURE = "fastddpm"
SOFTWARE = 0x0131
"""The tag of EXIF that names what wrote a picture."""


def image_grid(
    images: Tensor, columns: int | None = None, *, levels: int = 256, scale: int | None = None
) -> Image.Image:
    """One picture of many images, row by row.

    Args:
        images: [N, C, H, W], C = 1 or 3: float in [0, 1] (clamped), or uint8 with values 0..levels-1.
        columns: images a row, >= 1; about a square by default.
        levels: grey levels of uint8 images, 2..256.
        scale: pixels per pixel, >= 1; by default as many as make a tile of at least 64.

    Raises:
        ValueError: a shape or number that does not fit. TypeError: another dtype.
    """
    if images.dim() != 4 or images.shape[0] < 1 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"image_grid: expected images of shape [N, 1 or 3, H, W], got {list(images.shape)}; "
            "choose the channels to show"
        )
    for name, value, least in (("columns", columns, 1), ("scale", scale, 1), ("levels", levels, 2)):
        if value is not None and value < least:
            raise ValueError(f"image_grid: expected {name} >= {least}, got {value}; leave it out for a usual one")
    if images.dtype == torch.uint8:
        pixels = (images.float() * (255 / (levels - 1))).round().to(torch.uint8)
    elif images.is_floating_point():
        pixels = (images.detach().float().nan_to_num(0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    else:
        raise TypeError(f"image_grid: expected uint8 images or float ones in [0, 1], got {images.dtype}; convert them")
    count, _, height, width = pixels.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    scale = scale or max(1, LEAST_TILE // max(height, width))
    gap = max(2, scale // 4)
    tiles = pixels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).cpu().numpy().repeat(scale, axis=1).repeat(scale, axis=2)
    tall, wide = tiles.shape[1] + gap, tiles.shape[2] + gap
    canvas = np.full((rows * tall + gap, columns * wide + gap, 3), BACKGROUND, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = gap + i // columns * tall, gap + i % columns * wide
        canvas[top : top + tall - gap, left : left + wide - gap] = tile
    return Image.fromarray(canvas)


def check_grid_path(path: str | Path, who: str = "save_grid", name: str = "path") -> None:
    """Expect the name of a picture that `save_grid` can write.

    Args:
        path: the file. who, name: what takes the path, and how it is called there, for the message.

    Raises:
        ValueError: a suffix of no format that this Pillow writes in colour.
    """
    form = Image.registered_extensions().get(Path(path).suffix.lower())
    try:
        if form in Image.SAVE:
            Image.new("RGB", (1, 1)).save(io.BytesIO(), format=form)
            return
    except (OSError, ValueError):  # a format of grey pictures, say, or one whose writer is not there
        pass
    raise ValueError(
        f"{who}: expected {name} to end in {', '.join(USUAL_SUFFIXES[:-1])} or {USUAL_SUFFIXES[-1]}, got {path}; "
        "rename it"
    )


def check_film_path(path: str | Path, who: str = "save_film", name: str = "path") -> None:
    """Expect the name of a film that `save_film` can write; see `check_grid_path`.

    Raises:
        ValueError: another suffix than .gif and .webp.
    """
    if Path(path).suffix.lower() not in FILM_SUFFIXES:
        raise ValueError(f"{who}: expected {name} to end in {' or '.join(FILM_SUFFIXES)}, got {path}; rename it")


def save_signed(picture: Image.Image, path: Path, **options: Any) -> None:
    """Write a picture with the name of this library in it, where its format has a place for that; see `is_signed`.

    Args:
        picture: what to write. path: the file; its suffix tells the format. options: of Pillow, for the format.
    """
    form = Image.registered_extensions().get(path.suffix.lower())
    if form == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text("Software", SIGNATURE)
    elif form == "GIF":
        options["comment"] = SIGNATURE.encode()
    else:
        options["exif"] = Image.Exif()
        options["exif"][SOFTWARE] = SIGNATURE
    picture.save(path, **options)


def plot_metadata(path: Path) -> dict[str, str] | None:
    """What matplotlib is to write into a plot, so that `is_signed` knows it; None for other formats than PNG."""
    return {"Software": SIGNATURE} if path.suffix.lower() == ".png" else None


def is_signed(path: Path) -> bool:
    """Whether a file is a picture that this library wrote, in a format that says so: PNG, JPEG, WebP, TIFF or GIF."""
    try:
        with Image.open(path) as picture:
            signed = (picture.info.get("Software"), picture.info.get("comment"), picture.getexif().get(SOFTWARE))
    except Exception:  # damage turns into errors of any kind; and then the file is not known to be ours
        return False
    return SIGNATURE in signed or SIGNATURE.encode() in signed


def save_grid(images: Tensor, path: str | Path, columns: int | None = None, *, levels: int = 256) -> Path:
    """Write `image_grid` to a file, and make its directory; the suffix tells the format. Returns the path.

    Raises:
        ValueError: a suffix of no format that Pillow writes, or what `image_grid` refuses. TypeError: see there.
    """
    path = Path(path)
    check_grid_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_signed(image_grid(images, columns, levels=levels), path)
    return path


def save_film(
    frames: Iterable[Tensor], path: str | Path, columns: int | None = None, *, milliseconds: int = 60, hold: int = 1500
) -> Path:
    """Write an endless film, each frame the grid of a batch of images.

    Equal frames that follow one another may be one in the file, shown for the time of all.

    Args:
        frames: of [N, C, H, W], as for `image_grid`; at least one.
        path: a file named .gif or .webp; its directory is made.
        columns: see `image_grid`.
        milliseconds: time of a frame, >= 1. hold: time of the last one.

    Returns: the path.

    Raises:
        ValueError: another suffix, no frame, a time out of range, or what `image_grid` refuses.
    """
    path = Path(path)
    check_film_path(path)
    if milliseconds < 1 or hold < 1:
        raise ValueError(
            f"save_film: expected milliseconds and hold >= 1, got {milliseconds} and {hold}; 60 and 1500 are usual"
        )
    pictures = [image_grid(frame, columns) for frame in frames]
    if not pictures:
        raise ValueError("save_film: expected at least one frame, got none; collect them in the callback of sample")
    path.parent.mkdir(parents=True, exist_ok=True)
    times = [milliseconds] * (len(pictures) - 1) + [hold]
    save_signed(pictures[0], path, save_all=True, append_images=pictures[1:], duration=times, loop=0)
    return path


def plot_loss(metrics: str | Path, path: str | Path, title: str = "") -> Path:
    """Draw the metrics of a training run: loss over images seen, and loss by timestep of first, middle and last line.

    Args:
        metrics: the file of JSON lines that `fastddpm.Trainer` writes.
        path: of a PNG, PDF or SVG; its directory is made.
        title: written above.

    Returns: the path.

    Raises:
        ValueError: the file holds no line. ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, NullFormatter
    except ImportError as error:
        raise ImportError(
            "plot_loss: expected the package matplotlib, got none; pip install 'fastddpm[plot]'"
        ) from error

    lines = Path(metrics).read_text(encoding="utf-8").splitlines(keepends=True)
    records: list[dict[str, Any]] = [json.loads(line) for line in lines if line.endswith("\n")]
    if not records:
        raise ValueError(
            f"plot_loss: expected at least one line in {metrics}, got none; train until the first one is written"
        )
    figure = Figure(figsize=(11, 4), layout="constrained")
    over_images, over_t = figure.subplots(1, 2)
    images = [record["images"] for record in records]
    over_images.plot(
        images, [record["loss"] for record in records], color="C0", marker="." if len(records) < 50 else ""
    )
    over_images.set(xlabel="images seen", ylabel="training loss", yscale="log")
    over_images.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    over_images.xaxis.set_major_formatter("{x:,.0f}")
    for i in sorted({0, len(records) // 2, len(records) - 1}):
        starts, by_t = records[i]["timesteps"], records[i]["loss_by_t"]
        points = [(t, loss) for t, loss in zip(starts, by_t, strict=True) if loss is not None]
        over_t.plot(*zip(*points, strict=True), marker=".", label=f"{images[i]:,} images", alpha=0.9)
    over_t.set(xlabel="timestep t (start of each group)", ylabel="training loss", yscale="log")
    over_t.legend()
    for axes in (over_images, over_t):
        axes.grid(alpha=0.3, which="both")
        axes.yaxis.set_major_formatter("{x:g}")
        low, high = axes.get_ylim()
        axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else NullFormatter())  # of 2, 3, ... times a power
    if title:
        figure.suptitle(title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata=plot_metadata(path))
    return path
