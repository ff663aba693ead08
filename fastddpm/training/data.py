"""Images decoded once and kept as uint8, and the order in which training visits them.

`load_images` reads a folder, a zip, an array or a Hugging Face dataset. Encoded images are decoded, cropped and resized
with Pillow once; the result is a memory-mapped array in a cache directory, which the next run opens at once.
`batch_indices` says which images a step sees.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import shutil
import struct
import time
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .atomic import is_disk_full, megabytes, publish, remove, unfinished_directory
from .decode import Settings, UInt8Array, decode_all, fit, usable_cores
from .sources import Source, download, folder_source, hugging_face_source, read_array, read_arrays, zip_source

_CACHE_FORMAT = 1  # of what is in a cache directory, and of how images are decoded

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False, repr=False)
class ImageDataset:
    """Images and their classes, as plain arrays.

    Attributes:
        images: uint8 [N, C, H, W], in memory or mapped from a file (changes to it never reach the file).
        labels: int64 [N] from 0, or None.
        class_names: the name of each class, or None.
        levels: number of values a pixel may take, 0..levels - 1.
        fingerprint: of images, labels, class names and levels: the same data have the same one wherever they lie.
        skipped: damaged images that were left out, each with the reason.
        report: one line on where the images came from.
    """

    images: UInt8Array
    labels: Int64Array | None
    class_names: tuple[str, ...] | None
    levels: int
    fingerprint: str
    skipped: tuple[str, ...] = ()
    report: str = ""

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.images.shape[1:]))
        classes = "no labels" if self.labels is None else f"{self.num_classes} classes"
        return f"ImageDataset({len(self):,} images of {size}, {classes}, {self.levels} levels)"

    @property
    def channels(self) -> int:
        """C."""
        return int(self.images.shape[1])

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W)."""
        return int(self.images.shape[2]), int(self.images.shape[3])

    @property
    def num_classes(self) -> int | None:
        """How many classes there are, or None without labels."""
        if self.labels is None:
            return None
        return len(self.class_names) if self.class_names is not None else int(self.labels.max()) + 1

    def tensor(self) -> Tensor:
        """The images as a uint8 tensor [N, C, H, W] on the same memory."""
        return torch.from_numpy(self.images)


def order(seed: int, epoch: int, n: int) -> Int64Array:
    """The order in which an epoch visits the images: a permutation of 0..n-1 that is a function of its arguments alone.

    Args:
        seed: of the run, in [0, 2^64).
        epoch: from 0.
        n: number of images, >= 1.

    Returns:
        int64 [n], read-only.

    Raises:
        ValueError: an argument is out of range.

    Numerics: sorts the first n words of Philox 4x64 under the key (seed, epoch), a stream that NumPy promises never to
    change. No global random state is read or changed, neither NumPy's nor PyTorch's.
    """
    for name, value, least, end in (("seed", seed, 0, 64), ("epoch", epoch, 0, 63), ("n", n, 1, 63)):
        if not least <= value < 2**end:
            raise ValueError(
                f"order: expected {name} in [{least}, 2^{end}), got {value}; pass an integer in that range"
            )
    return _order(seed, epoch, n)


@functools.lru_cache(maxsize=4)  # a training loop asks for the same one at every step of an epoch
def _order(seed: int, epoch: int, n: int) -> Int64Array:
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(n)
    permutation = np.argsort(words, kind="stable")
    permutation.flags.writeable = False
    return permutation


def batch_indices(seed: int, images_seen: int, batch_size: int, n: int) -> Tensor:
    """Which images the next batch holds: a function of (seed, images_seen), so that a resumed run repeats nothing.

    They are images_seen .. images_seen + batch_size - 1 of the endless sequence order(seed, 0), order(seed, 1), ... A
    batch may straddle epochs, and may be larger than one.

    Args:
        seed: of the run, in [0, 2^64).
        images_seen: images before this batch, >= 0.
        batch_size: >= 1.
        n: number of images in the data set, >= 1.

    Returns:
        int64 [batch_size].

    Raises:
        ValueError: an argument is out of range.
    """
    for name, value, least in (("images_seen", images_seen, 0), ("batch_size", batch_size, 1), ("n", n, 1)):
        if value < least:
            raise ValueError(f"batch_indices: expected {name} >= {least}, got {value}; pass a larger number")
    indices = np.empty(batch_size, np.int64)
    filled = 0
    while filled < batch_size:
        epoch, start = divmod(images_seen + filled, n)
        part = order(seed, epoch, n)[start : start + batch_size - filled]
        indices[filled : filled + len(part)] = part
        filled += len(part)
    return torch.from_numpy(indices)


def load_images(
    source: object,
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    labels: Sequence[int] | Int64Array | Tensor | None = None,
    cache_dir: str | Path | None = None,
    on_corrupt: str = "skip",
    resize: str = "resize",
    progress: bool = True,
    levels: int = 256,
) -> ImageDataset:
    """Read a data set of images into uint8 [N, C, H, W].

    Args:
        source: one of

            - a folder, searched with all folders in it; first-level folders are classes, unless all images lie at the
              top;
            - a zip of images, likewise (one folder around everything is passed over);
            - an .npz with an array ``images``, ``x`` or ``arr_0``, and, if there are classes, ``labels``, ``y`` or
              ``arr_1``; an .npy;
            - a uint8 NumPy array or tensor [N, H, W], [N, H, W, C] or [N, C, H, W];
            - a Hugging Face dataset with a column ``image`` or ``img``, and perhaps ``label``; or "hf:<name>" or
              "hf:<name>:<split>", which loads one with the package datasets (the split is train unless named).

        image_size: H = W, or (H, W): images are turned as their EXIF data say, cropped at the centre to these
            proportions and resized (Lanczos). None: all must have one size already.
        channels: 1 (grey) or 3 (RGB; transparency is dropped) for encoded images, None to take that of the first; the
            number of channels of an array, which tells its layout where the shape alone does not.
        labels: int [N] >= 0, in the order of the source (paths sorted by name), instead of the source's own.
        cache_dir: where decoded images are kept; by default ``fastddpm`` in $XDG_CACHE_HOME or ~/.cache. An entry is
            found again by names, sizes and times of the files (zip: checksums) and by the options here, and is checked
            in full when it is opened. Arrays are not kept there: they stay in memory, uncopied where the layout allows,
            and a file .npy is mapped.
        on_corrupt: "skip" damaged images and name them in a warning, or "raise".
        resize: "resize", or "refuse" an image of another size than ``image_size``.
        progress: show a progress bar where output goes to a terminal.
        levels: number of values a pixel may take, 2..256.

    Raises:
        ValueError: an option out of range; no images; images or labels that do not fit; a file that cannot be read; a
            damaged image, with on_corrupt="raise".
        TypeError: a source of another kind, or pixels that are not uint8.
        FileNotFoundError: no such file or folder.
        ImportError: "hf:" without the package datasets.
        OSError: the cache cannot be written; with a full disk the message says how much is needed.

    Numerics: pixels of an image that has the right size are what Pillow decodes, unchanged; 16-bit grey keeps its upper
    8 bits.
    """
    if image_size is not None:
        image_size = (image_size, image_size) if isinstance(image_size, int) else (*image_size,)  # JSON gives lists
    if image_size is not None and (len(image_size) != 2 or min(image_size) < 1):
        raise ValueError(
            f"load_images: expected image_size to be a number >= 1 or a pair (H, W) of them, "
            f"got {image_size}; pass for example 32"
        )
    if channels is not None and channels < 1:
        raise ValueError(f"load_images: expected channels >= 1, got {channels}; pass 1 for grey or 3 for RGB")
    if not 2 <= levels <= 256:
        raise ValueError(f"load_images: expected levels in 2..256, got {levels}; pixels are uint8")
    for name, value, allowed in (
        ("on_corrupt", on_corrupt, ("skip", "raise")),
        ("resize", resize, ("resize", "refuse")),
    ):
        if value not in allowed:
            raise ValueError(
                f"load_images: expected {name} to be one of {', '.join(allowed)}, got {value!r}; choose one of these"
            )
    settings = Settings(image_size, channels, resize if image_size is not None else "refuse", levels)
    options = (settings, labels, cache_dir, on_corrupt, progress)

    if isinstance(source, str) and source.startswith("hf:"):
        source = download(source)
    if isinstance(source, np.ndarray | Tensor):
        return _from_array(source, labels, settings, "an array", progress)
    if type(source).__module__.partition(".")[0] == "datasets":
        return _from_encoded(hugging_face_source(source), *options)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            "load_images: expected source to be a path, an array, a tensor or a Hugging Face dataset, "
            f"got {type(source).__name__}; save the images in a folder, or stack them into a uint8 array [N, H, W, C]"
        )
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"load_images: expected source to exist, got {path}; check the path (here is {Path.cwd()})"
        )
    if path.is_dir():
        return _from_encoded(folder_source(path), *options)
    if path.suffix == ".npy":
        return _from_array(read_array(path), labels, settings, path.name, progress)
    if path.suffix == ".npz":
        images, own_labels = read_arrays(path)
        return _from_array(images, own_labels if labels is None else labels, settings, path.name, progress)
    if path.suffix == ".zip":
        try:
            archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"load_images: expected {path} to be a zip, got a file that cannot be opened ({error}); make it again"
            ) from error
        with archive:
            return _from_encoded(zip_source(path, archive), *options)
    raise ValueError(
        f"load_images: expected a folder, .zip, .npz or .npy, got {path}; put the images into a folder or a zip"
    )


def _from_array(array: Any, labels: Any, settings: Settings, where: str, progress: bool) -> ImageDataset:
    array = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
    if array.dtype != np.uint8:
        raise TypeError(
            f"load_images: expected pixels of dtype uint8 in {where}, got {array.dtype}; "
            "convert them, from [0, 1] for example with (255 * images).round() and then to uint8"
        )
    if array.size == 0:
        raise ValueError(
            f"load_images: expected at least one image in {where}, got shape {list(array.shape)}; check how it was made"
        )
    images = _channels_first(array, settings, where)
    if int(images.max()) >= settings.levels:
        raise _too_many_levels(where, int(images.max()), settings.levels)
    size = settings.image_size
    if size is not None and images.shape[2:] != size:
        if settings.resize == "refuse":
            raise _wrong_size(where, size, images.shape[2:])
        planes = images.reshape(-1, *images.shape[2:])
        fitted = np.empty((len(planes), *size), np.uint8)
        for i, plane in enumerate(tqdm(planes, "resizing", unit="plane", disable=None if progress else True)):
            fitted[i] = fit(Image.fromarray(plane), size, settings.levels)
        images = fitted.reshape(*images.shape[:2], *size)
    images = np.require(images, requirements=["C", "W"])
    checked = None if labels is None else _checked_labels(labels, len(images), where)
    fingerprint = _fingerprint(images, checked, None, settings.levels)
    return _with_report(ImageDataset(images, checked, None, settings.levels, fingerprint), where)


def _channels_first(array: UInt8Array, settings: Settings, where: str) -> UInt8Array:
    """A view [N, C, H, W] of an array in any of the three layouts."""
    shape = list(array.shape)
    possible = (1, 2, 3, 4) if settings.channels is None else (settings.channels,)
    if array.ndim == 3:
        if settings.channels not in (None, 1):
            raise ValueError(
                f"load_images: expected {settings.channels} channels in {where}, got shape {shape}; pass [N, C, H, W]"
            )
        if settings.channels is None and shape[2] in possible:
            raise ValueError(
                f"load_images: expected many images in {where}, got shape {shape}, which could be one image [H, W, C]; "
                f"pass images[None] for one image, or channels=1 for {shape[0]} grey ones"
            )
        return array[:, None]
    if array.ndim != 4:
        raise ValueError(
            f"load_images: expected shape [N, H, W], [N, H, W, C] or [N, C, H, W] in {where}, got {shape}; reshape it"
        )
    first, last = shape[1] in possible, shape[3] in possible
    if first and last and settings.image_size is not None:
        first, last = tuple(shape[2:]) == settings.image_size, tuple(shape[1:3]) == settings.image_size
    if first == last:
        counts = " or ".join(map(str, possible))
        why = "both could be the channels" if first else "neither can be the channels"
        raise ValueError(
            f"load_images: expected [N, C, H, W] or [N, H, W, C] with {counts} channels in {where}, got {shape} "
            f"(second number {shape[1]}, last {shape[3]}: {why}); "
            "pass channels=, and the images' own image_size= if that does not tell"
        )
    return array if first else array.transpose(0, 3, 1, 2)


def _from_encoded(
    source: Source, settings: Settings, labels: Any, cache_dir: str | Path | None, on_corrupt: str, progress: bool
) -> ImageDataset:
    if settings.channels not in (None, 1, 3):
        raise ValueError(
            f"load_images: expected channels to be 1 or 3 for image files, got {settings.channels}; "
            "other numbers need an array"
        )
    if labels is not None:
        source = replace(source, labels=labels, class_names=None)
    if source.labels is not None:
        source = replace(source, labels=_checked_labels(source.labels, len(source.names), source.where).tolist())

    key = json.dumps([_CACHE_FORMAT, source.identity, asdict(settings), source.labels, source.class_names])
    target = cache_directory(cache_dir) / f"images-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
    start = time.perf_counter()
    dataset, origin = _open_cache(target, source), f"kept in {target}"
    if dataset is None:
        _write_cache(target, source, settings, on_corrupt, progress)
        seconds = time.perf_counter() - start
        origin = f"decoded in {seconds:.1f} s ({len(source.names) / seconds:,.0f} images/s), now kept in {target}"
        dataset = _open_cache(target, source)
    if dataset is None:
        raise OSError(
            f"load_images: expected to read back what was written to {target}, got something else; "
            "the disk may be failing, choose another with --cache-dir (cache_dir=)"
        )
    counts = [f", {source.ignored} other files ignored"] if source.ignored else []
    if dataset.skipped:
        if on_corrupt == "raise":
            raise _damaged(source.where, dataset.skipped[0])
        counts.append(f", {len(dataset.skipped)} damaged images skipped")
        listed = "; ".join(dataset.skipped[:8]) + ("; ..." if len(dataset.skipped) > 8 else "")
        warnings.warn(
            f"load_images: skipped {len(dataset.skipped)} of {len(source.names)} images of {source.where}, "
            f"which are damaged: {listed}",
            stacklevel=3,
        )
    return _with_report(dataset, f"{source.where}{''.join(counts)}; {origin}")


def cache_directory(given: str | Path | None = None) -> Path:
    """Where decoded images are kept: the given folder, or that of the user. What lies there may be deleted."""
    if given is not None:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastddpm"


def _write_cache(target: Path, source: Source, settings: Settings, on_corrupt: str, progress: bool) -> None:
    """Decode everything into a directory of images.npy, labels.npy and meta.json."""
    cache = target.parent
    needed = 0
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with unfinished_directory(cache) as path:
            shape: tuple[int, ...] | None = None
            first, kept, skipped = "", [], []
            decoded = tqdm(
                decode_all(source, settings),
                "decoding",
                len(source.names),
                unit="image",
                disable=None if progress else True,
            )
            with (path / "images.npy").open("wb") as file:
                file.write(_npy_header((0,)))
                for i, image in enumerate(decoded):
                    if isinstance(image, str):
                        if on_corrupt == "raise":
                            raise _damaged(source.where, image)
                        skipped.append(image)
                        continue
                    if shape is None:
                        first, shape = source.names[i], (image.shape[0], *(settings.image_size or image.shape[1:]))
                        needed = len(source.names) * math.prod(shape)
                        if shutil.disk_usage(cache).free < needed:
                            raise OSError(errno.ENOSPC, "too little space")
                    file.write(_as_expected(image, shape, settings, source, i, first).tobytes())
                    kept.append(i)
                if shape is None:
                    raise ValueError(
                        f"load_images: expected images that can be decoded in {source.where}, got {len(skipped)} that "
                        f"cannot, the first {skipped[0]}; check how they were made"
                    )
                file.seek(0)
                file.write(_npy_header((len(kept), *shape)))
            labels = None if source.labels is None else np.array(source.labels, np.int64)[kept]
            if labels is not None:
                np.save(path / "labels.npy", labels)
            images = np.load(path / "images.npy", mmap_mode="r")
            meta = {
                "fingerprint": _fingerprint(images, labels, source.class_names, settings.levels),
                "class_names": source.class_names,
                "levels": settings.levels,
                "skipped": skipped,
                "labelled": labels is not None,
            }
            (path / "meta.json").write_text(json.dumps(meta))
            with contextlib.suppress(FileExistsError):  # another process has made the same meanwhile
                publish(path, target)
    except OSError as error:
        if is_disk_full(error):
            free = shutil.disk_usage(cache).free
            raise OSError(
                errno.ENOSPC,
                f"load_images: expected {megabytes(needed)} of free space for decoded images in {cache}, "
                f"got {megabytes(free)}; free some, or choose a directory on another disk with --cache-dir "
                "(cache_dir=)",
            ) from error
        raise OSError(
            error.errno,
            f"load_images: expected to write decoded images to {cache}, got {error}; "
            "choose a directory of yours with --cache-dir (cache_dir=)",
        ) from error


def _open_cache(target: Path, source: Source) -> ImageDataset | None:
    """A cache entry, checked in full; None, and it is removed, where it is damaged."""
    if not target.exists():
        return None
    try:
        meta = json.loads((target / "meta.json").read_bytes())
        images = np.load(target / "images.npy", mmap_mode="c", allow_pickle=False)
        labels = np.load(target / "labels.npy", allow_pickle=False) if meta["labelled"] else None
        class_names = None if meta["class_names"] is None else tuple(meta["class_names"])
        if _fingerprint(images, labels, class_names, meta["levels"]) != meta["fingerprint"]:
            raise ValueError("its checksum differs")
        return ImageDataset(images, labels, class_names, meta["levels"], meta["fingerprint"], tuple(meta["skipped"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        warnings.warn(
            f"load_images: the cache {target} of {source.where} is damaged ({error}); decoding again", stacklevel=4
        )
        remove(target)
        return None


def _as_expected(
    image: UInt8Array, shape: tuple[int, ...], settings: Settings, source: Source, i: int, first: str
) -> UInt8Array:
    """The image in the shape of the data set, or an error that names it."""
    where, name = source.where, source.names[i]
    if image.shape[1:] != shape[1:]:
        if settings.image_size is not None:
            raise _wrong_size(f"{where}: {name}", settings.image_size, image.shape[1:])
        raise ValueError(
            f"load_images: expected all images of {where} to have the size of the first, {first} of "
            f"{_size(shape[1:])}, got {name} of {_size(image.shape[1:])}; "
            "pass image_size= (--image-size) to crop and resize them"
        )
    if image.shape[0] > shape[0]:
        raise ValueError(
            f"load_images: expected all images of {where} to be grey like the first, {first}, got {name} in colour; "
            "pass channels=3 for colour or channels=1 for grey (--channels)"
        )
    if settings.levels < 256 and int(image.max()) >= settings.levels:
        raise _too_many_levels(f"{where}: {name}", int(image.max()), settings.levels)
    return np.broadcast_to(image, shape)  # a grey image among coloured ones


def _npy_header(shape: tuple[int, ...]) -> bytes:
    """128 bytes before the data of an .npy file, whatever the shape."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + text.ljust(117).encode() + b"\n"


def _fingerprint(images: UInt8Array, labels: Int64Array | None, class_names: Sequence[str] | None, levels: int) -> str:
    flat = images.reshape(-1)
    block = 1 << 26
    with ThreadPoolExecutor(usable_cores()) as pool:
        sums = list(pool.map(zlib.crc32, (flat[start : start + block].data for start in range(0, len(flat), block))))
    labels_sum = None if labels is None else zlib.crc32(labels.astype("<i8").data)
    content = [images.shape, sums, labels_sum, class_names, levels]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _with_report(dataset: ImageDataset, where: str) -> ImageDataset:
    n, c, h, w = dataset.images.shape
    classes = "" if dataset.num_classes is None else f" in {dataset.num_classes} classes"
    return replace(dataset, report=f"{n:,} images of {c} x {h} x {w}{classes} from {where}")


def _checked_labels(labels: Any, n: int, where: str) -> Int64Array:
    array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if array.ndim != 1 or len(array) != n:
        raise ValueError(
            f"load_images: expected a label for each of the {n} images of {where}, got shape {list(array.shape)}; "
            f"pass {n} integers"
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(
            f"load_images: expected labels of {where} to be integers, got {array.dtype}; number the classes from 0"
        )
    if int(array.min()) < 0:
        raise ValueError(
            f"load_images: expected labels of {where} >= 0, got {int(array.min())}; "
            "number the classes from 0, or leave the labels out"
        )
    return array.astype(np.int64)


def _size(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]} (H x W)"


def _damaged(where: str, what: str) -> ValueError:
    return ValueError(
        f"load_images: expected every image of {where} to be intact, got {what}; "
        "repair or remove it, or skip such images with on_corrupt='skip' (--on-corrupt skip)"
    )


def _wrong_size(where: str, wanted: Sequence[int], got: Sequence[int]) -> ValueError:
    return ValueError(
        f"load_images: expected images of {_size(wanted)}, got {where} of {_size(got)}; "
        "pass resize='resize' (--resize resize) to crop and resize them, or another image_size"
    )


def _too_many_levels(where: str, value: int, levels: int) -> ValueError:
    return ValueError(
        f"load_images: expected pixels in 0..{levels - 1} (levels={levels}), got {value} in {where}; "
        f"pass levels=256, or divide the pixels into {levels} levels first"
    )
