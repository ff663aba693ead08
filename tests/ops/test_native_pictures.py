"""q_sample and diffusion_loss of the native kernels where the way they deal out a picture changes.

Rows that a run of 4 or 8 elements divides or does not, pixels in NHWC order by fours, any number of channels, images
that begin at any element of memory, batches larger than a grid. The kernels for CUDA run them too: on a GPU and, on a
CPU, emulated (tests/cuda/test_kernels.py).
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import fastddpm
from fastddpm import _native
from tests.ops.cases import (
    DEVICES,
    DTYPES,
    FLOAT,
    LAYOUTS,
    Case,
    Inputs,
    bound_table,
    drawn,
    images,
    op_of,
    rand,
    randn,
    signal_sigma,
)
from tests.ops.test_contract import check_values, poisoned_memory, results

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"no native module: {_native.reason()}")

SHAPES = [
    (3, 32, 32), (3, 16, 24), (3, 4, 4), (3, 20, 36), (3, 8, 10), (3, 9, 16), (3, 1, 48), (3, 12, 44), (1, 28, 28),
    (2, 8, 8), (4, 8, 8), (4, 1, 16), (4, 5, 7), (5, 8, 8), (8, 16, 4), (16, 8, 8), (192, 1, 1),
]  # fmt: skip
"""C, H, W"""


def q_sample(shape: tuple[int, int, int], stored: str, returns: str, flip: bool, batch: int = 3) -> Case:
    def make(g: torch.Generator) -> Inputs:
        whole = stored == "uint8"
        inputs = dict(
            x0=images(g, batch + 2, *shape) if whole else rand(g, batch + 2, *shape),
            t=torch.randint(10, (batch,), generator=g),
            table=signal_sigma(), index=torch.randint(batch + 2, (batch,), generator=g), returns=returns, dtype=FLOAT,
            pixel_scale=2 / 255 if whole else 2.0, **drawn(batch),
        )  # fmt: skip
        return inputs | (dict(flip=torch.rand(batch, generator=g) < 0.6) if flip else {})

    return Case("q_sample", f"{batch} of {shape}, {stored}, {returns}, flip={flip}", make)


def diffusion_loss(
    shape: tuple[int, int, int],
    objective: str,
    stored: str = "uint8",
    flip: bool = True,
    batch: int = 3,
    bound: bool = False,
) -> Case:
    def make(g: torch.Generator) -> Inputs:
        channels, *size = shape
        inputs = q_sample(shape, stored, "x_t", flip, batch).make(g)
        del inputs["returns"], inputs["dtype"]
        inputs |= dict(
            pred=0.5 * randn(g, batch, 2 * channels if bound else channels, *size), objective=objective,
            t=torch.randint(1, 10, (batch,), generator=g), weight=0.5 + rand(g, batch),
        )  # fmt: skip
        return inputs | (dict(vlb=bound_table(), vlb_weight=0.01) if bound else {})

    name = f"{batch} of {shape}, {objective}, {stored}, flip={flip}, bound={bound}"
    return Case("diffusion_loss", name, make, gradients=("pred",))


def check(case: Case, device: str, dtype: torch.dtype, layout: str, offset: int = 0) -> None:
    """Against the reference; images begin ``offset`` elements behind the start of their memory."""
    inputs = case.inputs(dtype, layout, device)

    def op(**given: Any) -> Any:
        pictures = {name: shifted(x, offset) for name, x in given.items() if isinstance(x, Tensor) and x.dim() == 4}
        return op_of(case.op)(**given | pictures)

    with fastddpm.use_backend("native"), poisoned_memory():
        found = results(case, inputs, dtype, op=op)
    check_values(case, found, inputs, dtype)


def shifted(x: Tensor, offset: int) -> Tensor:
    if not offset:
        return x
    memory = torch.empty(x.numel() + offset, dtype=x.dtype, device=x.device)
    return memory[offset:].as_strided(x.shape, x.stride()).copy_(x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_pictures_from_bytes_and_floats(device: str, dtype: torch.dtype, layout: str) -> None:
    options = [("uint8", "x_t", True), ("uint8", "noise", False), ("float", "v", True), ("float", "x0", False)]
    for shape, option in itertools.product(SHAPES, options):
        check(q_sample(shape, *option), device, dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("objective", ["eps", "x0", "bound"])
@pytest.mark.parametrize("device", DEVICES)
def test_losses(device: str, objective: str, dtype: torch.dtype, layout: str) -> None:
    for shape in SHAPES:
        case = diffusion_loss(shape, objective.replace("bound", "eps"), bound=objective == "bound")
        check(case, device, dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_losses_of_a_velocity(device: str, dtype: torch.dtype, layout: str) -> None:
    for shape, (stored, flip) in itertools.product(SHAPES, [("uint8", True), ("float", True), ("float", False)]):
        check(diffusion_loss(shape, "v", stored, flip), device, dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_images_begin_anywhere(device: str, dtype: torch.dtype, layout: str) -> None:
    for shape, offset in itertools.product([(3, 16, 16), (4, 8, 8), (16, 8, 8), (3, 5, 7)], (1, 2, 4)):
        for stored in ("uint8", "float"):
            check(q_sample(shape, stored, "x_t", True), device, dtype, layout, offset)
            check(diffusion_loss(shape, "v", stored), device, dtype, layout, offset)
        check(diffusion_loss(shape, "eps", bound=True), device, dtype, layout, offset)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("device", DEVICES)
def test_the_sums_of_a_sample_do_not_depend_on_its_batch(device: str, layout: str) -> None:
    of_batch = {"pred", "t", "index", "flip", "sample", "weight"}
    for shape in SHAPES:
        inputs = diffusion_loss(shape, "v", batch=5).inputs(torch.float32, layout, device)
        with fastddpm.use_backend("native"):
            _, together = fastddpm.diffusion_loss(**inputs)
            for b in range(5):
                alone = {name: x[b : b + 1] if name in of_batch else x for name, x in inputs.items()}
                assert torch.equal(fastddpm.diffusion_loss(**alone)[1], together[b : b + 1]), shape


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("device", DEVICES)
def test_batches_larger_than_a_side_of_a_grid(device: str, layout: str, shape: tuple[int, int, int]) -> None:
    check(q_sample(shape, "uint8", "x_t", False, 65537), device, torch.float32, layout)
    check(diffusion_loss(shape, "eps", flip=False, batch=65537), device, torch.float32, layout)
