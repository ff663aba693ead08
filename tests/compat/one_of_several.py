"""One of several training processes: python -m tests.compat.one_of_several FOLDER RESULTS, as torchrun starts it."""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor

from fastddpm.compat.denoising_diffusion_pytorch.trainer import Trainer
from tests.compat.toy_diffusion import Toy


class Plain(Toy):
    """Without noise, so that a batch in parts has the gradient of the whole one."""

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.net(images)
        return (found - images).square().mean()


def train(folder: str, results: str, seed: int) -> Trainer:
    """Two milestones; the seed is for the order of the images."""
    torch.manual_seed(0)
    model = Plain()
    trainer = Trainer(
        model, folder, train_num_steps=10, save_and_sample_every=5, num_samples=4, calculate_fid=False, train_lr=1e-2,
        augment_horizontal_flip=False, results_folder=results, gradient_accumulate_every=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    trainer.train()
    return trainer


if __name__ == "__main__":
    trainer = train(*sys.argv[1:3], seed=int(os.environ["RANK"]))
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    torch.save(weights, f"{sys.argv[2]}/weights-of-{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
