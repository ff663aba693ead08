"""Training and sampling on a GPU: every contestant alone, a row for each, and the floor of the same process.

A case is a task on a network at a batch size in a precision. "float32" multiplies as float32 everywhere, "tf32" lets
convolutions and products round to TensorFloat-32, and in "default" the libraries run as their examples do, with what
torch has by default. Each row has the step (images per second follow), its floor, what the first call took, the most
memory, and how often a step launches something: a kernel, a CUDA graph, a copy.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import conv_floor, gpu_record
from benchmarks.gpu_cases import Part
from benchmarks.gpu_timing import DeviceLostError, in_short, is_lost
from benchmarks.peers.contestants import (
    CIFAR10,
    DEVICE,
    DIFFUSERS,
    LARGE,
    LUCIDRAINS,
    OURS,
    TINY,
    TORCH,
    Contestant,
    Network,
    Workshop,
)
from fastddpm import UNet
from fastddpm.bench import record, time_by_part

Line = dict[str, Any]
Call = Callable[[], object]
GROUP = "steps"
NETWORKS = {"cifar-10": CIFAR10, "256x256": LARGE, "tiny": TINY}
KINDS = [
    ("train", "cifar-10", 128), ("sample", "cifar-10", 256), ("sample", "cifar-10", 1), ("sample", "cifar-10", 16),
    ("train", "256x256", 8), ("sample", "256x256", 8), ("train", "cifar-10", 16), ("train", "cifar-10", 1),
    ("train", "cifar-10", 256), ("train", "cifar-10", 512), ("sample", "cifar-10", 128), ("sample", "cifar-10", 512),
    ("train", "256x256", 1), ("sample", "256x256", 1),
]  # fmt: skip
"""Task, network and batch size: what a short lease needs most comes first."""
BARRED = {"train": 128, "sample": 256}
"""The batch size of CIFAR-10 that was set out to be fast; there every precision is compiled, elsewhere bfloat16."""
EAGER = ("bfloat16", "tf32", "default", "float32")
WARM_UP = 5  # calls before the timed ones: a CUDA graph is recorded after three
TURNS = 3
LAUNCHES = {
    "graphs": r"cu(da)?GraphLaunch",
    "kernels": r"cu(da)?Launch(Cooperative)?Kernel",
    "copies": r"cu(da)?Mem(cpy|set)",
}
TRIES = 2  # of a contestant that ends its process, or does not end in time


@dataclass(frozen=True)
class StepCase:
    """What all contestants of a case do; ``compiled`` are those by torch.compile, which take minutes to begin."""

    part: str
    task: str
    network: str
    batch: int
    precision: str
    compiled: bool = False

    @property
    def key(self) -> str:
        compiled = " compiled" if self.compiled else ""
        return f"{self.task} {self.network} {self.batch} {self.precision}{compiled}"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    @property
    def is_barred(self) -> bool:
        """Whether it is what was set out to be fast."""
        return self.network == "tiny" or (self.network == "cifar-10" and self.batch == BARRED[self.task])

    @property
    def steps(self) -> tuple[int, int]:
        """Of two samplings, whose difference is that of steps in the middle."""
        if self.network == "tiny":
            return 2, 4
        return (8, 24) if self.batch >= 128 or self.network == "256x256" else (16, 48)

    def contestants(self) -> list[Contestant]:
        """Ours first; at the end the libraries that are not installed, which have rows that say so."""
        dtype = str(self.dtype).removeprefix("torch.")
        everyone = self._compiled(dtype) if self.compiled else self._eager(dtype)
        if self.task == "sample":  # with whatever weights, and no gradients
            everyone = [replace(who, ema=False, deterministic=True, mirror=None) for who in everyone]
            everyone = list(dict.fromkeys(everyone))
        return sorted(everyone, key=lambda who: who.missing is not None)

    def names(self) -> list[str]:
        """Of its contestants, in the record."""
        return [name_of(who) for who in self.contestants()]

    def _eager(self, dtype: str) -> list[Contestant]:
        if self.precision == "default":
            found = [Contestant(DIFFUSERS, default=True), Contestant(DIFFUSERS, default=True, ema=True)]
            return [*found, Contestant(LUCIDRAINS, default=True)]
        ours = Contestant(OURS, dtype, True, ema=True, graph="on", deterministic=False)
        found, peers = [ours], [Contestant(DIFFUSERS, dtype, True)]
        if self.precision == "bfloat16":
            found.append(replace(ours, graph="off"))
            found += [replace(ours, deterministic=True), replace(ours, mirror="off")] if self.is_barred else []
            peers += [Contestant(DIFFUSERS, dtype), Contestant(LUCIDRAINS, dtype, True)]
        return [*found, *peers, *self._stand_in(Contestant(TORCH, dtype, True))]

    def _compiled(self, dtype: str) -> list[Contestant]:
        ours = Contestant(OURS, dtype, True, "default", ema=True, graph="on", deterministic=False)
        modes = ("default", "reduce-overhead") if self.precision == "bfloat16" else ("reduce-overhead",)
        peers = [Contestant(DIFFUSERS, dtype, True, mode) for mode in modes]
        found = [ours, *([replace(ours, graph="off")] if self.precision == "bfloat16" else []), *peers]
        return [*found, *self._stand_in(*(Contestant(TORCH, dtype, True, mode) for mode in modes))]

    def _stand_in(self, *found: Contestant) -> list[Contestant]:
        """The plain network, where there is no other library to be compared with."""
        return list(found) if Contestant(DIFFUSERS).missing else []


def name_of(who: Contestant) -> str:
    """Of a contestant in the record."""
    return f"{who.library}, {who.setting}"


# How long it takes: estimates, which a listing shows before anything is measured.

GFLOP = {"cifar-10": 12.4, "256x256": 497.0, "tiny": 0.001}
RATES = {"bfloat16": 2.5e14, "tf32": 1.2e14, "default": 8e13, "float32": 3.5e13}
"""Operations a second that a step of an H100 may come to: a guess, for these estimates alone."""
LAUNCHING = 0.04  # seconds that Python takes for a step of many kernels
COMPILING = {"train": 100.0, "sample": 50.0}
STARTING, MAKING, FLOOR = 15.0, 4.0, 10.0


def predicted(case: StepCase, who: Contestant) -> float:
    """Seconds that a contestant may take, everything included."""
    if who.missing is not None:
        return 0.0
    work = 1.7e9 * GFLOP[case.network] * case.batch * (3 if case.task == "train" else 1) / RATES[case.precision]
    step = max(work, LAUNCHING if who.graph != "on" and who.compiled != "reduce-overhead" else 0.0)
    few, many = case.steps
    steps = WARM_UP + 4 + 5 * TURNS if case.task == "train" else (few + many) * (TURNS + 2)
    return MAKING + (COMPILING[case.task] if who.compiled else 0.0) + steps * step


def predicted_part(cases: tuple[StepCase, ...]) -> float:
    """Seconds of a part."""
    return STARTING + sum(FLOOR + sum(predicted(case, who) for who in case.contestants()) for case in cases)


def parts(tiny: bool = False) -> list[Part]:
    """All of training and sampling, in the order in which it runs."""
    kinds = [("train", "tiny", 2), ("sample", "tiny", 2)] if tiny else KINDS
    found = []
    for kind in kinds:
        name = " ".join(map(str, kind))
        found += [_part(name, EAGER, False, *kind), _part(f"{name} compiled", ("bfloat16",), True, *kind)]
    for kind in kinds[:2]:
        name = " ".join(map(str, kind))
        found.append(_part(f"{name} compiled, float32", ("tf32", "float32"), True, *kind))
    return found


def _part(name: str, precisions: tuple[str, ...], compiled: bool, task: str, network: str, batch: int) -> Part:
    cases = tuple(StepCase(name, task, network, batch, precision, compiled) for precision in precisions)
    longest = max(predicted(case, who) for case in cases for who in case.contestants())
    return Part(name, 540, cases, group=GROUP, predicted=predicted_part(cases), least=STARTING + FLOOR + longest)


# One process of a part.


def run_part(part: Part, record_at: Path, seconds: float, end: float) -> bool:
    """Write the rows that are missing, as long as the time suffices. Returns whether the part is complete.

    Args:
        part: of `parts`. record_at: path of the record. seconds: of turns for each contestant.
        end: by time.monotonic(); no contestant is begun that would not end before it.
    """
    lines = gpu_record.read(record_at)
    done = gpu_record.stepped(lines)
    for case in part.cases:
        assert isinstance(case, StepCase)
        floor: float | None = None
        for who in case.contestants():
            name = name_of(who)
            if (case.key, name) in done:
                continue
            row: Line = dict(
                kind="step", part=part.name, key=case.key, task=case.task, network=case.network, batch=case.batch,
                precision=case.precision, contestant=name, library=who.library, dtype=who.dtype, default=who.default,
                ema=who.ema, compiled=who.compiled, graph=who.graph, deterministic=who.deterministic, seconds=None,
            )  # fmt: skip
            tries = sum(line.get("kind") == "begun" and (line["key"], line["contestant"]) == (case.key, name)
                        for line in lines)  # fmt: skip
            if who.missing is not None:
                gpu_record.append(record_at, [row | {"note": f"{who.missing} is not installed"}])
                continue
            if tries >= TRIES:
                gpu_record.append(record_at, [row | {"error": f"ended its process, or not in time, {tries} times"}])
                continue
            if time.monotonic() + predicted(case, who) + (FLOOR if floor is None else 0.0) > end:
                return False
            if floor is None:
                floor = floor_of(case, record_at)
            print(f"{case.key}: {name}", flush=True)
            gpu_record.append(record_at, [{"kind": "begun", "part": part.name, "key": case.key, "contestant": name}])
            row |= {"floor": floor or None} | attempt(case, who, seconds)
            gpu_record.append(record_at, [row])
            clean_up(who)
            if row.get("lost"):
                raise DeviceLostError([row])
    return True


def attempt(case: StepCase, who: Contestant, seconds: float) -> Line:
    """What is measured of a contestant; where it fails, why."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = measured(case, who, seconds)
        except torch.OutOfMemoryError as error:
            found = {"error": f"out of memory: {in_short(error)}"}
        except Exception as error:
            short = in_short(error)
            found = {"error": f"out of memory: {short}" if "out of memory" in str(error) else short}
            found["lost"] = DEVICE == "cuda" and is_lost()
    told = [f"{w.category.__name__}: {w.message}"[:200] for w in said if "without a CUDA graph" in str(w.message)]
    return found | ({"warnings": told} if told else {})


def measured(case: StepCase, who: Contestant, seconds: float) -> Line:
    """Seconds of a step, of the first call, the most memory, and launches."""
    workshop = Workshop(NETWORKS[case.network])
    with multiplying(case.precision):
        begin = time.perf_counter()
        if case.task == "train":
            few, steps = workshop.training_step(who, case.batch), (1, 1)
            many = few
        else:
            steps = case.steps
            few, many = (workshop.sampling(who, case.batch, n) for n in steps)
        few()
        wait()
        found: Line = {"first": time.perf_counter() - begin}
        forget_peak()  # cuDNN has tried its algorithms, with all memory that they ask for; graphs are recorded later
        if case.task == "train":
            found["seconds"] = steady(few, seconds)
        else:
            many()  # so that what depends on the number of steps is ready, too
            wait()
            found["seconds"] = marginal(few, many, steps, seconds)
        found |= peaks()
        launched = launches(many)
        if case.task == "sample":
            before = launches(few)
            launched = {k: (launched[k] - before[k]) / (steps[1] - steps[0]) for k in launched}
        found["launches"] = launched
        if not who.compiled and who.graph != "on":
            found["parts"] = {k: s / steps[0] for k, s in time_by_part(few, torch.device(DEVICE)).items()}
    return found


def steady(call: Call, seconds: float) -> float:
    """Of a call among many in a row, which the host need not wait for: the best of some turns."""
    for _ in range(WARM_UP):
        call()
    wait()
    once = timed(call, 1)
    count = max(1, min(20, round(seconds / TURNS / max(once, 1e-6))))
    return min(timed(call, count) for _ in range(TURNS))


def marginal(few: Call, many: Call, steps: tuple[int, int], seconds: float) -> float:
    """Of one step more, by two samplings: what a sampling does once is in neither."""
    end = time.monotonic() + seconds
    times: tuple[list[float], list[float]] = ([], [])
    while len(times[0]) < 2 or (time.monotonic() < end and len(times[0]) < 5 * TURNS):
        for found, call in zip(times, (few, many), strict=True):
            found.append(timed(call, 1))
    return max(1e-9, (min(times[1]) - min(times[0])) / (steps[1] - steps[0]))


def timed(call: Call, count: int) -> float:
    """Seconds of each of ``count`` calls in a row."""
    wait()
    begin = time.perf_counter()
    for _ in range(count):
        call()
    wait()
    return (time.perf_counter() - begin) / count


@contextlib.contextmanager
def multiplying(precision: str) -> Iterator[None]:
    """Float32 as the precision says, and the fastest algorithms of cuDNN; "default" leaves all as it is."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    if precision != "default":
        matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
        cudnn.benchmark = True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def floor_of(case: StepCase, record_at: Path) -> float:
    """Seconds of a step at the least, layer by layer, written to the record; 0 where it could not be measured."""
    layers: list[Line] = []
    line: Line = {"kind": "floor", "part": case.part, "key": case.key}
    try:
        with multiplying("tf32" if case.precision == "default" else case.precision):
            shapes = shapes_of(case.network)
            repeat = 2 if case.network == "tiny" else 20
            found = conv_floor.conv_floor(
                case.batch, case.dtype, training=case.task == "train", repeat=repeat, shapes=shapes, found=layers
            )
    except Exception as error:
        gpu_record.append(record_at, [line | {"error": in_short(error)}])
        return 0.0
    gpu_record.append(record_at, [line | {"floor": found, "layers": layers}])
    return found["floor_train" if case.task == "train" else "floor_sample"]


def shapes_of(name: str) -> conv_floor.Shapes:
    """The layers of a network; those for CIFAR-10 are listed, others are found by running it on an image."""
    network: Network = NETWORKS[name]
    if network is CIFAR10:
        return conv_floor.CIFAR10
    made = UNet(**network.unet).to(DEVICE)
    x, t = torch.zeros(1, 3, network.size, network.size, device=DEVICE), torch.zeros(1, device=DEVICE)
    with torch.no_grad():
        layers = record(lambda: made(x, t))
    return conv_floor.shapes_of(layers, sum(p.numel() for p in made.parameters()))


# The device.


def wait() -> None:
    """Until the device has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def forget_peak() -> None:
    """Count the most memory from now on."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peaks() -> Line:
    """Bytes that tensors filled at the most, and that torch had taken from the device for them."""
    if DEVICE != "cuda":
        return {}
    return {"memory": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def launches(call: Call) -> dict[str, float]:
    """How many kernels, CUDA graphs and copies a call launches, as torch's profiler counts them."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes lines of its own to stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    if DEVICE == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    wait()
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        call()
        wait()
    return counted({event.key: event.count for event in profile.key_averages()})


def counted(events: dict[str, int]) -> dict[str, float]:
    """Launches by kind, of events by name."""
    found: Counter[str] = Counter()
    for name, count in events.items():
        for kind, pattern in LAUNCHES.items():
            if re.match(pattern, name):
                found[kind] += count
    return {kind: float(found[kind]) for kind in LAUNCHES}


def clean_up(who: Contestant) -> None:
    """Give back what a contestant left."""
    if who.compiled:
        torch._dynamo.reset()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
