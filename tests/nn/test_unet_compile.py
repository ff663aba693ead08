"""torch.compile takes the whole network in one graph, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastddpm.nn import UNet
from tests.nn.networks import inputs, variant
from tests.tolerance import assert_equal_to_rounding, assert_within

# attention in the middle alone: the compiler takes a time in proportion to the number of layers
ONE_LEVEL: dict[str, Any] = dict(channel_mult=(1,), attention_resolutions=())
TWO_LEVELS: dict[str, Any] = dict(channel_mult=(1, 1), attention_resolutions=())


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def inductor() -> None:
    """Let Inductor find out, once per machine, about the compiler and the vector instructions."""
    torch.compile(torch.sin)(torch.zeros(64))
    torch._dynamo.reset()


def step(unet: UNet, function: Callable[..., Tensor], batch: int) -> list[Tensor]:
    """The output, and the gradient of every parameter."""
    x, t, labels = inputs(unet, batch)
    noise: dict[str, Any] = dict(seed=torch.tensor(1), sample=torch.arange(batch) + 5, step=torch.tensor(3))
    y = function(x, t, labels, **noise)
    return [y, *torch.autograd.grad(y.square().sum(), list(unet.parameters()))]


def assert_same_step(compiled: list[Tensor], eager: list[Tensor], ulps: float = 1e4) -> None:
    for a, b in zip(compiled, eager, strict=True):
        assert a.stride() == b.stride()
        assert_equal_to_rounding(a, b, ulps=ulps, scale=b.abs().max().item())


@pytest.mark.parametrize(
    ("name", "levels", "dtype"),
    [  # in float64 the references are traced, in float32 the kernels
        ("ddpm", TWO_LEVELS, torch.float32),
        ("improved", ONE_LEVEL, torch.float64),
        ("adm", TWO_LEVELS, torch.float32),
    ],
)
def test_full_graph(name: str, levels: dict[str, Any], dtype: torch.dtype) -> None:
    unet = variant(name, **levels).to(dtype)
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    ulps = 1e4 if dtype == torch.float64 else 1e3
    assert_same_step(step(unet, compiled, 2), step(unet, unet, 2), ulps)


def test_full_graph_under_autocast_with_a_seed_of_its_own() -> None:
    unet = variant("improved", **ONE_LEVEL)
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    x, t, _ = inputs(unet)
    results = []
    for function in (compiled, unet):
        torch.manual_seed(5)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(function(x, t))
    assert results[0].dtype == torch.bfloat16
    assert torch.equal(*results)


def test_one_graph_for_every_batch_size() -> None:
    unet = variant("adm", **ONE_LEVEL)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(unet, fullgraph=True, backend=counter)

    def marked(*args: Tensor, **noise: Tensor) -> Tensor:
        for v in (*args, noise["sample"]):
            torch._dynamo.mark_dynamic(v, 0)
        out: Tensor = compiled(*args, **noise)
        return out

    for batch in (2, 3, 7):
        assert_same_step(step(unet, marked, batch), step(unet, unet, batch), ulps=1e3)
    assert counter.frame_count == 1


@pytest.mark.timeout(20, func_only=True)
@torch.no_grad()
def test_inductor_inference(inductor: None) -> None:
    unet = variant("ddpm", **ONE_LEVEL).eval()
    x, t, _ = inputs(unet)
    y, eager = torch.compile(unet, fullgraph=True)(x, t), unet(x, t)
    assert_within(y, unet.double()(x.double(), t), eager)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_inductor_training(inductor: None) -> None:
    unet = variant("adm", **ONE_LEVEL)
    compiled = torch.compile(unet, fullgraph=True)
    assert_same_step(step(unet, compiled, 2), step(unet, unet, 2), ulps=1e3)
