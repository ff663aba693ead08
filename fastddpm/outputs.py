"""Files and folders that the command line is asked to write: what cannot work is told before anything is computed."""

from __future__ import annotations

import tempfile
from pathlib import Path


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
