"""The same script before and after: improved-diffusion, and the same calls with its import lines changed, in turns.

    PYTHONPATH=<checkout of openai/improved-diffusion> pytest benchmarks/peers/test_migration_improved_diffusion.py \
        --benchmark-only --bench-threads 3 --peers-seconds 15

The network is that of its CIFAR-10 recipe, 52,546,438 parameters. It is on no registry; without it a row says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.conftest import turns
from benchmarks.peers import improved_diffusion
from benchmarks.peers.contestants import DEVICE

Call = Callable[[], object]
BEFORE, AFTER = "improved_diffusion", "fastddpm.compat.improved_diffusion"
RECIPE = dict(
    image_size=32, num_channels=128, num_res_blocks=3, learn_sigma=True, dropout=0.3, diffusion_steps=4000,
    noise_schedule="cosine",
)  # fmt: skip
TINY = dict(RECIPE, num_channels=32, num_res_blocks=1)
STEPS = 4
"""Of a sampling and of an evaluation, of which each call times all."""
CASES = {
    "train": (4, 128),
    "p_sample_loop": (4, 16),
    "ddim_sample_loop": (1, 1),
    "calc_bpd_loop": (1, 1),
}
"""Images, on a CPU and on a GPU."""


def library(name: str) -> Any:
    """The modules that its scripts import."""
    return improved_diffusion.original() if name == BEFORE else importlib.import_module(name)


def call_of(name: str, task: str, images: int, flags: dict[str, Any], folder: Path) -> Call:
    """What the script does again and again, by this library."""
    there = library(name)
    there.logger.configure(str(folder), [])
    respacing = "" if task == "train" else str(STEPS)
    options = dict(there.script_util.model_and_diffusion_defaults(), **flags, timestep_respacing=respacing)
    model, diffusion = there.script_util.create_model_and_diffusion(**options)
    model.to(DEVICE)
    shape = images, 3, options["image_size"], options["image_size"]
    if task == "train":
        return training(there, model, diffusion, shape)
    model.eval()
    if task == "calc_bpd_loop":
        x = torch.randint(0, 256, shape, device=DEVICE) / 127.5 - 1
        return lambda: diffusion.calc_bpd_loop(model, x)
    return lambda: getattr(diffusion, task)(model, shape)


def training(there: Any, model: Any, diffusion: Any, shape: tuple[int, ...]) -> Call:
    """A step of image_train.py: its flags are the loop's arguments."""

    def data() -> Iterator[Any]:
        batch = torch.rand(shape) * 2 - 1
        while True:
            yield batch, {}

    loop = there.train_util.TrainLoop(
        model=model, diffusion=diffusion, data=data(), batch_size=shape[0], microbatch=-1, lr=1e-4,
        ema_rate="0.9999", log_interval=10, save_interval=10**9, resume_checkpoint="",
        schedule_sampler=there.resample.create_named_schedule_sampler("uniform", diffusion),
    )  # fmt: skip

    def step() -> None:
        loop.run_step(*next(loop.data))
        if loop.step % loop.log_interval == 0:
            there.logger.dumpkvs()
        loop.step += 1

    return step


@pytest.fixture
def with_threads(threads: int) -> Iterator[int]:
    """So many for the test, in a process group of one: without it the original does not train."""
    from fastddpm.compat.improved_diffusion import dist_util

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    dist_util.setup_dist()
    yield threads
    dist.destroy_process_group()
    torch.set_num_threads(before)


@pytest.mark.timeout(3600)
@pytest.mark.benchmark(group="migration, improved-diffusion")
@pytest.mark.parametrize("task", CASES)
def test_script(
    task: str, with_threads: int, benchmark: Any, capsys: Any, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    there = [BEFORE, AFTER] if improved_diffusion.is_there() else [AFTER]
    if benchmark.disabled:  # each runs once on a tiny network, to see that it runs
        torch.set_num_threads(1)
        for name in there:
            call_of(name, task, 1, TINY, tmp_path)()
        benchmark(lambda: None)
        return
    images = CASES[task][DEVICE == "cuda"]
    calls = {name: call_of(name, task, images, RECIPE, tmp_path) for name in there}
    best = turns(calls, pytestconfig.getoption("--peers-seconds") * len(calls))
    benchmark.extra_info.update(seconds=best, images=images, threads=with_threads)
    with capsys.disabled():
        print(f"\n{task}, {images} image(s), {DEVICE}, {with_threads} thread(s)")
        for name in (BEFORE, AFTER):
            said = f"{best[name] * 1e3:10,.1f} ms" if name in best else "not installed"
            ratio = f"{best[BEFORE] / best[name]:6.2f}x" if BEFORE in best and name in best else ""
            print(f"    {name:40} {said} {ratio}")
    benchmark.pedantic(calls[AFTER], rounds=1)
