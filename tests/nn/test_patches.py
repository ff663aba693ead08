"""Convolutions as products of rows against torch's: values, gradients, memory order, and when which is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastddpm
from fastddpm.nn import layers, patches
from fastddpm.nn.layers import Conv2d, UpsampledConv2d
from fastddpm.nn.patches import conv3x3_products, strided_conv3x3_product, upsampled_conv3x3_products
from tests.tolerance import assert_within


def upsampled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)


def strided(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(F.pad(x, (1, 1, 1, 1)), weight, bias, stride=2)


WAYS = {
    "plain": (plain, conv3x3_products),
    "upsampled": (upsampled, upsampled_conv3x3_products),
    "strided": (strided, lambda x, w, b: strided_conv3x3_product(F.pad(x, (1, 1, 1, 1)), w, b)),
}


def step(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The output, and the gradient of each input."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    y = function(*inputs)
    upstream = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y, *torch.autograd.grad(y, inputs, upstream)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", [(2, 5, 4, 4), (3, 4, 1, 1), (1, 3, 1, 4), (2, 7, 3, 2), (1, 6, 2, 5)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_same_as_the_convolution(way: str, shape: tuple[int, ...], layout: torch.memory_format) -> None:
    reference, products = WAYS[way]
    x = torch.randn(shape, dtype=torch.float64)
    weight, bias = torch.randn(11, shape[1], 3, 3, dtype=torch.float64), torch.randn(11, dtype=torch.float64)
    inputs = x.to(memory_format=layout), weight.to(memory_format=layout), bias
    single = [p.float() for p in inputs]
    names = ("y", "dx", "dweight", "dbias")
    for name, ours, r, n in zip(
        names, step(products, *single), step(reference, *inputs), step(reference, *single), strict=True
    ):
        assert_within(ours, r, n, name)
    with torch.no_grad():
        y = products(*single)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, products(*single))


def test_gradients_that_nobody_asks_for() -> None:
    x, weight, bias = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 3, 3), torch.randn(5, requires_grad=True)
    conv3x3_products(x, weight, bias).sum().backward()
    assert x.grad is None and weight.grad is None
    assert torch.equal(bias.grad, torch.full((5,), 32.0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "slow", "taken"),
    [
        ((8, 8, 4, 4), False, True),
        ((7, 8, 4, 4), False, False),
        ((8, 8, 4, 8), False, False),
        ((128, 8, 1, 1), False, True),
        ((8, 8, 4, 4), True, False),
    ],
    ids=["small", "few", "large", "least", "slow products"],
)
def test_small_maps_of_enough_images_are_products(
    shape: tuple[int, ...], slow: bool, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_multiplies_slowly", lambda: slow)
    calls: list[Any] = []
    monkeypatch.setattr(patches, "_products", lambda x, taps, bias: calls.append(taps) or real(x, taps, bias))
    conv, x = Conv2d(8, 6, 3, padding=1), torch.randn(shape).to(memory_format=torch.channels_last)
    assert_within(
        conv(x), plain(x.double(), conv.weight.double(), conv.bias.double()), plain(x, conv.weight, conv.bias)
    )
    assert bool(calls) == taken
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    half = conv.to(torch.bfloat16)
    half_x = x.to(torch.bfloat16)
    y = half(half_x)
    assert y.dtype == torch.bfloat16 and all(call.dtype == torch.float32 for call in calls)
    exact = plain(half_x.double(), half.weight.double(), half.bias.double())
    assert_within(y, exact, plain(half_x.float(), half.weight.float(), half.bias.float()))


real = patches._products


def test_upsampling_of_few_and_of_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(patches, "_products", lambda x, taps, bias: calls.append(x) or real(x, taps, bias))
    conv = UpsampledConv2d(5, 4)
    for size in (4, 16):
        x = torch.randn(1, 5, size, size).to(memory_format=torch.channels_last)
        r = upsampled(x.double(), conv.weight.double(), conv.bias.double())
        assert_within(conv(x), r, upsampled(x, conv.weight, conv.bias))
    assert [len(x[0, 0]) for x in calls] == [16]


@pytest.mark.skipif(not layers._has_kernels(), reason="no kernels of conv3x3")
@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upsampling_in_half_precision_is_transformed(
    dtype: torch.dtype, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in float32 where torch's products are slow."""
    monkeypatch.setattr(layers, "_multiplies_half_slowly", lambda: True)
    monkeypatch.setattr(layers, "_multiplies_slowly", lambda: slow)
    calls: list[Any] = []
    monkeypatch.setattr(layers, "conv3x3", lambda *given: calls.append(given) or fastddpm.conv3x3(*given))
    conv = UpsampledConv2d(16, 16).to(dtype)
    x = torch.randn(2, 16, 8, 8).to(dtype, memory_format=torch.channels_last)
    single = [p.float() for p in (x, conv.weight, conv.bias)]
    assert_within(conv(x), upsampled(*(p.double() for p in single)), upsampled(*single))
    assert len(calls) == (slow or dtype == torch.bfloat16)


def test_one_graph_under_torch_compile() -> None:
    conv, behind = Conv2d(4, 3, 3, padding=1), UpsampledConv2d(4, 3)

    def function(x: Tensor) -> Tensor:
        return behind(conv(x)[:, [0, 1, 2, 0]])

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    parameters = [*conv.parameters(), *behind.parameters()]
    x = torch.randn(8, 4, 4, 4).to(memory_format=torch.channels_last)
    for ours, eager in zip(
        torch.autograd.grad(compiled(x).square().sum(), parameters),
        torch.autograd.grad(function(x).square().sum(), parameters),
        strict=True,
    ):
        assert_within(ours, eager.double(), eager)
