"""What the Triton kernels share: the noise, the activations, and how a kernel is launched.

Imported by ``triton_impl`` modules alone, so that the package imports without Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in the interpreter, on tensors in the memory of the host; decided when Triton is imported."""


@triton.jit
def philox_words(block, sample, step, stream, seed_low, seed_high):  # type: ignore[no-untyped-def]
    """The four words of counter (block, sample, step, stream) under key (seed_low, seed_high): Philox 4x32-10.

    Element e of a sample takes lane e % 4 of block e // 4 (see `fastddpm.ops.philox`). All uint32, of one shape.
    """
    return tl.philox_impl(block, sample, step, stream, seed_low, seed_high, 10)
