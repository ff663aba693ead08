"""Blocks computed again in backward: the same bits, less kept."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastddpm
from fastddpm import _native
from fastddpm.bench.memory import resident
from fastddpm.nn import Downsample, UNet
from fastddpm.nn.blocks import _joined
from tests.nn.networks import VARIANTS, inputs, variant
from tests.tolerance import assert_within


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
    for module in ("blocks", "attention"):
        monkeypatch.setattr(f"fastddpm.nn.{module}.recomputed", None)  # whose call would raise
    run(unet.eval())
    with torch.no_grad():
        unet.train()(*inputs(unet))


def test_gradients_add_up_under_autocast_whose_cache_is_warm() -> None:
    """Backward inside autocast too, where weights that were cast without a gradient would be found again."""
    unet = variant("ddpm").train()
    x, t, labels = inputs(unet)

    def gradients() -> list[Tensor]:
        unet.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                unet(x, t, labels).float().square().sum().backward()
        return [p.grad.clone() for p in unet.parameters() if p.grad is not None]

    plain = gradients()
    unet.recompute()
    assert all(map(torch.equal, plain, gradients()))
    frozen = unet.middle.block1.conv1.weight.requires_grad_(False)  # type: ignore[union-attr]
    gradients()
    assert frozen.grad is None


def test_the_gradient_of_a_joined_skip_keeps_no_other() -> None:
    """It waits for the way down; as a view it would keep that of the joined images until then."""
    x, skip = (torch.randn(2, c, 4, 4).to(memory_format=torch.channels_last).requires_grad_() for c in (8, 4))
    y = _joined(x, skip)
    assert torch.equal(y, torch.cat([x, skip], dim=1))
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, [x, skip], dy)
    for gradient, wanted in zip(gradients, dy.split([8, 4], dim=1), strict=True):
        assert torch.equal(gradient, wanted) and gradient.is_contiguous(memory_format=torch.channels_last)
        assert gradient.untyped_storage().nbytes() == 4 * gradient.numel()


def test_a_downsampling_keeps_its_input_alone() -> None:
    layer = Downsample(4).train()
    x = torch.randn(1, 4, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    before = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    layer.recompute = True
    kept = list[Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    assert not kept  # in its place stands the function of x
    after = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    assert all(map(torch.equal, before, after))


@pytest.mark.skipif(not _native.available() or resident("VmRSS") is None, reason="no native code, or no Linux")
def test_what_convolutions_keep_is_freed_before_a_part_is_computed_again() -> None:
    """Weights and tiles of a large one, in a process whose allocator gives back what is freed."""
    code = """
import torch
from fastddpm.bench.memory import resident
from fastddpm.nn.recompute import recomputed
from fastddpm.ops import conv3x3
from fastddpm._allocator import keep_freed_memory
keep_freed_memory(False)
torch.set_num_threads(4)  # for more threads more tiles are kept
x = torch.randn(1, 1, requires_grad=True)
recomputed(torch.exp, x).backward()  # the code of backward is in memory, too, from here on
y = recomputed(torch.exp, x)
image, weight = torch.randn(8, 256, 32, 32).to(memory_format=torch.channels_last), torch.randn(256, 256, 3, 3)
first = conv3x3(image, weight)
before = resident("VmRSS")
y.backward()
assert before - resident("VmRSS") > 8 << 20
assert torch.equal(first, conv3x3(image, weight))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_compilers_are_not_imported() -> None:
    """torch.utils.checkpoint imports torch._dynamo at its first call: 145 MiB."""
    code = (
        "import sys, torch, fastddpm; u = fastddpm.UNet(image_size=8, base_channels=8, channel_mult=(1,), num_groups=4,"
        "attention_resolutions=(8,)); u.recompute(); u(torch.randn(1, 3, 8, 8), torch.zeros(1)).sum().backward();"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_compiles_to_one_graph() -> None:
    """With the output and the gradients of the reference in float64, by the one rule."""
    unet = variant("ddpm", channel_mult=(1,), attention_resolutions=()).train()
    unet.recompute()
    x, t, labels = inputs(unet)

    def step(network: Callable[..., Tensor], weights: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
        y = network(x.to(weights[0].dtype), t, labels)
        return y.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(y.square().sum(), weights)])

    exact = copy.deepcopy(unet).double()
    with fastddpm.use_backend("reference"):
        of_exact = step(exact, list(exact.parameters()))
        of_reference = step(unet, list(unet.parameters()))
    compiled = torch.compile(unet, backend="aot_eager", fullgraph=True)
    for what, impl, ref64, ref32 in zip(
        ("output", "gradients"), step(compiled, list(unet.parameters())), of_exact, of_reference, strict=True
    ):
        assert_within(impl, ref64, ref32, what)
