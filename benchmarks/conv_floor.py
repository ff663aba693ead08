"""The floor of one step of the CIFAR-10 U-Net (35,746,307 parameters): what it convolves and multiplies, alone.

Each distinct layer is timed by itself in channels_last, and the least of 20 calls counts, times how often the network
has it; the optimiser's bytes are taken at the measured rate of a copy. The list of layers is that of diffusers'
network, with three projections for an attention; `fastddpm.bench.floor` finds the list of any network.

    OMP_NUM_THREADS=3 python -m benchmarks.conv_floor --batch 8 --dtype bfloat16 float32
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

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
PARAMETERS = 35_746_307
OPTIMIZER_BYTES = 38  # a parameter: AdamW, average of the weights, bfloat16 copy


def least(call: Callable[[], object], repeat: int, device: str) -> float:
    """Seconds of the fastest of ``repeat`` calls, after two that are not counted."""
    times = []
    for i in range(repeat + 2):
        _wait(device)
        begin = time.perf_counter()
        call()
        _wait(device)
        if i > 1:
            times.append(time.perf_counter() - begin)
    return min(times)


def conv_floor(batch: int, dtype: torch.dtype, *, training: bool = True, repeat: int = 20) -> dict[str, float]:
    """The floor by part, in seconds of a step of ``batch`` images on the GPU where there is one, else on the CPU.

    Returns: forward, attention_forward and floor_sample; with ``training``, train, attention_train, optimizer and
        floor_train, too: train is forward and gradients; copy_rate in bytes a second.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    forward = train = attention_forward = attention_train = 0.0
    for (c_in, c_out, kernel, stride, size), count in CONVS.items():
        conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2 if stride == 1 else 0).to(device, dtype)
        conv = conv.to(memory_format=torch.channels_last)
        x = torch.randn(batch, c_in, size, size, device=device, dtype=dtype)
        inputs = (x.contiguous(memory_format=torch.channels_last).requires_grad_(c_in != 3),)  # images need no gradient
        taken = _least_both(conv, inputs, list(conv.parameters()), training, repeat, device)
        forward, train = forward + count * taken[0], train + count * taken[1]
    for (c_in, c_out, tokens), count in LINEARS.items():
        linear = nn.Linear(c_in, c_out).to(device, dtype)
        inputs = (torch.randn(batch * max(tokens, 1), c_in, device=device, dtype=dtype).requires_grad_(),)
        taken = _least_both(linear, inputs, list(linear.parameters()), training, repeat, device)
        forward, train = forward + count * taken[0], train + count * taken[1]
    for (tokens, width), count in ATTENTION.items():
        shape = (batch, 1, tokens, width)
        qkv = tuple(torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3))
        taken = _least_both(F.scaled_dot_product_attention, qkv, [], training, repeat, device)
        attention_forward, attention_train = attention_forward + count * taken[0], attention_train + count * taken[1]
    found = dict(forward=forward, attention_forward=attention_forward, floor_sample=forward + attention_forward)
    if training:
        source = torch.randn(PARAMETERS, device=device)
        target = torch.empty_like(source)
        rate = 8 * PARAMETERS / least(lambda: target.copy_(source), repeat, device)
        optimizer = OPTIMIZER_BYTES * PARAMETERS / rate
        total = train + attention_train + optimizer
        found.update(train=train, attention_train=attention_train, optimizer=optimizer, floor_train=total)
        found.update(copy_rate=rate)
    return found


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


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


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
