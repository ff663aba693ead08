"""Processes that train or sample together, over torch.distributed alone; one process needs no set-up at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
"""Where torchrun, Open MPI and MPICH tell a process which one it is."""


def setup_dist() -> None:
    """Make the process group, so that torch.distributed can be used: of this process alone, or of those that torchrun
    or mpiexec started.

    Several processes meet at MASTER_ADDR and MASTER_PORT, which torchrun sets; else at localhost and 29500.
    """
    if dist.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(dev())
    rank, size = rank_and_size()
    if size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        return
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "29500")
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(minutes=30))


def dev() -> torch.device:
    """Where this process works: its GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = _first(LOCAL_RANKS)
    number = rank_and_size()[0] if local is None else local
    return torch.device("cuda", number % torch.cuda.device_count())


def load_state_dict(path: str, **kwargs: Any) -> Any:
    """What a .pt file holds, tensors and plain data alone: `torch.load` with weights_only=True.

    Args:
        path: a file. **kwargs: of `torch.load`, such as map_location.
    """
    return torch.load(path, **{"weights_only": True, **kwargs})


@torch.no_grad()
def sync_params(params: Iterable[Tensor]) -> None:
    """Give every process the values of the first."""
    if world_size() > 1:
        for p in params:
            dist.broadcast(p.detach(), 0)


def rank_and_size() -> tuple[int, int]:
    """Which process this is, and of how many: of the process group, else as the launcher says."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return _first(RANKS) or 0, _first(SIZES) or 1


def world_size() -> int:
    """Processes in the process group; 1 without."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _first(names: tuple[str, ...]) -> int | None:
    return next((int(os.environ[name]) for name in names if name in os.environ), None)
