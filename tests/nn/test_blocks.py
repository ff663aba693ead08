"""The parts of the U-Net against the same equations in plain PyTorch, values and gradients, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.nn import Downsample, DropoutKey, GroupNormSiLU, ResBlock, SelfAttention, Upsample
from fastddpm.ops import philox
from tests.tolerance import assert_equal_to_rounding


def randomised(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.double()


def image(*shape: int) -> Tensor:
    x = torch.randn(*shape, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    return x.requires_grad_()


def assert_same_function(module: nn.Module, plain: Callable[..., Tensor], *args: Tensor) -> None:
    """Equal values, and equal gradients for every argument and parameter."""
    results = []
    for function in (module, plain):
        y = function(*args)
        weights = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape)  # no two gradients alike
        results.append((y, *torch.autograd.grad((y * weights).sum(), (*args, *module.parameters()))))
    for a, b in zip(*results, strict=True):
        assert_equal_to_rounding(a, b, ulps=1000, scale=b.abs().max().item())


def group_norm(norm: GroupNormSiLU, x: Tensor) -> Tensor:
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def test_group_norm_silu() -> None:
    norm = randomised(GroupNormSiLU(12, 3, 1e-5))
    assert isinstance(norm, GroupNormSiLU)
    assert_same_function(norm, lambda x: F.silu(group_norm(norm, x)), image(2, 12, 3, 5))


@pytest.mark.parametrize("resample", [None, "down", "up"])
@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("out_channels", [8, 12])
def test_residual_block(resample: str | None, scale_shift: bool, out_channels: int) -> None:
    block = ResBlock(8, out_channels, 4, 1e-5, scale_shift=scale_shift, resample=resample)  # type: ignore[arg-type]
    randomised(block)

    def resized(x: Tensor) -> Tensor:
        if resample == "down":
            return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3) if resample == "up" else x

    def plain(x: Tensor, e: Tensor) -> Tensor:
        h = block.conv1(resized(F.silu(group_norm(block.norm1, x))))
        if scale_shift:
            scale, shift = e[:, :out_channels, None, None], e[:, out_channels:, None, None]
            h = F.silu(group_norm(block.norm2, h) * (1 + scale) + shift)
        else:
            h = F.silu(group_norm(block.norm2, h + e[:, :, None, None]))
        shortcut = block.shortcut if block.shortcut is not None else nn.Identity()
        return shortcut(resized(x)) + block.conv2(h)

    assert (block.shortcut is None) == (out_channels == 8)
    assert block.embedding_width == out_channels * (2 if scale_shift else 1)
    e = torch.randn(2, block.embedding_width, dtype=torch.float64, requires_grad=True)
    assert_same_function(block, plain, image(2, 8, 4, 6), e)


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_attention(num_heads: int) -> None:
    attention = SelfAttention(8, num_heads, 4, 1e-5)
    randomised(attention)

    def plain(x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        z = group_norm(attention.norm, x).flatten(2).mT  # [B, H*W, C]
        heads = []
        for i in range(num_heads):
            d = c // num_heads
            rows = [slice(part * c + i * d, part * c + (i + 1) * d) for part in range(3)]
            q, k, v = (z @ attention.qkv.weight[r].T + attention.qkv.bias[r] for r in rows)
            heads.append(torch.softmax(q @ k.mT / math.sqrt(d), dim=2) @ v)
        y = torch.cat(heads, dim=2) @ attention.proj.weight.T + attention.proj.bias
        return x + y.mT.reshape(b, c, h, w)

    assert_same_function(attention, plain, image(2, 8, 3, 5))


@pytest.mark.parametrize("padding", ["same", "symmetric"])
def test_downsample(padding: str) -> None:
    down = Downsample(4, padding)  # type: ignore[arg-type]
    randomised(down)
    before = 0 if padding == "same" else 1

    def plain(x: Tensor) -> Tensor:
        x = F.pad(x, (before, 1, before, 1))
        return F.conv2d(x, down.conv.weight, down.conv.bias)[:, :, ::2, ::2]

    assert_same_function(down, plain, image(2, 4, 6, 8))
    assert down(image(2, 4, 6, 8)).shape == (2, 4, 3, 4)


def test_upsample() -> None:
    up = Upsample(4)
    randomised(up)

    def plain(x: Tensor) -> Tensor:
        repeated = torch.stack([x, x], dim=4).flatten(3)
        repeated = torch.stack([repeated, repeated], dim=3).flatten(2, 3)
        return F.conv2d(repeated, up.conv.weight, up.conv.bias, padding=1)

    assert_same_function(up, plain, image(2, 4, 3, 5))


def test_dropout_of_a_block_is_the_stream_of_its_layer() -> None:
    block = ResBlock(8, 8, 4, dropout=0.5, layer=7)
    randomised(block)
    with torch.no_grad():  # let conv2 copy its input, which is what is dropped
        block.conv2.weight.copy_(torch.eye(8)[:, :, None, None] * F.pad(torch.ones(1, 1), (1, 1, 1, 1)))
        block.conv2.bias.zero_()
    x, e, sample = image(3, 8, 4, 4), torch.zeros(3, 8, dtype=torch.float64), torch.tensor([5, 0, 9])
    dropped = (block(x, e, DropoutKey(3, sample, 2)) - x) == 0
    words = philox.integers(8 * 4 * 4, seed=3, sample=sample, step=2, stream=philox.DROPOUT + 7)
    assert torch.equal(dropped, (words < 2**31).reshape(3, 8, 4, 4))


def test_dropout_needs_a_key_in_training_alone() -> None:
    block = ResBlock(8, 8, 4, dropout=0.5).double()
    x, e = image(1, 8, 4, 4), torch.zeros(1, 8, dtype=torch.float64)
    assert block.eval()(x, e).shape == x.shape
    with pytest.raises(ValueError, match="expected seed, sample and step together"):
        block.train()(x, e)
