"""Joining the way up with the way down: read from two tensors, or from their copy, it is the same network."""

from __future__ import annotations

import pytest
import torch

from fastddpm.nn import blocks
from tests.nn.networks import inputs, variant
from tests.tolerance import assert_within


@pytest.mark.parametrize("name", ["ddpm", "improved", "adm"])
def test_read_apart_is_read_joined(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = variant(name)
    x, t, labels = inputs(unet)

    def run(dtype: torch.dtype, apart: bool) -> list[torch.Tensor]:
        monkeypatch.setattr(blocks, "reads_apart", lambda _: apart)
        network = unet.to(dtype)
        noisy = x.detach().to(dtype).requires_grad_()
        y = network(noisy, t, labels)
        weights = [p for p in network.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(y.square().sum(), [noisy, *weights], allow_unused=True)
        return [y, *(g for g in gradients if g is not None)]

    exact, joined, apart = run(torch.float64, False), run(torch.float32, False), run(torch.float32, True)
    for what, tensors in (("output", slice(0, 1)), ("gradients", slice(1, None))):
        flat = [torch.cat([v.flatten() for v in values[tensors]]) for values in (apart, exact, joined)]
        assert_within(*flat, what)
