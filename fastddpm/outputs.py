"""Files and folders that the command line is asked to write: what cannot work is told before anything is computed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from .pictures import is_signed

RUN_FOLDERS = ("samples", "tensorboard")
"""What a training makes in its folder, beside checkpoint-<images>."""
REPORTS = ({"prior", "decoder", "per_timestep"}, {"floor_step", "utilisation"}, {"op", "backend", "floor"})
"""Keys by which the JSON of evaluate and bench is known, of the whole or of its first row."""
TRACE = '"made by": "fastddpm"'


def check_folder(folder: str | Path, who: str, flag: str) -> None:
    """Expect that a folder is there, or can be made, and takes files. Nothing stays behind.

    Args:
        folder: what the call names. who: the command, for the message. flag: the option that names it.

    Raises:
        ValueError: it is a file, lies in a file, or takes no files.
    """
    folder = Path(folder)
    try:
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError as error:  # a name that is too long, or in a folder that may not be searched
        raise ValueError(
            f"{who}: expected {flag} in a folder that can be written, got {folder} ({error.strerror}); choose another"
        ) from error
    if not nearest.is_dir():
        raise ValueError(
            f"{who}: expected {flag} in a folder, or a new one, got {folder}, where {nearest} is a file; "
            "choose another folder"
        )
    try:
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=nearest):
            pass
    except OSError as error:
        raise ValueError(
            f"{who}: expected {flag} in a folder that can be written, got {folder} "
            f"({nearest}: {error.strerror}); choose another folder"
        ) from error


def check_apart(data: str | Path, folder: str | Path, who: str, flag: str) -> None:
    """Expect that what a training writes does not become part of the images it reads.

    Args:
        data: a folder or file of images. folder: where the training writes. who, flag: see `check_folder`.

    Raises:
        ValueError: the folder is the data folder or lies in it, or the data lie where the training puts its own files.
    """
    images, out = Path(data).expanduser().resolve(), Path(folder).resolve()
    if images.is_dir() and out.is_relative_to(images):
        where = "the data folder itself" if out == images else f"in the data folder {data}"
        raise ValueError(
            f"{who}: expected {flag} outside the images, got {folder}, {where}: its pictures would become training "
            f"data, and the run could not be resumed; choose a folder beside it, such as {_beside(images)}"
        )
    inside = images.relative_to(out).parts if images.is_relative_to(out) else ()
    if inside and (inside[0] in RUN_FOLDERS or inside[0].startswith("checkpoint-")):
        raise ValueError(
            f"{who}: expected images outside what a training writes, got {data}, in the folder {inside[0]} of {flag} "
            f"{folder}, where it puts files of its own; choose another {flag}, or move the images"
        )


def _beside(images: Path) -> Path:
    """A folder for the run of these images, as a user would write it."""
    folder = images.parent / "runs" / images.name
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def check_replaceable(
    files: Mapping[str, Sequence[Path]],
    who: str,
    *,
    overwrite: bool = False,
    read: Sequence[Path] = (),
    remedy: str = "choose another name, or pass --overwrite to replace it",
) -> None:
    """Expect that writing loses nothing: every file is new, or one that this library wrote.

    Args:
        files: what is to be written, by the option that names it. who: the command, for the message.
        overwrite: replace other files, too. read: files that the call reads, which are not replaced either.
        remedy: what the message says to do.

    Raises:
        ValueError: two options name the same file. FileExistsError: a file is there that is not ours, or that is read.
    """
    named: dict[Path, str] = {}
    inputs = {path.resolve() for path in read}
    for flag, paths in files.items():
        for path in paths:
            other = named.setdefault(path.resolve(), flag)
            if other != flag:
                raise ValueError(
                    f"{who}: expected {other} and {flag} to name different files, got {path} for both; rename one"
                )
            if path.is_dir():
                raise ValueError(f"{who}: expected {flag} to name a file, got the folder {path}; name a file in it")
        kept = [path for path in paths if path.exists() and (path.resolve() in inputs or not is_own(path))]
        if kept and not overwrite:
            several = f" and {len(kept) - 1} more" if len(kept) > 1 else ""
            what = "which is read" if kept[0].resolve() in inputs else "which fastddpm did not write"
            raise FileExistsError(
                f"{who}: expected {flag} to name new files, or such as fastddpm wrote, got {kept[0]}{several}, {what}; "
                f"{remedy}"
            )


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training, which may write its pictures there again."""
    return any(folder.glob("checkpoint-*"))


def is_own(path: Path) -> bool:
    """Whether a file is a picture, report or trace that this library wrote, by what is in it."""
    if is_signed(path):
        return True
    try:
        with path.open(encoding="utf-8") as file:
            if TRACE in file.read(1 << 16):
                return True
            file.seek(0)
            contents = json.load(file)
    except (OSError, ValueError):
        return False
    first = contents[0] if isinstance(contents, list) and contents else contents
    return isinstance(first, dict) and any(keys <= first.keys() for keys in REPORTS)
