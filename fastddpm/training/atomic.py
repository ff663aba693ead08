"""Directories and files that appear whole or not at all, whatever happens to the process that writes them."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = ".unfinished-"


@contextmanager
def unfinished_directory(parent: Path) -> Iterator[Path]:
    """A new hidden directory in ``parent``, to be filled and given to `publish`; removed on leaving if it was not.

    A writer holds a lock on its directory. One that is not locked was left by a process that died, and the next writer
    removes it. Where there are no such locks (Windows, some network file systems) it stays.
    """
    path, lock = _begin(parent, Path.mkdir)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def publish(path: Path, target: Path) -> None:
    """Make every file in ``path`` durable, then give the directory its final name in one step.

    Raises:
        FileExistsError: ``target`` exists already.
    """
    for file in path.iterdir():
        _sync(file)
    _sync(path)
    try:
        os.rename(path, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise FileExistsError(errno.EEXIST, "exists already", str(target)) from error
        raise
    _sync(target.parent)


def remove(path: Path) -> None:
    """Remove a published directory so that no other process ever sees half of it."""
    hidden = path.parent / f"{_PREFIX}{secrets.token_hex(8)}"
    with suppress(FileNotFoundError):  # another process was faster
        os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A file to write to, beside ``target``: on leaving it takes the name, and the place, of ``target`` in one step.

    Where the block raises, ``target`` stays as it was and nothing is left behind. What a process that died left behind
    is removed by the next writer; see `unfinished_directory`.
    """
    path, lock = _begin(target.parent, Path.touch)
    try:
        yield path
        _sync(path)
        os.replace(path, target)
        _sync(target.parent)
    finally:
        path.unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in full
    return any(f"(os error {number})" in str(error) for number in full)  # safetensors hands on the text alone


def megabytes(size: int) -> str:
    """A size in bytes, for a message."""
    return f"{size / 1e6:,.1f} MB"


def _begin(parent: Path, make: Callable[[Path], None]) -> tuple[Path, int | None]:
    """A new hidden file or directory in ``parent``, and its lock; those that no living process writes are removed."""
    parent_lock = _lock(parent, wait=True)
    try:
        for leftover in parent.glob(f"{_PREFIX}*"):
            lock = _lock(leftover, wait=False)
            if lock is not None:
                shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
                os.close(lock)
        path = parent / f"{_PREFIX}{secrets.token_hex(8)}"
        make(path)
        return path, _lock(path, wait=False)
    finally:
        if parent_lock is not None:
            os.close(parent_lock)


def _lock(path: Path, wait: bool) -> int | None:
    """A file descriptor that holds the lock of a directory until it is closed; None where the lock is taken or there
    are none."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a directory, and needs no such call
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
