"""self_attention in plain PyTorch: the specification of every implementation."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(qkv: Tensor, heads: int, training: bool) -> tuple[Tensor, Tensor | None]:
    """Returns y, and for ``training`` the weights of the values, float32 [B, heads, T, T], which backward wants."""
    q, k, v = _heads(qkv.to(_computed_in(qkv)), heads)
    with torch.autocast(qkv.device.type, enabled=False):
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(3)
        y = (weights @ v).transpose(1, 2).flatten(2).contiguous()
    return y.to(qkv.dtype), weights if training else None


def backward(dy: Tensor, qkv: Tensor, weights: Tensor, heads: int) -> Tensor:
    """The gradient of qkv.

    With w the weights and s = q k^T / sqrt(d): dv = w^T dy, dw = dy v^T, ds = w (dw - sum_j w_j dw_j),
    dq = ds k / sqrt(d), dk = ds^T q / sqrt(d).
    """
    wide = _computed_in(qkv)
    q, k, v = _heads(qkv.to(wide), heads)
    (theirs,), w = _heads(dy.to(wide), heads, 1), weights.to(wide)
    with torch.autocast(qkv.device.type, enabled=False):
        dw = theirs @ v.mT
        ds = w * (dw - (w * dw).sum(3, keepdim=True)) * q.shape[-1] ** -0.5
        found = torch.stack((ds @ k, ds.mT @ q, w.mT @ theirs))
    return found.permute(1, 3, 0, 2, 4).flatten(2).contiguous().to(qkv.dtype)


def _heads(rows: Tensor, heads: int, parts: int = 3) -> tuple[Tensor, ...]:
    """[B, T, parts C] as that many [B, heads, T, d]."""
    b, tokens, columns = rows.shape
    return rows.view(b, tokens, parts, heads, columns // (parts * heads)).permute(2, 0, 3, 1, 4).unbind()


def _computed_in(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.float64 else torch.float32
