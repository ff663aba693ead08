"""The real package, where it can be imported; it is on no registry, so it comes from a checkout on the path.

Its training asks for mpi4py and blobfile, which have stand-ins here where they are not installed: one process, and
files of this machine.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest

needs_original = pytest.mark.skipif(
    importlib.util.find_spec("improved_diffusion") is None,
    reason="peer: needs a checkout of openai/improved-diffusion on PYTHONPATH",
)
PARTS = ("gaussian_diffusion", "respace", "script_util", "resample", "losses", "unet")
PARTS_OF_TRAINING = ("dist_util", "logger", "image_datasets", "train_util")


class OneProcess:
    """What mpi4py tells a program that was started alone."""

    rank, size = 0, 1

    def Get_rank(self) -> int:
        return 0

    def Get_size(self) -> int:
        return 1

    def bcast(self, value: Any, root: int = 0) -> Any:
        return value


def original(monkeypatch: pytest.MonkeyPatch, training: bool = False) -> Any:
    """The package with its modules as attributes."""
    monkeypatch.setattr(np, "int", int, raising=False)  # gone from NumPy since it was written
    stand_ins: dict[str, dict[str, Any]] = {
        "mpi4py": dict(MPI=_module("mpi4py.MPI", COMM_WORLD=OneProcess())),
        "blobfile": dict(
            join=os.path.join, dirname=os.path.dirname, basename=os.path.basename, exists=os.path.exists,
            isdir=os.path.isdir, listdir=os.listdir, BlobFile=builtins.open,
        ),
    }  # fmt: skip
    for name, contents in stand_ins.items():
        if training and importlib.util.find_spec(name) is None:
            monkeypatch.setitem(sys.modules, name, _module(name, **contents))
    for part in PARTS + (PARTS_OF_TRAINING if training else ()):
        importlib.import_module(f"improved_diffusion.{part}")
    return sys.modules["improved_diffusion"]


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module
