"""The same script before and after: a pipeline of diffusers with its scheduler and with ours, and the scheduler alone.

pytest benchmarks/peers/test_migration_diffusers.py --benchmark-only --bench-threads 1,3 --peers-seconds 5
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastddpm.compat.diffusers as ours
from benchmarks.conftest import turns
from benchmarks.peers.contestants import DEVICE

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="peer: needs pip install fastddpm[peer]"
)
Call = Callable[[], object]

PIPELINES = ("DDPMPipeline", "DDIMPipeline")
STEPS, BATCH, SIZE = 10, 16, 32
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "DDPM": ("DDPMScheduler", {}, {}),
    "DDIM": ("DDIMScheduler", {}, {}),
    "DDIM, eta 1": ("DDIMScheduler", {}, dict(eta=1.0)),
    "DPM-Solver++(2M)": ("DPMSolverMultistepScheduler", {}, {}),
    "SDE-DPM-Solver++(3M)": (
        "DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++", solver_order=3), {},
    ),
}  # fmt: skip


def small_network(size: int) -> Any:
    """Of the script."""
    import diffusers

    return diffusers.UNet2DModel(
        sample_size=size, block_out_channels=(32, 64), norm_num_groups=8, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).to(DEVICE)  # fmt: skip


def pipeline(name: str, network: Any) -> Any:
    """As a script makes it: a network and the scheduler that goes with the pipeline."""
    import diffusers

    pipe = getattr(diffusers, name)(network, getattr(diffusers, name.replace("Pipeline", "Scheduler"))())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawing(pipe: Any, batch: int, steps: int) -> Call:
    """The call of the script."""
    return lambda: pipe(batch_size=batch, num_inference_steps=steps, output_type="np")


def stepping(scheduler: Any, batch: int, size: int, steps: int, options: dict[str, Any]) -> Call:
    """A sampling without a network: what the steps take by themselves."""
    out, start = torch.randn(2, batch, 3, size, size, device=DEVICE).unbind()

    def run() -> None:
        scheduler.set_timesteps(steps)
        x = start
        for t in scheduler.timesteps:
            x = scheduler.step(out, t, x, **options).prev_sample

    return run


def report(benchmark: Any, capsys: Any, config: Any, what: str, calls: dict[str, Call], steps: int, unit: str) -> None:
    """Time the calls in turns, and say what one step of each takes."""
    if benchmark.disabled:  # each runs once, to see that it runs
        for call in calls.values():
            call()
        benchmark(lambda: None)
        return
    best = turns(calls, config.getoption("--peers-seconds") * len(calls))
    before = next(iter(best.values()))
    benchmark.extra_info.update(seconds={name: seconds / steps for name, seconds in best.items()})
    scale = {"us": 1e6, "ms": 1e3}[unit]
    with capsys.disabled():
        print(f"\n{what}, {DEVICE}")
        for name, seconds in best.items():
            print(f"    {name:32} {seconds / steps * scale:9.1f} {unit} a step {before / seconds:6.2f}x")
    benchmark.pedantic(list(calls.values())[1], rounds=1)


@pytest.fixture
def with_threads(threads: int) -> Any:
    """So many for the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield threads
    torch.set_num_threads(before)


@pytest.mark.timeout(3600)
@pytest.mark.benchmark(group="migration, diffusers")
@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline(name: str, with_threads: int, benchmark: Any, capsys: Any, pytestconfig: pytest.Config) -> None:
    batch, size, steps = (2, 8, 2) if benchmark.disabled else (BATCH, SIZE, STEPS)
    network = small_network(size)  # one for all: what differs is the scheduler
    pipes = [pipeline(name, network) for _ in range(3)]
    ours.install(pipes[1])
    ours.install(pipes[2], noise_seed=0)
    names = ("before", "after install(pipe)", "after install(pipe, noise_seed=0)")
    calls = {what: drawing(pipe, batch, steps) for what, pipe in zip(names, pipes, strict=True)}
    what = f"{name}, batch {batch}, {size}x{size}, {with_threads} thread(s)"
    report(benchmark, capsys, pytestconfig, what, calls, steps, "ms")


@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.benchmark(group="migration, diffusers")
@pytest.mark.parametrize("case", CASES)
def test_scheduler(case: str, with_threads: int, benchmark: Any, capsys: Any, pytestconfig: pytest.Config) -> None:
    import diffusers

    batch, size, steps = (2, 8, 3) if benchmark.disabled else (BATCH, SIZE, 20)
    name, config, options = CASES[case]
    made = {
        "before": getattr(diffusers, name)(**config),
        "after": getattr(ours, name)(**config),
        "after, noise from its counter": getattr(ours, name)(**config).set_noise_seed(0),
    }
    calls = {what: stepping(scheduler, batch, size, steps, options) for what, scheduler in made.items()}
    what = f"{case}: the scheduler alone, batch {batch}, {size}x{size}, {with_threads} thread(s)"
    report(benchmark, capsys, pytestconfig, what, calls, steps, "us")
