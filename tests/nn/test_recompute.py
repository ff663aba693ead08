"""Blocks computed again in backward: the same bits, less kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastddpm.nn import UNet
from tests.nn.networks import VARIANTS, inputs, variant


def run(unet: UNet) -> tuple[list[Tensor], int]:
    """The output and every gradient; and the bytes of what was kept for backward, but for the weights."""
    x, t, labels = inputs(unet)
    noise: dict[str, Any] = dict(seed=torch.tensor(1), sample=torch.arange(len(x)), step=torch.tensor(3))
    weights = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = unet(x, t, labels, **noise)
    gradients = torch.autograd.grad(y.square().sum(), list(unet.parameters()), allow_unused=True)
    return [y, *(g for g in gradients if g is not None)], sum(kept[place] for place in kept.keys() - weights)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_bits_are_the_same_and_less_is_kept(name: str) -> None:
    unet = variant(name).train()
    before, much = run(unet)
    unet.recompute()
    after, little = run(unet)
    assert all(map(torch.equal, before, after)) and len(before) == len(after)
    assert little < 0.8 * much, (little, much)
    unet.recompute(False)
    assert run(unet)[1] == much


def test_evaluation_and_other_modes_do_not_recompute(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = variant("ddpm")
    unet.recompute()
    monkeypatch.setattr("fastddpm.nn.blocks.checkpoint", None)  # whose call would raise
    run(unet.eval())
    with torch.no_grad():
        unet.train()(*inputs(unet))


def test_it_compiles_to_one_graph() -> None:
    unet = variant("ddpm", channel_mult=(1,), attention_resolutions=()).train()
    unet.recompute()
    x, t, labels = inputs(unet)
    eager = unet(x, t, labels)
    compiled = torch.compile(unet, backend="aot_eager", fullgraph=True)(x, t, labels)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
    compiled.sum().backward()
