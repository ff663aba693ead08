"""The attention of the U-Net, on the CPU.

On a GPU the network takes torch.nn.functional.scaled_dot_product_attention, which has tensor cores; this op is its
reference there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._checks import FLOATS, check_dtype
from ..._dispatch import Op, needs_gradient, once_differentiable, own
from . import reference

OP = Op(__package__, reference)


class _SelfAttention(torch.autograd.Function):
    """Keeps qkv, and the weights of the values in float32."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        ctx.implementation, ctx.heads = OP.choose(qkv, {"qkv": qkv}), heads
        y: Tensor
        y, weights = ctx.implementation.forward(qkv, heads, True)
        ctx.save_for_backward(qkv, weights)
        return own(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.implementation.backward(dy, *ctx.saved_tensors, ctx.heads), None


def self_attention(qkv: Tensor, heads: int = 1) -> Tensor:
    """Let every token of an image look at every other.

    y = softmax(q k^T / sqrt(d)) v for each head   (Vaswani et al. 2017, eq. 1)

    Args:
        qkv: float [B, T, 3 C]: of each of T tokens the query, the key and the value side by side, C numbers each; of
            each of these the heads side by side, d = C / heads numbers each. Other strides are copied.
        heads: how many; C is a multiple of it.

    Returns: y [B, T, C] in the dtype of qkv.

    Raises:
        ValueError: a shape that does not fit, or a number of heads.
        TypeError: a dtype.
        RuntimeError: (from autograd) the gradient of the gradient is asked for.

    Numerics: float32 arithmetic in every dtype (float64 for float64), one rounding of the output and of the gradient;
    scores of bfloat16 are products as those of `linear`, by the faster instruction where a processor has it. For
    backward qkv and the weights softmax(..) are kept, these in float32 [B, heads, T, T]. Deterministic, whatever
    the number of threads.
    """
    check_dtype("self_attention", "qkv", qkv, *FLOATS)
    if qkv.dim() != 3 or qkv.shape[2] % 3 or qkv.shape[2] == 0:
        raise ValueError(
            f"self_attention: expected qkv of shape [B, T, 3 C], got {list(qkv.shape)}; join queries, keys and values "
            "along their last dimension"
        )
    columns = qkv.shape[2] // 3
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or columns % heads:
        raise ValueError(f"self_attention: expected heads to divide {columns}, got {heads!r}; pass 1, for example")
    y: Tensor
    if needs_gradient(qkv):
        y = _SelfAttention.apply(qkv, heads)  # type: ignore[no-untyped-call]
        return y
    y, _ = OP.choose(qkv, {"qkv": qkv}).forward(qkv, heads, False)
    return y
