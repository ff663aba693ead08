"""self_attention by the kernels of csrc/self_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..native_common import reason_against, register_fake


def unsupported(*, qkv: Tensor, **_: Any) -> str | None:
    """Why these kernels cannot run, or None."""
    if qkv.is_cuda:
        return "the kernels are for the CPU: on a GPU torch.nn.functional.scaled_dot_product_attention has tensor cores"
    return reason_against(qkv) or reason_against(qkv, dtype=qkv.dtype)


def forward(qkv: Tensor, heads: int, training: bool) -> tuple[Tensor, Tensor | None]:
    """Returns y, and for ``training`` the weights of the values, which backward wants."""
    y, *weights = torch.ops.fastddpm.self_attention.default(qkv.contiguous(), heads, training)
    return y, weights[0] if training else None


def backward(dy: Tensor, qkv: Tensor, weights: Tensor, heads: int) -> Tensor:
    """The gradient of qkv."""
    backward = torch.ops.fastddpm.self_attention_backward.default
    found: Tensor = backward(dy.contiguous(), qkv.contiguous(), weights, heads)
    return found


@register_fake("self_attention")
def _(qkv: Tensor, heads: int, training: bool) -> list[Tensor]:
    b, tokens, columns = qkv.shape
    weights = [qkv.new_empty((b, heads, tokens, tokens), dtype=torch.float32)] if training else []
    return [qkv.new_empty((b, tokens, columns // 3)), *weights]


@register_fake("self_attention_backward")
def _(dy: Tensor, qkv: Tensor, weights: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape)
