"""From the files of a training run, or of a pipeline of diffusers, to a diffusion that samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..diffusion import DiffusionConfig, GaussianDiffusion
from ..nn.unet import UNet
from .checkpoint import Checkpoint, CheckpointError, latest_checkpoint, load_checkpoint
from .config import choose_device
from .pipeline import is_pipeline, load_pipeline


def load_diffusion(
    path: str | Path, *, ema: bool = True, device: str | torch.device = "auto", model: nn.Module | None = None
) -> GaussianDiffusion:
    """Load the diffusion of a checkpoint, ready to sample: in eval mode, with the averaged weights.

    Args:
        path: directory of a checkpoint, or of a run, whose newest intact checkpoint is taken; or a DDPM pipeline of
            diffusers, a folder or the name of a repository on the Hugging Face hub such as "google/ddpm-cifar10-32".
        ema: take the moving average of the weights, which samples better; False takes the weights of the last step, as
            does a run without an average.
        device: where to; "auto" takes a GPU where there is one.
        model: the network to load into, needed where it is not a `fastddpm.UNet`; as it was for the training.

    Raises:
        CheckpointError: no checkpoint there, a half-written or damaged one, one that this version cannot read, or one
            of another configuration than ``model`` has; a pipeline that cannot be read or represented, see
            `UNet.from_pretrained`. ImportError: a repository without the package huggingface_hub.
    """
    if is_pipeline(path) and model is None:
        try:
            diffusion = load_pipeline(path)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        return diffusion.to(choose_device(device) if isinstance(device, str) else device)
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    try:
        diffusion_config = DiffusionConfig(**config["diffusion"])
        size, channels = tuple(config["images"]["size"]), int(config["images"]["channels"])
        if model is None and config["unet"] is not None:
            model = UNet.from_config(config["unet"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"load_diffusion: expected {checkpoint.path / 'config.json'} with options that this version knows, "
            f"got {error}; it was written by fastddpm {checkpoint.environment.get('fastddpm')}, use that version"
        ) from error
    if model is None:
        raise CheckpointError(
            f"load_diffusion: expected model= for {checkpoint.path}, which holds another network than a fastddpm.UNet, "
            "got None; pass the network that it was trained with"
        )
    checkpoint.copy_into("model", model.state_dict())
    if ema and config["train"].get("ema_decay", 0.0) is not None:
        parameters = dict(model.named_parameters())
        checkpoint.copy_into(
            "ema", {name: parameters[name].detach() for name in trained_names(checkpoint) if name in parameters}
        )
    diffusion = GaussianDiffusion(model, size, channels, diffusion_config)
    return diffusion.to(choose_device(device) if isinstance(device, str) else device).eval()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at a path, or the newest intact one of a run there.

    Raises:
        CheckpointError: see `load_diffusion`.
    """
    path = Path(path)
    if (path / "state.json").exists() or path.name.startswith("checkpoint-"):
        return load_checkpoint(path)
    found = latest_checkpoint(path) if path.is_dir() else None
    if found is None:
        what = "a directory without checkpoints" if path.is_dir() else "a file" if path.exists() else "nothing there"
        raise CheckpointError(
            f"load_diffusion: expected {path} to be a checkpoint or the directory of a training run, got {what}; "
            "pass the output_dir of the training"
        )
    return found


def trained_names(checkpoint: Checkpoint) -> list[str]:
    """Names of the parameters that were trained, and so have an average."""
    names: Any = checkpoint.state["trained"]
    return list(names)
