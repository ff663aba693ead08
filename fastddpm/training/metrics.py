"""Metrics as JSON lines: one object a line, in order of the images seen."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append_metrics(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line, whole and on the disk when the function returns.

    Raises:
        ValueError: a number that is not finite, which JSON cannot hold.
    """
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All lines, but for a last one that was not finished."""
    return [json.loads(line) for line in _finished_lines(Path(path))]


def truncate_metrics(path: Path, images: int) -> None:
    """Drop what was written behind ``images`` images, or not finished: a run resumed there writes it again."""
    if not path.exists():
        return
    length = 0
    for line in _finished_lines(path):
        if json.loads(line)["images"] > images:
            break
        length += len(line)
    if length < path.stat().st_size:
        os.truncate(path, length)


def _finished_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def set_aside(path: Path) -> None:
    """Give a file or directory that is in the way a free name, path.1, path.2, ..."""
    if path.exists():
        number = 1
        while path.with_name(f"{path.name}.{number}").exists():
            number += 1
        path.rename(path.with_name(f"{path.name}.{number}"))
