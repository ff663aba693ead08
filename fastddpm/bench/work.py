"""What is measured, as plain data: a training step, or a piece of sampling, of a configuration and random images."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..diffusion import SAMPLERS, DiffusionConfig, GaussianDiffusion
from ..nn.unet import UNet, UNetConfig
from ..training import ImageDataset, TrainConfig, Trainer
from ..training.config import choose_device, choose_precision, compile_network
from .floor import Layer, record
from .timing import Call

KINDS = ("train", "sample")


@dataclass(frozen=True)
class Work:
    """A step to measure. Every field is data that JSON can hold.

    Args:
        kind: "train", an optimiser step of ``train.batch_size`` images; or "sample", that many images by a few steps.
        unet, diffusion, train: fields of `UNetConfig`, `DiffusionConfig` and `TrainConfig`; of the last, a sampling
            takes batch_size, precision (the dtype of the weights), compile, compile_mode, cuda_graph, device and seed.
        sampler: of a sampling: "ddpm", "ddim" or "dpmpp_2m".
        num_steps: calls of the network that draw an image, >= 1; None is all timesteps for ddpm, at most 50 for ddim
            and 20 for dpmpp_2m.
        measured_steps: so many of them are measured, >= 1; one takes as long as another. What a sampling prepares once
            is not counted, see `GaussianDiffusion.frozen`.

    Raises:
        ValueError: another kind or sampler, a number out of its range, or what the configurations refuse.
    """

    kind: str
    unet: dict[str, Any] = field(default_factory=dict)
    diffusion: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    sampler: str = "ddpm"
    num_steps: int | None = None
    measured_steps: int = 5

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Work: expected kind to be one of {', '.join(KINDS)}, got {self.kind!r}; choose one")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"Work: expected sampler to be one of {', '.join(SAMPLERS)}, got {self.sampler!r}; choose")
        total = DiffusionConfig(**self.diffusion).num_timesteps
        if self.measured_steps < 1 or not 1 <= self.image_steps <= total:
            raise ValueError(
                f"Work: expected measured_steps >= 1 and num_steps in [1, {total}], got {self.measured_steps} and "
                f"{self.num_steps}; a step is one call of the network"
            )

    @property
    def config(self) -> TrainConfig:
        """What the training of this work is told."""
        return TrainConfig(**self.train)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return choose_device(self.config.device)

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        return choose_precision(self.config.precision, self.device)

    @property
    def steps(self) -> int:
        """Steps in one call of what `prepare` gives."""
        return 1 if self.kind == "train" else min(self.measured_steps, self.image_steps)

    @property
    def image_steps(self) -> int:
        """Steps that a batch of images takes: one in training, those of the sampler else."""
        if self.kind == "train":
            return 1
        total = DiffusionConfig(**self.diffusion).num_timesteps
        return (
            min(total, {"ddpm": total, "ddim": 50, "dpmpp_2m": 20}[self.sampler])
            if self.num_steps is None
            else (self.num_steps)
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields, which ``Work(**fields)`` takes again."""
        return asdict(self)

    def prepare(self) -> Call:
        """Make network, images and state, and return what does the work: an optimiser step, or a sampling."""
        network = UNet(UNetConfig(**self.unet))
        fill_zeros(network)
        diffusion = GaussianDiffusion(network, config=DiffusionConfig(**self.diffusion))
        return self._training(diffusion) if self.kind == "train" else self._sampling(diffusion)

    def unrecorded(self) -> Work:
        """The same work, launched op by op."""
        return replace(self, train={**self.train, "cuda_graph": "off"})

    def layers(self) -> Counter[Layer]:
        """The layers that multiply matrices in one step, see `fastddpm.bench.floor.record`."""
        network = UNet(UNetConfig(**self.unet)).to(self.device)
        c, batch = network.config, self.config.micro_batch if self.kind == "train" else self.config.batch_size
        x = torch.randn(batch, c.in_channels, *c.image_size, device=self.device)
        t = torch.zeros(batch, dtype=torch.int64, device=self.device)
        labels = None if c.num_classes is None else torch.zeros_like(t)
        network.train(self.kind == "train")
        found = record(lambda: network(x, t, labels))
        repeated = self.config.batch_size // batch
        return Counter({layer: count * repeated for layer, count in found.items()})

    def _training(self, diffusion: GaussianDiffusion) -> Call:
        # nothing is written there: a step writes no files
        nowhere = Path(tempfile.gettempdir()) / "fastddpm-bench-writes-nothing"
        data = random_images(diffusion, 4 * self.config.batch_size)
        options: dict[str, Any] = dict(output_dir=str(nowhere), warmup_images=0)
        return Trainer(diffusion, data, self.config, resume=False, progress=False, **options).step

    def _sampling(self, diffusion: GaussianDiffusion) -> Call:
        diffusion.to(self.device).eval()
        diffusion.model.to(self.dtype)
        if self.config.compile:
            compile_network(diffusion.model, self.config.compile_mode)
        batch, classes = self.config.batch_size, diffusion.num_classes
        graph = {"auto": "auto", "on": True, "off": False}[self.config.cuda_graph]
        options: dict[str, Any] = dict(sampler=self.sampler, num_steps=self.steps, cuda_graph=graph)
        labels = None if classes is None else torch.arange(batch) % classes
        frozen = diffusion.frozen()  # a short sampling stands for a long one

        def call() -> object:
            with frozen:
                return diffusion.sample(batch, batch_size=batch, seed=self.config.seed, labels=labels, **options)

        return call


@torch.no_grad()
def fill_zeros(network: nn.Module) -> None:
    """Give weights that start at 0 the size of the others, as they have in the middle of a training.

    Left at 0 they make gradients 0, and a step later so small that their squares are denormal numbers, which take a
    processor many times as long.
    """
    for p in network.parameters():
        if p.dim() > 1 and not bool(p.any()):
            nn.init.xavier_uniform_(p)


def random_images(diffusion: GaussianDiffusion, count: int) -> ImageDataset:
    """Images of noise that fit a diffusion, uint8 [count, C, H, W], with a class each where it has classes."""
    random, levels, classes = np.random.default_rng(0), diffusion.config.levels, diffusion.num_classes
    shape = (count, diffusion.channels, *diffusion.image_size)
    images = random.integers(0, levels, shape, dtype=np.uint8)
    labels = None if classes is None else random.integers(0, classes, count)
    return ImageDataset(images, labels, None, levels, fingerprint="random images of fastddpm bench")
