"""The contests of `benchmarks.contests` at the shapes of U-Nets.

What is timed as "fastddpm" is whichever implementation `fastddpm.explain` names as chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from benchmarks.contests import (
    Make,
    adam_ema,
    compiled,
    conv3x3,
    conv3x3_backward,
    diffusion_loss,
    group_norm_silu,
    group_norm_silu_backward,
    linear,
    linear_backward,
    name_of,
    normal,
    q_sample,
    rms_norm_silu,
    rms_norm_silu_backward,
    self_attention,
    self_attention_backward,
    solver_step,
)  # fmt: skip

F32, BF16 = torch.float32, torch.bfloat16
CIFAR, LATENT = (128, 3, 32, 32), (8, 4, 64, 64)
HOT = (16, 128, 32, 32)
NORMS = [  # of the U-Nets for CIFAR-10, LSUN, ImageNet-64 and Stable Diffusion
    (16, 256, 32, 32), (16, 384, 32, 32), (16, 256, 16, 16), (16, 512, 8, 8), (16, 256, 4, 4), (1, 128, 256, 256),
    (4, 192, 64, 64), (16, 576, 16, 16), (2, 320, 64, 64),
]  # fmt: skip
# On a GPU, those of cuDNN, cuBLAS and torch. Of linear layers: the projections of an attention, and a shortcut.
CONVOLUTIONS = [(8, 128, 32, 32), (8, 256, 16, 16)] if not torch.cuda.is_available() else []
LINEAR = [(2048, 256, 768), (8192, 256, 128)] if not torch.cuda.is_available() else []
ATTENTION = [(8, 256, 3 * 256)] if not torch.cuda.is_available() else []
# case, shape, dtype, whether torch.compile takes part (5 to 20 seconds each)
CASES: list[tuple[Make, Sequence[int], torch.dtype, bool]] = [
    (normal, CIFAR, F32, True), (normal, (8, 3, 256, 256), F32, False), (normal, CIFAR, BF16, False),
    (q_sample, CIFAR, F32, True), (q_sample, (8, 3, 256, 256), F32, False), (q_sample, LATENT, F32, False),
    (q_sample, CIFAR, BF16, False), (diffusion_loss, CIFAR, F32, True), (diffusion_loss, CIFAR, BF16, False),
    (solver_step, CIFAR, F32, True), (solver_step, LATENT, F32, False),
    (group_norm_silu, HOT, F32, True), (group_norm_silu_backward, HOT, F32, True),
    (group_norm_silu, HOT, BF16, True), (group_norm_silu_backward, HOT, BF16, False),
    *((make, shape, F32, False) for shape in NORMS for make in (group_norm_silu, group_norm_silu_backward)),
    (rms_norm_silu, HOT, F32, True), (rms_norm_silu_backward, HOT, F32, True),
    (rms_norm_silu, HOT, BF16, False), (rms_norm_silu_backward, HOT, BF16, False),
    *((make, shape, dtype, False) for shape in CONVOLUTIONS for dtype in (F32, BF16)
      for make in (conv3x3, conv3x3_backward)),
    *((make, shape, dtype, False) for shape in LINEAR for dtype in (F32, BF16) for make in (linear, linear_backward)),
    *((make, shape, dtype, False) for shape in ATTENTION for dtype in (F32, BF16)
      for make in (self_attention, self_attention_backward)),
    (adam_ema, (256, 256, 3, 3), F32, True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "shape", "dtype", "with_compile"),
    [pytest.param(*case, id=f"{name_of(*case[:2])} {str(case[2]).removeprefix('torch.')}") for case in CASES],
)
@pytest.mark.timeout(120)
def test_op(
    make: Make, shape: Sequence[int], dtype: torch.dtype, with_compile: bool, threads: int, compare: Any, benchmark: Any
) -> None:
    torch.manual_seed(0)
    if benchmark.disabled:  # no timing: whether it runs is the question
        shape, with_compile = [min(n, limit) for n, limit in zip(shape, (1, shape[1], 6, 6), strict=False)], False
    contest = make(shape, dtype)
    functions = {"eager": contest.eager, "fastddpm": contest.ours}
    if with_compile:
        functions["compile"] = compiled(contest.eager)
    if contest.native_op is not None:
        functions["native op"] = contest.native_op
    with torch.set_grad_enabled(contest.timed != "call"):
        compare(
            {name: contest.bound(function) for name, function in functions.items()}, case=name_of(make, shape),
            dtype=str(dtype).removeprefix("torch."), threads=threads, size=contest.size, normals=contest.normals,
            updates=contest.updates,
        )  # fmt: skip
