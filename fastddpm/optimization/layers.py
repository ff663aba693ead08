"""Convolutions and linear layers of any network by `fastddpm.nn.layers`, which knows the fastest way on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._checks import is_nhwc
from ..nn import layers
from .fused import Fused, is_plain_conv


class FastConv2d(Fused):
    """A convolution with square filters, stride and border, and no other options; others run as they did."""

    pattern = "Conv2d: by minimal filtering or matrix products"
    stride: tuple[int, int]
    padding: tuple[int, int]

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.dim() != 4 or not is_square(self):
            return super()._conv_forward(input, weight, bias)  # type: ignore[misc, no-any-return]
        if lies_by_pixels(weight) and not is_nhwc(input):  # torch, too, would copy it, inside
            input = input.contiguous(memory_format=torch.channels_last)
        return layers.conv2d(input, weight, bias, self.stride[0], self.padding[0])


class FastLinear(Fused):
    """A linear layer."""

    pattern = "Linear: by a product that reads and writes half precision, and adds"
    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """[.., K] to [.., N]."""
        return layers.linear(input, self.weight, self.bias)


def lies_by_pixels(weight: Tensor) -> bool:
    """Whether a weight [N, K, P, Q] is channels_last, of 1x1 filters, too, whose strides alone tell it."""
    return is_nhwc(weight) and weight.stride(3) == weight.shape[1]


def is_square(conv: Any) -> bool:
    """What `fastddpm.nn.layers.conv2d` computes: one stride, one border of zeros, every pixel of every channel."""
    if isinstance(conv.padding, str):
        return False
    same = all(len(set(pair)) == 1 for pair in (conv.kernel_size, conv.stride, conv.padding))
    return same and conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"


def follows_upsampling(conv: Any) -> bool:
    """Whether `fastddpm.nn.layers.upsampled_conv2d` computes it behind repeated pixels."""
    kind = conv.kernel_size, conv.stride, conv.padding
    return is_plain_conv(conv) and is_square(conv) and kind == ((3, 3), (1, 1), (1, 1))


def fast_layer(module: nn.Module) -> type[Fused] | None:
    """What takes the place of a layer, if anything does."""
    if isinstance(module, (FastConv2d, FastLinear)):
        return None
    if is_plain_conv(module):
        return FastConv2d
    plain = type(module).forward is nn.Linear.forward and "forward" not in module.__dict__
    return FastLinear if plain and not hasattr(module, "parametrizations") else None
