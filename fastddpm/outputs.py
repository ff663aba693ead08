"""Files and folders that the command line is asked to write: what cannot work is told before anything is computed."""

from __future__ import annotations

import tempfile
from pathlib import Path

RUN_FOLDERS = ("samples", "tensorboard")
"""What a training makes in its folder, beside checkpoint-<images>."""


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
