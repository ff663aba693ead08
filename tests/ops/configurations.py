"""Every configuration of the Triton kernels: what the contract cases launch, and what they leave out.

    python -m tests.ops.configurations --arch 90           those dealt to sm_90, as lines of JSON
    python -m tests.ops.configurations --arch 90 --all     all of them, in every dtype and layout

Each case is dealt an architecture, a dtype and a layout, so that each op meets all of them: all together would take ten
times as long. Must run where TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import fastddpm
from tests.ops import aot
from tests.ops.cases import CASES, FLOAT, Case, drawn
from tests.ops.test_native import sized
from tests.ops.test_triton import stepped
from tests.ops.test_triton_norms import normed

OPS = tuple(aot.HOT)
Way = tuple[torch.dtype, str]
WAYS: list[Way] = [
    (torch.bfloat16, "NHWC"), (torch.float16, "NCHW"), (torch.float32, "NHWC"),
    (torch.bfloat16, "NCHW"), (torch.float16, "NHWC"), (torch.float32, "NCHW"),
]  # fmt: skip


def noise(*shape: int, tensors: bool = False) -> Case:
    name = f"{'x'.join(map(str, shape))}{', seed on the device' if tensors else ''}"
    return Case("normal", name, lambda _: dict(shape=shape, stream=1, dtype=FLOAT, **drawn(shape[0], tensors=tensors)))


MORE = [
    noise(2, 3, 8, 16), noise(3, 7, tensors=True), noise(2, 1025),
    *(sized(op, 5, (7, 59)) for op in ("q_sample", "diffusion_loss", "group_norm_silu", "rms_norm_silu")),
    stepped(17, (2, 34)),
    normed(24, 4, (4, 4), "dropout", "conditioned"),
    normed(32, 8, (64, 64), "dropout", "conditioned"),  # in chunks, as the next
    normed(45, 9, (61, 67), "two inputs", "residual"),
]  # fmt: skip
"""Noise alone, odd sizes, learned variance with every option, dropout, and norms that do not fit in one tile."""


def cases_of(op: str) -> list[Case]:
    return [case for case in (*CASES, *MORE) if case.op == op]


def dealt(arch: int) -> Iterator[tuple[Case, Way]]:
    """The cases of this architecture, each in one dtype and layout."""
    for op in OPS:
        for i, case in enumerate(cases_of(op)):
            if aot.ARCHITECTURES[i % 3] == arch:
                yield case, WAYS[(i + i // 3 * 2) % len(WAYS)]


def everything() -> Iterator[tuple[Case, Way]]:
    for op in OPS:
        yield from itertools.product(cases_of(op), WAYS)


def launches(case: Case, dtype: torch.dtype, layout: str) -> list[aot.Launch]:
    """What the op launches for a case, forward and backward: of tensors without values, but for adam_ema."""
    inputs = case.inputs(dtype, layout)
    if case.op != "adam_ema":  # which takes addresses
        inputs = tree_map_only(Tensor, lambda x: x.to("meta"), inputs)
    for name in case.gradients:
        inputs[name].requires_grad_()

    def call(module: Any) -> None:
        aot.unwrapped(module).unsupported = lambda **_: None
        with fastddpm.use_backend("triton"):
            out = [x for x in tree_leaves(getattr(fastddpm.ops, case.op)(**inputs)) if x.requires_grad]
            if out:
                torch.autograd.grad(
                    out, [inputs[name] for name in case.gradients], [torch.ones_like(x) for x in out], allow_unused=True
                )

    return aot.recorded(case.op, call)


@dataclass(frozen=True)
class Compiled:
    """A kernel and what it was compiled for; ``local``, the bytes of a thread in local memory."""

    op: str
    case: str
    way: str
    kernel: str
    local: int


def compiled(arch: int, chosen: Iterator[tuple[Case, Way]]) -> Iterator[Compiled]:
    """What the chosen cases launch; what two launches share in all it is compiled from comes once."""
    seen = set()
    for case, (dtype, layout) in chosen:
        for launch in launches(case, dtype, layout):
            key = (aot.source_of(launch).hash(), tuple(launch.options.items()))
            if key in seen:
                continue
            seen.add(key)
            usage = aot.dumped(aot.compiled(launch, arch), "-res-usage")
            local = aot.used("STACK", usage) + aot.used("LOCAL", usage)
            yield Compiled(case.op, case.name, f"{aot.TYPES[dtype]} {layout}", launch.kernel.fn.__name__, local)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, required=True, choices=aot.ARCHITECTURES)
    parser.add_argument("--all", action="store_true", help="every case in every dtype and layout")
    options = parser.parse_args()
    for kernel in compiled(options.arch, everything() if options.all else dealt(options.arch)):
        print(json.dumps(asdict(kernel)))


if __name__ == "__main__":
    main()
