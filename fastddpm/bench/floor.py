"""The least time that a step of a network can take: its convolutions, linear layers and attention, each timed alone.

    floor_sample = forward
    floor_train  = forward and gradients + optimiser

`record` finds what a network multiplies by running it once; `floor` times each distinct call by itself, in
channels_last and in one dtype, and adds up the minima. The optimiser's share is its bytes over the rate of a copy. What
lies between (norms, activations, noise, loss, copies) is what a library may save, and is not in the floor.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..nn.layers import torch_layers
from .timing import copy_rate, least

OPTIMIZER_BYTES = 38
"""A parameter: AdamW reads a gradient, reads and writes weight, two moments and average, and writes a bfloat16 copy."""


@dataclass(frozen=True)
class Operand:
    """A tensor among the arguments of a layer: its shape, and whether training needs its gradient."""

    shape: tuple[int, ...]
    needs_gradient: bool


@dataclass(frozen=True)
class Layer:
    """One call that multiplies matrices, as data: ``arguments`` and ``options`` hold an `Operand` for each tensor."""

    kind: str
    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]
    flops: int

    @property
    def operands(self) -> list[Operand]:
        """The tensors, in the order of the call."""
        return [value for value in _leaves((self.arguments, self.options)) if isinstance(value, Operand)]


@dataclass(frozen=True)
class Floor:
    """Seconds of each kind of layer, and of the optimiser, in a whole step; ``copy_rate`` is in bytes a second."""

    forward: dict[str, float]
    train: dict[str, float]
    optimizer: float
    copy_rate: float

    @property
    def sample_step(self) -> float:
        """Seconds of one sampling step at the least."""
        return sum(self.forward.values())

    @property
    def train_step(self) -> float:
        """Seconds of one training step at the least."""
        return sum(self.train.values()) + self.optimizer


class Recorder(TorchFunctionMode):
    """Counts the layers that are called in a ``with`` block, in ``layers``.

    It sees torch's convolutions, `linear`, `scaled_dot_product_attention`, `matmul`, `bmm`, `baddbmm` and `einsum` of
    two tensors, in modules or not; not what other functions do inside, `multi_head_attention_forward` among them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers: Counter[Layer] = Counter()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if function in KINDS and (function is not torch.einsum or len(args) == 3):
            kind, flops = KINDS[function]
            options = tuple((name, _described(value)) for name, value in sorted(kwargs.items()))
            described = tuple(_described(value) for value in args)
            count = flops(out, *args, **kwargs)
            self.layers[Layer(kind, SAME.get(function, function), described, options, count)] += 1
        return out


def record(call: Callable[[], object]) -> Counter[Layer]:
    """How often each layer is called in ``call()``, which must not be compiled."""
    recorder = Recorder()
    with torch_layers(), recorder:
        call()
    return recorder.layers


def floor(
    layers: Mapping[Layer, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    parameters: int,
    training: bool = True,
    repeat: int = 20,
    seconds: float = 60.0,
) -> Floor:
    """Time each layer alone, in ``dtype`` and channels_last; the best of ``repeat`` counts, see `least`.

    Args:
        layers: how often each is called in a step, see `record`.
        dtype: float32, bfloat16 or float16. device: where.
        parameters: how many the optimiser updates, >= 1.
        training: time gradients, too; without, ``train`` and ``optimizer`` are those of no step: empty and 0.
        repeat: calls of each, >= 1. seconds: for one layer at most, once three calls are timed.
    """
    forward, train = (dict.fromkeys(sorted({layer.kind for layer in layers}), 0.0) for _ in range(2))
    for layer, count in layers.items():
        with torch.no_grad():
            forward[layer.kind] += count * least(_replay(layer, dtype, device), device, repeat, seconds)
        if training:
            train[layer.kind] += count * least(_replay_gradients(layer, dtype, device), device, repeat, seconds)
    rate = copy_rate(8 * parameters, device, repeat)
    optimizer = OPTIMIZER_BYTES * parameters / rate if training else 0.0
    return Floor(forward, train if training else {}, optimizer, rate)


def flops(layers: Mapping[Layer, int]) -> int:
    """Operations of all calls, a multiplication and an addition being two."""
    return sum(layer.flops * count for layer, count in layers.items())


def _replay(layer: Layer, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    arguments, options = _made((layer.arguments, layer.options), layer.kind, dtype, device)
    keywords = dict(options)
    return lambda: layer.function(*arguments, **keywords)


def _replay_gradients(layer: Layer, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """Forward, and the gradients that training needs of it."""
    arguments, options = _made((layer.arguments, layer.options), layer.kind, dtype, device)
    keywords = dict(options)
    wanted = [x for x in _leaves((arguments, options)) if isinstance(x, Tensor) and x.requires_grad]
    if not wanted:
        return lambda: layer.function(*arguments, **keywords)
    gradient = torch.randn_like(layer.function(*arguments, **keywords))
    return lambda: torch.autograd.grad(layer.function(*arguments, **keywords), wanted, gradient)


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Operand(tuple(value.shape), value.requires_grad)
    if isinstance(value, (list, tuple)):
        return tuple(_described(item) for item in value)
    return value


def _made(value: Any, kind: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The arguments with a tensor of random numbers for each `Operand`."""
    if isinstance(value, tuple):
        return tuple(_made(item, kind, dtype, device) for item in value)
    if not isinstance(value, Operand):
        return value
    x = torch.randn(value.shape, device=device).to(dtype)
    if kind == "convolution" and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(value.needs_gradient)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, tuple):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _convolution_flops(out: Tensor, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * out.numel() * weight[0].numel()


def _transposed_flops(out: Tensor, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * input.numel() * weight[0].numel()


def _linear_flops(out: Tensor, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * out.numel() * weight.shape[-1]


def _attention_flops(out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return 2 * (query.numel() + out.numel()) * key.shape[-2]


def _product_flops(out: Tensor, input: Tensor, *_: Any, **__: Any) -> int:
    return 2 * out.numel() * input.shape[-1]


def _sum_product_flops(out: Tensor, input: Tensor, batch1: Tensor, *_: Any, **__: Any) -> int:
    return 2 * out.numel() * batch1.shape[-1]


def _einsum_flops(out: Tensor, equation: str, a: Tensor, b: Tensor) -> int:
    names = equation.replace(" ", "").partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    for letters, x in zip(names, (a, b), strict=True):
        sizes.update(zip(letters.replace("...", "." * (x.dim() - len(letters) + 3)), x.shape, strict=True))
    return 2 * math.prod(sizes.values())


SAME: dict[Any, Any] = {Tensor.matmul: torch.matmul, Tensor.__matmul__: torch.matmul, Tensor.bmm: torch.bmm}
"""Methods, and the functions that do the same."""
KINDS: dict[Any, tuple[str, Callable[..., int]]] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), ("convolution", _convolution_flops)),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), ("convolution", _transposed_flops)),
    F.linear: ("linear", _linear_flops),
    F.scaled_dot_product_attention: ("attention", _attention_flops),
    **dict.fromkeys((torch.matmul, torch.bmm, *SAME), ("matmul", _product_flops)),
    torch.baddbmm: ("matmul", _sum_product_flops),
    torch.einsum: ("matmul", _einsum_flops),
}
