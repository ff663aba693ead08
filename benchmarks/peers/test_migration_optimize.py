"""A network of another library before and after one line, `fastddpm.optimize(network)`, in turns in one run."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastddpm
from benchmarks.conftest import threads_to_try, turns
from benchmarks.peers.contestants import CIFAR10, DEVICE, TINY, Contestant, PeerNetwork, lucidrains

BAR = 1.3
"""What was set out for the inference of UNet2DModel on a CPU."""
BATCHES = {"inference": (1, 4, 16), "training": (8,)}
OWN = Contestant("denoising-diffusion-pytorch", own=True)
AS_IT_WAS, ORDERED, OPTIMIZED, FROZEN = "as it was", "channels_last", "optimize", "optimize, frozen"


@pytest.fixture
def most_threads(pytestconfig: pytest.Config) -> Iterator[int]:
    """The most of those to try: all cores but one."""
    before, wanted = torch.get_num_threads(), threads_to_try(pytestconfig)[-1]
    torch.set_num_threads(wanted)
    yield wanted
    torch.set_num_threads(before)


@pytest.mark.timeout(3600)
@pytest.mark.benchmark(group="optimize")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("task", "batch"), [(task, batch) for task, sizes in BATCHES.items() for batch in sizes])
@pytest.mark.parametrize("library", ["diffusers", "denoising-diffusion-pytorch"])
def test_optimize(
    library: str,
    task: str,
    batch: int,
    dtype: str,
    most_threads: int,
    benchmark: Any,
    capfd: pytest.CaptureFixture[str],
    pytestconfig: pytest.Config,
) -> None:
    missing = missing_for(library)
    if missing is not None:
        pytest.skip(f"peer: {missing} is not installed")
    if benchmark.disabled:  # each runs once on a tiny network, to see that it runs
        for call in calls_of(library, task, 2, dtype, tiny=True).values():
            call()
        benchmark(lambda: None)
        return
    calls = calls_of(library, task, batch, dtype)
    best = turns(calls, pytestconfig.getoption("--peers-seconds") * len(calls))
    found = best[AS_IT_WAS] / min(seconds for name, seconds in best.items() if name.startswith(OPTIMIZED))
    case = f"{library}, {task}, batch {batch}, {dtype}, {DEVICE}, {most_threads} thread(s)"
    lines = [f"{name}: {seconds * 1e3:,.1f} ms, {best[AS_IT_WAS] / seconds:.2f}x" for name, seconds in best.items()]
    verdict = ""
    if library == "diffusers" and task == "inference" and DEVICE == "cpu":
        verdict = f"; at least {BAR}x: {'met' if found >= BAR else 'NOT MET'}"
    with capfd.disabled():
        print(f"\n{case}: {'; '.join(lines)}{verdict}")
    benchmark.extra_info.update(seconds=best, ratio=found, threads=most_threads)
    benchmark.pedantic(calls[OPTIMIZED], rounds=1)


def missing_for(library: str) -> str | None:
    """The first package that is not installed."""
    if library == "diffusers":
        return None if importlib.util.find_spec("diffusers") else "diffusers"
    return OWN.missing


def calls_of(library: str, task: str, batch: int, dtype: str, tiny: bool = False) -> dict[str, Callable[[], object]]:
    """The same call on copies of one network: as it was, as a good user has it, and after the one line."""
    network = network_of(library, tiny).to(DEVICE)
    if task == "inference" and library == "diffusers":
        network = network.to(getattr(torch, dtype))
    size = TINY.size if tiny else CIFAR10.size
    names = [AS_IT_WAS, ORDERED, OPTIMIZED, *([FROZEN] if task == "inference" else [])]
    made = {name: copy.deepcopy(network).train(task == "training") for name in names}
    made[ORDERED].to(memory_format=torch.channels_last)
    for name in names[2:]:
        fastddpm.optimize(made[name], frozen=name == FROZEN)
    call = inference if task == "inference" else training
    return {name: call(network, batch, size, dtype) for name, network in made.items()}


def network_of(library: str, tiny: bool) -> nn.Module:
    """With weights as they start."""
    if library == "diffusers":
        return PeerNetwork(TINY if tiny else CIFAR10).unet
    network: nn.Module = lucidrains().Unet(TINY.own_width if tiny else CIFAR10.own_width)
    return network


def inference(network: nn.Module, batch: int, size: int, dtype: str) -> Callable[[], object]:
    """One forward, in the dtype of the weights, or under autocast where they stay float32."""
    weight = next(network.parameters())
    x = torch.randn(batch, 3, size, size, device=DEVICE, dtype=weight.dtype)
    t = torch.full((batch,), 500, device=DEVICE)
    autocast = weight.dtype == torch.float32 and dtype == "bfloat16"

    @torch.inference_mode()
    def call() -> object:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            return network(x, t)

    return call


def training(network: nn.Module, batch: int, size: int, dtype: str) -> Callable[[], object]:
    """One step of AdamW; bfloat16 under autocast."""
    x, noise = (torch.randn(batch, 3, size, size, device=DEVICE) for _ in range(2))
    t = torch.full((batch,), 500, device=DEVICE)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def call() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
            out = network(x, t)
        out = out if isinstance(out, torch.Tensor) else out.sample
        F.mse_loss(out.float(), noise).backward()
        optimizer.step()
        optimizer.zero_grad()

    return call
