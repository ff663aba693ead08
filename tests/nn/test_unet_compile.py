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


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(unet: UNet, function: Callable[..., Tensor], batch: int) -> list[Tensor]:
    """The output, and the gradient of every parameter."""
    x, t, labels = inputs(unet, batch)
    noise: dict[str, Any] = dict(seed=torch.tensor(1), sample=torch.arange(batch) + 5, step=torch.tensor(3))
    y = function(x, t, labels, **noise)
    return [y, *torch.autograd.grad(y.square().sum(), list(unet.parameters()))]


def assert_same_step(compiled: list[Tensor], eager: list[Tensor]) -> None:
    for a, b in zip(compiled, eager, strict=True):
        assert a.stride() == b.stride()
        assert_equal_to_rounding(a, b, ulps=1e4, scale=b.abs().max().item())


@pytest.mark.parametrize("name", ["ddpm", "improved", "adm"])
def test_full_graph(name: str) -> None:
    unet = variant(name).double()
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    assert_same_step(step(unet, compiled, 2), step(unet, unet, 2))


def test_full_graph_under_autocast_with_a_seed_of_its_own() -> None:
    unet = variant("improved", channel_mult=(2,), attention_resolutions=())
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    x, t, _ = inputs(unet)
    results = []
    for function in (compiled, unet):
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(function(x, t))
    assert torch.equal(*results)


def test_one_graph_for_every_batch_size() -> None:
    unet = variant("adm", channel_mult=(1,), attention_resolutions=()).double()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(unet, fullgraph=True, backend=counter)

    def marked(*args: Tensor, **noise: Tensor) -> Tensor:
        for v in (*args, noise["sample"]):
            torch._dynamo.mark_dynamic(v, 0)
        out: Tensor = compiled(*args, **noise)
        return out

    for batch in (2, 3, 7):
        assert_same_step(step(unet, marked, batch), step(unet, unet, batch))
    assert counter.frame_count == 1


def test_inductor() -> None:
    unet = variant("ddpm", channel_mult=(1,), attention_resolutions=())
    compiled = torch.compile(unet, fullgraph=True)
    exact = step(unet.double(), unet, 2)
    for i, (a, b, r) in enumerate(zip(step(unet.float(), compiled, 2), step(unet, unet, 2), exact, strict=True)):
        if i == 0:
            assert_within(a, r, b)
        else:
            assert_equal_to_rounding(a, b, ulps=1e3, scale=b.abs().max().item())
