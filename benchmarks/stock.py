"""Our U-Net on torch's own ops, with the same weights: what a good user of torch alone would have."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.nn import GroupNormSiLU


class StockNorm(nn.Module):
    """What `GroupNormSiLU` does, by torch's own ops and with the same weights."""

    def __init__(self, norm: GroupNormSiLU) -> None:
        super().__init__()
        self.norm = norm

    def forward(
        self,
        x: Tensor,
        *,
        x2: Tensor | None = None,
        channel_bias: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        dropout: float = 0.0,
        **_: Any,
    ) -> Tensor:
        norm = self.norm
        if x2 is not None:
            x = torch.cat([x, x2], dim=1)
        if channel_bias is not None:
            x = x + channel_bias.reshape(-1, x.shape[1], 1, 1)
        # autocast would compute in float32, and give it on: a good user keeps bfloat16
        with torch.autocast(x.device.type, enabled=False):
            y = F.group_norm(x, norm.num_groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
        if scale is not None and shift is not None:
            y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return F.dropout(F.silu(y) if norm.activation else y, dropout)


def on_stock_ops(model: nn.Module) -> nn.Module:
    """A copy of the network with torch's own ops in place of ours."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, GroupNormSiLU):
                setattr(module, name, StockNorm(child))
    return model
