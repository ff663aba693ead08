"""Where images come from: folders, zips, Hugging Face datasets and array files."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Source:
    """Images that are still encoded.

    Attributes:
        where: for messages.
        names: one per image.
        read: gives the bytes of image i; called from several threads.
        labels, class_names: or None.
        identity: as JSON; differs when the contents differ.
        ignored: number of other files.
    """

    where: str
    names: Sequence[str]
    read: Callable[[int], bytes]
    labels: Sequence[int] | None
    class_names: Sequence[str] | None
    identity: Any
    ignored: int = 0


def folder_source(root: Path) -> Source:
    """All images in a folder and the folders in it; first-level folders are classes."""

    def unreadable(error: OSError) -> None:
        raise ValueError(
            f"load_images: expected to read every folder in {root}, got {error}; change its permissions or move it away"
        ) from error

    files: list[Path] = []
    entered = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=unreadable):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:  # a symbolic link back up
            subfolders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        files += [Path(folder, name) for name in names]

    images = sorted(name for name in (file.relative_to(root).as_posix() for file in files) if _is_image(name))
    ignored = len(files) - len(images)
    _expect_images(str(root), len(images), ignored)
    class_names, labels = _classes(str(root), images)
    identity = ["folder", str(root.resolve()), [(name, *_size_and_time(root / name)) for name in images]]
    return Source(str(root), images, lambda i: (root / images[i]).read_bytes(), labels, class_names, identity, ignored)


def _size_and_time(file: Path) -> tuple[int, int]:
    """(-1, -1) for a link to nowhere, which is named as unreadable when its turn comes."""
    try:
        status = file.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def zip_source(path: Path, archive: zipfile.ZipFile) -> Source:
    """All images in a zip; one folder around everything is passed over, and the next folders are classes."""
    members = [member for member in archive.infolist() if not member.is_dir()]
    images = sorted((member for member in members if _is_image(member.filename)), key=lambda member: member.filename)
    ignored = len(members) - len(images)
    _expect_images(str(path), len(images), ignored)
    names = [member.filename for member in images]
    parts = [PurePosixPath(name).parts for name in names]
    around = len({part[0] for part in parts}) == 1 and min(map(len, parts)) > 1  # one folder around everything
    class_names, labels = _classes(str(path), ["/".join(part[1:] if around else part) for part in parts])
    identity = ["zip", [(member.filename, member.file_size, member.CRC) for member in images]]
    return Source(str(path), names, lambda i: archive.read(images[i]), labels, class_names, identity, ignored)


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not any(
        part.startswith(".") or part == "__MACOSX" for part in path.parts
    )


def _expect_images(where: str, count: int, ignored: int) -> None:
    if count == 0:
        found = f"{ignored} files of other kinds" if ignored else "nothing in it"
        raise ValueError(
            f"load_images: expected images in {where}, got {found}; "
            f"put images there ({', '.join(IMAGE_SUFFIXES)}), or check the path"
        )


def _classes(where: str, names: Sequence[str]) -> tuple[list[str] | None, list[int] | None]:
    """Class names and labels from first-level folders of sorted relative paths; None when all images lie at the top."""
    top = [name for name in names if "/" not in name]
    if len(top) == len(names):
        return None, None
    if top:
        below = next(name for name in names if "/" in name)
        raise ValueError(
            f"load_images: expected all images of {where} in folders (one per class) or all outside, got {top[0]} "
            f"({len(top)} such) beside {below}; move those into a folder, or point at the folder to train on"
        )
    class_names = sorted({name.partition("/")[0] for name in names})
    number = {name: i for i, name in enumerate(class_names)}
    return class_names, [number[name.partition("/")[0]] for name in names]


def download(source: str) -> Any:
    """The data set "hf:<name>" or "hf:<name>:<split>" from the Hugging Face hub, or its local cache."""
    _, name, split = [*source.split(":", 2), "train"][:3]
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"load_images: expected the package datasets for {source}, got none; "
            "pip install datasets, or pass a folder, a zip or an array"
        ) from error
    return datasets.load_dataset(name, split=split)


def hugging_face_source(dataset: Any) -> Source:
    """The images of a datasets.Dataset, still encoded."""
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"load_images: expected a datasets.Dataset, got {type(dataset).__name__}; "
            "choose a split, as in dataset['train'], and do not stream"
        )
    column = next((name for name in ("image", "img") if name in dataset.column_names), None)
    if column is None:
        raise ValueError(
            f"load_images: expected a column image or img, got {', '.join(dataset.column_names)}; "
            "rename it with dataset.rename_column(..., 'image')"
        )
    if not isinstance(dataset.features[column], datasets.Image):
        raise TypeError(
            f"load_images: expected column {column} to hold images, got {dataset.features[column]}; "
            f"use dataset.cast_column({column!r}, datasets.Image()), or pass the array itself"
        )
    where = f"the Hugging Face dataset {dataset.info.dataset_name or 'in memory'}"
    if len(dataset) == 0:
        raise ValueError(f"load_images: expected images in {where}, got an empty dataset; choose another split")
    encoded = dataset.with_format(None).cast_column(column, datasets.Image(decode=False))
    lock = Lock()

    def read(i: int) -> bytes:
        with lock:
            item = encoded[i][column]
        if item is None:
            raise ValueError("no image in this row")
        data: bytes = item["bytes"] if item["bytes"] is not None else Path(item["path"]).read_bytes()
        return data

    labels: list[int] | None = None
    class_names: list[str] | None = None
    if "label" in dataset.column_names:
        labels = list(encoded["label"])
        class_names = getattr(dataset.features["label"], "names", None)
    names = [f"row {i}" for i in range(len(dataset))]
    return Source(where, names, read, labels, class_names, ["datasets", dataset._fingerprint, len(dataset)])


def read_array(path: Path) -> npt.NDArray[Any]:
    """An .npy file, mapped into memory."""
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"load_images: expected {path} to hold a numeric array, got {error}; write it with numpy.save"
        ) from error
    return array


def read_arrays(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """Images and, where there are some, labels of an .npz file."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images = next((arrays[name] for name in ("images", "x", "arr_0") if name in arrays), None)
            labels = next((arrays[name] for name in ("labels", "y", "arr_1") if name in arrays), None)
            names = ", ".join(arrays.files)
    except (OSError, ValueError, EOFError, AttributeError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(
            f"load_images: expected {path} to hold numeric arrays, got {error}; write it with numpy.savez"
        ) from error
    if images is None:
        raise ValueError(
            f"load_images: expected an array images, x or arr_0 in {path}, got {names or 'none'}; rename it"
        )
    return images, labels
