"""Convolutions in half precision on a processor that is slower at them than in float32."""

from __future__ import annotations

import functools
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dispatch import _constant
from .fused import Fused

PIXELS = 512
"""From so many on the weights, which are converted at each call, weigh little."""
GAIN = 1.2
"""How much faster float32 must be."""


class Float32Conv2d(Fused):
    """A convolution that computes in float32 where that is faster, between the same inputs and outputs.

    The products of bfloat16 or float16 numbers are exact in float32, and are added up in float32 either way. Under
    autocast the float32 weights are taken as they are. For backward the input is kept in float32.
    """

    pattern = "Conv2d: called in half precision it computes in float32, in which this processor is faster"
    stride: tuple[int, int]

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = computing_dtype(input)
        pixels = input.numel() // input.shape[1] // (self.stride[0] * self.stride[1])
        if dtype == torch.float32 or input.device.type != "cpu" or pixels < PIXELS:
            return super()._conv_forward(input, weight, bias)  # type: ignore[misc, no-any-return]
        if not slower_than_float32(dtype):
            return super()._conv_forward(input, weight, bias)  # type: ignore[misc, no-any-return]
        with torch.autocast("cpu", enabled=False):
            wide = None if bias is None else bias.float()
            y: Tensor = super()._conv_forward(input.float(), weight.float(), wide)  # type: ignore[misc]
        return y.to(dtype)


def computing_dtype(x: Tensor) -> torch.dtype:
    """Of a convolution: that of x, or of autocast."""
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype


@_constant
def slower_than_float32(dtype: torch.dtype) -> bool:
    """Whether this processor takes longer for a convolution in this half precision than in float32; measured once."""
    return dtype in (torch.bfloat16, torch.float16) and _ratio(dtype) > GAIN


@functools.cache
def _ratio(dtype: torch.dtype) -> float:
    """Seconds in half precision over seconds in float32, of a layer as networks have them."""
    best: dict[torch.dtype, float] = {}
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        for _ in range(4):
            for tried in (dtype, torch.float32):
                x, weight = torch.ones(2, 64, 16, 16), torch.ones(64, 64, 3, 3)
                x, weight = (p.to(tried, memory_format=torch.channels_last) for p in (x, weight))
                begin = time.perf_counter()
                F.conv2d(x, weight, padding=1)
                best[tried] = min(best.get(tried, float("inf")), time.perf_counter() - begin)
    return best[dtype] / best[torch.float32]
