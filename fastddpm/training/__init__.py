"""Training: configuration, data, optimisation, checkpoints and the loop."""

from .checkpoint import Checkpoint, CheckpointError, latest_checkpoint, load_checkpoint, pin_checkpoint, save_checkpoint
from .config import TrainConfig
from .data import ImageDataset, batch_indices, load_images
from .load import load_diffusion
from .loop import DivergenceError, InUseError, Trainer
from .metrics import read_metrics
from .presets import PRESETS, make_configs

__all__ = [
    "PRESETS",
    "Checkpoint",
    "CheckpointError",
    "DivergenceError",
    "ImageDataset",
    "InUseError",
    "TrainConfig",
    "Trainer",
    "batch_indices",
    "latest_checkpoint",
    "load_checkpoint",
    "load_diffusion",
    "load_images",
    "make_configs",
    "pin_checkpoint",
    "read_metrics",
    "save_checkpoint",
]
