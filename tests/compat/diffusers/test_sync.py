"""A step never reads from the device: everything runs on tensors that have no values, and timesteps there are found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastddpm
import fastddpm.compat.diffusers as ours
from fastddpm.compat.diffusers.scheduler import Scheduler
from tests.compat.diffusers.cases import NAMES, Party, Walk, laid_out, mine, network, outputs, walks
from tests.tolerance import assert_near_peer

pytestmark = pytest.mark.filterwarnings("ignore")


def on_meta(walk: Walk, foreign: bool) -> None:
    """Sample on a device from which nothing can be read: `.item()`, `.cpu()` or an if would raise."""
    scheduler = mine(walk)
    if walk.timesteps is None:
        scheduler.set_timesteps(walk.num_steps, device="meta")
    else:
        scheduler.set_timesteps(timesteps=list(walk.timesteps), device="meta")
    visited = scheduler._visited
    if walk.name.startswith("DPM") and (foreign or visited[0] in visited[1:]):
        scheduler.set_begin_index(0)  # as pipelines do
    x = torch.empty(walk.shape, dtype=walk.dtype, device="meta")
    out = torch.empty(walk.output_shape, dtype=walk.dtype, device="meta")
    options: dict[str, Any] = dict(walk.options)
    if walk.generators == "list":
        options["generator"] = [torch.Generator().manual_seed(i) for i in range(walk.shape[0])]
    if walk.generators == "one":
        scheduler.set_noise_seed(7)
    for t in scheduler.timesteps:
        assert t.is_meta
        x = scheduler.step(out, t.clone() if foreign else t, x, **options).prev_sample
        assert x.is_meta and x.shape == walk.shape
    if not walk.name.startswith("DPM"):
        t = torch.empty(walk.shape[0], dtype=torch.int64, device="meta")
        assert scheduler.add_noise(x, x, t).is_meta and scheduler.get_velocity(x, x, t).is_meta


@pytest.mark.parametrize("foreign", [False, True], ids=["own timesteps", "copies of timesteps"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_read_from_the_device(name: str, foreign: bool) -> None:
    for walk in walks(name, 12, seed=99):
        on_meta(walk, foreign)


@pytest.mark.gpu
@pytest.mark.parametrize("generator", ["cpu", "cuda", "list", "counter"])
@pytest.mark.parametrize("name", NAMES)
def test_the_host_never_waits_for_the_gpu(name: str, generator: str) -> None:
    scheduler = getattr(ours, name)(**(dict(algorithm_type="sde-dpmsolver++") if name.startswith("DPM") else {}))
    options: dict[str, Any] = dict(eta=1.0) if name == "DDIMScheduler" else {}
    x, out = torch.randn(2, 4, 3, 16, 16, device="cuda").unbind()
    if generator == "counter":
        scheduler.set_noise_seed(3)
    elif generator == "list":
        options["generator"] = [torch.Generator().manual_seed(i) for i in range(4)]
    else:
        options["generator"] = torch.Generator(generator).manual_seed(1)

    def walk(x: Tensor) -> Tensor:
        for t in scheduler.timesteps:
            x = scheduler.step(out, t, x, **options).prev_sample
        return x

    scheduler.set_timesteps(12, device="cuda")
    walk(x)  # compiles and allocates
    scheduler.set_timesteps(12, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        x = walk(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.isfinite().all()


def test_the_place_of_a_timestep_is_known_from_its_memory() -> None:
    """By iteration, by index, and in a slice, as image-to-image takes the end of the list."""
    scheduler = ours.DDPMScheduler()
    scheduler.set_timesteps(10, device="meta")
    assert [scheduler._host(t) for t in scheduler.timesteps] == list(range(900, -1, -100))
    assert scheduler._host(scheduler.timesteps[3]) == 600
    assert [scheduler._host(t) for t in scheduler.timesteps[7:]] == [200, 100, 0]
    assert scheduler._host(scheduler.timesteps[3].clone()) is None
    assert scheduler._host(torch.tensor([5])) == scheduler._host(5) == 5
    with pytest.raises(ValueError, match=r"expected one timestep for the batch, got a tensor of shape \[2\]"):
        scheduler._host(torch.tensor([5, 5]))


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_a_timestep_looked_up_on_the_device_gives_the_same_step(
    name: str, corrected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = Walk(name, dict(variance_type="learned_range") if name == "DDPMScheduler" else {}, 8)
    known, unknown = (Party(walk, mine(walk, corrected=corrected), walk.dtype) for _ in range(2))
    x = y = torch.randn(walk.shape)
    for i, drawn in enumerate(outputs(walk, 8)):
        x = known.step(network(walk, drawn, x), i, x).prev_sample
        with monkeypatch.context() as patched:
            patched.setattr(Scheduler, "_host", lambda self, t: None)
            y = unknown.step(network(walk, drawn, y), i, y).prev_sample
        assert torch.equal(x, y)


def test_a_timestep_on_the_device_that_is_not_visited_gives_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot raise without waiting for the device; a wrong picture in silence it shall not give."""
    scheduler = ours.DDPMScheduler()
    scheduler.set_timesteps(10)
    monkeypatch.setattr(Scheduler, "_host", lambda self, t: None)
    x = torch.randn(1, 3, 4, 4)
    for t in (1, 999, 1000, 2000):
        assert scheduler.step(x, torch.tensor(t), x).prev_sample.isnan().all()
    assert scheduler.step(x, torch.tensor(900), x).prev_sample.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", NAMES)
def test_every_implementation_takes_the_calls(name: str, backend: str) -> None:
    """In whatever dtypes and memory orders a sampling comes; Triton in its interpreter."""
    if backend == "triton":
        pytest.importorskip("triton", reason="the Triton kernels need Triton")
    for walk in walks(name, 6, seed=5):
        walk = replace(walk, num_steps=min(walk.num_steps, 4), timesteps=None)
        if walk.dtype == torch.float64 or walk.config.get("num_train_timesteps") == 60:
            continue
        expected, found = (Party(walk, mine(walk), walk.dtype) for _ in range(2))
        x = laid_out(torch.randn(walk.shape).to(walk.dtype), walk)
        for i, drawn in list(enumerate(outputs(walk, len(expected.scheduler.timesteps))))[:3]:
            out = network(walk, drawn, x)
            native = expected.step(out, i, x)
            with fastddpm.use_backend(backend):
                result = found.step(out, i, x)
            for key in native:
                assert result[key].dtype == native[key].dtype
                precision = 1e-5 if walk.dtype == torch.float32 else torch.finfo(walk.dtype).eps
                assert_near_peer(result[key], native[key], precision)
            x = native.prev_sample


def test_timesteps_may_be_assigned() -> None:
    scheduler = ours.DDPMScheduler()
    scheduler.set_timesteps(10)
    scheduler.timesteps = scheduler.timesteps[4:]
    x = torch.randn(1, 3, 4, 4)
    assert scheduler.step(x, scheduler.timesteps[0], x).prev_sample.isfinite().all()
    with pytest.raises(ValueError, match="expected one of the timesteps that set_timesteps chose, got 900"):
        scheduler.step(x, 900, x)
