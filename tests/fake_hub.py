"""A stand-in for the package huggingface_hub, whose repositories are folders."""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import pytest


def put_in_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let ``snapshot_download`` take its repositories, and their revisions, from <folder>/remote/<owner>/<name>.

    Files of the patterns that are asked for are copied into a cache, as the real one does, and their names are written
    to <folder>/remote/asked. The working directory becomes ``folder``, where no folder has the name of a repository.

    Returns: <folder>/remote.
    """
    remote, cache = folder / "remote", folder / "cache"
    remote.mkdir()

    def snapshot_download(
        repo_id: str, *, revision: str | None = None, allow_patterns: Sequence[str] | None = None
    ) -> str:
        repository = remote / repo_id / (revision or "")
        if not repository.is_dir():
            raise OSError(f"404 Client Error.\n\nRepository Not Found for {repo_id}.")
        (cache / repo_id).mkdir(parents=True, exist_ok=True)
        for file in repository.rglob("*"):
            name = file.relative_to(repository).as_posix()
            if file.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns or ["*"]):
                (cache / repo_id / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / repo_id / name)
                with (remote / "asked").open("a") as asked:
                    asked.write(f"{name}\n")
        return str(cache / repo_id)

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.chdir(folder)
    return remote
