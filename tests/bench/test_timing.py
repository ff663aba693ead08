"""What is timed on a GPU is the GPU: with a queue in its place, and on one."""

from __future__ import annotations

import importlib
import time
from collections import Counter
from typing import Any

import pytest
import torch

from fastddpm.bench import (
    GpuClock,
    Work,
    copy_rate,
    floor,
    least,
    measure,
    measure_ops,
    product_rate,
    times,
    timing,
    update_rate,
)
from fastddpm.bench.floor import Layer
from tests.launched import launch_on_cpu

CPU, GPU = torch.device("cpu"), torch.device("cuda")
UNET = dict(
    image_size=(8, 8), base_channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=4
)  # fmt: skip


@pytest.mark.parametrize(
    ("kernels", "host", "seconds"),
    [(1, 5e-6, 2e-6), (1, 1e-4, 2e-5), (8, 2e-5, 3e-6), (1, 3e-4, 1e-2), (900, 3e-5, 4e-6), (10, 2e-3, 1e-6)],
)
@pytest.mark.parametrize("clock", [1.2e9, 3e9])
def test_launches_are_not_timed(
    kernels: int, host: float, seconds: float, clock: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = launch_on_cpu(monkeypatch)
    gpu.clock = clock

    def call() -> None:
        for _ in range(kernels):
            gpu.launch(host, seconds)

    assert least(call, GPU, repeat=3) == pytest.approx(kernels * seconds)
    assert min(times(call, GPU, repeat=3)) >= kernels * max(host, seconds)


def test_calls_in_a_row_are_as_many_as_hide_the_events(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = launch_on_cpu(monkeypatch)
    for seconds, fewest, count in ((1e-6, 1, 64), (2e-5, 1, 20), (1e-2, 1, 1), (1e-2, 4, 4)):
        clock = GpuClock(lambda seconds=seconds: gpu.launch(1e-5, seconds), fewest)  # type: ignore[misc]
        assert clock.count == count


@pytest.mark.parametrize("waits", [True, False])
def test_a_call_that_no_sleep_hides_is_timed_all_the_same(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the GPU, or has more launches than a GPU keeps."""
    gpu = launch_on_cpu(monkeypatch)

    def call() -> None:
        for _ in range(4 if waits else 2000):
            gpu.launch(1e-5, 2e-6)
        if waits:
            gpu.synchronize()

    found = least(call, GPU, repeat=5)
    assert (8e-6 if waits else 4e-3) <= found <= min(times(call, GPU, repeat=3))
    assert gpu.slept < 20


def test_what_a_step_is_held_against_has_no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers, copies, products and ops are timed by `least`."""

    def two_seconds(*_: Any) -> float:
        return 2.0

    ops = importlib.import_module("fastddpm.bench.ops")
    for module in (timing, importlib.import_module("fastddpm.bench.floor"), ops):
        monkeypatch.setattr(module, "least", two_seconds)
    assert copy_rate(16, CPU) == update_rate(16, CPU) == 8
    assert product_rate(torch.float32, CPU, size=10) == 1000
    layer = Layer("linear", torch.neg, (1,), (), 0)
    monkeypatch.setattr(importlib.import_module("fastddpm.bench.floor"), "_replay", lambda *_: None)
    monkeypatch.setattr(importlib.import_module("fastddpm.bench.floor"), "_replay_gradients", lambda *_: None)
    found = floor(Counter({layer: 3}), torch.float32, CPU, parameters=10)
    assert found.forward == found.train == {"linear": 6.0}
    assert found.optimizer == pytest.approx(38 * 10 / (80 / 2))
    rows = measure_ops(Work("sample", UNET, {}, dict(batch_size=2, device="cpu")), only="q_sample")
    assert [row.seconds for row in rows] == [2.0]
    monkeypatch.setattr(ops, "update_rate", lambda *_: 10.0)
    (row,) = measure_ops(Work("sample", UNET, {}, dict(batch_size=2, device="cpu")), only="adam_ema")
    assert row.floor == row.bytes / 10


@pytest.mark.gpu
def test_a_slow_host_is_not_timed() -> None:
    """100,000 cycles are some 50 us; the host takes 2 ms to launch them."""

    def call() -> None:
        time.sleep(2e-3)
        torch.cuda._sleep(100_000)

    assert 2e-5 < least(call, GPU, repeat=5) < 5e-4
    assert min(times(call, GPU, repeat=5)) > 2e-3


@pytest.mark.gpu
def test_the_floor_of_a_small_network_is_less_than_its_step() -> None:
    """Whose step is that of its launches; its layers are timed without theirs."""
    train = dict(batch_size=4, precision="float32", device="cuda", cuda_graph="off")
    assert measure(Work("train", UNET, {}, train), repeat=10, peak_flops=1e12).ratio > 1
