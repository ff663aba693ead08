"""A training step and a step of sampling by every contestant, in turns, with the floor of the same run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from benchmarks.conftest import threads_to_try, turns
from benchmarks.conv_floor import conv_floor
from benchmarks.peers.contestants import (
    CIFAR10,
    DEVICE,
    DIFFUSERS,
    LARGE,
    OURS,
    TINY,
    Contestant,
    Network,
    Workshop,
    contestants,
    lucidrains,
    memory_contestants,
)
from benchmarks.peers.memory import peak_of
from benchmarks.peers.records import Row
from fastddpm import UNet
from fastddpm.bench import floor, record, time_by_part

NETWORKS = [CIFAR10, LARGE] if DEVICE == "cuda" else [CIFAR10]
BATCHES = {
    ("train", "CIFAR-10"): (128,) if DEVICE == "cuda" else (8,),
    ("train", "256x256"): (8,),
    ("sample", "CIFAR-10"): (1, 16, 256) if DEVICE == "cuda" else (1, 16),
    ("sample", "256x256"): (1, 8),
}
CASES = [(network, batch, task) for (task, name), batches in BATCHES.items() for network in NETWORKS
         if network.name == name for batch in batches]  # fmt: skip
LEAST_STEPS, LEAST_IMAGES = 4, 32
"""Of a call: steps, and steps times images. What a sampling does once is a small share then, as of a thousand steps."""


@dataclass(frozen=True)
class Case:
    """What all do: a task on a network at a batch size, with so many threads."""

    task: str
    network: Network
    batch: int
    threads: int

    @property
    def steps(self) -> int:
        """In one call of a contestant."""
        return max(LEAST_STEPS, LEAST_IMAGES // self.batch) if self.task == "sample" else 1


@pytest.fixture
def most_threads(pytestconfig: pytest.Config) -> Iterator[int]:
    """The most of those to try: all cores but one."""
    before, wanted = torch.get_num_threads(), threads_to_try(pytestconfig)[-1]
    torch.set_num_threads(wanted)
    yield wanted
    torch.set_num_threads(before)


@pytest.mark.timeout(4 * 3600)
@pytest.mark.benchmark(group="peers")
@pytest.mark.parametrize(("network", "batch", "task"), CASES, ids=lambda v: getattr(v, "name", str(v)))
def test_peers(
    network: Network,
    batch: int,
    task: str,
    most_threads: int,
    rows: list[Row],
    benchmark: Any,
    pytestconfig: pytest.Config,
) -> None:
    if benchmark.disabled:  # each runs once on a tiny network, to see that it runs
        case = Case(task, TINY, 2, most_threads)
        for call in calls_of(case, contestants("eager")).values():
            call()
        benchmark(lambda: None)
        return
    case = Case(task, network, batch, most_threads)
    everyone = contestants(pytestconfig.getoption("--peers-settings"))
    if task == "sample":  # with whatever weights
        everyone = list(dict.fromkeys(replace(who, ema=False) for who in everyone))
    calls = calls_of(case, everyone)
    floors = floors_of(case, list(calls))
    best = turns_of(calls, pytestconfig.getoption("--peers-seconds"))
    rows += [row_of(case, who, best.get(who), floors, calls) for who in everyone]
    benchmark.pedantic(calls[next(who for who in calls if who.library == OURS)], rounds=1)


@pytest.mark.timeout(3600)
@pytest.mark.benchmark(group="peers")
@pytest.mark.parametrize(("network", "batch"), [(n, b) for n, b, task in CASES if task == "train"],
                         ids=lambda v: getattr(v, "name", str(v)))  # fmt: skip
def test_memory(network: Network, batch: int, most_threads: int, rows: list[Row], benchmark: Any) -> None:
    small = benchmark.disabled
    case = Case("memory", TINY if small else network, 2 if small else batch, most_threads)
    found = [memory_of(case, who) for who in memory_contestants()[: 1 if small else None]]
    rows += [] if small else found
    benchmark.pedantic(lambda: None, rounds=1)


def memory_of(case: Case, who: Contestant) -> Row:
    """The peak of a training, in a process of its own."""
    there = who.missing is None
    return Row(
        device=DEVICE, task=case.task, network=case.network.name, batch=case.batch, threads=case.threads,
        library=who.library, setting=who.setting, dtype=who.dtype, default=who.default, ema=who.ema, own=who.own,
        seconds=None, memory=peak_of(who, case.network, case.batch, case.threads) if there else None,
        note="" if there else "not installed",
    )  # fmt: skip


def calls_of(case: Case, everyone: list[Contestant]) -> dict[Contestant, Any]:
    """The call of each contestant that is installed."""
    workshop = Workshop(case.network)
    there = [who for who in everyone if who.missing is None and not (who.own and case.network is LARGE)]
    if case.task == "train":
        return {who: workshop.training_step(who, case.batch) for who in there}
    return {who: workshop.sampling(who, case.batch, case.steps) for who in there}


def turns_of(calls: dict[Contestant, Any], seconds: float) -> dict[Contestant, float]:
    """Seconds of the best call of each."""
    names = {f"{who.library}, {who.setting}": who for who in calls}
    assert len(names) == len(calls)
    best = turns({name: calls[who] for name, who in names.items()}, seconds * len(calls))
    return {who: best[name] for name, who in names.items()}


def floors_of(case: Case, everyone: list[Contestant]) -> dict[tuple[str, bool], float]:
    """Seconds that a step takes at the least, by dtype and whether the network is denoising-diffusion-pytorch's own."""
    found = {}
    for dtype, own in sorted({(who.dtype, who.own) for who in everyone}):
        if case.network is CIFAR10 and not own:
            parts = conv_floor(case.batch, getattr(torch, dtype), training=case.task == "train")
            found[dtype, own] = parts["floor_train" if case.task == "train" else "floor_sample"]
        else:
            found[dtype, own] = recorded_floor(case, dtype, own)
    return found


def recorded_floor(case: Case, dtype: str, own: bool) -> float:
    """Of a network whose layers are not listed: they are found by running it."""
    size = case.network.size
    network = lucidrains().Unet(case.network.own_width) if own else UNet(**case.network.unet)
    network = network.to(DEVICE)
    x, t = torch.randn(case.batch, 3, size, size, device=DEVICE), torch.zeros(case.batch, device=DEVICE)
    layers = record(lambda: network(x, t))
    parameters = sum(p.numel() for p in network.parameters())
    training = case.task == "train"
    least = floor(layers, getattr(torch, dtype), torch.device(DEVICE), parameters=parameters, training=training)
    return least.train_step if training else least.sample_step


def row_of(
    case: Case,
    who: Contestant,
    seconds: float | None,
    floors: dict[tuple[str, bool], float],
    calls: dict[Contestant, Any],
) -> Row:
    """With the parts of those that are compared by them: ours, and the default of diffusers."""
    row = Row(
        device=DEVICE, task=case.task, network=case.network.name, batch=case.batch, threads=case.threads,
        library=who.library, setting=who.setting, dtype=who.dtype, default=who.default, ema=who.ema, own=who.own,
        seconds=None if seconds is None else seconds / case.steps, floor=floors.get((who.dtype, who.own)),
    )  # fmt: skip
    if seconds is None:
        return replace(row, floor=None, note="not installed" if who.missing else "not of this size")
    ours = who.library == OURS
    if case.task != "train" or who.compiled or not (ours or (who.library == DIFFUSERS and who.default and not who.ema)):
        return row
    return replace(row, parts=time_by_part(calls[who], torch.device(DEVICE)))
