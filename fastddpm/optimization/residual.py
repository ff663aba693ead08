"""Residual blocks of other libraries, over the fused norms: the same modules, called in the same order.

With e what a block takes of the time embedding, all of them are

    h = conv1(silu(norm1(x)));   h = conv2(drop(silu(norm2(h + e))))   or   conv2(drop(silu(norm2(h) (1 + e1) + e2)))

and x + h, x through a convolution where the channels differ (Ho et al. 2020, appendix B; Nichol and Dhariwal 2021); or
they have the norm behind each convolution. conv1 runs without its bias, which the second norm adds with e on its way.
Dropout is that of the block, so that it draws what it drew before.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .fused import Fused, convolve_without_bias, is_plain_conv, untouched
from .norms import computes_group_norm, computes_rms_norm, computes_silu, example, group_norm, rms_norm


class Block(Fused):
    """A block that is recognised by its parts, and by what it gives."""

    @staticmethod
    def against(module: Any) -> str | None:
        """Why its parts do not fit, or None."""
        raise NotImplementedError

    @staticmethod
    def trial(module: Any) -> tuple[str, nn.Module, tuple[Any, ...]]:
        """What to call, a module in it whose input must be the same, too, and what to call it with."""
        raise NotImplementedError


class DiffusersResnetBlock(Block):
    """diffusers' ResnetBlock2D."""

    pattern = "diffusers ResnetBlock2D: GroupNorm + SiLU, time embedding and bias in the second norm"
    norm1: Any
    norm2: Any
    nonlinearity: Any
    conv1: Any
    conv2: Any
    conv_shortcut: Any
    dropout: Any
    upsample: Any
    downsample: Any
    time_emb_proj: Any
    time_embedding_norm: str
    skip_time_act: bool
    output_scale_factor: float

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """[B, C1, H, W] and [B, E] to [B, C2, H', W']."""
        fits = (temb is None) == (self.time_emb_proj is None) and not args and not kwargs
        if not fits or not untouched(self.norm1, self.norm2, self.nonlinearity):
            return super().forward(input_tensor, temb, *args, **kwargs)  # type: ignore[no-any-return]
        x, h = input_tensor, group_norm(self.norm1, input_tensor)
        resample = self.upsample if self.upsample is not None else self.downsample
        if resample is not None:
            x, h = resample(x), resample(h)
        h, bias = convolve_without_bias(self.conv1, h)
        e = None
        if temb is not None and self.time_embedding_norm in ("default", "scale_shift"):
            e = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        h = _second_norm(self.norm2, h, bias, e, scale_shift=self.time_embedding_norm == "scale_shift")
        h = self.conv2(self.dropout(h))
        out = _added(h, x if self.conv_shortcut is None else self.conv_shortcut(x), self.conv2)
        return out if self.output_scale_factor == 1 else out / self.output_scale_factor

    @staticmethod
    def against(module: Any) -> str | None:
        """See `Block`."""
        if module.time_embedding_norm == "scale_shift" and module.time_emb_proj is None:
            return "its scale and shift come from elsewhere"
        return _against_parts(module.norm1, module.norm2, module.nonlinearity)

    @staticmethod
    def trial(module: Any) -> tuple[str, nn.Module, tuple[Any, ...]]:
        """See `Block`."""
        x = example(2, module.in_channels, 4, 4, like=module.conv2.weight)
        return "forward", module.conv2, (x, _example_for(module.time_emb_proj))


class OpenAIResBlock(Block):
    """The ResBlock of improved-diffusion and guided-diffusion, and of what was made of them."""

    pattern = "guided-diffusion ResBlock: GroupNorm + SiLU, time embedding and bias in the second norm"
    in_layers: Any
    out_layers: Any
    emb_layers: Any
    skip_connection: Any
    use_scale_shift_norm: bool
    updown: Any
    h_upd: Any
    x_upd: Any

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """[B, C1, ...] and [B, E] to [B, C2, ...]."""
        norm1, act1, conv1 = self.in_layers
        norm2, act2, *rest = self.out_layers
        if not untouched(self.in_layers, self.out_layers, norm1, act1, norm2, act2):
            return super()._forward(x, emb)  # type: ignore[misc, no-any-return]
        h = group_norm(norm1, x)
        if getattr(self, "updown", False):
            x, h = self.x_upd(x), self.h_upd(h)
        h, bias = convolve_without_bias(conv1, h)
        h = _second_norm(norm2, h, bias, self.emb_layers(emb), scale_shift=self.use_scale_shift_norm)
        for layer in rest:
            h = layer(h)
        return _added(h, self.skip_connection(x), rest[-1])

    @staticmethod
    def against(module: Any) -> str | None:
        """See `Block`."""
        if len(module.in_layers) != 3 or len(module.out_layers) < 3 or type(module.in_layers) is not nn.Sequential:
            return "in_layers and out_layers are not those of guided-diffusion"
        (norm1, act1, _), (norm2, act2, *_) = module.in_layers, module.out_layers
        return _against_parts(norm1, norm2, act1, act2)

    @staticmethod
    def trial(module: Any) -> tuple[str, nn.Module, tuple[Any, ...]]:
        """See `Block`."""
        conv = module.in_layers[2]
        size = (4,) * (conv.weight.dim() - 2)
        linear = next(m for m in module.emb_layers if isinstance(m, nn.Linear))
        x = example(2, conv.in_channels, *size, like=conv.weight)
        return "_forward", module.out_layers[-1], (x, _example_for(linear))


class DDIMResnetBlock(Block):
    """The ResnetBlock of ermongroup/ddim, latent-diffusion and taming-transformers, whose SiLU is a function."""

    pattern = "ddim ResnetBlock: GroupNorm + SiLU as a function, time embedding and bias in the second norm"
    norm1: Any
    norm2: Any
    conv1: Any
    conv2: Any
    temb_proj: Any
    dropout: Any
    in_channels: int
    out_channels: int
    use_conv_shortcut: bool
    conv_shortcut: Any
    nin_shortcut: Any

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """[B, C1, H, W] and [B, E] to [B, C2, H, W]."""
        if not untouched(self.norm1, self.norm2):
            return super().forward(x, temb)  # type: ignore[no-any-return]
        h, bias = convolve_without_bias(self.conv1, group_norm(self.norm1, x))
        e = None if temb is None else self.temb_proj(nn.functional.silu(temb))
        h = self.conv2(self.dropout(_second_norm(self.norm2, h, bias, e, scale_shift=False)))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return _added(h, x, self.conv2)

    @staticmethod
    def against(module: Any) -> str | None:
        """See `Block`."""
        return _against_parts(module.norm1, module.norm2)

    @staticmethod
    def trial(module: Any) -> tuple[str, nn.Module, tuple[Any, ...]]:
        """See `Block`."""
        x = example(2, module.in_channels, 4, 4, like=module.conv2.weight)
        return "forward", module.conv2, (x, _example_for(getattr(module, "temb_proj", None)))


class LucidrainsBlock(Block):
    """The Block of denoising-diffusion-pytorch: convolution, channel RMSNorm, scale and shift, SiLU, dropout."""

    pattern = "denoising-diffusion-pytorch Block: channel RMSNorm, scale and shift, SiLU"
    proj: Any
    norm: Any
    act: Any
    dropout: Any

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """[B, C1, ...] and two [B, C2, 1, ...] to [B, C2, ...]."""
        if not untouched(self.norm, self.act):
            return super().forward(x, scale_shift)  # type: ignore[no-any-return]
        scale, shift = (None, None) if scale_shift is None else [p.flatten(1) for p in scale_shift]
        y = rms_norm(self.norm.g, self.proj(x), scale=scale, shift=shift)
        out: Tensor = self.dropout(y)
        return out

    @staticmethod
    def against(module: Any) -> str | None:
        """See `Block`."""
        fits = computes_rms_norm(module.norm) and computes_silu(module.act)
        return None if fits else "its norm and its activation are not a channel RMSNorm and a SiLU"

    @staticmethod
    def trial(module: Any) -> tuple[str, nn.Module, tuple[Any, ...]]:
        """See `Block`."""
        weight = module.proj.weight
        size, ones = ([n] * (weight.dim() - 2) for n in (4, 1))
        scale_shift = example(2, 2 * weight.shape[0], *ones, like=weight).chunk(2, dim=1)
        return "forward", module.dropout, (example(2, weight.shape[1], *size, like=weight), scale_shift)


def _second_norm(norm: nn.Module, h: Tensor, bias: Tensor | None, e: Tensor | None, *, scale_shift: bool) -> Tensor:
    """silu(norm(h + bias) (1 + e1) + e2), or silu(norm(h + bias + e)); e is [B, 2C] or [B, C]."""
    if scale_shift:
        assert e is not None
        scale, shift = e.chunk(2, dim=1)
        return group_norm(norm, h, channel_bias=bias, scale=scale, shift=shift)
    added = e if bias is None else bias if e is None else e + bias
    return group_norm(norm, h, channel_bias=added)


def _added(h: Tensor, x: Tensor, conv: nn.Module) -> Tensor:
    """x + h; in the memory of h where that is what a convolution gave, which needs it no more."""
    return h.add_(x) if is_plain_conv(conv) and h.dtype == x.dtype else x + h


def _example_for(projection: Any) -> Tensor | None:
    """What a projection of the time embedding takes."""
    return None if projection is None else example(2, projection.in_features, like=projection.weight)


def _against_parts(norm1: nn.Module, norm2: nn.Module, *activations: nn.Module) -> str | None:
    for activation in activations:
        if not computes_silu(activation):
            return f"its activation is {type(activation).__name__}, not SiLU"
    return against_norms(norm1, norm2)


def against_norms(*norms: nn.Module) -> str | None:
    """Why one of them is not a group norm that an op computes, or None."""
    for norm in norms:
        if not computes_group_norm(norm):
            return f"its norm is {type(norm).__name__}, not a GroupNorm with weight and bias"
    return None
