"""The floor of one step of a U-Net, that for CIFAR-10 (35,746,307 parameters) unless told otherwise: what it convolves
and multiplies, alone.

Each distinct layer is timed by itself in channels_last, and the least of 20 calls counts, times how often the network
has it; the optimiser's bytes are taken at the measured rate of a copy. On a GPU a call is one of some in a row between
two events, and its launch is not waited for, see `fastddpm.bench.GpuClock`. The list of layers for CIFAR-10 is that of
diffusers' network, with three projections for an attention; `shapes_of` finds that of another network.

    OMP_NUM_THREADS=3 python -m benchmarks.conv_floor --batch 8 --dtype bfloat16 float32
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from fastddpm.bench import Layer, timing

# (in, out, kernel, stride, input size) x count; a stride of 2 has its padding in the input
CONVS = {
    (3, 128, 3, 1, 32): 1, (128, 3, 3, 1, 32): 1, (128, 128, 3, 1, 32): 7, (128, 128, 3, 2, 33): 1,
    (384, 128, 3, 1, 32): 1, (384, 128, 1, 1, 32): 1, (256, 128, 3, 1, 32): 2, (256, 128, 1, 1, 32): 2,
    (128, 256, 3, 1, 16): 1, (128, 256, 1, 1, 16): 1, (256, 256, 3, 1, 16): 7, (256, 256, 3, 2, 17): 1,
    (512, 256, 3, 1, 16): 2, (512, 256, 1, 1, 16): 2, (384, 256, 3, 1, 16): 1, (384, 256, 1, 1, 16): 1,
    (256, 256, 3, 1, 8): 8, (256, 256, 3, 2, 9): 1, (512, 256, 3, 1, 8): 3, (512, 256, 1, 1, 8): 3,
    (256, 256, 3, 1, 4): 11, (512, 256, 3, 1, 4): 3, (512, 256, 1, 1, 4): 3, (256, 256, 3, 1, 32): 1,
}  # fmt: skip
# (in, out, tokens of an image, or 0 for once a sample) x count
LINEARS = {
    (256, 256, 256): 20, (256, 256, 16): 4, (128, 512, 0): 1, (512, 512, 0): 1, (512, 128, 0): 5, (512, 256, 0): 17,
}  # fmt: skip
ATTENTION = {(256, 256): 5, (16, 256): 1}  # (tokens, width) x count
OPTIMIZER_BYTES = 38  # a parameter: AdamW, average of the weights, bfloat16 copy


@dataclass(frozen=True)
class Shapes:
    """The layers of a network, each with how often it is called, and the parameters that the optimiser updates."""

    convs: Mapping[tuple[int, int, int, int, int], int]
    linears: Mapping[tuple[int, int, int], int]
    attention: Mapping[tuple[int, int], int]
    parameters: int


CIFAR10 = Shapes(CONVS, LINEARS, ATTENTION, 35_746_307)


def shapes_of(layers: Mapping[Layer, int], parameters: int) -> Shapes:
    """Of what `fastddpm.bench.record` saw a network call for one square image."""
    convs: Counter[tuple[int, int, int, int, int]] = Counter()
    linears: Counter[tuple[int, int, int]] = Counter()
    attention: Counter[tuple[int, int]] = Counter()
    for layer, count in layers.items():
        x, weight = (operand.shape for operand in layer.operands[:2])
        if layer.kind == "convolution":
            given = dict(zip(("input", "weight", "bias", "stride", "padding"), layer.arguments, strict=False))
            given.update(layer.options)
            stride, padding = (_first(given.get(name, default)) for name, default in (("stride", 1), ("padding", 0)))
            size = x[2] if stride == 1 else x[2] + 2 * padding
            convs[x[1], weight[0], weight[2], stride, size] += count
        elif layer.kind == "linear":
            linears[weight[1], weight[0], x[-2] if len(x) > 2 else 0] += count
        elif layer.kind == "attention":
            attention[x[-2], x[-1]] += count
        else:
            raise ValueError(f"shapes_of: expected convolution, linear or attention, got {layer.kind}; leave it out")
    return Shapes(convs, linears, attention, parameters)


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, tuple) else value)


def flops(shapes: Shapes) -> int:
    """Operations of a forward pass of one image, a multiplication and an addition being two."""
    convs = sum(
        n * 2 * c_in * c_out * kernel**2 * (size // stride) ** 2
        for (c_in, c_out, kernel, stride, size), n in shapes.convs.items()
    )
    linears = sum(n * 2 * c_in * c_out * max(tokens, 1) for (c_in, c_out, tokens), n in shapes.linears.items())
    return convs + linears + sum(n * 4 * tokens**2 * width for (tokens, width), n in shapes.attention.items())


def least(call: Callable[[], object], repeat: int, device: str) -> float:
    """Seconds of the fastest of ``repeat`` calls, after two that are not counted."""
    call()
    return timing.least(call, torch.device(device), repeat, seconds=float("inf"))


def conv_floor(
    batch: int,
    dtype: torch.dtype,
    *,
    training: bool = True,
    repeat: int = 20,
    shapes: Shapes = CIFAR10,
    found: list[dict[str, Any]] | None = None,
) -> dict[str, float]:
    """The floor by part, in seconds of a step of ``batch`` images on the GPU where there is one, else on the CPU.

    Args:
        batch: images. dtype: of all layers. training: whether gradients and the optimiser are timed, too.
        repeat: calls of each layer, of which the fastest counts. shapes: of the network.
        found: where a row for each layer goes: kind, shape, count, seconds of a forward call, and with gradients.

    Returns: forward, attention_forward and floor_sample; with ``training``, train, attention_train, optimizer and
        floor_train, too: train is forward and gradients; copy_rate in bytes a second.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = [] if found is None else found
    begin = len(rows)

    def add(kind: str, shape: tuple[int, ...], count: int, layer: Callable[..., torch.Tensor], *more: Any) -> None:
        forward, train = _least_both(layer, *more, training, repeat, device)
        rows.append(dict(kind=kind, shape=list(shape), count=count, forward=forward, train=train))

    for conv_shape, count in shapes.convs.items():
        c_in, c_out, kernel, stride, size = conv_shape
        conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2 if stride == 1 else 0).to(device, dtype)
        conv = conv.to(memory_format=torch.channels_last)
        x = torch.randn(batch, c_in, size, size, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_(c_in != 3)  # images need no gradient
        add("convolution", conv_shape, count, conv, (x,), list(conv.parameters()))
    for linear_shape, count in shapes.linears.items():
        c_in, c_out, tokens = linear_shape
        linear = nn.Linear(c_in, c_out).to(device, dtype)
        x = torch.randn(batch * max(tokens, 1), c_in, device=device, dtype=dtype).requires_grad_()
        add("linear", linear_shape, count, linear, (x,), list(linear.parameters()))
    for attention_shape, count in shapes.attention.items():
        tokens, width = attention_shape
        shape = (batch, 1, tokens, width)
        qkv = tuple(torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3))
        add("attention", attention_shape, count, F.scaled_dot_product_attention, qkv, [])

    def total(what: str, *, attention: bool) -> float:
        return sum(row["count"] * row[what] for row in rows[begin:] if (row["kind"] == "attention") == attention)

    forward, of_attention = (total("forward", attention=attention) for attention in (False, True))
    parts = dict(forward=forward, attention_forward=of_attention, floor_sample=forward + of_attention)
    if training:
        source = torch.randn(shapes.parameters, device=device)
        target = torch.empty_like(source)
        rate = 8 * shapes.parameters / least(lambda: target.copy_(source), repeat, device)
        optimizer = OPTIMIZER_BYTES * shapes.parameters / rate
        train, of_attention = (total("train", attention=attention) for attention in (False, True))
        parts.update(train=train, attention_train=of_attention, optimizer=optimizer)
        parts.update(floor_train=train + of_attention + optimizer, copy_rate=rate)
    return parts


def _least_both(
    layer: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], weights: list[Any], training: bool,
    repeat: int, device: str,
) -> tuple[float, float]:  # fmt: skip
    """Seconds of the forward pass alone, and of the forward pass with all gradients that training needs."""
    with torch.no_grad():
        forward = least(lambda: layer(*inputs), repeat, device)
    if not training:
        return forward, 0.0
    wanted = [*weights, *(x for x in inputs if x.requires_grad)]
    gradient = torch.randn_like(layer(*inputs))
    return forward, least(lambda: torch.autograd.grad(layer(*inputs), wanted, gradient), repeat, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    options = parser.parse_args()
    for name in options.dtype:
        found = conv_floor(options.batch, getattr(torch, name), repeat=options.repeat)
        row = {"threads": torch.get_num_threads(), "dtype": name, "batch": options.batch, **found}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
