"""improved-diffusion, where it can be imported; it is on no registry, so it comes from a checkout on PYTHONPATH.

Its training asks for mpi4py and blobfile, which have stand-ins here where they are not installed: one process, and
files of this machine.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

NAME = "improved_diffusion"
PARTS = (
    "gaussian_diffusion", "respace", "script_util", "resample", "losses", "unet",
    "dist_util", "logger", "image_datasets", "train_util",
)  # fmt: skip


class OneProcess:
    """What mpi4py tells a program that was started alone."""

    rank, size = 0, 1

    def Get_rank(self) -> int:
        """The number of the process."""
        return 0

    def Get_size(self) -> int:
        """How many there are."""
        return 1

    def bcast(self, value: Any, root: int = 0) -> Any:
        """From one to all."""
        return value


def is_there() -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec(NAME) is not None


def original() -> Any:
    """The package, with its modules as attributes."""
    np.int = int  # type: ignore[attr-defined]  # noqa: NPY001  # gone from NumPy since it was written
    _stand_in("mpi4py", MPI=SimpleNamespace(COMM_WORLD=OneProcess()))
    _stand_in(
        "blobfile", join=os.path.join, dirname=os.path.dirname, basename=os.path.basename, exists=os.path.exists,
        isdir=os.path.isdir, listdir=os.listdir, BlobFile=builtins.open,
    )  # fmt: skip
    for part in PARTS:
        importlib.import_module(f"{NAME}.{part}")
    return sys.modules[NAME]


def _stand_in(name: str, **contents: Any) -> None:
    """See to it that a module of this name can be imported."""
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(contents)
        sys.modules[name] = module
