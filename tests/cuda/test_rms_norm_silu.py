"""rms_norm_silu by its CUDA kernels, around the edges of how they cut the work: on a GPU, or emulated on a CPU.

Where there is neither, the kernels for the CPU pass the same tests.
"""

from __future__ import annotations

import pytest
import torch

import fastddpm
from fastddpm import _native
from tests.ops.cases import AT_HAND, DTYPES, LAYOUTS, OF_A_GPU, Case, Inputs, randn
from tests.ops.test_contract import check_values, poisoned_memory, results

pytestmark = [
    *OF_A_GPU,
    pytest.mark.skipif(not _native.available(), reason=f"no native code: {_native.reason()}"),
    pytest.mark.timeout(300),  # emulated, thread after thread
]


def norm_case(batch: int, channels: int, height: int, width: int, scaled: bool) -> Case:
    def make(g: torch.Generator) -> Inputs:
        inputs: Inputs = dict(x=randn(g, batch, channels, height, width), weight=1 + 0.3 * randn(g, channels))
        if scaled:
            inputs |= dict(scale=0.3 * randn(g, batch, channels), shift=0.3 * randn(g, batch, channels))
        return inputs

    given = ("weight", *(("scale", "shift") if scaled else ())) if channels > 14 else ()
    # x / |x| of one channel does not depend on |x|: its gradient is 0 but for rounding, which a GPU does otherwise
    of_x = ("x",) if channels > 1 else ()
    return Case("rms_norm_silu", f"{batch}x{channels}x{height}x{width}", make, gradients=(*of_x, *given))


def check(case: Case, inputs: Inputs, dtype: torch.dtype) -> None:
    on_device = {n: x.to(AT_HAND) if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    with fastddpm.use_backend("native"), poisoned_memory():
        found = results(case, on_device, dtype)
    check_values(case, {name: x.cpu() for name, x in found.items()}, inputs, dtype)


# A pixel in 1 to 4 vectors of a part of a warp, of a warp, of several; more than fit; tiles of 1 to 32 lanes; what no
# vector fits; one pixel, one channel, many small samples, an item of several rounds.
SHAPES = [
    (2, 8, 3, 4), (1, 24, 5, 8), (2, 64, 8, 8), (3, 128, 4, 6), (1, 192, 4, 8), (1, 320, 2, 8), (1, 576, 2, 4),
    (1, 768, 4, 4), (1, 1152, 2, 4), (1, 2048, 1, 8), (1, 4104, 2, 4), (1, 6152, 1, 3), (2, 16, 40, 40), (1, 4, 64, 64),
    (2, 33, 5, 7), (1, 7, 16, 16), (70, 40, 1, 1), (130, 16, 1, 2), (5, 1, 3, 8), (1, 257, 3, 3),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_shapes_around_the_edges(shape: tuple[int, int, int, int], layout: str) -> None:
    for i, dtype in enumerate(DTYPES):
        case = norm_case(*shape, scaled=i != 1)
        check(case, case.inputs(dtype, layout), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_that_16_bytes_do_not_fit(layout: str) -> None:
    """The same numbers two bytes further on in memory."""
    case = norm_case(2, 64, 4, 8, scaled=True)
    inputs = case.inputs(torch.bfloat16, layout)
    x = inputs["x"]
    memory = torch.zeros(x.numel() + 1, dtype=x.dtype)
    inputs["x"] = memory[1:].as_strided(x.shape, x.stride()).copy_(x)
    check(case, inputs, torch.bfloat16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_other_dtypes(layout: str) -> None:
    case = norm_case(2, 32, 4, 4, scaled=True)
    for dtype in (torch.float64, torch.float16):
        inputs = case.inputs(torch.bfloat16, layout)
        inputs |= {name: inputs[name].to(dtype) for name in ("weight", "scale", "shift")}
        check(case, inputs, torch.bfloat16)
