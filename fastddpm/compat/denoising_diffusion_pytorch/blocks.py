"""The parts that the 2-D and the 1-D network share: embedding of the time, channel norm, residual block, attention.

A sequence [B, C, N] is an image of one row here, [B, C, 1, N]: so there is one set of blocks, over the same kernels.
Images are channels_last throughout, where the pixels of an image are N tokens of C channels as they lie.

Residual block, [scale, shift] = W silu(embedding) + b:

    h = silu(norm(conv1(x)) g1 (1 + scale) + shift);   h = silu(norm(conv2(drop(h))) g2);   y = h + shortcut(x)

with norm(x) = sqrt(C) x / ||x|| over the channels of a pixel.
"""

from __future__ import annotations

import math
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn import sinusoidal_embedding
from ...nn.layers import Conv2d
from ...ops import rms_norm_silu


class RowConv(nn.Conv1d):
    """A convolution of sequences with the weights of `torch.nn.Conv1d`, applied to images of one row [B, C, 1, N]."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, 1, N] to [B, C', 1, N']."""
        stride, padding = int(self.stride[0]), int(self.padding[0])
        return F.conv2d(x, self.weight.unsqueeze(2), self.bias, (1, stride), (0, padding))


Conv: TypeAlias = type[nn.Conv2d] | type[RowConv]


class SinusoidalPosEmb(nn.Module):
    """e(t) = [sin(w_0 t) .. , cos(w_0 t) ..], w_i = theta^(-i / (dim/2 - 1)), i < dim/2, in float32 at least.

    Args:
        dim: length, even and >= 4.
        theta: > 0.
    """

    def __init__(self, dim: int, theta: float = 10000) -> None:
        super().__init__()
        self.dim, self.theta = dim, theta

    def forward(self, t: Tensor) -> Tensor:
        """[B] to [B, dim]."""
        dtype = torch.promote_types(t.dtype, torch.float32) if t.is_floating_point() else torch.float32
        return sinusoidal_embedding(t, self.dim, dtype=dtype, theta=self.theta)


class RandomOrLearnedSinusoidalPosEmb(nn.Module):
    """e(t) = [t, sin(2 pi w_i t) .., cos(2 pi w_i t) ..] with w_i ~ N(0, 1), i < dim/2, trained unless ``is_random``.

    Args:
        dim: even, >= 2; the result has one element more.
    """

    def __init__(self, dim: int, is_random: bool = False) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"Unet: expected learned_sinusoidal_dim even and >= 2, got {dim}; 16 is usual")
        self.weights = nn.Parameter(torch.randn(dim // 2), requires_grad=not is_random)

    def forward(self, t: Tensor) -> Tensor:
        """[B] to [B, dim + 1]."""
        t = t.to(self.weights.dtype).unsqueeze(1)
        angle = t * self.weights * (2 * math.pi)
        return torch.cat([t, angle.sin(), angle.cos()], dim=1)


class TimeMLP(nn.Sequential):
    """From times [B] to what every residual block takes a projection of, silu(embedding) [B, width].

    Args:
        embedding: of the time. fourier_dim: its length. width: of the result.
    """

    def __init__(self, embedding: nn.Module, fourier_dim: int, width: int) -> None:
        super().__init__(embedding, nn.Linear(fourier_dim, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """[B] to [B, width]."""
        sinusoid, linear1, gelu, linear2 = self
        return F.silu(linear2(gelu(linear1(sinusoid(t).to(linear1.weight.dtype)))))


class RMSNorm(nn.Module):
    """sqrt(C) x / max(||x||, 1e-12) g over the channels of a pixel.

    Args:
        dim: C.
        ndim: dimensions of the gain, 4 for [1, C, 1, 1] and 3 for [1, C, 1].
    """

    def __init__(self, dim: int, ndim: int = 4) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, dim, *[1] * (ndim - 2)))

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, *, activation: bool = False
    ) -> Tensor:
        """[B, C, H, W] to the same, with (1 + scale) and shift, each [B, C], and SiLU where they are asked for."""
        return rms_norm_silu(x, self.g.flatten(), scale=scale, shift=shift, activation=activation)


class Block(nn.Module):
    """Convolution, norm, scale and shift, SiLU, dropout."""

    def __init__(self, dim: int, dim_out: int, dropout: float = 0.0, conv: Conv = nn.Conv2d) -> None:
        super().__init__()
        self.proj = Conv2d(dim, dim_out, 3, padding=1) if conv is nn.Conv2d else conv(dim, dim_out, 3, padding=1)
        self.norm = RMSNorm(dim_out, self.proj.weight.dim())
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """[B, dim, H, W] to [B, dim_out, H, W]; scale and shift are [B, dim_out]."""
        x = self.norm(self.proj(x), scale, shift, activation=True)
        if self.training and self.dropout.p > 0:
            # the mask is drawn in C, H, W order, as it is for images that lie so: a seed drops the same elements
            x = x * self.dropout(torch.ones(x.shape, dtype=x.dtype, device=x.device))
        return x


class ResnetBlock(nn.Module):
    """The residual block of this module's equation.

    Args:
        dim, dim_out: channels; where they differ the shortcut is a 1x1 convolution.
        time_emb_dim: length of silu(embedding).
        dropout: probability in [0, 1], after the first activation, in training.
        conv: class of the convolutions.
    """

    def __init__(
        self, dim: int, dim_out: int, *, time_emb_dim: int, dropout: float = 0.0, conv: Conv = nn.Conv2d
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Identity(), nn.Linear(time_emb_dim, dim_out * 2))
        self.block1 = Block(dim, dim_out, dropout, conv)
        self.block2 = Block(dim_out, dim_out, conv=conv)
        self.res_conv: nn.Module = nn.Identity()
        if dim != dim_out:
            self.res_conv = Conv2d(dim, dim_out, 1) if conv is nn.Conv2d else conv(dim, dim_out, 1)

    def forward(self, x: Tensor, activated: Tensor) -> Tensor:
        """x [B, dim, H, W] and silu(embedding) [B, time_emb_dim] to [B, dim_out, H, W]."""
        scale, shift = self.mlp(activated).chunk(2, dim=1)
        h: Tensor = self.block2(self.block1(x, scale, shift))
        return h.add_(self.res_conv(x))


class LinearAttention(nn.Module):
    """Attention in linear time (Shen et al. 2021): q over the channels of a head and k over the tokens are softmaxed.

        context_h = sum_n k_h[n] v_h[n]^T;   y[n] = norm(W_o concat_h(context_h^T q_h[n]) / sqrt(d) + b_o)

    v = W_v x and W_o are linear, so v is never formed, and neither is what W_o is applied to: with K = [k_h[n]] of all
    heads, context_h = (K^T x)_h W_v,h^T is made from the [H d, C] matrix K^T x, and y[n] = M q[n] + b_o with M = W_o
    blockdiag(context^T) / sqrt(d) for each image. That is four products of N C H d in place of six passes.

    Args:
        dim: C. heads: H. dim_head: d.
        num_mem_kv: keys and values beside those of the tokens, learned.
        prenorm: normalise x first.
        conv: class of the projections.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        dim_head: int = 32,
        num_mem_kv: int = 4,
        *,
        prenorm: bool = True,
        conv: Conv = nn.Conv2d,
    ) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        ndim = 4 if conv is nn.Conv2d else 3
        self.norm = RMSNorm(dim, ndim) if prenorm else None
        self.mem_kv = nn.Parameter(torch.randn(2, heads, dim_head, num_mem_kv)) if num_mem_kv else None
        self.to_qkv = conv(dim, heads * dim_head * 3, 1, bias=False)
        self.to_out = nn.Sequential(conv(heads * dim_head, dim, 1), RMSNorm(dim, ndim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        tokens = _tokens(x if self.norm is None else self.norm(x))
        project = cast(nn.Conv2d, self.to_out[0])
        out: Tensor = self.to_out[1](_image(self._attend(tokens, project.weight.flatten(1), project.bias), x))
        return out

    def _attend(self, x: Tensor, w_out: Tensor, bias: Tensor | None) -> Tensor:
        """[B, N, C] to the same."""
        (b, n, c), h = x.shape, self.heads
        w_q, w_k, w_v = self.to_qkv.weight.flatten(1).chunk(3)  # [H d, C] each
        q = F.linear(x, w_q).view(b, n, h, -1).softmax(dim=-1)
        k = torch.bmm(w_k.expand(b, -1, -1), x.mT)  # [B, H d, N]: the softmax goes along memory
        inner = len(w_k)
        if self.mem_kv is None:
            k, mem_k, mem_v = k.softmax(dim=-1), None, None
        else:
            mem_k, mem_v = self.mem_kv.to(k.dtype)
            k = torch.cat([mem_k.reshape(1, inner, -1).expand(b, -1, -1), k], dim=2).softmax(dim=-1)
            mem_k, k = k.split([mem_v.shape[-1], n], dim=2)
        context = torch.einsum("bhdc,hec->bhde", torch.bmm(k, x).view(b, h, -1, c), w_v.view(h, -1, c))
        if mem_k is not None and mem_v is not None:
            context = context + torch.einsum("bhdm,hem->bhde", mem_k.view(b, h, -1, mem_k.shape[-1]), mem_v)
        mixed = torch.einsum("bhde,ohe->bhdo", context * self.scale, w_out.view(c, h, -1)).reshape(b, inner, c)
        assert bias is not None
        return torch.baddbmm(bias, q.view(b, n, inner), mixed)


class Attention(nn.Module):
    """Attention of every token to every other and to the learned ones (Vaswani et al. 2017, section 3.2).

        y = W_o concat_h(softmax(q_h k_h^T / sqrt(d)) v_h) + b_o

    Args: see `LinearAttention`.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        dim_head: int = 32,
        num_mem_kv: int = 4,
        *,
        prenorm: bool = True,
        conv: Conv = nn.Conv2d,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.norm = RMSNorm(dim, 4 if conv is nn.Conv2d else 3) if prenorm else None
        self.mem_kv = nn.Parameter(torch.randn(2, heads, num_mem_kv, dim_head)) if num_mem_kv else None
        self.to_qkv = conv(dim, heads * dim_head * 3, 1, bias=False)
        self.to_out = conv(heads * dim_head, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        tokens = _tokens(x if self.norm is None else self.norm(x))
        b, n, _ = tokens.shape
        qkv = F.linear(tokens, self.to_qkv.weight.flatten(1))
        q, k, v = qkv.view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B, heads, N, d] each
        if self.mem_kv is not None:
            mem_k, mem_v = self.mem_kv.to(k.dtype).unsqueeze(1).expand(-1, b, -1, -1, -1)
            k, v = torch.cat([mem_k, k], dim=2), torch.cat([mem_v, v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)
        return _image(F.linear(y, self.to_out.weight.flatten(1), self.to_out.bias), x)


def _tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] as [B, H W, C]: a view of what is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _image(tokens: Tensor, like: Tensor) -> Tensor:
    """[B, H W, C] as [B, C, H, W], channels_last, H and W those of ``like``."""
    b, _, h, w = like.shape
    return tokens.view(b, h, w, -1).permute(0, 3, 1, 2)
