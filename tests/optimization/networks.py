"""Small networks to optimize: those of other libraries, and blocks in the style of others in our words."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastddpm
from tests.tolerance import assert_near_peer, assert_within

Call = Callable[[nn.Module], Tensor]


# --- networks in the style of guided-diffusion, ddim and of scripts that build from nn.Sequential


class GroupNorm32(nn.GroupNorm):
    """In float32 at least, whatever comes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)


class Swish(nn.Module):
    """SiLU by another name."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class ResBlock(nn.Module):
    """What guided-diffusion calls so: the parts have its names and the forward is written from its equations."""

    def __init__(self, c_in: int, c_out: int, width: int, scale_shift: bool, resample: str | None = None) -> None:
        super().__init__()
        self.use_scale_shift_norm, self.updown = scale_shift, resample is not None
        self.in_layers = nn.Sequential(GroupNorm32(4, c_in), Swish(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(Swish(), nn.Linear(width, 2 * c_out if scale_shift else c_out))
        last = nn.Conv2d(c_out, c_out, 3, padding=1)
        nn.init.zeros_(last.weight)
        self.out_layers = nn.Sequential(GroupNorm32(4, c_out), Swish(), nn.Dropout(0.1), last)
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        kinds = {"up": nn.Upsample(scale_factor=2), "down": nn.AvgPool2d(2), None: nn.Identity()}
        self.h_upd = self.x_upd = kinds[resample]

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self._forward(x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[-1](self.h_upd(self.in_layers[:-1](x)))
        e = self.emb_layers(emb)[:, :, None, None].to(h.dtype)
        if self.use_scale_shift_norm:
            scale, shift = e.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + e)
        return self.skip_connection(self.x_upd(x)) + h


class OddResBlock(ResBlock):
    """Of the same name and parts, and another function."""

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return super()._forward(2 * x, emb)


OddResBlock.__name__ = "ResBlock"


class ResnetBlock(nn.Module):
    """What ddim and latent-diffusion call so."""

    def __init__(self, c_in: int, c_out: int, width: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.use_conv_shortcut = c_in, c_out, False
        self.norm1, self.norm2 = nn.GroupNorm(4, c_in, eps=1e-6), nn.GroupNorm(4, c_out, eps=1e-6)
        self.conv1, self.conv2 = nn.Conv2d(c_in, c_out, 3, padding=1), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.temb_proj, self.dropout = nn.Linear(width, c_out), nn.Dropout(0.1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        def act(a: Tensor) -> Tensor:
            return a * torch.sigmoid(a)

        h = self.conv1(act(self.norm1(x))) + self.temb_proj(act(temb))[:, :, None, None]
        h = self.conv2(self.dropout(act(self.norm2(h))))
        return (x if self.in_channels == self.out_channels else self.nin_shortcut(x)) + h


class Embedded(nn.Module):
    """Blocks one after the other, each with the embedding of t; an nn.Sequential behind."""

    def __init__(self, *blocks: nn.Module, channels: int) -> None:
        super().__init__()
        self.conv_in, self.embed = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(1, 16)
        self.blocks = nn.ModuleList(blocks)
        self.out = nn.Sequential(nn.GroupNorm(4, channels), nn.SiLU(), nn.Conv2d(channels, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        e, h = self.embed(t[:, None].to(self.embed.weight) / 1000), self.conv_in(x)
        for block in self.blocks:
            h = block(h, e)
        out: Tensor = self.out(h)
        return out


def guided(scale_shift: bool, resample: bool = False) -> Embedded:
    sizes = ("down", "up") if resample else (None, None)
    blocks = [ResBlock(8, 16, 16, scale_shift), *(ResBlock(16, 16, 16, scale_shift, size) for size in sizes)]
    made = Embedded(*blocks, channels=16)
    for block in blocks:  # else what is before them does not count
        nn.init.normal_(block.out_layers[-1].weight, std=0.1)
    return made


def ddim() -> Embedded:
    return Embedded(ResnetBlock(8, 16, 16), ResnetBlock(16, 16, 16), channels=16)


def call(network: nn.Module, size: int = 8, channels: int = 3) -> Call:
    """Two images at two timesteps, of the dtype of the network."""
    x, t = torch.randn(2, channels, size, size), torch.tensor([3, 500])

    def run(made: nn.Module) -> Tensor:
        dtype = next(made.parameters()).dtype
        out = made(x.to(dtype), t.to(dtype))
        found: Tensor = out if isinstance(out, Tensor) else out.sample
        return found

    return run


# --- what must hold for each


def randomise(network: nn.Module) -> None:
    """Norms, biases and last layers that start at 0 or 1, too."""
    with torch.no_grad():
        for p in network.parameters():
            if p.dim() == 1 or bool((p == p.flatten()[0]).all()):
                p += 0.2 * torch.randn_like(p)


def check_outputs(
    network: nn.Module, run: Call, dtype: torch.dtype = torch.float32, **options: Any
) -> fastddpm.optimization.Report:
    """As near to the network in float64 as the network as it was, within the factor of the rule."""
    network = copy.deepcopy(network).to(dtype).eval()
    exact = copy.deepcopy(network).double()
    with torch.no_grad():
        as_it_was, expected = run(network), run(exact)
        assert expected.std() > 0.01
        report = fastddpm.optimize(network, **options)
        found = run(network)
    assert found.dtype == as_it_was.dtype
    assert found.is_contiguous()  # as what it was given
    assert_within(found, expected, as_it_was.float())
    return report


def gradients(network: nn.Module, run: Call, dropout: bool = False) -> list[Tensor]:
    """Of a loss with every output in it."""
    network.train(dropout)
    torch.manual_seed(1)
    out = run(network)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)).sum().backward()
    found = [p.grad for p in network.parameters()]
    network.zero_grad()
    return [g for g in found if g is not None]


def check_gradients(network: nn.Module, run: Call, **options: Any) -> None:
    """All together by the rule; each by itself to the precision of peers, in units of its largest element."""
    exact = copy.deepcopy(network).double()
    expected, as_it_was = gradients(exact, run), gradients(network, run)
    fastddpm.optimize(network, **options)
    found = gradients(network, run)
    assert len(found) == len(expected)
    together = [torch.cat([g.flatten() for g in grads]) for grads in (found, expected, as_it_was)]
    assert_within(*together)
    for ours, theirs in zip(found, expected, strict=True):
        largest = theirs.abs().max().clamp(min=1e-4 * together[1].abs().max())  # below that it is rounding
        assert_near_peer(ours / largest, theirs / largest)
