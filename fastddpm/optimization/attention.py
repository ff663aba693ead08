"""Attention and resampling blocks of diffusers without the copies that undo channels_last.

A channels_last map [B, C, H, W] is H*W tokens of C channels as it lies in memory, and tokens are such a map: no copy is
needed either way. The repeated pixels of an upsampling keep the order, too, at any batch size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import is_nhwc
from ..nn import layers
from .fused import untouched
from .layers import follows_upsampling
from .norms import example, group_norm
from .residual import Block, against_norms

INDICES = 2**31
"""Elements that torch's kernels for channels_last upsampling can count."""


class DiffusersAttention(Block):
    """diffusers' Attention over the pixels of a map, with the processor that it has by default."""

    pattern = "diffusers Attention: GroupNorm on channels_last, tokens and map without a copy"
    group_norm: Any
    spatial_norm: Any
    norm_q: Any
    norm_k: Any
    processor: Any
    to_q: Any
    to_k: Any
    to_v: Any
    to_out: Any
    heads: int
    residual_connection: bool
    rescale_output_factor: float

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """[B, C, H, W] to the same; anything else as it was."""
        x = hidden_states
        own = encoder_hidden_states is None and attention_mask is None and x.dim() == 4
        own = own and all(value is None for name, value in kwargs.items() if name != "temb")
        if not own or _against_attention(self) is not None or not untouched(self.group_norm):
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        b, c, height, width = x.shape
        tokens = group_norm(self.group_norm, x, activation=False).permute(0, 2, 3, 1).reshape(b, height * width, c)
        y = layers.attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens), self.heads)
        for layer in self.to_out:
            y = layer(y)
        y = y.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        y = x + y if self.residual_connection else y  # in the order of x
        return y if self.rescale_output_factor == 1 else y / self.rescale_output_factor

    @staticmethod
    def against(module: Any) -> str | None:
        """See `Block`."""
        return _against_attention(module) or against_norms(module.group_norm)

    @staticmethod
    def trial(module: Any) -> tuple[str, nn.Module, tuple[Any, ...]]:
        """See `Block`."""
        return "forward", module.to_out[0], (example(2, module.group_norm.num_channels, 4, 4, like=module.to_q.weight),)


class DiffusersTransformer(Block):
    """diffusers' Transformer2DModel on maps: its last part."""

    pattern = "diffusers Transformer2DModel: tokens to map without a copy"
    use_linear_projection: bool
    proj_out: Any

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        """[B, H*W, inner_dim] to [B, C, H, W]."""
        linear = self.use_linear_projection
        tokens: Tensor = self.proj_out(hidden_states) if linear else hidden_states
        y = tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        out: Tensor = residual + (y if linear else self.proj_out(y))
        return out

    @staticmethod
    def against(module: Any) -> str | None:
        """See `Block`."""
        return None if module.is_input_continuous else "its input is not a map"

    @staticmethod
    def trial(module: Any) -> tuple[str, nn.Module, tuple[Any, ...]]:
        """See `Block`."""
        weight = module.proj_out.weight
        width = weight.shape[1]
        residual = example(2, module.norm.num_channels, 4, 4, like=weight)
        given = (example(2, 16, width, like=weight), residual, 2, 4, 4, width)
        return "_get_output_for_continuous_inputs", module.proj_out, given


class DiffusersUpsample(Block):
    """diffusers' Upsample2D by repeated pixels."""

    pattern = "diffusers Upsample2D: channels_last at any batch size, with its convolution on the smaller map"
    name: str
    use_conv: bool
    conv: Any
    Conv2d_0: Any

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """[B, C, H, W] to [B, C', 2H, 2W], or to the output size."""
        x = hidden_states
        if output_size is not None or args or kwargs or 4 * x.numel() >= INDICES:
            return super().forward(hidden_states, output_size, *args, **kwargs)  # type: ignore[no-any-return]
        conv = (self.conv if self.name == "conv" else self.Conv2d_0) if self.use_conv else None
        if is_nhwc(x) and conv is not None and follows_upsampling(conv):
            return layers.upsampled_conv2d(x, conv.weight, conv.bias)
        # a 1x1 map is in both orders at once, and the strides that say which are lost on the way
        layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        y = F.interpolate(x.to(memory_format=layout), scale_factor=2.0, mode="nearest")
        out: Tensor = y if conv is None else conv(y)
        return out

    @staticmethod
    def against(module: Any) -> str | None:
        """See `Block`."""
        plain = module.norm is None and module.interpolate and not module.use_conv_transpose
        return None if plain else "it does more than to repeat pixels"

    @staticmethod
    def trial(module: Any) -> tuple[str, nn.Module, tuple[Any, ...]]:
        """See `Block`."""
        weight = next(module.parameters(), torch.empty(0))
        return "forward", module, (example(2, module.channels, 4, 4, like=weight),)


def _against_attention(module: Any) -> str | None:
    if type(module.processor).__name__ != "AttnProcessor2_0":
        return f"its processor is {type(module.processor).__name__}"
    if module.group_norm is None:
        return "it has no GroupNorm"
    others = [name for name in ("spatial_norm", "norm_q", "norm_k") if getattr(module, name) is not None]
    return f"it has {', '.join(others)}" if others else None
