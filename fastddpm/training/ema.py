"""The exponential moving average (EMA) of the weights: its decay, and using it in place of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


def halflife_decay(halflife_images: float, batch_size: int) -> float:
    """2^(-batch_size / halflife): the decay per step with which weights of ``halflife_images`` ago count half.

    Args:
        halflife_images: > 0. batch_size: images per step, >= 1.

    Raises:
        ValueError: an argument out of its range.
    """
    if not halflife_images > 0 or batch_size < 1:
        raise ValueError(
            f"halflife_decay: expected halflife_images > 0 and batch_size >= 1, "
            f"got {halflife_images} and {batch_size}; a thousand batches is usual"
        )
    return float(0.5 ** (batch_size / halflife_images))


def warmed_decay(decay: float, step: int) -> float:
    """min(decay, (1 + s) / (10 + s)) for step s = 0, 1, ...: a short average while the weights change much."""
    return min(decay, (1 + step) / (10 + step))


@contextmanager
def weights_of(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Use other weights in a ``with`` block, and the model's own again behind it, whatever happens inside.

    Nothing is copied: the parameters point to other memory meanwhile. Do not train inside the block.

    Args:
        model: any module.
        weights: a tensor for some of its parameters, by name, of the same shape, dtype and device.

    Raises:
        ValueError: a name that is no parameter of the model, or a tensor that does not fit it.
    """
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        own = parameters.get(name)
        wanted = "no parameter of that name" if own is None else f"{list(own.shape)} {own.dtype} on {own.device}"
        if own is None or (own.shape, own.dtype, own.device) != (value.shape, value.dtype, value.device):
            raise ValueError(
                f"weights_of: expected weights that fit the model, got {name} {list(value.shape)} {value.dtype} on "
                f"{value.device} where it has {wanted}; take the weights of the same configuration"
            )
    saved = {name: parameters[name].data for name in weights}
    try:
        for name, value in weights.items():
            parameters[name].data = value
        yield
    finally:
        for name, value in saved.items():
            parameters[name].data = value
