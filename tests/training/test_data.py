"""Images from every kind of source, the cache of decoded images, the errors, and the order of visits."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import struct
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from fastddpm.training import data, decode, sources
from fastddpm.training.data import ImageDataset, batch_indices, load_images, order

Array = npt.NDArray[Any]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def pixels(seed: int, height: int = 8, width: int = 8, channels: int = 3, top: int = 256) -> Array:
    array = np.random.default_rng(seed).integers(0, top, (height, width, channels), dtype=np.uint8)
    return array if channels > 1 else array[..., 0]


def encoded(array: Array, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, contents in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(contents)
    return root


def pack(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, contents in files.items():
            archive.writestr(name, contents)
    return path


def load(source: object, **options: Any) -> ImageDataset:
    return load_images(source, progress=False, **options)


FILES = {"dog/b.png": encoded(pixels(0)), "cat/deep/a.png": encoded(pixels(1)), "cat/z.PNG": encoded(pixels(2))}
EXPECTED = np.stack([pixels(1), pixels(2), pixels(0)]).transpose(0, 3, 1, 2)  # cat/deep/a, cat/z, dog/b


# sources --------------------------------------------------------------------------------------------------------------


def test_folder_with_classes(tmp_path: Path) -> None:
    root = write(tmp_path / "images", FILES | {"dog/notes.txt": b"", ".hidden/c.png": b"", "cat/._a.png": b""})
    found = load(root)
    assert np.array_equal(found.images, EXPECTED)
    assert found.labels is not None
    assert found.labels.tolist() == [0, 0, 1]
    assert found.class_names == ("cat", "dog")
    assert (len(found), found.channels, found.image_size, found.num_classes, found.levels) == (3, 3, (8, 8), 2, 256)
    assert found.report.startswith(f"3 images of 3 x 8 x 8 in 2 classes from {root}, 2 other files ignored; decoded in")


def test_a_data_set_is_printed_without_its_pixels() -> None:
    images = load_images(np.zeros((1200, 3, 8, 4), np.uint8), channels=3, labels=[0, 1] * 600)
    assert repr(images) == "ImageDataset(1,200 images of 3 x 8 x 4, 2 classes, 256 levels)"
    plain = load_images(np.zeros((1, 1, 2, 2), np.uint8), channels=1, levels=17)
    assert repr(plain) == "ImageDataset(1 images of 1 x 2 x 2, no labels, 17 levels)"


def test_folder_without_classes(tmp_path: Path) -> None:
    found = load(str(write(tmp_path / "images", {"b.png": FILES["dog/b.png"], "a.png": FILES["cat/z.PNG"]})))
    assert np.array_equal(found.images, EXPECTED[1:])
    assert found.labels is found.class_names is found.num_classes is None


def test_folder_with_a_link_back_up(tmp_path: Path) -> None:
    root = write(tmp_path / "images", FILES)
    (root / "cat" / "loop").symlink_to(root)
    (root / "bird").symlink_to(write(tmp_path / "elsewhere", {"x.png": encoded(pixels(5))}))
    found = load(root)
    assert found.class_names == ("bird", "cat", "dog")
    assert len(found) == 4


@pytest.mark.parametrize("around", ["", "wrapped/"])
def test_zip(tmp_path: Path, around: str) -> None:
    files = {f"{around}{name}": contents for name, contents in FILES.items()}
    found = load(pack(tmp_path / "images.zip", files | {"__MACOSX/cat/._z.png": b"", f"{around}cat/.x.png": b""}))
    assert np.array_equal(found.images, EXPECTED)
    assert found.labels is not None
    assert found.labels.tolist() == [0, 0, 1]
    assert found.class_names == ("cat", "dog")


def test_the_same_images_have_the_same_fingerprint(tmp_path: Path) -> None:
    folder, archive = load(write(tmp_path / "images", FILES)), load(pack(tmp_path / "images.zip", FILES))
    assert folder.fingerprint == archive.fingerprint
    grey = load(EXPECTED)
    assert grey.fingerprint == load(EXPECTED.transpose(0, 2, 3, 1)).fingerprint != folder.fingerprint  # labels
    assert grey.fingerprint != load(EXPECTED, labels=[0, 0, 1]).fingerprint
    changed = EXPECTED.copy()
    changed[2, 2, 7, 7] ^= 1
    assert grey.fingerprint != load(changed).fingerprint


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((5, 8, 8), {}, (5, 1, 8, 8)),
        ((5, 8, 3), {"channels": 1}, (5, 1, 8, 3)),
        ((5, 8, 6, 3), {}, (5, 3, 8, 6)),
        ((5, 3, 8, 6), {}, (5, 3, 8, 6)),
        ((5, 1, 8, 8), {}, (5, 1, 8, 8)),
        ((5, 7, 8, 8), {"channels": 7}, (5, 7, 8, 8)),
        ((5, 3, 3, 3), {"channels": 1, "image_size": (3, 3)}, None),
        ((5, 3, 8, 3), {"image_size": (8, 3)}, (5, 3, 8, 3)),
        ((5, 3, 8, 3), {"image_size": (3, 8)}, (5, 3, 3, 8)),
        ((5, 3, 8, 3), {}, None),
        ((5, 3, 3, 3), {"channels": 3, "image_size": 3}, None),
        ((5, 8, 8, 8), {}, None),
        ((8, 8, 3), {}, None),
        ((5, 8, 8), {"channels": 3}, None),
        ((8, 8), {}, None),
    ],
)
@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_layout_of_arrays(
    shape: tuple[int, ...], options: dict[str, Any], expected: tuple[int, ...] | None, kind: Any
) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    if expected is None:
        with pytest.raises(ValueError, match=r"load_images: expected .*" + re.escape(str(list(shape))) + ".*; "):
            load(kind(array), **options)
        return
    images = load(kind(array), **options).images
    assert images.shape == expected
    last = len(shape) == 4 and expected[1:] == (shape[3], *shape[1:3])
    assert np.array_equal(images.reshape(-1), (array.transpose(0, 3, 1, 2) if last else array).reshape(-1))


def test_arrays_are_not_copied() -> None:
    array = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    found = load(array)
    assert found.tensor().data_ptr() == array.data_ptr()
    assert load(array.numpy()).tensor().data_ptr() == array.data_ptr()


def test_tensor_shares_the_memory_of_the_cache(tmp_path: Path) -> None:
    found = load(write(tmp_path / "images", FILES))
    tensor = found.tensor()
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.uint8, (3, 3, 8, 8))
    tensor[0, 0, 0, 0] += 1
    assert found.images[0, 0, 0, 0] == tensor[0, 0, 0, 0]
    assert np.array_equal(load(tmp_path / "images").images, EXPECTED)  # and never reaches the file


@pytest.mark.parametrize(("images", "labels"), [("images", "labels"), ("x", "y"), ("arr_0", "arr_1"), ("x", None)])
def test_npz(tmp_path: Path, images: str, labels: str | None) -> None:
    np.savez(tmp_path / "a.npz", **{images: EXPECTED}, **({labels: np.array([1, 0, 1])} if labels else {}))
    found = load(tmp_path / "a.npz")
    assert np.array_equal(found.images, EXPECTED)
    assert (
        (found.labels is None) if labels is None else (found.labels is not None and found.labels.tolist() == [1, 0, 1])
    )
    assert found.num_classes == (2 if labels else None)


def test_npy_is_mapped(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", EXPECTED)
    found = load(tmp_path / "a.npy", labels=torch.tensor([0, 1, 2]))
    assert np.array_equal(found.images, EXPECTED)
    assert isinstance(found.images, np.memmap) or isinstance(found.images.base, np.memmap)
    assert found.num_classes == 3


def hugging_face(column: str = "image", label: list[int] | None = None) -> Any:
    datasets = pytest.importorskip("datasets", reason="needs the extra: pip install fastddpm[datasets]")
    features = {column: datasets.Image()}
    if label is not None:
        features["label"] = datasets.ClassLabel(names=["cat", "dog"])
    rows = {column: [Image.fromarray(pixels(seed)) for seed in (1, 2, 0)], "label": label}
    return datasets.Dataset.from_dict({name: rows[name] for name in features}, features=datasets.Features(features))


@pytest.mark.parametrize("column", ["image", "img"])
def test_hugging_face(column: str) -> None:
    found = load(hugging_face(column, label=[0, 0, 1]))
    assert np.array_equal(found.images, EXPECTED)
    assert found.labels is not None
    assert found.labels.tolist() == [0, 0, 1]
    assert found.class_names == ("cat", "dog")
    unlabelled = load(hugging_face(column).with_format("torch"))
    assert np.array_equal(unlabelled.images, EXPECTED)
    assert unlabelled.labels is None


def test_hugging_face_damaged_and_missing_rows() -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra: pip install fastddpm[datasets]")
    rows = [{"bytes": b"nonsense", "path": None}, {"bytes": encoded(pixels(1)), "path": None}, None]
    dataset = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()}))
    with pytest.warns(UserWarning, match=r"skipped 2 of 3 images .*row 0: .*; row 2: no image in this row"):
        found = load(dataset)
    assert np.array_equal(found.images, EXPECTED[:1])


def test_hugging_face_errors() -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra: pip install fastddpm[datasets]")
    dataset = hugging_face()
    with pytest.raises(TypeError, match=r"expected a datasets.Dataset, got DatasetDict; choose a split"):
        load(datasets.DatasetDict(train=dataset))
    with pytest.raises(ValueError, match=r"expected a column image or img, got picture; rename it"):
        load(dataset.rename_column("image", "picture"))
    with pytest.raises(TypeError, match=r"expected column image to hold images, got .*; use dataset.cast_column"):
        load(datasets.Dataset.from_dict({"image": [1, 2]}))
    with pytest.raises(ValueError, match=r"got an empty dataset; choose another split"):
        load(dataset.select([]))


def test_hugging_face_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra: pip install fastddpm[datasets]")
    asked = []

    def load_dataset(name: str, split: str) -> Any:
        asked.append((name, split))
        return hugging_face()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load("hf:some/name")) == len(load("hf:some/name:test")) == 3
    assert asked == [("some/name", "train"), ("some/name", "test")]


def test_hugging_face_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(
        ImportError, match=r"load_images: expected the package datasets for hf:x, got none; pip install"
    ):
        load("hf:x")


# decoding -------------------------------------------------------------------------------------------------------------


def test_images_of_the_right_size_are_unchanged(tmp_path: Path) -> None:
    root = write(tmp_path / "images", FILES)
    assert np.array_equal(load(root, image_size=8).images, load(root).images)


def test_resize_and_crop(tmp_path: Path) -> None:
    """A wide image with a flat centre: what is cropped away, and beyond the reach of the filter, leaves no trace."""
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, :12], wide[:, 12:48], wide[:, 48:] = (255, 0, 0), (10, 200, 30), (0, 0, 255)
    root = write(tmp_path / "images", {"wide.png": encoded(wide), "tall.png": encoded(wide.transpose(1, 0, 2))})
    images = load(root, image_size=10).images
    assert images.shape == (2, 3, 10, 10)
    assert np.array_equal(images, np.broadcast_to(np.array([10, 200, 30], np.uint8)[:, None, None], images.shape))
    assert load(root, image_size=(4, 12)).images.shape == (2, 3, 4, 12)
    assert load(images, image_size=[10, 10], resize="refuse").image_size == (10, 10)  # as JSON gives it


def test_arrays_are_resized_like_files(tmp_path: Path) -> None:
    array = pixels(3, 24, 36)
    of_file = load(write(tmp_path / "images", {"a.png": encoded(array)}), image_size=(9, 7))
    assert np.array_equal(load(array[None], image_size=(9, 7)).images, of_file.images)


def test_a_large_jpeg_is_resized_like_its_pixels(tmp_path: Path) -> None:
    """It may be decoded at half size or less: the mean stays within a level of the one that Pillow decodes in full."""
    y, x = np.mgrid[0:400, 0:400]
    contents = encoded(np.stack([y // 2, x // 2, (x + y) // 4], -1).astype(np.uint8), "JPEG", quality=95)
    small = load(write(tmp_path / "images", {"a.jpg": contents}), image_size=16).images
    full = load(np.asarray(Image.open(io.BytesIO(contents)))[None], image_size=16).images
    assert np.abs(small.mean((0, 2, 3)) - full.mean((0, 2, 3))).max() < 1


def test_turned_as_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the stored image is to be turned clockwise
    array = pixels(0, 6, 10)
    found = load(write(tmp_path / "images", {"a.png": encoded(array, exif=exif)}))
    assert np.array_equal(found.images[0], np.rot90(array, -1).transpose(2, 0, 1))


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_channels(tmp_path: Path, channels: int | None) -> None:
    grey = pixels(0, channels=1)
    found = load(write(tmp_path / "grey", {"a.png": encoded(grey)}), channels=channels)
    assert np.array_equal(found.images, np.broadcast_to(grey, (1, channels or 1, 8, 8)))
    colour = load(write(tmp_path / "colour", {"a.png": encoded(pixels(1))}), channels=channels)
    wanted = np.asarray(Image.fromarray(pixels(1)).convert("L"))[None] if channels == 1 else EXPECTED[0]
    assert np.array_equal(colour.images[0], wanted)


def test_grey_among_coloured_and_coloured_among_grey(tmp_path: Path) -> None:
    grey, colour = encoded(pixels(0, channels=1)), encoded(pixels(1))
    found = load(write(tmp_path / "first", {"a.png": colour, "b.png": grey}))
    assert np.array_equal(found.images, np.stack([EXPECTED[0], np.stack([pixels(0, channels=1)] * 3)]))
    with pytest.raises(ValueError, match=r"to be grey like the first, a.png, got b.png in colour; pass channels=3"):
        load(write(tmp_path / "second", {"a.png": grey, "b.png": colour}))


def test_sixteen_bits(tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (8, 8), dtype=np.uint16)
    found = load(write(tmp_path / "images", {"a.png": encoded(deep)}))
    assert np.array_equal(found.images[0, 0], deep >> 8)
    with pytest.warns(UserWarning, match=r"float.tiff: pixels of 32 bits \(mode F\)"):
        load(write(tmp_path / "images", {"float.tiff": encoded(deep.astype(np.float32), "TIFF")}))


def test_threads_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(
        tmp_path / "images", {f"{i:03d}.png": encoded(pixels(i, 4, 4)) for i in range(150)} | {"070.png": b"x"}
    )
    expected = np.stack([pixels(i, 4, 4) for i in range(150) if i != 70]).transpose(0, 3, 1, 2)
    for threads, small in ((1, 0), (3, 0), (3, 10**6)):
        monkeypatch.setattr(decode, "usable_cores", lambda threads=threads: threads)
        monkeypatch.setattr(decode, "SMALL", small)
        with pytest.warns(UserWarning, match="skipped 1 of 150 images"):
            assert np.array_equal(load(root, cache_dir=tmp_path / f"{threads} {small}").images, expected)


def test_levels(tmp_path: Path) -> None:
    grey = pixels(0, 24, 24, channels=1, top=17)
    root = write(tmp_path / "images", {"a.png": encoded(grey)})
    assert load(root, levels=17).levels == 17
    assert load(root, levels=17, image_size=9).images.max() <= 16  # the filter overshoots
    with pytest.raises(
        ValueError, match=r"expected pixels in 0..15 \(levels=16\), got 16 in .*a.png; pass levels=256, or"
    ):
        load(root, levels=16)
    with pytest.raises(ValueError, match=r"expected pixels in 0..15 \(levels=16\), got 16 in an array"):
        load(grey[None], levels=16)
    assert load(grey[None], levels=17).fingerprint != load(grey[None]).fingerprint


def test_a_terminal_shows_how_far_decoding_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    images = write(tmp_path / "images", FILES)
    load_images(images, progress=True)
    assert "decoding: 100%" in terminal.getvalue() and f"{len(FILES)}/{len(FILES)}" in terminal.getvalue()
    load_images(images, progress=True)
    assert terminal.getvalue().count("100%") == 1, "the second time nothing is decoded"


def test_nothing_is_shown_without_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_images(write(tmp_path / "images", FILES), progress=True)
    load_images(EXPECTED, image_size=4, progress=True)
    assert capfd.readouterr() == ("", "")


# errors ---------------------------------------------------------------------------------------------------------------


def truncated(contents: bytes) -> bytes:
    return contents[: len(contents) * 2 // 3]


@pytest.mark.parametrize(
    "damaged",
    [b"", b"not an image", truncated(encoded(pixels(0, 64, 64))), truncated(encoded(pixels(0, 64, 64), "JPEG"))],
    ids=["empty", "text", "half a PNG", "half a JPEG"],
)
@pytest.mark.parametrize("place", ["folder", "zip"])
def test_a_damaged_image_among_good_ones(tmp_path: Path, damaged: bytes, place: str) -> None:
    files = FILES | {"cat/damaged.png": damaged}
    source = write(tmp_path / "images", files) if place == "folder" else pack(tmp_path / "images.zip", files)
    with pytest.raises(
        ValueError, match=r"expected every image of .* to be intact, got cat/damaged.png: .*; repair or remove"
    ):
        load(source, on_corrupt="raise")
    for origin in ("decoded in", "kept in"):
        with pytest.warns(UserWarning, match=r"skipped 1 of 4 images of .*, which are damaged: cat/damaged.png: "):
            found = load(source)
        assert np.array_equal(found.images, EXPECTED)
        assert found.labels is not None
        assert found.labels.tolist() == [0, 0, 1]
        assert len(found.skipped) == 1
        assert f", 1 damaged images skipped; {origin}" in found.report
    with pytest.raises(ValueError, match=r"cat/damaged.png"):  # from the cache, too
        load(source, on_corrupt="raise")


def test_a_member_of_a_zip_with_a_wrong_checksum(tmp_path: Path) -> None:
    path = pack(tmp_path / "images.zip", FILES)
    contents = bytearray(path.read_bytes())
    contents[contents.index(FILES["dog/b.png"]) + 60] ^= 255
    path.write_bytes(contents)
    with pytest.warns(UserWarning, match=r"dog/b.png: Bad CRC-32"):
        assert np.array_equal(load(path).images, EXPECTED[:2])


def test_all_damaged(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"expected images that can be decoded in .*, got 2 that cannot, the first a.png: "
    ):
        load(write(tmp_path / "images", {"a.png": b"", "b.png": b""}))


def test_a_file_that_the_system_cannot_read(tmp_path: Path) -> None:
    root = write(tmp_path / "images", FILES)
    (root / "cat" / "link.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"expected to read cat/link.png of .*, got .*No such file.*; change its permissions"
    ):
        load(root)


def test_a_folder_that_the_system_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "images", FILES)
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("dog"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        ValueError, match=r"expected to read every folder in .*, got .*Permission denied: .*dog.*; change"
    ):
        load(root)


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected images in .*empty, got nothing in it; put images there \(\.avif, "):
        load(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"expected images in .*texts, got 2 files of other kinds; put"):
        load(write(tmp_path / "texts", {"a.txt": b"", "b/c.txt": b""}))
    with pytest.raises(ValueError, match=r"expected images in .*texts.zip, got 1 files of other kinds; put"):
        load(pack(tmp_path / "texts.zip", {"a.txt": b""}))
    with pytest.raises(ValueError, match=r"expected images in .*empty.zip, got nothing in it"):
        load(pack(tmp_path / "empty.zip", {}))
    with pytest.raises(FileNotFoundError, match=r"expected source to exist, got .*missing; check the path \(here is "):
        load(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"expected at least one image in an array, got shape \[0, 8, 8\]"):
        load(np.zeros((0, 8, 8), np.uint8))


def test_other_kinds_of_source(tmp_path: Path) -> None:
    for name, message in (
        ("a.tar", r"expected a folder, .zip, .npz or .npy, got .*a.tar"),
        ("a.zip", r"expected .*a.zip to be a zip, got a file that cannot be opened"),
        ("a.npy", r"expected .*a.npy to hold a numeric array, got .*; write it with numpy.save"),
        ("a.npz", r"expected .*a.npz to hold numeric arrays, got .*; write it with numpy.savez"),
    ):
        (tmp_path / name).write_bytes(b"something else")
        with pytest.raises(ValueError, match=f"load_images: {message}"):
            load(tmp_path / name)
    np.savez(tmp_path / "b.npz", pictures=EXPECTED)
    with pytest.raises(ValueError, match=r"expected an array images, x or arr_0 in .*b.npz, got pictures; rename it"):
        load(tmp_path / "b.npz")
    np.save(tmp_path / "c.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"expected .*c.npy to hold a numeric array, got .*"):
        load(tmp_path / "c.npy")
    with pytest.raises(TypeError, match=r"expected source to be a path, .*, got list; save the images in a folder"):
        load([1, 2])
    with pytest.raises(TypeError, match=r"expected pixels of dtype uint8 in an array, got float32; convert them"):
        load(torch.rand(2, 8, 8))


@pytest.mark.parametrize("place", ["folder", "zip"])
def test_images_beside_classes(tmp_path: Path, place: str) -> None:
    files = FILES | {"stray.png": FILES["dog/b.png"]}
    source = write(tmp_path / "images", files) if place == "folder" else pack(tmp_path / "images.zip", files)
    with pytest.raises(ValueError, match=r"or all outside, got stray.png \(1 such\) beside cat/deep/a.png; move those"):
        load(source)


def test_wrong_sizes(tmp_path: Path) -> None:
    root = write(tmp_path / "images", FILES | {"dog/large.png": encoded(pixels(0, 9, 12))})
    with pytest.raises(
        ValueError,
        match=r"the first, cat/deep/a.png of 8 x 8 \(H x W\), got dog/large.png of 9 x 12 .*; pass image_size=",
    ):
        load(root)
    with pytest.raises(
        ValueError, match=r"expected images of 8 x 8 \(H x W\), got .*dog/large.png of 9 x 12 .*; pass resize='resize'"
    ):
        load(root, image_size=8, resize="refuse")
    with pytest.raises(ValueError, match=r"expected images of 4 x 4 \(H x W\), got an array of 8 x 8"):
        load(EXPECTED, image_size=4, resize="refuse")
    assert load(root, image_size=8).images.shape == (4, 3, 8, 8)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([0, 1], ValueError, r"expected a label for each of the 3 images of .*, got shape \[2\]; pass 3 integers"),
        ([[0], [1], [2]], ValueError, r"got shape \[3, 1\]"),
        ([0.0, 1.0, 2.0], TypeError, r"expected labels of .* to be integers, got float64; number the classes"),
        ([0, -1, 2], ValueError, r"expected labels of .* >= 0, got -1; number the classes"),
    ],
)
def test_wrong_labels(tmp_path: Path, labels: Any, error: type[Exception], message: str) -> None:
    for source in (EXPECTED, write(tmp_path / "images", FILES)):
        with pytest.raises(error, match=message):
            load(source, labels=labels)


def test_given_labels_replace_those_of_the_folders(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="skipped 1"):
        found = load(write(tmp_path / "images", FILES | {"cat/m.png": b""}), labels=[3, 9, 1, 0])
    assert found.labels is not None
    assert found.labels.tolist() == [3, 1, 0]
    assert (found.class_names, found.num_classes) == (None, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, r"expected image_size to be a number >= 1 or a pair \(H, W\) of them, got \(0, 0\)"),
        ({"image_size": (8, 8, 8)}, r"expected image_size to be .*, got \(8, 8, 8\)"),
        ({"channels": 0}, "expected channels >= 1, got 0"),
        ({"levels": 1}, "expected levels in 2..256, got 1"),
        ({"levels": 257}, "expected levels in 2..256, got 257"),
        ({"on_corrupt": "ignore"}, "expected on_corrupt to be one of skip, raise, got 'ignore'"),
        ({"resize": "stretch"}, "expected resize to be one of resize, refuse, got 'stretch'"),
        ({"channels": 4}, "expected channels to be 1 or 3 for image files, got 4"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"load_images: {message}"):
        load(write(tmp_path / "images", FILES), **options)


# cache ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each image that is decoded."""
    calls: list[int] = []
    original = decode.decode

    def count(*args: Any) -> Any:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(decode, "decode", count)
    return calls


def test_second_time_from_the_cache(tmp_path: Path, decoded: list[int]) -> None:
    root = write(tmp_path / "images", FILES)
    first = load(root)
    assert len(decoded) == 3
    second = load(root)
    assert len(decoded) == 3
    assert np.array_equal(first.images, second.images)
    assert (first.fingerprint, first.class_names) == (second.fingerprint, second.class_names)
    assert f"kept in {tmp_path / 'xdg' / 'fastddpm'}" in second.report
    assert not list((tmp_path / "xdg" / "fastddpm").glob(".*"))


def test_the_cache_follows_the_source_and_the_options(tmp_path: Path, decoded: list[int]) -> None:
    root = write(tmp_path / "images", FILES)
    load(root, cache_dir=tmp_path / "cache")
    os.utime(root / "dog" / "b.png", ns=(1, 1))
    changes: list[dict[str, Any]] = [{}, {"image_size": 8}, {"channels": 1}, {"levels": 255}, {"labels": [0, 1, 2]}]
    for n, options in enumerate(changes):
        if "levels" in options:
            write(root, {name: encoded(pixels(0, top=200)) for name in FILES})
        load(root, cache_dir=tmp_path / "cache", **options)
        assert len(decoded) == 3 * (n + 2)
    assert len(list((tmp_path / "cache").iterdir())) == 1 + len(changes)


def test_a_moved_zip_is_found_again(tmp_path: Path, decoded: list[int]) -> None:
    load(pack(tmp_path / "a.zip", FILES))
    load(pack(tmp_path / "b.zip", FILES))
    assert len(decoded) == 3
    load(pack(tmp_path / "c.zip", FILES | {"dog/b.png": encoded(pixels(9))}))
    assert len(decoded) == 6


def flip_bit(file: Path) -> None:
    contents = bytearray(file.read_bytes())
    contents[-40] ^= 1
    file.write_bytes(contents)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


@pytest.mark.parametrize("damage", [flip_bit, truncate, os.unlink, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "meta.json"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, decoded: list[int], damage: Any, name: str) -> None:
    root = write(tmp_path / "images", FILES)
    load(root, cache_dir=tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    damage(entry / name)
    with pytest.warns(UserWarning, match=f"load_images: the cache {entry} of {root} is damaged .*; decoding again"):
        found = load(root, cache_dir=tmp_path / "cache")
    assert len(decoded) == 6
    assert np.array_equal(found.images, EXPECTED)
    assert found.labels is not None
    assert found.labels.tolist() == [0, 0, 1]


def test_a_disk_that_does_not_give_back_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cache = data._write_cache

    def write_and_damage(target: Path, *rest: Any) -> None:
        write_cache(target, *rest)
        flip_bit(target / "images.npy")

    monkeypatch.setattr(data, "_write_cache", write_and_damage)
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(OSError, match=r"expected to read back what was written"),
    ):
        load(write(tmp_path / "images", FILES))


def test_two_processes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that finishes second takes the entry of the first."""
    root = write(tmp_path / "images", FILES)
    publish = data.publish

    def publish_late(path: Path, target: Path) -> None:
        monkeypatch.setattr(data, "publish", publish)
        load(root, cache_dir=tmp_path / "cache")
        publish(path, target)

    monkeypatch.setattr(data, "publish", publish_late)
    assert np.array_equal(load(root, cache_dir=tmp_path / "cache").images, EXPECTED)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "images", {"a.png": encoded(np.zeros((1000, 1000, 3), np.uint8))})
    (tmp_path / "cache").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 2_000_000))
        with pytest.raises(
            OSError, match=r"expected 3\.0 MB of free space for decoded images in .*cache, got 2\.0 MB; .*--cache-dir"
        ) as caught:
            load(root, cache_dir=tmp_path / "cache")
    assert caught.value.errno == errno.ENOSPC
    if os.path.exists("/dev/full"):
        monkeypatch.setattr(np, "save", lambda *_: Path("/dev/full").write_bytes(b"x"))
        with pytest.raises(OSError, match=r"expected 3\.0 MB of free space for decoded images .*--cache-dir") as caught:
            load(root, labels=[0], cache_dir=tmp_path / "cache")
        assert caught.value.errno == errno.ENOSPC
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError, match=r"expected to write decoded images to .*file/cache, got .*; choose a directory of yours with"
    ):
        load(write(tmp_path / "images", FILES), cache_dir=tmp_path / "file" / "cache")


def test_default_place_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load(write(tmp_path / "images", FILES))
    (entry,) = (tmp_path / "home" / ".cache" / "fastddpm").iterdir()
    assert sorted(os.listdir(entry)) == ["images.npy", "labels.npy", "meta.json"]
    assert json.loads((entry / "meta.json").read_text())["class_names"] == ["cat", "dog"]


@pytest.mark.parametrize("shape", [(1,), (50_000, 3, 32, 32), (2**40, 3, 1024, 1024)])
def test_header_of_the_cached_array(shape: tuple[int, ...]) -> None:
    header = data._npy_header(shape)
    assert len(header) == 128
    stream = io.BytesIO(header)
    assert np.lib.format.read_magic(stream) == (1, 0)
    assert np.lib.format.read_array_header_1_0(stream) == (shape, False, np.dtype(np.uint8))
    assert struct.unpack("<H", header[8:10])[0] == 118


# order ----------------------------------------------------------------------------------------------------------------


def test_order_is_a_permutation() -> None:
    for n in (1, 2, 7, 1000):
        assert np.array_equal(np.sort(order(3, 5, n)), np.arange(n))


def test_order_is_pinned() -> None:
    """Philox 4x64 with the key (seed, epoch), sorted: a resumed run, and NumPy's next version, must give the same."""
    assert order(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert order(2**64 - 1, 3, 8).tolist() == [3, 2, 0, 1, 6, 5, 4, 7]


def test_order_differs_by_seed_and_epoch() -> None:
    orders = {tuple(order(seed, epoch, 50).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_every_position_is_equally_likely() -> None:
    """Counts of each image at each position over 4,000 epochs: chi-square within 5 standard deviations of its mean."""
    n, epochs = 6, 4000
    counts = np.zeros((n, n))
    for epoch in range(epochs):
        counts[np.arange(n), order(1, epoch, n)] += 1
    chi2 = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    degrees = (n - 1) ** 2
    assert abs(chi2 - degrees) < 5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (10, 10), (3, 10), (1, 4), (7, 7)])
def test_batches_follow_the_epochs(n: int, batch_size: int) -> None:
    endless = np.concatenate([order(9, epoch, n) for epoch in range(60)])
    for images_seen in (0, 1, n - 1, n, 3 * n + 1, 17):
        batch = batch_indices(9, images_seen, batch_size, n)
        assert batch.dtype == torch.int64
        assert batch.tolist() == endless[images_seen : images_seen + batch_size].tolist()


def test_batches_neither_read_nor_change_global_random_state() -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    first = batch_indices(4, 30, 8, 20)
    state = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    torch.manual_seed(2)
    data._order.cache_clear()
    assert torch.equal(batch_indices(4, 30, 8, 20), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002


def test_changing_a_batch_does_not_change_the_order() -> None:
    before = order(0, 0, 5).tolist()
    batch_indices(0, 0, 5, 5).zero_()
    assert order(0, 0, 5).tolist() == before
    with pytest.raises(ValueError, match="read-only"):
        order(0, 0, 5)[0] = 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0, 5), r"order: expected seed in \[0, 2\^64\), got -1"),
        ((2**64, 0, 5), r"order: expected seed in \[0, 2\^64\), got"),
        ((0, -1, 5), r"order: expected epoch in \[0, 2\^63\), got -1"),
        ((0, 0, 0), r"order: expected n in \[1, 2\^63\), got 0"),
    ],
)
def test_order_errors(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        order(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, -1, 4, 5), "images_seen >= 0, got -1"),
        ((0, 0, 0, 5), "batch_size >= 1, got 0"),
        ((0, 0, 4, 0), "n >= 1, got 0"),
    ],
)
def test_batch_indices_errors(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"batch_indices: expected {message}"):
        batch_indices(*arguments)


def test_suffixes_can_be_opened() -> None:
    """Each suffix that is looked for belongs to a format that this Pillow knows, or (avif) that a newer one knows."""
    Image.init()
    known = Image.registered_extensions()
    assert [suffix for suffix in sources.IMAGE_SUFFIXES if suffix not in known and suffix != ".avif"] == []
