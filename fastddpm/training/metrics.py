"""Metrics: sums kept on the device, and JSON lines in a file, one object a line, in order of the images seen."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GROUPS_OF_T = 20


def append_metrics(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line, whole and on the disk when the function returns. Numbers keep six digits.

    Raises:
        ValueError: a number that is not finite, which JSON cannot hold.
    """
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_rounded(record), allow_nan=False) + "\n")
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


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _finished_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def set_aside(path: Path) -> None:
    """Give a file or directory that is in the way a free name, path.1, path.2, ..."""
    if path.exists():
        number = 1
        while path.with_name(f"{path.name}.{number}").exists():
            number += 1
        path.rename(path.with_name(f"{path.name}.{number}"))


class Reading:
    """Numbers on their way from the device, which goes on meanwhile.

    Args:
        numbers: float32 [N]; written over later by nobody.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers, self.event = numbers, None
        if numbers.device.type == "cuda":
            pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self.numbers, self.event = pinned.copy_(numbers, non_blocking=True), torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(numbers.device))

    def is_there(self) -> bool:
        """Whether they have come; asking does not wait."""
        return self.event is None or self.event.query()

    def wait(self) -> list[float]:
        """The numbers, and the host waits for them."""
        if self.event is not None:
            self.event.synchronize()
        found: list[float] = self.numbers.tolist()
        return found


class Totals:
    """Sums of an interval, on the device: nothing is read before the interval ends. float32.

    Args:
        num_timesteps: T. device: where. scaled: count the steps that are left out since a gradient is not finite.

    Attributes:
        tensors: the sums by name. skipped: that count.
    """

    def __init__(self, num_timesteps: int, device: torch.device, scaled: bool = False) -> None:
        self.num_timesteps, self.groups = num_timesteps, min(GROUPS_OF_T, num_timesteps)
        self.number = torch.arange(self.groups, device=device)
        groups = (self.groups,)
        shapes = {"steps": (), "loss": (), "grad_norm": (), "loss_by_t": groups, "count_by_t": groups, "skipped": ()}
        self.tensors = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        self.scaled = scaled

    def add_samples(self, t: Tensor, per_sample: Tensor) -> None:
        """t int64 [B], per_sample [B]. Without atomics, so that the order of the additions is always the same."""
        member = (t * self.groups // self.num_timesteps).unsqueeze(1) == self.number
        self.tensors["loss_by_t"] += torch.where(member, per_sample.float().unsqueeze(1), 0.0).sum(0)
        self.tensors["count_by_t"] += member.sum(0)

    def add_step(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Both []."""
        self.tensors["steps"] += 1
        self.tensors["loss"] += loss
        if self.scaled:
            made = grad_norm.isfinite()
            self.tensors["skipped"] += ~made
            grad_norm = torch.where(made, grad_norm, 0.0)
        self.tensors["grad_norm"] += grad_norm

    def wait(self) -> None:
        """Wait until the device has done what was asked of it, so that times are true."""
        if self.number.device.type == "cuda":
            torch.cuda.synchronize(self.number.device)

    def take(self, *others: Tensor) -> Reading:
        """The sums of the interval, and other numbers [] behind them; a new interval begins."""
        reading = Reading(torch.cat([value.reshape(-1).float() for value in (*self.tensors.values(), *others)]))
        for value in self.tensors.values():
            value.zero_()
        return reading

    def peek(self) -> Reading:
        """Steps and loss of the interval so far, which goes on."""
        return Reading(torch.stack([self.tensors["steps"], self.tensors["loss"]]))

    def means(self, values: list[float]) -> dict[str, Any]:
        """Means of an interval from its sums: loss, grad_norm (None where no step was made), and the loss for groups of
        t, each with its first t; and, where they are counted, the steps that were left out."""
        steps, loss, norm = values[:3]
        sums, counts = values[3 : 3 + self.groups], values[3 + self.groups : 3 + 2 * self.groups]
        skipped = int(values[3 + 2 * self.groups])
        return {
            "loss": loss / steps,
            "grad_norm": norm / (steps - skipped) if steps > skipped else None,
            **({"skipped": skipped} if self.scaled or skipped else {}),
            "timesteps": [math.ceil(k * self.num_timesteps / self.groups) for k in range(self.groups)],
            "loss_by_t": [total / count if count else None for total, count in zip(sums, counts, strict=True)],
        }
