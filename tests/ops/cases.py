"""The cases of the contract: every op with inputs that reach each of its options.

A case makes its inputs in float64 and NCHW; `Case.inputs` rounds and lays them out. An implementation that stands
beside a reference is found by itself; a case is an entry of `CASES`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only, tree_map_with_path

import fastddpm
from fastddpm._dispatch import Op

Inputs = dict[str, Any]

HALVED = {
    "conv3x3": {"x", "weight"},
    "linear": {"x", "weight", "x2", "residual"},
    "q_sample": {"x0", "noise"},
    "diffusion_loss": {"pred", "target", "x0", "weight"},
    "solver_step": {"x", "out", "pred_prev", "out_uncond", "clamp", "noise", "known", "known_noise", "mask"},
    "group_norm_silu": {"x", "x2", "residual", "channel_bias", "scale", "shift"},
    "rms_norm_silu": {"x", "scale", "shift"},
    "self_attention": {"qkv"},
    "adam_ema": {"grads", "mirror"},
}
"""Op to the inputs that take the dtype of a test; the other floats are float32, as the weights of mixed precision."""

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
FLOAT = "the dtype of the test"
QUICK = ["diffusion_loss", "normal", "q_sample", "solver_step"]  # tested in one process, which takes long to start
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
AT_HAND = "cuda" if torch.cuda.is_available() else "cpu"
OF_A_GPU = [pytest.mark.gpu] if AT_HAND == "cuda" else []
"""Marks of tests of kernels for a GPU that run there and, where there is none, on a CPU."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def op_of(name: str) -> Callable[..., Any]:
    op: Callable[..., Any] = getattr(fastddpm, name)
    return op


def holder_of(name: str) -> Op:
    holder: Op = sys.modules[op_of(name).__module__].OP  # type: ignore[attr-defined]
    return holder


@dataclass(frozen=True)
class Case:
    """Inputs of an op.

    Args:
        op, name: of the op, and of the case.
        make: the inputs by name, from a seeded generator.
        gradients: inputs to differentiate with respect to.
        written: inputs that the op writes over.
        compiled: compile it, too: one or two cases for each op.
    """

    op: str
    name: str
    make: Callable[[torch.Generator], Inputs]
    gradients: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    compiled: bool = False

    def inputs(self, dtype: torch.dtype = torch.float32, layout: str = "NCHW", device: str = "cpu") -> Inputs:
        """The inputs, the same numbers for every layout; each call gives new tensors."""
        memory = LAYOUTS[layout]

        def place(path: tuple[Any, ...], x: Any) -> Any:
            if x is FLOAT:
                return dtype
            if not isinstance(x, Tensor):
                return x
            if x.is_floating_point() and path[0].key != "table":  # tables stay in float64: every dtype of it is taken
                x = x.to(dtype if path[0].key in HALVED[self.op] else torch.float32)
            return x.to(device).contiguous(memory_format=memory) if x.dim() == 4 else x.to(device)

        placed: Inputs = tree_map_with_path(place, self.make(torch.Generator().manual_seed(len(self.name))))
        return placed


def converted(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same numbers with every float in ``dtype`` and every image in NCHW order, for the reference of the rule."""
    out: Inputs = tree_map_only(Tensor, lambda x: (x.to(dtype) if x.is_floating_point() else x).contiguous(), inputs)
    if "dtype" in out:
        out["dtype"] = dtype
    if out.get("found_inf") is not None:
        out["found_inf"] = out["found_inf"].float()
    return out


def copied(inputs: Inputs) -> Inputs:
    """Tensors of their own, with the same strides."""
    out: Inputs = tree_map_only(Tensor, lambda x: x.detach().clone(), inputs)
    return out


def randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def rand(g: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=g, dtype=torch.float64)


def images(g: torch.Generator, *shape: int, levels: int = 256) -> Tensor:
    return torch.randint(levels, shape, generator=g, dtype=torch.uint8)


def drawn(batch: int, *, seed: int = 2**63 + 11, tensors: bool = False) -> Inputs:
    """Where noise is drawn: numbers, or tensors on the device."""
    sample = torch.arange(batch) * 3 + 4
    if tensors:
        return dict(seed=torch.tensor(seed - 2**64 if seed >= 2**63 else seed), sample=sample, step=torch.tensor(2**20))
    return dict(seed=seed, sample=sample, step=2**20)


def signal_sigma(steps: int = 10) -> Tensor:
    alpha_bar = torch.linspace(0.999, 0.01, steps, dtype=torch.float64)
    return torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()], dim=1)


def bound_table(steps: int = 10) -> Tensor:
    """Slope of the mean, smallest and largest log-variance, log-variance of q: those of a chain with noise near 0.1."""
    least = torch.linspace(-6.0, -3.0, steps, dtype=torch.float64)
    return torch.stack([torch.linspace(0.01, 0.2, steps, dtype=torch.float64), least, least + 1.5, least + 0.1], dim=1)


def solver_table(g: torch.Generator, steps: int = 7) -> Tensor:
    """Coefficients of order one; no noise in the last step, as in every sampler."""
    table = randn(g, steps, 9)
    table[:, 7], table[:, 8] = -4.0, -2.0
    table[:, 5] = table[:, 5].abs()
    table[-1, 5] = 0.0
    return table


def norm_weights(g: torch.Generator, channels: int) -> Inputs:
    return dict(weight=1 + 0.3 * randn(g, channels), bias=0.3 * randn(g, channels))


def optimizer_state(g: torch.Generator, *shapes: tuple[int, ...]) -> Inputs:
    params = [randn(g, *s) for s in shapes]
    return dict(
        params=params,
        grads=[randn(g, *s) for s in shapes],
        exp_avg=[0.1 * randn(g, *s) for s in shapes],
        exp_avg_sq=[0.01 * rand(g, *s) for s in shapes],
        step=torch.tensor(3),
        lr=torch.tensor(1e-3, dtype=torch.float64),
    )


SHAPES = ((4, 3, 5, 3), (7,), (), (2, 8, 1, 1))
STATE = ("params", "exp_avg", "exp_avg_sq", "step")


def optimizer_options(g: torch.Generator, found_inf: float = 0.0) -> Inputs:
    inputs = optimizer_state(g, *SHAPES[:2])
    params = inputs["params"]
    return inputs | dict(
        weight_decay=0.1,
        max_grad_norm=0.5,
        ema=[p + 0.1 for p in params],
        ema_decay=torch.tensor(0.99, dtype=torch.float64),
        mirror=[p - 0.5 for p in params],
        grad_scale=torch.tensor(8.0, dtype=torch.float64),
        found_inf=torch.tensor(found_inf, dtype=torch.float64),
    )


CASES = [
    # q_sample
    Case(
        "q_sample",
        "uint8, index, flip, drawn, v",
        lambda g: dict(
            x0=images(g, 6, 3, 5, 7), t=torch.tensor([0, 9, 4, 4]), table=signal_sigma(),
            index=torch.tensor([5, 0, 0, 2]), flip=torch.tensor([True, False, True, False]), returns="v", dtype=FLOAT,
            **drawn(4, tensors=True),
        ),
        compiled=True,
    ),
    Case(
        "q_sample",
        "float, noise given",
        lambda g: dict(
            x0=rand(g, 3, 2, 11, 13), t=torch.tensor([1, 2, 9]), table=signal_sigma(), noise=randn(g, 3, 2, 11, 13),
            pixel_scale=2.0, dtype=FLOAT,
        ),
    ),
    Case(
        "q_sample",
        "one pixel, drawn, noise",
        lambda g: dict(
            x0=images(g, 2, 1, 1, 1), t=torch.tensor([3, 9]), table=signal_sigma(), returns="noise", dtype=FLOAT,
            **drawn(2),
        ),
    ),
    Case(
        "q_sample",
        "one channel, flip, x0",
        lambda g: dict(
            x0=images(g, 1, 1, 8, 8, levels=17), t=torch.tensor([3]), table=signal_sigma(), flip=torch.tensor([True]),
            pixel_scale=2 / 16, returns="x0", dtype=FLOAT, **drawn(1),
        ),
    ),
    Case(
        "q_sample",
        "vectors of 16 bytes, drawn",  # and four pixels at a time
        lambda g: dict(
            x0=images(g, 2, 3, 8, 16), t=torch.tensor([3, 7]), table=signal_sigma(), dtype=FLOAT, **drawn(2),
        ),
    ),
    # diffusion_loss
    Case(
        "diffusion_loss",
        "eps, drawn",
        lambda g: dict(pred=randn(g, 3, 3, 5, 7), t=torch.tensor([0, 3, 9]), **drawn(3)),
        gradients=("pred",),
    ),
    Case(
        "diffusion_loss",
        "x0, float images, weight",
        lambda g: dict(
            pred=randn(g, 2, 1, 8, 8), t=torch.tensor([0, 3]), objective="x0", x0=rand(g, 2, 1, 8, 8), pixel_scale=2.0,
            weight=0.5 + rand(g, 2),
        ),
        gradients=("pred",),
    ),
    Case(
        "diffusion_loss",
        "v, index, flip, drawn",
        lambda g: dict(
            pred=randn(g, 3, 2, 4, 3), t=torch.tensor([0, 3, 9]), objective="v", table=signal_sigma(),
            x0=images(g, 5, 2, 4, 3), index=torch.tensor([4, 1, 1]), flip=torch.tensor([False, True, True]),
            **drawn(3, tensors=True),
        ),
        gradients=("pred",),
    ),
    Case(
        "diffusion_loss",
        "target, one element",
        lambda g: dict(pred=randn(g, 1, 1, 1, 1), t=torch.tensor([1]), target=randn(g, 1, 1, 1, 1)),
        gradients=("pred",),
    ),
    Case(
        "diffusion_loss",
        "hybrid, 17 levels",
        lambda g: dict(
            pred=0.5 * randn(g, 4, 6, 5, 3), t=torch.tensor([0, 0, 3, 9]), target=0.5 * randn(g, 4, 3, 5, 3),
            x0=images(g, 4, 3, 5, 3, levels=17), pixel_scale=2 / 16, levels=17, vlb=bound_table(), vlb_weight=0.01,
        ),
        gradients=("pred",),
    ),
    Case(
        "diffusion_loss",
        "hybrid, drawn, weights of each sample",
        lambda g: dict(
            pred=0.5 * randn(g, 3, 2, 4, 3), t=torch.tensor([0, 3, 9]), x0=images(g, 3, 1, 4, 3),
            flip=torch.tensor([True, False, True]), weight=0.5 + rand(g, 3), vlb=bound_table(), vlb_weight=rand(g, 3),
            **drawn(3, tensors=True),
        ),
        gradients=("pred",),
        compiled=True,
    ),
    Case(
        "diffusion_loss",
        "v, vectors of 16 bytes, drawn",
        lambda g: dict(
            pred=randn(g, 2, 3, 8, 16), t=torch.tensor([3, 7]), objective="v", table=signal_sigma(),
            x0=images(g, 2, 3, 8, 16), **drawn(2),
        ),
        gradients=("pred",),
    ),
    # solver_step
    Case(
        "solver_step",
        "drawn",
        lambda g: dict(
            x=randn(g, 3, 3, 5, 7), out=randn(g, 3, 3, 5, 7), table=solver_table(g), clamp=1.0, seed=7,
            sample=torch.tensor([0, 5, 9]), step=2,
        ),
    ),
    Case(
        "solver_step",
        "learned variance, guidance, clamps, mask, drawn",
        lambda g: dict(
            x=randn(g, 2, 3, 4, 5), out=randn(g, 2, 6, 4, 5), table=solver_table(g), pred_prev=randn(g, 2, 3, 4, 5),
            out_uncond=randn(g, 2, 6, 4, 5), guidance_scale=torch.tensor(2.5), clamp=0.5 + rand(g, 2),
            seed=torch.tensor(7), sample=torch.tensor([0, 5]), step=torch.tensor(3), mask=rand(g, 1, 1, 4, 5),
            known=randn(g, 2, 3, 4, 5), known_table=rand(g, 7, 2),
        ),
        compiled=True,
    ),
    Case(
        "solver_step",
        "noise given, mask",
        lambda g: dict(
            x=randn(g, 2, 1, 3, 3), out=randn(g, 2, 1, 3, 3), table=solver_table(g), noise=randn(g, 2, 1, 3, 3), step=0,
            mask=(rand(g, 2, 1, 3, 3) > 0.5).double(), known=randn(g, 2, 1, 3, 3), known_table=rand(g, 7, 2),
            known_noise=randn(g, 2, 1, 3, 3),
        ),
    ),
    Case(
        "solver_step",
        "in place, two steps",
        lambda g: dict(
            x=randn(g, 2, 3, 5, 1), out=randn(g, 2, 3, 5, 1), table=solver_table(g), pred_prev=randn(g, 2, 3, 5, 1),
            seed=7, sample=torch.tensor([0, 5]), step=torch.tensor(6), inplace=True,
        ),
        written=("x", "pred_prev"),
    ),
    Case(
        "solver_step",
        "no option, vectors of 16 bytes, drawn",
        lambda g: dict(
            x=randn(g, 2, 3, 8, 16), out=randn(g, 2, 3, 8, 16), table=solver_table(g), seed=7,
            sample=torch.tensor([0, 5]), step=2,
        ),
    ),
    # group_norm_silu
    Case(
        "group_norm_silu",
        "plain",
        lambda g: dict(x=randn(g, 2, 8, 5, 7), num_groups=4, **norm_weights(g, 8)),
        gradients=("x", "weight", "bias"),
    ),
    Case(
        "group_norm_silu",
        "mean much larger than the deviation",
        # many groups: the error is the rounding of each mean, and the rule compares the sizes of such errors
        lambda g: dict(x=100 + randn(g, 4, 32, 5, 5), num_groups=16, **norm_weights(g, 32)),
        gradients=("x", "weight", "bias"),
    ),
    Case(
        "group_norm_silu",
        "bias of each sample, scale, shift, dropout",
        lambda g: dict(
            x=randn(g, 3, 6, 5, 3), num_groups=3, channel_bias=randn(g, 3, 6), scale=0.3 * randn(g, 3, 6),
            shift=0.3 * randn(g, 3, 6), dropout=0.25, layer=4, **drawn(3, tensors=True), **norm_weights(g, 6),
        ),
        gradients=("x", "weight", "bias", "channel_bias", "scale", "shift"),
        compiled=True,
    ),
    Case(
        "group_norm_silu",
        "bias of each channel, residual, eps",
        lambda g: dict(
            x=randn(g, 2, 6, 4, 4), num_groups=6, channel_bias=randn(g, 6), residual=randn(g, 2, 6, 4, 4), eps=1e-2,
            **norm_weights(g, 6),
        ),
        gradients=("x", "weight", "bias", "channel_bias", "residual"),
    ),
    Case(
        "group_norm_silu",
        "two inputs, residual, no activation",
        lambda g: dict(
            x=randn(g, 2, 3, 3, 5), x2=randn(g, 2, 7, 3, 5), num_groups=5, residual=randn(g, 2, 10, 3, 5),
            activation=False, **norm_weights(g, 10),
        ),
        gradients=("x", "x2", "weight", "bias", "residual"),
    ),
    Case(
        "group_norm_silu",
        "one group, one pixel, shift alone",
        lambda g: dict(x=randn(g, 1, 5, 1, 1), num_groups=1, shift=randn(g, 1, 5), **norm_weights(g, 5)),
        gradients=("x", "weight", "bias", "shift"),
    ),
    Case(
        "group_norm_silu",
        "vectors of 16 bytes",
        lambda g: dict(x=3 + randn(g, 2, 64, 4, 8), num_groups=16, **norm_weights(g, 64)),
        gradients=("x", "weight", "bias"),
    ),
    Case(
        "group_norm_silu",
        "one channel, alone",  # the name seeds the numbers: a single sum must not be exact in float32 by luck
        lambda g: dict(x=randn(g, 2, 1, 7, 5), num_groups=1, **norm_weights(g, 1)),
        gradients=("x", "weight", "bias"),
    ),
    # rms_norm_silu
    Case(
        "rms_norm_silu",
        "plain",
        lambda g: dict(x=randn(g, 2, 7, 5, 3), weight=1 + 0.3 * randn(g, 7)),
        gradients=("x", "weight"),
    ),
    Case(
        "rms_norm_silu",
        "scale, shift",
        lambda g: dict(
            x=10 + randn(g, 3, 4, 5, 3), weight=1 + 0.3 * randn(g, 4), scale=0.3 * randn(g, 3, 4),
            shift=0.3 * randn(g, 3, 4),
        ),
        gradients=("x", "weight", "scale", "shift"),
        compiled=True,
    ),
    Case(
        "rms_norm_silu",
        "one pixel, shift alone, no activation, eps as the divisor",
        lambda g: dict(
            x=randn(g, 2, 3, 1, 1), weight=1 + 0.3 * randn(g, 3), shift=randn(g, 2, 3), activation=False, eps=100.0
        ),
        gradients=("x", "weight", "shift"),
    ),
    Case(
        "rms_norm_silu",
        "vectors of 16 bytes",
        lambda g: dict(x=randn(g, 2, 32, 4, 8), weight=1 + 0.3 * randn(g, 32)),
        gradients=("x", "weight"),
    ),
    # conv3x3
    Case(
        "conv3x3",
        "plain",
        lambda g: dict(x=randn(g, 2, 7, 5, 3), weight=0.3 * randn(g, 9, 7, 3, 3), bias=randn(g, 9)),
        gradients=("x", "weight", "bias"),
    ),
    Case(
        "conv3x3",
        "more channels than a panel, odd width",
        lambda g: dict(x=5 + randn(g, 2, 20, 6, 9), weight=0.1 * randn(g, 37, 20, 3, 3)),
        gradients=("x", "weight"),
        compiled=True,
    ),
    Case(
        "conv3x3",
        "one pixel",
        lambda g: dict(x=randn(g, 3, 8, 1, 1), weight=randn(g, 8, 8, 3, 3), bias=randn(g, 8)),
        gradients=("x", "weight", "bias"),
    ),
    Case(
        "conv3x3",
        "several blocks of tiles, several sums",
        lambda g: dict(x=randn(g, 2, 16, 34, 33), weight=0.1 * randn(g, 65, 16, 3, 3), bias=randn(g, 65)),
        gradients=("x", "weight", "bias"),
    ),
    # linear; images of rows have one channel, so that they lie in both orders
    Case(
        "linear",
        "plain",
        lambda g: dict(x=randn(g, 5, 7), weight=0.3 * randn(g, 9, 7), bias=randn(g, 9)),
        gradients=("x", "weight", "bias"),
    ),
    Case(
        "linear",
        "rows of two tensors, residual",
        lambda g: dict(
            x=randn(g, 4, 6, 20), x2=1 + randn(g, 4, 6, 9), weight=0.2 * randn(g, 11, 29), bias=randn(g, 11),
            residual=randn(g, 4, 6, 11), dtype=FLOAT,
        ),
        gradients=("x", "x2", "weight", "bias", "residual"),
        compiled=True,
    ),
    Case(
        "linear",
        "images, filters of one pixel",
        lambda g: dict(
            x=randn(g, 3, 1, 5, 20), weight=0.3 * randn(g, 8, 20, 1, 1), residual=randn(g, 3, 1, 5, 8),
        ),
        gradients=("x", "weight", "residual"),
    ),
    Case(
        "linear",
        "more outputs than a panel, a row more than a block",
        lambda g: dict(x=5 + randn(g, 97, 70), weight=0.1 * randn(g, 37, 70), bias=randn(g, 37)),
        gradients=("x", "weight", "bias"),
    ),
    Case(
        "linear",
        "several items and sums of the gradient, float32 of any dtype",
        lambda g: dict(x=randn(g, 2, 130, 140), weight=0.1 * randn(g, 135, 140), dtype=torch.float32),
        gradients=("x", "weight"),
    ),
    # self_attention
    Case("self_attention", "plain", lambda g: dict(qkv=randn(g, 2, 9, 3 * 7)), gradients=("qkv",)),
    Case(
        "self_attention",
        "two heads, more tokens than a panel",
        lambda g: dict(qkv=randn(g, 3, 33, 3 * 2 * 20), heads=2),
        gradients=("qkv",),
        compiled=True,
    ),
    Case(
        "self_attention",
        "a token more than a block, three heads of an odd number",
        lambda g: dict(qkv=2 * randn(g, 2, 49, 3 * 3 * 5), heads=3),
        gradients=("qkv",),
    ),
    Case(
        "self_attention",
        "means of keys and values much larger than the deviation",
        lambda g: dict(qkv=randn(g, 2, 32, 3 * 16) + torch.tensor([0.0, 30.0, 100.0]).repeat_interleave(16)),
        gradients=("qkv",),
    ),
    Case(
        "self_attention",
        "several items of the gradient, heads of one number",
        lambda g: dict(qkv=3 * randn(g, 1, 130, 3 * 4), heads=4),
        gradients=("qkv",),
    ),
    Case(
        "self_attention",
        "more numbers than an item of the gradient",
        lambda g: dict(qkv=randn(g, 2, 16, 3 * 130)),
        gradients=("qkv",),
    ),
    # adam_ema
    Case("adam_ema", "plain", lambda g: optimizer_state(g, *SHAPES), written=STATE),
    Case(
        "adam_ema",
        "more than a chunk",
        lambda g: optimizer_state(g, (8200,), (4096,)),
        written=STATE,
    ),
    Case(
        "adam_ema",
        "every option",
        optimizer_options,
        written=(*STATE, "ema", "mirror", "found_inf"),
        compiled=True,
    ),
    Case(
        "adam_ema",
        "skipped by found_inf",
        lambda g: optimizer_options(g, found_inf=2.0),
        written=(*STATE, "ema", "mirror", "found_inf"),
    ),
]  # fmt: skip

OPS = tuple(sorted(HALVED))
IMPLEMENTATIONS = [(op, backend) for op in OPS for backend in holder_of(op).present]
