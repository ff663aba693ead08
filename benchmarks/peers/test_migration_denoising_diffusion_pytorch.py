"""The same script before and after: the README of denoising-diffusion-pytorch, with its import line changed, in turns.

    pytest benchmarks/peers/test_migration_denoising_diffusion_pytorch.py --benchmark-only --bench-threads 1,3 \
        --peers-seconds 30 --peers-record RECORD

The network of its README, 35,711,491 parameters, on images of 32x32 in float32: a step of training with the optimizer
that its trainer takes, torch.optim.Adam, and a step of sampling.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.conftest import turns
from benchmarks.peers.contestants import DEVICE, LUCIDRAINS, OURS, Contestant, lucidrains
from benchmarks.peers.records import Row
from benchmarks.peers.report import SCRIPT

Call = Callable[[], object]
AFTER = "fastddpm.compat.denoising_diffusion_pytorch"
BATCHES = {"train": (16,), "sample": (16, 4)}
SAMPLING_STEPS = 20
"""Of one call. What ours does once in a sampling, it transforms the weights, is in it; the README has 250 and more."""


def script(library: Any, task: str, batch: int, *, dim: int = 64, size: int = 32, steps: int = SAMPLING_STEPS) -> Call:
    """What the script does again and again; ``library`` is what it imports from."""
    torch.manual_seed(0)
    model = library.Unet(dim=dim, dim_mults=(1, 2, 4, 8), flash_attn=True)
    timesteps = 1000 if task == "train" else steps
    diffusion = library.GaussianDiffusion(model, image_size=size, timesteps=timesteps).to(DEVICE)
    if task == "sample":
        return lambda: diffusion.sample(batch_size=batch)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=8e-5, betas=(0.9, 0.99))
    images = torch.rand(batch, 3, size, size, device=DEVICE)

    def step() -> None:
        diffusion(images).backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.timeout(3600)
@pytest.mark.benchmark(group="migration, denoising-diffusion-pytorch")
@pytest.mark.parametrize(("task", "batch"), [(task, batch) for task, batches in BATCHES.items() for batch in batches])
def test_readme(
    task: str,
    batch: int,
    threads: int,
    rows: list[Row],
    benchmark: Any,
    pytestconfig: pytest.Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing = Contestant(LUCIDRAINS, own=True).missing
    if missing is not None:
        pytest.skip(f"peer: needs {missing}; see `make bench-peers`")
    monkeypatch.setattr("tqdm.auto.tqdm", lambda steps, **_: steps)  # no bars, as those of the other are off
    before, after = lucidrains(), importlib.import_module(AFTER)
    if benchmark.disabled:  # each runs once on a tiny network, to see that it runs
        for library in (before, after):
            script(library, task, 2, dim=8, size=8, steps=2)()
        benchmark(lambda: None)
        return
    had = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        calls = {LUCIDRAINS: script(before, task, batch), OURS: script(after, task, batch)}
        best = turns(calls, pytestconfig.getoption("--peers-seconds") * len(calls))
        steps = SAMPLING_STEPS if task == "sample" else 1
        benchmark.extra_info.update(seconds={who: seconds / steps for who, seconds in best.items()})
        settings = {LUCIDRAINS: "before, float32", OURS: "after, float32"}
        rows += [
            Row(
                device=DEVICE, task=task, network=f"{SCRIPT}{LUCIDRAINS} at 32x32", batch=batch, threads=threads,
                library=who, setting=settings[who], dtype="float32", default=True, ema=False, own=True,
                seconds=seconds / steps,
            )
            for who, seconds in best.items()
        ]  # fmt: skip
        benchmark.pedantic(calls[OURS], rounds=1)
    finally:
        torch.set_num_threads(had)
