"""Transformed weights that are used again: those of a sampling loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_kept: WeakIdKeyDictionary | None = None  # weight to what it was transformed to, by the size of the tiles


@contextlib.contextmanager
def keep_transformed() -> Iterator[None]:
    """Within the block weights are transformed at their first use, and kept: they must not change there.

    That takes 16 / 9 of the memory of the weights in float32, or 4 times it where tiles are of 4x4 pixels. Where a
    gradient is asked for, and under torch.compile, nothing is kept.
    """
    global _kept
    before = _kept
    _kept = WeakIdKeyDictionary() if before is None else before
    try:
        yield
    finally:
        _kept = before


@contextlib.contextmanager
def transform_anew() -> Iterator[None]:
    """Within the block nothing is kept: where a gradient is asked for, weights are about to change."""
    global _kept
    before, _kept = _kept, None
    try:
        yield
    finally:
        _kept = before


def is_kept() -> bool:
    """Whether weights are transformed once for many calls."""
    return _kept is not None and not torch.compiler.is_compiling() and not torch.is_grad_enabled()


def kept(weight: Tensor, tile: int, transform: Callable[[], Tensor]) -> Tensor:
    """What ``transform`` gives, that of an earlier call with this tile within `keep_transformed`, where `is_kept`."""
    assert _kept is not None
    of_weight: dict[int, Tensor] = _kept.setdefault(weight, {})
    if tile not in of_weight:
        of_weight[tile] = transform()
    return of_weight[tile]
