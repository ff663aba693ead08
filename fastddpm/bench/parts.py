"""What the time of a step goes to, by kind of op, and a trace of it for Perfetto (https://ui.perfetto.dev)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .timing import Call, wait

PARTS: tuple[tuple[str, str], ...] = (
    ("optimizer", r"adam|optimizer|_foreach|lerp|addcmul|addcdiv|vector_norm"),
    ("attention", r"attention|softmax"),
    ("norm, activation", r"group_?norm|layer_?norm|batch_?norm|rms_?norm|silu"),
    ("noise, loss, solver", r"q_?sample|diffusion_?loss|solver_?step|fastddpm::normal|philox|randn|normal_|mse_loss"),
    ("convolution", r"conv"),
    ("linear", r"addmm|bmm|\bmm\b|linear|matmul|gemm"),
    ("copies", r"copy|clone|contiguous|::cat\b|::pad|constant_pad|upsample|memcpy"),
)
"""A part, and the names of ops that belong to it; the first that matches counts, and what matches none is "other"."""


def part_of(name: str) -> str:
    """The part that an op of this name belongs to."""
    return next((part for part, pattern in PARTS if re.search(pattern, name, re.IGNORECASE)), "other")


def time_by_part(call: Call, device: torch.device, steps: int = 1, trace: Path | None = None) -> dict[str, float]:
    """Seconds of a step by kind of op, from torch's profiler, the longest first.

    Each op counts without those that it calls, so the parts add up; on a GPU its kernels count, and Python does not.
    The profiler makes a step slower: read the parts as shares of it.

    Args:
        call: one step. device: where it computes. steps: how many to average, >= 1.
        trace: where to write what happened when, as JSON that Perfetto opens.
    """
    call()
    wait(device)
    with _profile(device, trace) as profile:
        for _ in range(steps):
            call()
        wait(device)
    seconds: dict[str, float] = {}
    for event in profile.key_averages():
        spent = _microseconds(event, device) / 1e6 / steps
        if spent > 0:
            seconds[part_of(event.key)] = seconds.get(part_of(event.key), 0.0) + spent
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def trace_calls(calls: Iterable[tuple[str, Call]], device: torch.device, trace: Path) -> None:
    """Write a trace of calls, each under its name.

    Args:
        calls: names and calls; each is called once before, and is not asked for the next until it is done.
        device: where they compute. trace: where to write, as JSON that Perfetto opens.
    """
    with _profile(device, trace):
        for name, call in calls:
            call()
            wait(device)
            with torch.profiler.record_function(name):
                call()
                wait(device)


@contextmanager
def _profile(device: torch.device, trace: Path | None) -> Iterator[torch.profiler.profile]:
    """torch's profiler over a ``with`` block, and its trace where one is wanted."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes lines of its own to stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        if trace is not None:
            profile.add_metadata("made by", "fastddpm")  # by which the command line knows that it may replace it
        yield profile
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(trace))


def _microseconds(event: Any, device: torch.device) -> float:
    """Of an op: what it spent itself. Kernels have events of their own, whose time is already that of an op."""
    if event.device_type.name != "CPU":
        return 0.0
    return float(event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total)
