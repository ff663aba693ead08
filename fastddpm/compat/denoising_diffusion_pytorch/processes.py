"""The device, and the other processes of a training that torchrun or `accelerate launch` started."""

from __future__ import annotations

import os
from dataclasses import astuple
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from ...training.config import choose_device
from .batches import Epoch, Share

PATIENCE = timedelta(hours=24)  # all wait while the first one samples and evaluates


class Processes:
    """This process among those that train together, one for each GPU; alone, where there are no others.

    They are those of torch.distributed's default group, which is made here where the environment tells of others.

    Attributes:
        device: where this process computes.
        process_index, num_processes: its number, and how many there are.
        is_main_process, is_local_main_process: whether it is the first of all, or of its machine.
        local_processes: how many of them share this machine.
    """

    def __init__(self) -> None:
        dist = torch.distributed
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = choose_device("auto")
        if self.device.type == "cuda":
            self.device = torch.device("cuda", local) if "LOCAL_RANK" in os.environ else self.device
            torch.cuda.set_device(self.device)
        several = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1
        if several and dist.is_available() and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=PATIENCE)
        together = dist.is_available() and dist.is_initialized()
        self.process_index, self.num_processes = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self.is_main_process, self.is_local_main_process = self.process_index == 0, local == 0
        self.local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if together else 1

    def print(self, *values: Any) -> None:
        """Print in the first process alone."""
        if self.is_main_process:
            print(*values)

    def wait_for_everyone(self) -> None:
        """Go on when all processes are here."""
        if self.num_processes > 1:
            torch.distributed.barrier()

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model on the device; where there are others, wrapped so that gradients are their mean over all."""
        model = model.to(self.device)
        if self.num_processes == 1:
            return model
        return nn.parallel.DistributedDataParallel(
            model, device_ids=[self.device] if self.device.type == "cuda" else None
        )

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        """The module that `prepare` was given."""
        return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model

    def share(self, batch_size: int, split: bool) -> Share:
        """The part of each batch that this process takes.

        Raises:
            ValueError: a batch that is split does not part evenly.
        """
        if split and batch_size % self.num_processes:
            raise ValueError(
                f"Trainer: expected train_batch_size to be a multiple of the {self.num_processes} processes, got "
                f"{batch_size}; choose another, or pass split_batches=False, with which each process takes as many"
            )
        return Share(self.process_index, self.num_processes, split)

    def agree(self, epoch: Epoch) -> Epoch:
        """The epoch of the first process."""
        if self.num_processes == 1:
            return epoch
        numbers = torch.tensor(astuple(epoch), dtype=torch.int64, device=self.device)
        torch.distributed.broadcast(numbers, 0)
        return Epoch(*numbers.tolist())
