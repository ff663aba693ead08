"""Between two states of the same noise level."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_shape


def lerp(a: Tensor, b: Tensor, weight: Tensor | float) -> Tensor:
    """(1 - w) a + w b for each sample: the interpolation of x_t in Ho et al. 2020, section 4.4.

    Args:
        a, b: [B, ...].
        weight: w, a number, or [B]; 0 gives a and 1 gives b, exactly.

    Returns: [B, ...].

    Raises:
        ValueError: a shape that does not fit.
    """
    return torch.lerp(a, b, _weights("lerp", a, b, weight))


def slerp(a: Tensor, b: Tensor, weight: Tensor | float) -> Tensor:
    """On the arc from a to b, which keeps the length of noise, for each sample (Song et al. 2021, DDIM, eq. 67).

    sin((1 - w) theta) / sin(theta) a + sin(w theta) / sin(theta) b,  cos(theta) = <a, b> / (|a| |b|).

    Args:
        a, b: [B, ...], each sample a vector other than 0; where two are parallel, the line stands for the arc.
        weight: w, a number, or [B].

    Returns: [B, ...].

    Raises:
        ValueError: a shape that does not fit.

    Numerics: the angle in float64, the rest in the dtype of a; deterministic.
    """
    w = _weights("slerp", a, b, weight).double()
    u, v = (torch.nn.functional.normalize(x.double().flatten(1), dim=1) for x in (a, b))
    # half the angle from the lengths of sum and difference is exact near 0 and pi, where the arc cosine is not
    theta = 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1)).reshape(w.shape[:1] + (1,) * (a.dim() - 1))
    sine = torch.sin(theta)
    parallel = sine.abs() < torch.finfo(torch.float64).eps * 8
    of_a = torch.where(parallel, 1 - w, torch.sin((1 - w) * theta) / sine)
    of_b = torch.where(parallel, w, torch.sin(w * theta) / sine)
    return of_a.to(a.dtype) * a + of_b.to(a.dtype) * b


def _weights(op: str, a: Tensor, b: Tensor, weight: Tensor | float) -> Tensor:
    """The weights as [B, 1, ..., 1]."""
    check_shape(op, "b", b, tuple(a.shape))
    if isinstance(weight, Tensor):
        check_shape(op, "weight", weight, (len(a),))
    else:
        weight = torch.full((len(a),), weight, dtype=a.dtype, device=a.device)
    return weight.to(a.dtype).reshape(-1, *[1] * (a.dim() - 1))
