"""The U-Net of denoising diffusion models.

With L levels of H / 2^i x W / 2^i pixels and base_channels * channel_mult[i] channels, i = 0..L-1:

    down:    num_res_blocks times (residual block, attention at chosen levels), then half the size, unless last level
    middle:  residual block, attention, residual block
    up:      from the last level to the first, num_res_blocks + 1 times (join the newest output of the way down that is
             not used yet, residual block, attention at chosen levels), then twice the size, unless first level

between one convolution 3x3 and (group norm, SiLU, convolution 3x3). With the defaults this is the CIFAR-10 network of
Ho et al. 2020 (appendix B), 35,746,307 parameters. The options lead to the networks of Nichol and Dhariwal 2021
(improved DDPM) and Dhariwal and Nichol 2021 (ADM). Improved DDPM on CIFAR-10, 52,546,438 parameters, is

    UNet(num_res_blocks=3, attention_resolutions=(16, 8), num_heads=4, scale_shift=True, learned_variance=True,
         dropout=0.3, norm_eps=1e-5, embedding="adm", downsample_padding="symmetric")

Activations are channels_last from the first layer to the last. `UNet.from_pretrained` reads the networks of other
libraries, for which the last options of the configuration are.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._calls import forget
from .._checks import check_device, check_dtype, check_shape
from .attention import SelfAttention
from .blocks import PADDINGS, Downsample, DropoutKey, Padding, ResBlock, Upsample
from .embedding import EMBEDDINGS, Embedding, TimeEmbedding
from .layers import Conv2d, Linear
from .norm import GroupNormSiLU

if TYPE_CHECKING:
    from typing_extensions import Self

Resample = Literal["conv", "resblock"]
RESAMPLES: tuple[str, ...] = get_args(Resample)
MiddleKind = Literal["attention", "plain_attention", "blocks", "none"]
MIDDLES: tuple[str, ...] = get_args(MiddleKind)


OPTIONAL = ("head_channels", "num_classes", "time_width", "prediction_channels")


@dataclass(frozen=True)
class UNetConfig:
    """What a `UNet` is made of; the defaults are the CIFAR-10 network of Ho et al. 2020.

    Args:
        image_size: (height, width) of the images, each divisible by 2^(levels - 1); an int n means (n, n). It decides
            which levels have attention. The network takes images of other divisible sizes too.
        in_channels: channels C of an image, >= 1.
        learned_variance: give 2C channels: the prediction, then what places the log-variance between its bounds
            (Nichol and Dhariwal 2021, eq. 15).
        base_channels: width of the first level, >= 2; the time embedding is four times as wide.
        channel_mult: width of each level in units of base_channels; one integer >= 1 per level.
        num_res_blocks: residual blocks per level on the way down, >= 1; there is one more on the way up.
        attention_resolutions: heights, in pixels of the feature map, of the levels with attention; () for the
            middle alone, which has it always.
        num_heads: heads of every attention, >= 1.
        head_channels: channels of a head, >= 1, in place of num_heads.
        scale_shift: condition residual blocks by scale and shift after the second norm, not by a bias before it.
        dropout: probability in [0, 1), in the residual blocks, in training.
        num_classes: number of classes, >= 1; None for a network without labels.
        num_groups: groups of every group norm; divides the width of every level.
        norm_eps: added to the variances, > 0: 1e-6 (Ho et al.) or 1e-5 (improved DDPM, ADM).
        embedding: "ddpm" or "adm", see `fastddpm.nn.embedding`, which has two more.
        downsample_padding: "same" (right and bottom, Ho et al.) or "symmetric" (improved DDPM, ADM).
        resample: change size by a convolution, "conv", or by a residual block, "resblock" (ADM).
        widths: channels of each level, the first being those of the first convolution, in place of channel_mult times
            base_channels (ADM at 512x512 pixels, and ratios that are no integers).
        time_width: length of the time embedding, >= 1; None is four times base_channels.
        time_scale: timesteps are multiplied by it, > 0: 1000 / T where improved DDPM was trained with
            rescale_timesteps.
        null_class: have one class more, for none (classifier-free guidance); False takes labels alone.
        middle: the middle has residual blocks with "attention" between, with attention that has no group norm of its
            own, "plain_attention", or "blocks" alone; "none" leaves the middle out.
        middle_scale: divide what each part of the middle gives by this, > 0.
        prediction_channels: channels of the prediction, >= 1, where they are not in_channels, since the input has a
            condition beside x_t; None is in_channels.
        center_input: bring inputs in [0, 1] to [-1, 1].
        up_attention_resolutions: attention_resolutions of the way up, where they are others.

    Raises:
        ValueError: a value out of its range, or values that do not fit together.
    """

    image_size: tuple[int, int] = (32, 32)
    in_channels: int = 3
    learned_variance: bool = False
    base_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    num_heads: int = 1
    head_channels: int | None = None
    scale_shift: bool = False
    dropout: float = 0.0
    num_classes: int | None = None
    num_groups: int = 32
    norm_eps: float = 1e-6
    embedding: Embedding = "ddpm"
    downsample_padding: Padding = "same"
    resample: Resample = "conv"
    widths: tuple[int, ...] | None = None
    time_width: int | None = None
    time_scale: float = 1.0
    null_class: bool = True
    middle: MiddleKind = "attention"
    middle_scale: float = 1.0
    prediction_channels: int | None = None
    center_input: bool = False
    up_attention_resolutions: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if _is_int(self.image_size):
            object.__setattr__(self, "image_size", (self.image_size, self.image_size))
        sequences = ("widths", "up_attention_resolutions")
        for name in ("image_size", "channel_mult", "attention_resolutions", *sequences):
            value = getattr(self, name)
            if value is None and name in sequences:
                continue
            sequence = isinstance(value, (list, tuple)) and all(_is_int(v) and v >= 1 for v in value)
            _expect(sequence, name, "to be a sequence of integers >= 1", value, "pass a tuple of integers")
            object.__setattr__(self, name, tuple(value))
        _expect(len(self.image_size) == 2, "image_size", "to be (height, width)", self.image_size, "pass two integers")
        _expect(len(self.channel_mult) > 0, "channel_mult", "to have a number per level", (), "(1, 2, 2, 2) is usual")
        many = self.widths is None or len(self.widths) > 0
        _expect(many, "widths", "to have a number per level", self.widths, "or leave it out and give channel_mult")
        for name in ("in_channels", "num_res_blocks", "num_heads", "num_groups", *OPTIONAL):
            value = getattr(self, name)
            optional = value is None and name in OPTIONAL
            _expect(optional or (_is_int(value) and value >= 1), name, "to be an integer >= 1", value, "choose one")
        wide = _is_int(self.base_channels) and self.base_channels >= 2
        _expect(wide, "base_channels", "to be an integer >= 2", self.base_channels, "choose one")
        for name in ("learned_variance", "scale_shift", "null_class", "center_input"):
            value = getattr(self, name)
            _expect(isinstance(value, bool), name, "to be True or False", value, "choose one of these")
        for name, choices in (
            ("embedding", EMBEDDINGS),
            ("downsample_padding", PADDINGS),
            ("resample", RESAMPLES),
            ("middle", MIDDLES),
        ):
            value, wanted = getattr(self, name), " or ".join(map(repr, choices))
            _expect(value in choices, name, f"to be {wanted}", value, "choose one of these")
        probability = _is_number(self.dropout) and 0 <= self.dropout < 1
        _expect(probability, "dropout", "in [0, 1)", self.dropout, "0.1 drops one element in ten")
        for name, usual in (
            ("norm_eps", "1e-6 and 1e-5 are usual"),
            ("time_scale", "1 is usual"),
            ("middle_scale", "1 is usual"),
        ):
            value = getattr(self, name)
            _expect(_is_number(value) and 0 < value < float("inf"), name, "> 0 and finite", value, usual)

        _check_divisible("UNetConfig", "image_size", *self.image_size, len(self.level_widths), self._fewer_levels())
        heights = [("attention_resolutions", height) for height in self.attention_resolutions]
        heights += [("up_attention_resolutions", height) for height in self.up_attention_resolutions or ()]
        for name, height in heights:
            _expect(
                height in self.level_heights,
                name,
                f"to be heights of feature maps, here {self.level_heights}",
                height,
                "choose among these, or () for attention in the middle alone, or give channel_mult more levels",
            )
        for width in self.level_widths:
            _expect(
                width % self.num_groups == 0,
                "num_groups",
                f"to divide the width of every level, here {self.level_widths}",
                self.num_groups,
                f"set num_groups to a divisor of {self.base_channels}, or base_channels to a multiple of num_groups",
            )
        name = "num_heads" if self.head_channels is None else "head_channels"
        in_middle = self.level_widths[-1] if "attention" in self.middle else None
        both_ways = zip(self.level_widths, self.level_has_attention, self.up_level_has_attention, strict=True)
        for width, *has_attention in both_ways:
            if any(has_attention) or width == in_middle:
                _expect(
                    width % getattr(self, name) == 0,
                    name,
                    f"to divide the width {width} of a level with attention",
                    getattr(self, name),
                    f"set {name} to a divisor of {width}",
                )

    def _fewer_levels(self) -> str:
        """Options with as many levels as the size of the images can be halved for, and the attention that is nearest to
        what was asked for; empty where there is one level alone."""
        height, width = self.image_size
        halvings = min((n & -n).bit_length() - 1 for n in (height, width))
        if halvings == 0:
            return ""
        name, widths = ("channel_mult", self.channel_mult) if self.widths is None else ("widths", self.widths)
        heights = [height >> i for i in range(halvings + 1)]
        options: dict[str, tuple[int, ...]] = {name: widths[: halvings + 1]}
        for option in ("attention_resolutions", "up_attention_resolutions"):
            wanted = getattr(self, option)
            if wanted:
                nearest = {min(heights, key=lambda h: abs(math.log(h / each))) for each in wanted}
                options[option] = tuple(sorted(nearest, reverse=True))
        return " and ".join(f"{option}={value}" for option, value in options.items())

    @property
    def level_heights(self) -> tuple[int, ...]:
        """Height of the feature map at each level."""
        return tuple(self.image_size[0] >> i for i in range(len(self.level_widths)))

    @property
    def level_widths(self) -> tuple[int, ...]:
        """Channels at each level."""
        return tuple(self.base_channels * m for m in self.channel_mult) if self.widths is None else self.widths

    @property
    def level_has_attention(self) -> tuple[bool, ...]:
        """Whether the residual blocks of each level have attention behind them, on the way down."""
        return tuple(height in self.attention_resolutions for height in self.level_heights)

    @property
    def up_level_has_attention(self) -> tuple[bool, ...]:
        """The same on the way up, the first level first."""
        if self.up_attention_resolutions is None:
            return self.level_has_attention
        return tuple(height in self.up_attention_resolutions for height in self.level_heights)

    @property
    def live_elements(self) -> int:
        """Elements that are kept at a time for one image without gradients, at least: all that the way up joins, and of
        its largest block the input, what is made of it, and a copy of each."""
        widths, pixels = self.level_widths, [(h * self.image_size[1]) >> i for i, h in enumerate(self.level_heights)]
        joined = sum((self.num_res_blocks + 1) * c * n for c, n in zip(widths, pixels, strict=True))
        wider = [*widths[1:], widths[-1]]  # what comes from below
        return joined + 4 * max((c + below) * n for c, below, n in zip(widths, wider, pixels, strict=True))

    @property
    def out_channels(self) -> int:
        """Channels that the network gives: C, or 2C with a learned variance."""
        predicted = self.in_channels if self.prediction_channels is None else self.prediction_channels
        return 2 * predicted if self.learned_variance else predicted


FIRST_OPTIONS = [field.name for field in dataclasses.fields(UNetConfig)].index("widths")
"""Number of options that the first version had."""


class DownLevel(nn.Module):
    """One level of the way down.

    Args:
        blocks: residual blocks.
        attentions: as many, one behind each block; or none.
        downsample: what halves the size; None at the last level.
    """

    def __init__(
        self, blocks: list[ResBlock], attentions: list[SelfAttention], downsample: Downsample | ResBlock | None
    ) -> None:
        super().__init__()
        self.blocks, self.attentions, self.downsample = nn.ModuleList(blocks), nn.ModuleList(attentions), downsample

    def forward(self, x: Tensor, e: tuple[Tensor, ...], key: DropoutKey | None) -> list[Tensor]:
        """All outputs that the way up will join, oldest first; the last is what the next level takes."""
        outputs = []
        for i, block in enumerate(self.blocks):
            x = _apply(block, x, e, key)
            if self.attentions:
                x = self.attentions[i](x)
            outputs.append(x)
        if self.downsample is not None:
            outputs.append(_apply(self.downsample, x, e, key))
        return outputs


class Middle(nn.Module):
    """Residual block, attention (or none), residual block, at the smallest size."""

    def __init__(self, block1: ResBlock, attention: SelfAttention | None, block2: ResBlock) -> None:
        super().__init__()
        self.block1, self.attention, self.block2 = block1, attention, block2

    def forward(self, x: Tensor, e: tuple[Tensor, ...], key: DropoutKey | None) -> Tensor:
        """[B, C, H, W] to the same."""
        x = _apply(self.block1, x, e, key)
        return _apply(self.block2, x if self.attention is None else self.attention(x), e, key)


class UpLevel(nn.Module):
    """One level of the way up.

    Args:
        blocks: residual blocks, each of which takes one more output of the way down.
        attentions: as many, one behind each block; or none.
        upsample: what doubles the size; None at the first level.
    """

    def __init__(
        self, blocks: list[ResBlock], attentions: list[SelfAttention], upsample: Upsample | ResBlock | None
    ) -> None:
        super().__init__()
        self.blocks, self.attentions, self.upsample = nn.ModuleList(blocks), nn.ModuleList(attentions), upsample

    def forward(self, x: Tensor, skips: list[Tensor], e: tuple[Tensor, ...], key: DropoutKey | None) -> Tensor:
        """Apply the level; what it joins is taken from the end of ``skips``."""
        for i, block in enumerate(self.blocks):
            assert isinstance(block, ResBlock)
            x = block(x, e[block.layer], key, skips.pop())
            if self.attentions:
                x = self.attentions[i](x)
        return x if self.upsample is None else _apply(self.upsample, x, e, key)


class UNet(nn.Module):
    """The network that predicts noise (or x_0, or v) from a noisy image and its timestep: eps_theta(x_t, t).

    Args:
        config: what it is made of; None for the defaults of `UNetConfig`.
        **overrides: options of `UNetConfig` that take the place of those in ``config``.

    Attributes: config, in_channels, out_channels, num_classes, null_class, learned_variance.

    Raises:
        ValueError: an option that `UNetConfig` does not have, or a value that it refuses.

    Numerics: weights start as in Ho et al. 2020: uniform with variance 2 / (fan_in + fan_out), biases 0; and 0 for the
        last convolution of each residual block, the last projection of each attention and the last convolution of all,
        so that a new network gives 0. The class embedding starts as N(0, 1).
    """

    def __init__(self, config: UNetConfig | None = None, **overrides: Any) -> None:
        super().__init__()
        refuse_unknown("UNet", overrides)
        config = dataclasses.replace(config if config is not None else UNetConfig(), **overrides)
        self.config = config
        self.in_channels, self.out_channels = config.in_channels, config.out_channels
        self.num_classes, self.learned_variance = config.num_classes, config.learned_variance
        self.null_class = config.null_class
        groups, eps = config.num_groups, config.norm_eps
        self.projected: list[int] = []  # elements of the time projection that each residual block takes, by its number

        def block(
            c_in: int, c_out: int, resample: Literal["down", "up"] | None = None, output_scale: float = 1.0
        ) -> ResBlock:
            layer = len(self.projected)
            made = ResBlock(
                c_in, c_out, groups, eps, scale_shift=config.scale_shift, dropout=config.dropout, layer=layer,
                resample=resample, output_scale=output_scale,
            )  # fmt: skip
            self.projected.append(made.embedding_width)
            return made

        def attention(c: int, norm: bool = True, output_scale: float = 1.0) -> SelfAttention:
            heads = config.num_heads if config.head_channels is None else c // config.head_channels
            return SelfAttention(c, heads, groups if norm else None, eps, output_scale=output_scale)

        width = 4 * config.base_channels if config.time_width is None else config.time_width
        self.time_embedding = TimeEmbedding(config.base_channels, width, config.embedding, config.time_scale)
        self.class_embedding = (
            None if config.num_classes is None else nn.Embedding(config.num_classes + config.null_class, width)
        )
        c = config.base_channels if config.widths is None else config.widths[0]
        self.conv_in = Conv2d(config.in_channels, c, 3, padding=1)

        skips = [c]  # channels of the outputs that the way up will join
        self.down = nn.ModuleList()
        levels = list(zip(config.level_widths, config.level_has_attention, strict=True))
        for i, (c_out, has_attention) in enumerate(levels):
            blocks = [block(c if n == 0 else c_out, c_out) for n in range(config.num_res_blocks)]
            attentions = [attention(c_out) for _ in blocks if has_attention]
            skips += [c_out] * len(blocks)
            c = c_out
            downsample: Downsample | ResBlock | None = None
            if i < len(levels) - 1:
                resblock = config.resample == "resblock"
                downsample = block(c, c, "down") if resblock else Downsample(c, config.downsample_padding)
                skips.append(c)
            self.down.append(DownLevel(blocks, attentions, downsample))

        self.middle: Middle | None = None
        if config.middle != "none":
            scale, norm = config.middle_scale, config.middle == "attention"
            block1 = block(c, c, output_scale=scale)
            between = None if config.middle == "blocks" else attention(c, norm, scale)
            self.middle = Middle(block1, between, block(c, c, output_scale=scale))

        self.up = nn.ModuleList()
        levels = list(zip(config.level_widths, config.up_level_has_attention, strict=True))
        for i, (c_out, has_attention) in reversed(list(enumerate(levels))):
            joined = [skips.pop() for _ in range(config.num_res_blocks + 1)]
            blocks = [block((c if n == 0 else c_out) + skip, c_out) for n, skip in enumerate(joined)]
            attentions = [attention(c_out) for _ in blocks if has_attention]
            c = c_out
            upsample: Upsample | ResBlock | None = None
            if i > 0:
                upsample = block(c, c, "up") if config.resample == "resblock" else Upsample(c)
            self.up.append(UpLevel(blocks, attentions, upsample))

        self.norm_out = GroupNormSiLU(c, groups, eps)
        self.conv_out = Conv2d(c, config.out_channels, 3, padding=1)
        self.time_projection = Linear(width, sum(self.projected))  # of all residual blocks, in order of their number
        self._initialise()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        *,
        seed: Tensor | int | None = None,
        sample: Tensor | None = None,
        step: Tensor | int | None = None,
    ) -> Tensor:
        """Predict from noisy images x_t at timesteps t.

        Args:
            x: noisy images, floating point, [B, C, H, W], H and W divisible by 2^(levels - 1). Here, and nowhere later,
                they are brought to channels_last and to the dtype of the weights, where they are not so already.
            t: timesteps, 0 = least noise: integer, float32 or float64, [B].
            labels: classes 0..num_classes-1, or num_classes for no class, int64, [B]; None means no class for all. With
                null_class=False there is no such class, and labels are needed.
            seed, sample, step: where dropout draws in training (see `fastddpm.ops.philox`): int or int64 [] / int64 [B]
                / int or int64 []. By default the seed comes from torch's generator of the device, rows are numbered
                from 0, and step is 0.

        Returns: [B, C, H, W], or [B, 2C, H, W] with a learned variance, in the dtype of the weights or of autocast.

        Raises:
            ValueError: a shape or device that does not fit; labels for a network without classes, or none for one
                without a null class. TypeError: a dtype.

        Numerics: the sinusoids of t are never in half precision. Nothing waits for the device.
        """
        self._check(x, t, labels)
        e = self._embed(t, labels)
        key = self._dropout_key(x, seed, sample, step)
        dtype = self.conv_in.weight.dtype
        if self.config.center_input:  # in the wider of the two dtypes
            x = 2 * x.to(torch.promote_types(x.dtype, dtype)) - 1
        x = x.to(dtype=dtype, memory_format=torch.channels_last)

        skips = [self.conv_in(x)]
        for level in self.down:
            skips += level(skips[-1], e, key)
        h = skips[-1] if self.middle is None else self.middle(skips[-1], e, key)
        for level in self.up:
            h = level(h, skips, e, key)
        out: Tensor = self.conv_out(self.norm_out(h))
        return out

    def recompute(self, enabled: bool = True) -> None:
        """Whether training keeps only the inputs of each residual block, attention and downsampling, and computes these
        again in backward: less memory, one forward pass more; the same bits."""
        for module in self.modules():
            if isinstance(module, (ResBlock, SelfAttention, Downsample)):
                module.recompute = enabled

    def cast_parameters(self) -> set[str]:
        """Names of the parameters that torch.autocast casts wherever they are read: those of convolutions and linear
        layers, but for the first bias of a residual block, which a norm reads."""
        found = {
            f"{name}.{key}"
            for name, module in self.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear))
            for key in module._parameters
        }
        blocks = {name for name, module in self.named_modules() if isinstance(module, ResBlock)}
        return found - {f"{name}.conv1.bias" for name in blocks}

    def to_config(self) -> dict[str, Any]:
        """The configuration as plain data for JSON; `from_config` makes a network of it.

        Options that came after the first version are left out where they have their defaults, so that configurations
        compare equal with those that earlier versions wrote.
        """
        options = dataclasses.asdict(self.config)
        for field in dataclasses.fields(self.config)[FIRST_OPTIONS:]:
            if options[field.name] == field.default:
                del options[field.name]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> UNet:
        """A new network from what `to_config` gave; options that are missing have their defaults.

        Raises:
            ValueError: an option that `UNetConfig` does not have, named, or a value that it refuses.
        """
        refuse_unknown("UNet.from_config", config)
        return cls(UNetConfig(**config))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        attention_order: Literal["legacy", "new"] | None = None,
        num_timesteps: int | None = None,
        rescale_timesteps: bool | None = None,
        **options: Any,
    ) -> UNet:
        """A trained network, of this library or of another, in eval mode on the CPU.

        Read are folders that `save_pretrained` wrote; a ``UNet2DModel`` of diffusers (its folder, that of a pipeline
        with the sub-folder ``unet``, or the same as a repository on the Hugging Face hub); and ``.pt`` files of
        improved-diffusion and guided-diffusion, which hold weights alone.

        Args:
            path: a folder, a file, or the name of a repository such as "google/ddpm-cifar10-32"; a folder of that name
                is preferred.
            subfolder: where in the folder or repository; None looks there, then in ``unet``.
            revision: of the repository on the hub: a branch, tag or commit.
            dtype: of the weights, floating point; what is stored is rounded to it once.
            attention_order: of a .pt file with several heads: "new" where it was trained with
                use_new_attention_order, else "legacy".
            num_timesteps: of a .pt file: T that it was trained with (diffusion_steps).
            rescale_timesteps: of a .pt file whose T is not 1000: whether it was trained with that flag.
            **options: options of `UNetConfig` that the files cannot tell: image_size and num_heads or head_channels for
                a .pt file; dropout for further training; null_class=True for a network of diffusers whose last class
                stands for none. What the files tell cannot be changed.

        Raises:
            ValueError: nothing to read there; a file that is no such network, or is damaged; options that are missing,
                unknown, or against what the files say; a configuration that cannot be represented, with each key at
                fault. ImportError: a repository on the hub without the package huggingface_hub.

        Numerics: tensors are copied, or permuted where rows are ordered in another way; none is computed.
        """
        from .pretrained import load_unet  # it builds networks, so it stands above this module

        about = dict(attention_order=attention_order, num_timesteps=num_timesteps, rescale_timesteps=rescale_timesteps)
        return load_unet(path, subfolder=subfolder, revision=revision, dtype=dtype, options=options, about=about)

    def save_pretrained(self, folder: str | Path, format: Literal["fastddpm", "diffusers"] = "fastddpm") -> None:
        """Write the network to a folder that `from_pretrained` reads: config.json and weights in safetensors.

        Args:
            folder: where to; made where it is missing, files of the same names are replaced.
            format: "fastddpm", or "diffusers" for what ``UNet2DModel.from_pretrained`` of diffusers reads.

        Raises:
            ValueError: another format, or options that diffusers does not have, each named.
        """
        from .pretrained import save_unet

        save_unet(self, folder, format)

    def _embed(self, t: Tensor, labels: Tensor | None) -> tuple[Tensor, ...]:
        """What each residual block takes: W silu(embedding(t) + class) + b, W of all blocks in one product."""
        embedding = self.time_embedding(t)
        if self.class_embedding is not None:
            null_class = self.class_embedding.weight[-1]
            embedding = embedding + (null_class if labels is None else self.class_embedding(labels))
        e: Tensor = self.time_projection(F.silu(embedding))
        return torch.split(e, self.projected, dim=1)

    def _dropout_key(
        self, x: Tensor, seed: Tensor | int | None, sample: Tensor | None, step: Tensor | int | None
    ) -> DropoutKey | None:
        if not self.training or self.config.dropout == 0:
            return None
        if seed is None:
            seed = torch.randint(0, 2**63 - 1, (), device=x.device)
        if sample is None:
            sample = torch.arange(x.shape[0], device=x.device)
        return DropoutKey(seed, sample, 0 if step is None else step)

    def _check(self, x: Tensor, t: Tensor, labels: Tensor | None) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"UNet: expected x of shape [B, {self.in_channels}, H, W], got {list(x.shape)}; "
                f"reshape it, or build the network with another in_channels"
            )
        if not x.is_floating_point():
            raise TypeError(f"UNet: expected x of a floating-point dtype, got {x.dtype}; bring pixels to [-1, 1] first")
        _check_divisible("UNet", "x", x.shape[2], x.shape[3], len(self.config.level_widths))
        check_shape("UNet", "t", t, (x.shape[0],))
        if t.dtype in (torch.bfloat16, torch.float16):
            raise TypeError(
                f"UNet: expected t of an integer dtype, float32 or float64, got {t.dtype}; it cannot hold each timestep"
            )
        check_device("UNet", x, t=t, labels=labels)
        if labels is None and self.num_classes is not None and not self.null_class:
            raise ValueError(
                f"UNet: expected labels for a network with {self.num_classes} classes and no null class, got None; "
                "pass the class of each image, int64 [B]"
            )
        if labels is not None:
            if self.num_classes is None:
                raise ValueError(
                    "UNet: expected labels to be None for a network without classes, got a tensor; "
                    "leave them out, or build the network with num_classes"
                )
            check_shape("UNet", "labels", labels, (x.shape[0],))
            check_dtype("UNet", "labels", labels, torch.int64)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        forget(self)  # before weights are moved or cast: what samplings keep of them takes memory
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @torch.no_grad()
    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        # What is stored fused is initialised as the separate projections that it stands for.
        for part in torch.split(self.time_projection.weight, self.projected):
            nn.init.xavier_uniform_(part)
        for module in self.modules():
            if isinstance(module, SelfAttention):
                for part in module.qkv.weight.chunk(3):
                    nn.init.xavier_uniform_(part)
                nn.init.zeros_(module.proj.weight)
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.conv2.weight)
        nn.init.zeros_(self.conv_out.weight)
        for p in self.parameters():
            if p.dim() == 4:
                p.data = p.data.to(memory_format=torch.channels_last)


def _apply(module: nn.Module, x: Tensor, e: tuple[Tensor, ...], key: DropoutKey | None) -> Tensor:
    """A residual block takes its part of the time projection; a convolution that resamples knows only x."""
    out: Tensor = module(x, e[module.layer], key) if isinstance(module, ResBlock) else module(x)
    return out


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _expect(condition: bool, name: str, what: str, value: Any, remedy: str) -> None:
    if not condition:
        raise ValueError(f"UNetConfig: expected {name} {what}, got {value!r}; {remedy}")


def _check_divisible(who: str, name: str, height: int, width: int, num_levels: int, recipe: str = "") -> None:
    """The network halves height and width num_levels - 1 times; ``recipe`` says how to halve less often."""
    divisor = 2 ** (num_levels - 1)
    if height % divisor or width % divisor:
        near = "x".join(str(-(-size // divisor) * divisor) for size in (height, width))
        fewer = f"for this size give {recipe}" if recipe else "give channel_mult fewer levels"
        raise ValueError(
            f"{who}: expected {name} with height and width divisible by {divisor} = 2^(levels - 1), "
            f"got {height}x{width}; pad or resize the images to {near}, or {fewer}"
        )


def refuse_unknown(who: str, options: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(UNetConfig)]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"choose among {', '.join(known)}"
            raise ValueError(f"{who}: expected options of UNetConfig, got {name!r}; {remedy}")
