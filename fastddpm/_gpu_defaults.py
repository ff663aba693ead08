"""Which kernels a GPU runs by default: the one table, and the record that it was set from.

``python -m benchmarks.gpu_suite --out DIR`` measures the Triton and the CUDA C++ kernels of every op at the shapes of
real networks, and writes such a table into DIR/defaults.md.
"""

from __future__ import annotations

RECORD: str | None = None
"""The file under benchmarks/results/ that FASTEST comes from; None: not measured."""

FASTEST: dict[str, tuple[tuple[int, str], ...]] = {}
"""Op to (elements of its first tensor, up to which this backend is the faster one), ascending; the last goes on."""

UNMEASURED = "triton"


def preferred(op: str, elements: int) -> tuple[str, ...]:
    """Backends for a call of an op on a GPU, in the order in which they are tried."""
    ranges = FASTEST.get(op, ())
    first = next((backend for most, backend in ranges if elements <= most), ranges[-1][1] if ranges else UNMEASURED)
    return (first, *(backend for backend in ("triton", "native") if backend != first), "reference")
