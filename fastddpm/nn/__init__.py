"""The networks: a U-Net and its parts, each usable alone."""

from .attention import SelfAttention
from .blocks import Downsample, DropoutKey, ResBlock, Upsample
from .embedding import TimeEmbedding, sinusoidal_embedding
from .norm import GroupNormSiLU
from .unet import UNet, UNetConfig

__all__ = [
    "Downsample",
    "DropoutKey",
    "GroupNormSiLU",
    "ResBlock",
    "SelfAttention",
    "TimeEmbedding",
    "UNet",
    "UNetConfig",
    "Upsample",
    "sinusoidal_embedding",
]
