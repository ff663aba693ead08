"""How close two results must be: the rules that every test of this library compares with."""

from __future__ import annotations

import torch
from torch import Tensor

Number = Tensor | float


def assert_within(impl: Tensor, ref64: Tensor, ref32: Tensor, what: str = "result") -> None:
    """The one rule for ops: ||impl - r|| <= 2 ||n - r|| + 4 eps(float32) ||r||, on the 2-norm and on the maximum.

    Args:
        impl: what the implementation gave.
        ref64: r, the reference in float64 on the same inputs.
        ref32: the reference in float32 on the same inputs; rounded once to the dtype of ``impl`` it is n.
        what: named in the message.
    """
    assert impl.shape == ref64.shape == ref32.shape, f"{what}: shapes {impl.shape}, {ref64.shape}, {ref32.shape}"
    assert ref64.dtype == torch.float64, f"{what}: the reference was not run in float64, but in {ref64.dtype}"
    assert ref32.dtype == torch.float32, f"{what}: the reference was not run in float32, but in {ref32.dtype}"
    r, n, i = ref64.detach(), ref32.detach().to(impl.dtype).double(), impl.detach().double()
    for name, norm in (("2-norm", _norm2), ("maximum", _maximum)):
        error, allowed = norm(i - r), 2 * norm(n - r) + 4 * torch.finfo(torch.float32).eps * norm(r)
        assert error <= allowed, (
            f"{what}: {name} of the error is {error:.3e}, allowed {allowed:.3e} ({norm(r):.3e} is that of the result)"
        )


def assert_normals_within(z: Tensor, reference: Tensor) -> None:
    """The bound for normal numbers: |z - reference| <= 1e-3 each, and 2e-6 in the relative 2-norm.

    The first is wide because near u = 1 the rounding of u in float32, 2^-25, is up to sqrt(2 2^-25) = 2.4e-4 in z.
    """
    assert z.shape == reference.shape, f"shapes {z.shape}, {reference.shape}"
    difference = z.double() - reference.double()
    assert _maximum(difference) <= 1e-3, (
        f"largest difference of two normal numbers is {_maximum(difference):.3e}, allowed 1e-3"
    )
    relative = _norm2(difference) / _norm2(reference.double()) if z.numel() else 0.0
    assert relative <= 2e-6, f"relative 2-norm of the difference of normal numbers is {relative:.3e}, allowed 2e-6"


def assert_equal_to_rounding(a: Number, b: Number, ulps: float = 8.0, scale: Number | None = None) -> None:
    """Two ways to compute one number: |a - b| <= ulps eps scale, element by element, eps that of the coarser dtype.

    Args:
        a, b: tensors that broadcast, or numbers (float64).
        ulps: how many roundings apart they may be.
        scale: size of the terms that were added up, where they cancel; None takes max(|a|, |b|) of each element.
    """
    a, b = (v.detach() if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for v in (a, b))
    eps = max(torch.finfo(v.dtype).eps for v in (a, b))
    a, b = torch.broadcast_tensors(a.double(), b.double())
    size = torch.maximum(a.abs(), b.abs()) if scale is None else torch.as_tensor(scale, dtype=torch.float64).abs()
    error, allowed = (a - b).abs(), ulps * eps * size
    same = (a == b) | (error <= allowed)  # equal infinities are equal
    if not same.all():
        worst = (
            (error / allowed.clamp(min=torch.finfo(torch.float64).tiny))
            .masked_fill(same, 0)
            .nan_to_num(torch.inf)
            .argmax()
        )
        x, y = a.flatten()[worst].item(), b.flatten()[worst].item()
        raise AssertionError(
            f"{(~same).sum().item()} of {same.numel()} elements differ by more than {ulps} roundings; "
            f"the worst, number {worst.item()}: {x!r} and {y!r}, difference {abs(x - y):.3e}"
        )


def assert_near_peer(ours: Tensor, theirs: Tensor, precision: float = 1e-4) -> None:
    """Agreement with another library at the precision of its tables: |ours - theirs| <= precision max(1, max |theirs|).

    Args:
        precision: 1e-4 for tables made in float32.
    """
    assert ours.shape == theirs.shape, f"shapes {ours.shape}, {theirs.shape}"
    error, allowed = _maximum(ours.double() - theirs.double()), precision * max(1.0, _maximum(theirs.double()))
    assert error <= allowed, f"largest difference from the other library is {error:.3e}, allowed {allowed:.3e}"


def _norm2(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))


def _maximum(x: Tensor) -> float:
    """The largest |x|; NaN where there is one, so that a comparison with it fails."""
    return float(x.detach().abs().max()) if x.numel() else 0.0
