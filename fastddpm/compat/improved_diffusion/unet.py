"""The networks of improved-diffusion: its constructors and its names of weights, around `fastddpm.UNet`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn import SelfAttention, UNet
from ...nn.unet import DownLevel, UpLevel
from ._exports import refuse
from .weights import layout_of, to_ours, to_theirs

ZEROED = ("out_layers.3", "proj_out", "out.2")
"""Layers that start at 0."""


class UNetModel(nn.Module):
    """The U-Net of Nichol and Dhariwal 2021, which computes as `fastddpm.UNet` and is stored as the original.

    `state_dict` and `load_state_dict` have the names, shapes and order of the original, so its files load, and it loads
    ours. Parameters lie as they do in `fastddpm.UNet`: `named_parameters` has its names, joined projections are one
    parameter, and writing into a tensor of `state_dict` need not reach the weights.

    Args:
        in_channels, out_channels: of input and output; out_channels is 2C for a learned variance.
        model_channels: width of the first level, a multiple of 32.
        num_res_blocks: residual blocks of a level on the way down.
        attention_resolutions: rates of downsampling, 1, 2, 4 .., whose levels have attention; others are ignored.
        dropout: in the residual blocks, in training. Its masks are drawn as in `fastddpm.UNet`: other than those of
            torch, the same wherever and however the network is split.
        channel_mult: width of each level in units of model_channels.
        conv_resample: must be True. dims: must be 2.
        num_classes: number of classes of a conditional network; None without.
        use_checkpoint: compute residual blocks again in backward, to save memory.
        num_heads, num_heads_upsample: heads of an attention; of one on the way up, -1 for the same.
        use_scale_shift_norm: condition by scale and shift, not by a bias.

    Raises:
        NotImplementedError: conv_resample or dims of another value. ValueError: what `fastddpm.nn.UNetConfig` refuses.

    Numerics: new weights are drawn as by the original, so a seed gives its weights: torch's defaults, 0 for the last
    convolution of each residual block, the projection of each attention and the last convolution of all.
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        num_heads: int = 1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
    ) -> None:
        super().__init__()
        for name, value, known in (("conv_resample", conv_resample, True), ("dims", dims, 2)):
            if value != known:
                raise NotImplementedError(
                    f"UNetModel: expected {name}={known}, got {value}; no published network has another, use the "
                    "original for it"
                )
        self.in_channels, self.out_channels, self.model_channels = in_channels, out_channels, model_channels
        self.num_res_blocks, self.attention_resolutions = num_res_blocks, attention_resolutions
        self.dropout, self.channel_mult, self.conv_resample = dropout, channel_mult, conv_resample
        self.num_classes, self.use_checkpoint = num_classes, use_checkpoint
        self.num_heads = num_heads
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.half_precision = False

        smallest = 2 ** (len(channel_mult) - 1)  # any size will do: heights of the config stand for rates here
        rates = [2**level for level in range(len(channel_mult))]
        with torch.device("meta"):
            network = UNet(
                image_size=(smallest, smallest),
                in_channels=in_channels,
                prediction_channels=out_channels,
                base_channels=model_channels,
                channel_mult=tuple(channel_mult),
                num_res_blocks=num_res_blocks,
                attention_resolutions=tuple(smallest // rate for rate in rates if rate in attention_resolutions),
                num_heads=num_heads,
                scale_shift=use_scale_shift_norm,
                dropout=dropout,
                num_classes=num_classes,
                null_class=False,
                norm_eps=1e-5,
                embedding="adm",
                downsample_padding="symmetric",
            )
        for module in network.up.modules():
            if isinstance(module, SelfAttention):
                if module.qkv.in_features % self.num_heads_upsample:
                    raise ValueError(
                        f"UNetModel: expected num_heads_upsample to divide the width {module.qkv.in_features} of a "
                        f"level with attention, got {self.num_heads_upsample}; -1 takes num_heads"
                    )
                module.num_heads = self.num_heads_upsample
        network.recompute(use_checkpoint)
        self.network = network.to_empty(device=torch.get_default_device())
        self.layout = layout_of(self.network)
        self._initialise()
        self.register_state_dict_post_hook(_give_their_names)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_take_their_names)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict from noisy images.

        Args:
            x: [B, C, H, W], H and W divisible by 2^(levels - 1). timesteps: [B], integers or fractions.
            y: classes int64 [B], for a network with classes, and for no other.

        Returns: [B, out_channels, H, W] in the dtype and memory order of x.

        Raises:
            ValueError: labels where there are no classes, or none where there are; a shape. TypeError: a dtype.
        """
        if (y is None) != (self.num_classes is None):
            raise ValueError(
                f"UNetModel: expected y for a network with classes and for no other, got {'none' if y is None else 'y'}"
                f" with num_classes={self.num_classes}; pass model_kwargs={{'y': labels}} or leave it out"
            )
        half = torch.autocast(x.device.type, torch.float16) if self.half_precision else contextlib.nullcontext()
        with half:
            out: Tensor = self.network(x, timesteps, y)
        order = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        return out.to(x.dtype, memory_format=order)

    def get_feature_vectors(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> dict[str, Any]:
        """What every stage gives: "down" and "up", lists of [B, C, H, W], and "middle". Args are those of `forward`."""
        found: dict[str, list[Tensor]] = {"down": [], "middle": [], "up": []}
        network = self.network
        assert network.middle is not None
        stages: list[tuple[str, nn.Module]] = [("down", network.conv_in), ("middle", network.middle)]
        for name, levels in (("down", network.down), ("up", network.up)):
            for level in levels:
                assert isinstance(level, (DownLevel, UpLevel))
                ends: list[nn.Module] = list(level.attentions or level.blocks)
                if isinstance(level, DownLevel):
                    ends += [] if level.downsample is None else [level.downsample]
                elif level.upsample is not None:
                    ends[-1] = level.upsample
                stages += [(name, end) for end in ends]

        def keep(name: str) -> Callable[..., None]:
            return lambda _module, _inputs, out: found[name].append(out.to(x.dtype))

        handles = [module.register_forward_hook(keep(name)) for name, module in stages]
        try:
            UNetModel.forward(self, x, timesteps, y)
        finally:
            for handle in handles:
                handle.remove()
        return {"down": found["down"], "middle": found["middle"][0], "up": found["up"]}

    def convert_to_fp16(self) -> None:
        """Compute in float16 from now on, by autocast; weights and their gradients stay float32."""
        self.half_precision = True

    def convert_to_fp32(self) -> None:
        """Undo `convert_to_fp16`."""
        self.half_precision = False

    @property
    def inner_dtype(self) -> torch.dtype:
        """What it computes in."""
        return torch.float16 if self.half_precision else self.network.conv_in.weight.dtype

    @torch.no_grad()
    def _initialise(self) -> None:
        """Weights as torch draws them for each layer, in the order in which the original makes its layers."""
        drawn: dict[str, Tensor] = {}
        shapes = {name: value.shape for name, value in to_theirs(self.network.state_dict(), self.layout).items()}
        for name, shape in shapes.items():
            layer, _, leaf = name.rpartition(".")
            value = torch.empty(shape)
            weight = shapes[f"{layer}.weight"]
            if len(weight) == 1:
                nn.init.constant_(value, 1.0 if leaf == "weight" else 0.0)  # a norm
            elif layer == "label_emb":
                nn.init.normal_(value)
            elif leaf == "weight":
                nn.init.kaiming_uniform_(value, a=math.sqrt(5))
            else:
                bound = 1 / math.sqrt(weight[1:].numel())
                nn.init.uniform_(value, -bound, bound)
            drawn[name] = torch.zeros_like(value) if layer.endswith(ZEROED) else value
        self.network.load_state_dict(to_ours(drawn, self.layout))


class SuperResModel(UNetModel):
    """A `UNetModel` that is given a smaller image, ``low_res``, beside the noisy one.

    Args:
        in_channels: of the noisy image. Others: of `UNetModel`.
    """

    def __init__(self, in_channels: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(in_channels * 2, *args, **kwargs)

    def forward(  # type: ignore[override]
        self, x: Tensor, timesteps: Tensor, low_res: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Predict from noisy images and ``low_res`` [B, C, h, w], which is brought to their size."""
        return super().forward(self._joined(x, low_res), timesteps, **kwargs)

    def get_feature_vectors(  # type: ignore[override]
        self, x: Tensor, timesteps: Tensor, low_res: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """See `UNetModel.get_feature_vectors`."""
        return super().get_feature_vectors(self._joined(x, low_res), timesteps, **kwargs)

    @staticmethod
    def _joined(x: Tensor, low_res: Tensor | None) -> Tensor:
        if low_res is None:
            raise ValueError("SuperResModel: expected low_res, got None; pass model_kwargs={'low_res': images}")
        return torch.cat([x, F.interpolate(low_res, x.shape[2:], mode="bilinear")], dim=1)


def _give_their_names(module: UNetModel, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    """Hook of state_dict: in place of our tensors, theirs."""
    start = f"{prefix}network."
    ours = {name.removeprefix(start): state.pop(name) for name in list(state) if name.startswith(start)}
    state.update({prefix + name: value for name, value in to_theirs(ours, module.layout).items()})


def _take_their_names(
    module: UNetModel,
    state: dict[str, Tensor],
    prefix: str,
    _metadata: Any,
    _strict: bool,
    missing: list[str],
    _unexpected: list[str],
    errors: list[str],
) -> None:
    """Hook of load_state_dict: in place of their tensors, ours; what does not fit is reported under their names."""
    values = to_theirs(dict(module.network.named_parameters()), module.layout)  # kept where nothing fits
    for theirs, own in values.items():
        name = prefix + theirs
        if name not in state:
            missing.append(name)
            continue
        value = state.pop(name)
        if value.shape == own.shape:
            values[theirs] = value.detach()
        else:
            errors.append(
                f"size mismatch for {name}: expected shape {list(own.shape)}, got {list(value.shape)}; make the model "
                "with the flags it was trained with"
            )
    with torch.no_grad():
        state.update({f"{prefix}network.{name}": value for name, value in to_ours(values, module.layout).items()})


__getattr__ = refuse(__name__, ("UNetModel", "SuperResModel"))
