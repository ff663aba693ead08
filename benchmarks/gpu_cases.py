"""What the GPU suite times: every op at every shape of four U-Nets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Network:
    """A U-Net: images of a batch, and its GroupNorms, (channels, height = width) to how many a forward pass has."""

    batch: int
    image: tuple[int, int]
    norms: dict[tuple[int, int], int]


NETWORKS = {
    "cifar-10": Network(128, (3, 32), {
        (128, 32): 8, (256, 32): 2, (384, 32): 1, (128, 16): 1, (256, 16): 11, (384, 16): 1, (512, 16): 2, (256, 8): 7,
        (512, 8): 3, (256, 4): 12, (512, 4): 3,
    }),
    "adm-64": Network(64, (3, 64), {
        (192, 64): 12, (384, 64): 4, (576, 64): 1, (192, 32): 2, (384, 32): 18, (576, 32): 2, (768, 32): 2,
        (960, 32): 1, (384, 16): 2, (576, 16): 18, (768, 16): 1, (960, 16): 1, (1152, 16): 2, (1344, 16): 1,
        (576, 8): 2, (768, 8): 22, (1344, 8): 1, (1536, 8): 3,
    }),
    "sd-1.5": Network(16, (4, 64), {
        (320, 64): 13, (640, 64): 2, (960, 64): 1, (320, 32): 1, (640, 32): 11, (960, 32): 1, (1280, 32): 1,
        (1920, 32): 1, (640, 16): 1, (1280, 16): 11, (1920, 16): 1, (2560, 16): 2, (1280, 8): 12, (2560, 8): 3,
    }),
    "lsun-256": Network(8, (3, 256), {
        (128, 256): 8, (256, 256): 3, (128, 128): 7, (256, 128): 2, (384, 128): 1, (128, 64): 1, (256, 64): 6,
        (384, 64): 1, (512, 64): 2, (256, 32): 7, (512, 32): 2, (768, 32): 1, (256, 16): 1, (512, 16): 11, (768, 16): 1,
        (1024, 16): 2, (512, 8): 12, (1024, 8): 3,
    }),
}  # fmt: skip

ELEMENTWISE = ("normal", "q_sample", "diffusion_loss", "solver_step")
LARGE = (256, 3, 256, 256)  # images of more than 64 MB, whatever the op and the dtype


@dataclass(frozen=True)
class Case:
    """One line of the table. ``contest`` names a function of `benchmarks.contests`; ``count``: calls in a forward pass
    (or in a backward pass) of the network."""

    part: str
    contest: str
    shape: Shape
    dtype: str
    network: str
    count: int = 1

    @property
    def op(self) -> str:
        return self.contest.removesuffix("_backward").removesuffix("_nhwc")

    @property
    def key(self) -> str:
        return f"{self.network} {self.contest} {'x'.join(map(str, self.shape))} {self.dtype}"

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Part:
    """A piece of the suite that runs in a process of its own, with the seconds that it may take.

    ``cases`` are timed; the other parts build, test and check. ``group``: "ops", or what else asks for time of its own;
    ``predicted``: seconds that it may take by an estimate, 0 where there is none; ``least``: it is not begun with less
    time left.
    """

    name: str
    limit: float
    cases: tuple[Any, ...] = field(default=())
    group: str = "ops"
    predicted: float = 0.0
    least: float = 15.0


def _elementwise() -> tuple[Case, ...]:
    cases = [
        Case("elementwise", op, (n.batch, n.image[0], n.image[1], n.image[1]), dtype, name)
        for dtype in ("bfloat16", "float32")
        for name, n in NETWORKS.items()
        for op in ELEMENTWISE
    ]
    cases += [Case("elementwise", op, LARGE, "bfloat16", "large") for op in ELEMENTWISE[1:]]
    cases += [
        Case("elementwise", f"{op}_nhwc", (n.batch, n.image[0], n.image[1], n.image[1]), "bfloat16", name)
        for name, n in NETWORKS.items()
        for op in ELEMENTWISE[1:]
    ]
    return (*cases, Case("elementwise", "adam_ema", (256, 256, 3, 3), "float32", "cifar-10"))


def _norms(op: str, network: str) -> tuple[Case, ...]:
    """All shapes in bfloat16, those first that the network spends most elements on; the first in float32, too."""
    part, n = f"{op} {network}", NETWORKS[network]
    by_weight = sorted(n.norms.items(), key=lambda item: -item[1] * item[0][0] * item[0][1] ** 2)

    def case(shape: tuple[int, int], count: int, contest: str, dtype: str) -> Case:
        return Case(part, contest, (n.batch, shape[0], shape[1], shape[1]), dtype, network, count)

    both = (op, f"{op}_backward")
    cases = [case(shape, count, contest, "bfloat16") for shape, count in by_weight for contest in both]
    return (*cases, *(case(*by_weight[0], contest, "float32") for contest in both))


def parts() -> list[Part]:
    """In the order in which they run: what a short lease needs most comes first."""
    measured = [Part("elementwise", 240, _elementwise())]
    for op in ("group_norm_silu", "rms_norm_silu"):
        measured += [Part(f"{op} {name}", 240, _norms(op, name)) for name in NETWORKS]
    checks = [Part("build", 300), Part("tests", 240), Part("sanitizer", 150)]
    return [*checks, *measured[:5], Part("sweep", 90), *measured[5:]]


