"""Transformed weights that are used again: those of a sampling loop."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Transformed = WeakIdKeyDictionary
"""Weight to what it was transformed to, by the kind of transform: of a 3x3 convolution the size of the tiles, or 0:
packed, to be transformed on the way; of a linear layer "panels"."""


class _Thread(threading.local):
    def __init__(self) -> None:  # of each thread its own: torch.compile refuses an attribute that comes while it reads
        self.kept: Transformed | None = None


_here = _Thread()
"""Of the thread: a sampling in one says nothing of a training in another."""


@contextlib.contextmanager
def keep_transformed(into: Transformed | None = None) -> Iterator[None]:
    """Within the block weights are transformed at their first use, and kept: they must not change there.

    For few pixels they are only packed, which takes the memory of the weights, and transformed on the way to the
    product; for more it takes 16 / 9 of their memory in float32, or 4 times it where tiles are of 4x4 pixels. Weights
    of linear layers are kept in float32, or in bfloat16 where products take that. Where a gradient is asked for, and
    under torch.compile, nothing is kept.

    Args:
        into: where to keep them, for another block; None keeps them for this one, or where a block around it does.
    """
    before = _here.kept
    _here.kept = into if into is not None else Transformed() if before is None else before
    try:
        yield
    finally:
        _here.kept = before


@contextlib.contextmanager
def transform_anew() -> Iterator[None]:
    """Within the block nothing is kept: where a gradient is asked for, weights are about to change."""
    before, _here.kept = _here.kept, None
    try:
        yield
    finally:
        _here.kept = before


def is_kept() -> bool:
    """Whether weights are transformed once for many calls."""
    return not torch.compiler.is_compiling() and not torch.is_grad_enabled() and _here.kept is not None


def kept(weight: Tensor, kind: Hashable, transform: Callable[[], Tensor]) -> Tensor:
    """What ``transform`` gives, that of an earlier call of this kind within `keep_transformed`, where `is_kept`."""
    assert _here.kept is not None
    of_weight: dict[Hashable, Tensor] = _here.kept.setdefault(weight, {})
    if kind not in of_weight:
        of_weight[kind] = transform()
    return of_weight[kind]
