"""Self-attention over the pixels of a feature map, with a residual connection.

    z = groupnorm(x), as H*W tokens of C channels
    q, k, v = z W_q^T + b_q, z W_k^T + b_k, z W_v^T + b_v, each split in heads of d channels
    y = x + softmax(q k^T / sqrt(d)) v W_o^T + b_o

The attention of the U-Net of Ho et al. 2020 (appendix B), with the heads of Vaswani et al. 2017 (section 3.2) as in
Nichol and Dhariwal 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import Linear, self_attention
from .norm import GroupNormSiLU
from .recompute import recomputed


class SelfAttention(nn.Module):
    """Attention of every pixel to every other.

    The three projections are stored as one: rows 0..C-1 of ``qkv.weight`` make the queries, the next C the keys, the
    last C the values; in each of them head h owns the channels h*d .. (h+1)*d - 1.

    Args:
        channels: C, divisible by num_groups and by num_heads.
        num_heads: number of heads; d = C / num_heads.
        num_groups, eps: of the group norm; None for num_groups leaves it out.
        output_scale: y is divided by it.

    Attributes:
        recompute: in training keep nothing but the input, and compute it again in backward, see `recomputed`.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_groups: int | None = 32,
        eps: float = 1e-6,
        *,
        output_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.output_scale = num_heads, output_scale
        self.recompute = False
        self.norm = None if num_groups is None else GroupNormSiLU(channels, num_groups, eps, activation=False)
        self.qkv = Linear(channels, 3 * channels)
        self.proj = Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same; channels_last x is rearranged nowhere, and the result is channels_last."""
        if self.recompute and self.training and torch.is_grad_enabled():
            return recomputed(self._forward, x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        z = x if self.norm is None else self.norm(x)
        tokens = z.permute(0, 2, 3, 1).reshape(b, h * w, c)  # a view: NHWC is [B, H*W, C] as it lies
        of_x = x.permute(0, 2, 3, 1).reshape(b, h * w, c)
        y = self.proj(self_attention(self.qkv(tokens), self.num_heads), residual=of_x, dtype=of_x.dtype)
        out: Tensor = y.view(b, h, w, c).permute(0, 3, 1, 2)
        return out if self.output_scale == 1 else out / self.output_scale

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"
