"""What the configuration and the tensors of a ``UNet2DModel`` of diffusers mean, and ours in its terms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..embedding import Embedding
from ..unet import DownLevel, UNet, UNetConfig, UpLevel
from .options import prediction_options, size_options, width_options
from .weights import Layout, layout_from

WHO = "UNet.from_pretrained"

# What a key means that config.json does not have.
DEFAULTS: dict[str, Any] = dict(
    sample_size=None, in_channels=3, out_channels=3, center_input_sample=False, time_embedding_type="positional",
    time_embedding_dim=None, freq_shift=0, flip_sin_to_cos=True,
    down_block_types=["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    mid_block_type="UNetMidBlock2D",
    up_block_types=["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    block_out_channels=[224, 448, 672, 896], layers_per_block=2, mid_block_scale_factor=1, downsample_padding=1,
    downsample_type="conv", upsample_type="conv", dropout=0.0, act_fn="silu", attention_head_dim=8, norm_num_groups=32,
    attn_norm_num_groups=None, norm_eps=1e-5, resnet_time_scale_shift="default", add_attention=True,
    class_embed_type=None, num_class_embeds=None, num_train_timesteps=None,
)  # fmt: skip
# Its moving average writes its own options into config.json, too; they say nothing of the network.
OF_THE_AVERAGE = frozenset(
    ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")
)
DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
EMBEDDING_OF: dict[tuple[bool, int], Embedding] = {  # (flip_sin_to_cos, freq_shift)
    (False, 1): "ddpm", (True, 0): "adm", (True, 1): "ddpm_cos_first", (False, 0): "adm_sin_first",
}  # fmt: skip
OWN_KEY = "_fastddpm"  # diffusers passes over keys with an underscore in front
FREE = ("image_size", "dropout", "null_class", "learned_variance", "prediction_channels")

LEAVES = {
    "shortcut": ("conv_shortcut",),
    "norm": ("group_norm",),
    "qkv": ("to_q", "to_k", "to_v"),
    "proj": ("to_out.0",),
    "linear1": ("linear_1",),
    "linear2": ("linear_2",),
}


class Fault(NamedTuple):
    """A key of a configuration that we cannot represent, its value, and what would do."""

    key: str
    value: Any
    supported: str


def to_unet_config(config: Mapping[str, Any], options: Mapping[str, Any], source: str) -> UNetConfig:
    """Our configuration of a UNet2DModel.

    Args:
        config: contents of its config.json. options: what the user adds, of `FREE` here, see `UNet.from_pretrained`.
        source: named in messages.

    Raises:
        ValueError: a configuration that cannot be represented, with every key at fault.
    """
    c = {**DEFAULTS, **{key: value for key, value in config.items() if key in DEFAULTS}}
    faults = [
        Fault(key, value, "no such key")
        for key, value in config.items()
        if key not in DEFAULTS and not key.startswith("_") and key not in OF_THE_AVERAGE and value is not None
    ]

    def expect(condition: bool, key: str, supported: str) -> bool:
        if not condition:
            faults.append(Fault(key, c[key], supported))
        return condition

    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        faults.append(Fault("_class_name", config["_class_name"], "UNet2DModel"))
    for key in ("in_channels", "out_channels", "layers_per_block", "norm_num_groups"):
        expect(_is_count(c[key]), key, "an integer >= 1")
    for key in ("time_embedding_dim", "num_class_embeds", "attention_head_dim", "attn_norm_num_groups"):
        expect(c[key] is None or _is_count(c[key]), key, "null or an integer >= 1")
    for key in ("center_input_sample", "flip_sin_to_cos", "add_attention"):
        expect(isinstance(c[key], bool), key, "true or false")
    for key in ("norm_eps", "mid_block_scale_factor"):
        expect(_is_number(c[key]) and c[key] > 0, key, "a number > 0")
    expect(_is_number(c["dropout"]) and 0 <= c["dropout"] < 1, "dropout", "a number in [0, 1)")
    expect(c["freq_shift"] in (0, 1), "freq_shift", "0 or 1")
    expect(c["time_embedding_type"] == "positional", "time_embedding_type", "'positional'")
    expect(str(c["act_fn"]).lower() in ("silu", "swish"), "act_fn", "'silu' or 'swish'")
    expect(c["class_embed_type"] is None, "class_embed_type", "null")
    expect(c["mid_block_type"] in ("UNetMidBlock2D", None), "mid_block_type", "'UNetMidBlock2D' or null")
    expect(
        c["resnet_time_scale_shift"] in ("default", "scale_shift"), "resnet_time_scale_shift", "default or scale_shift"
    )

    widths = c["block_out_channels"]
    listed = isinstance(widths, (list, tuple)) and len(widths) > 0 and all(map(_is_count, widths))
    known = expect(listed, "block_out_channels", "a list of integers >= 1")
    for key, kinds in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        c[key] = [str(kind).removeprefix("UNetRes") for kind in c[key] or ()]
        known &= expect(all(kind in kinds for kind in c[key]), key, f"of {', '.join(kinds)}")
        known &= expect(not listed or len(c[key]) == len(widths), key, "one for each of block_out_channels")
    if known:
        _check_levels(c, faults, options)
    if faults:
        raise ValueError(
            f"{WHO}: expected a configuration that a fastddpm.UNet can represent, got from {source}: "
            + "; ".join(f"{fault.key} {fault.value!r} (supported: {fault.supported})" for fault in faults)
            + "; run this network with diffusers, fastddpm.optimize makes it faster there"
        )
    return _represented(c, options, config.get(OWN_KEY) or {}, source)


def from_unet_config(config: UNetConfig) -> dict[str, Any]:
    """The configuration of a UNet2DModel that is our network.

    Raises:
        ValueError: options that it does not have, each named.
    """
    widths, faults = config.level_widths, []

    def expect(condition: bool, name: str, supported: str) -> None:
        if not condition:
            faults.append(Fault(name, getattr(config, name), supported))

    expect(config.time_scale == 1, "time_scale", "1")
    if config.widths is None:
        expect(config.channel_mult[0] == 1, "channel_mult", "1 in front")
    else:
        expect(config.base_channels == widths[0], "base_channels", f"the first of widths, {widths[0]}")
    scale_shift = "scale_shift" if config.scale_shift else "default"
    expect(config.middle != "plain_attention" or config.scale_shift, "middle", "this with scale_shift alone")

    both_ways = zip(widths, config.level_has_attention, config.up_level_has_attention, strict=True)
    attended = {width for width, *has_attention in both_ways if any(has_attention)}
    attended |= {widths[-1]} if "attention" in config.middle else set()
    head_dim = config.head_channels
    if head_dim is None and config.num_heads > 1 and attended:
        expect(len(attended) == 1, "num_heads", f"1, or head_channels, with attention of widths {sorted(attended)}")
        head_dim = max(attended) // config.num_heads
    if faults:
        raise ValueError(
            "UNet.save_pretrained: expected options that a UNet2DModel of diffusers has, got "
            + "; ".join(f"{fault.key}={fault.value!r} (supported: {fault.supported})" for fault in faults)
            + "; save with format='fastddpm'"
        )

    resblocks = config.resample == "resblock"
    down = [
        "AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" if resblocks else "DownBlock2D"
        for a in config.level_has_attention
    ]
    up = [
        "AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" if resblocks else "UpBlock2D"
        for a in reversed(config.up_level_has_attention)
    ]
    flip, shift = next(key for key, kind in EMBEDDING_OF.items() if kind == config.embedding)
    height, width = config.image_size
    size_changes = "resnet" if resblocks else "conv"
    return {
        "_class_name": "UNet2DModel",
        "act_fn": "silu",
        "add_attention": config.middle != "blocks",
        "attention_head_dim": head_dim,
        "attn_norm_num_groups": config.num_groups if config.middle == "attention" and config.scale_shift else None,
        "block_out_channels": list(widths),
        "center_input_sample": config.center_input,
        "class_embed_type": None,
        "down_block_types": down,
        "downsample_padding": 0 if config.downsample_padding == "same" else 1,
        "downsample_type": size_changes,
        "dropout": config.dropout,
        "flip_sin_to_cos": flip,
        "freq_shift": shift,
        "in_channels": config.in_channels,
        "layers_per_block": config.num_res_blocks,
        "mid_block_scale_factor": config.middle_scale,
        "mid_block_type": None if config.middle == "none" else "UNetMidBlock2D",
        "norm_eps": config.norm_eps,
        "norm_num_groups": config.num_groups,
        "num_class_embeds": None if config.num_classes is None else config.num_classes + config.null_class,
        "out_channels": config.out_channels,
        "resnet_time_scale_shift": scale_shift,
        "sample_size": height if height == width else [height, width],
        "time_embedding_dim": config.time_width,
        "time_embedding_type": "positional",
        "up_block_types": up,
        "upsample_type": size_changes,
        # what these keys cannot tell apart
        OWN_KEY: {"null_class": config.null_class, "learned_variance": config.learned_variance},
    }


def layout(unet: UNet) -> Layout:
    """What our tensors are called in a UNet2DModel."""
    modules = {
        "conv_in": "conv_in",
        "time_embedding": "time_embedding",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    }
    if unet.class_embedding is not None:
        modules["class_embedding"] = "class_embedding"
    for way, levels in (("down", unet.down), ("up", unet.up)):
        for i, level in enumerate(levels):
            assert isinstance(level, (DownLevel, UpLevel))
            for j in range(len(level.blocks)):
                modules[f"{way}.{i}.blocks.{j}"] = f"{way}_blocks.{i}.resnets.{j}"
            for j in range(len(level.attentions)):
                modules[f"{way}.{i}.attentions.{j}"] = f"{way}_blocks.{i}.attentions.{j}"
            if getattr(level, f"{way}sample") is not None:
                modules[f"{way}.{i}.{way}sample"] = f"{way}_blocks.{i}.{way}samplers.0"
    if unet.middle is not None:
        modules |= {"middle.block1": "mid_block.resnets.0", "middle.block2": "mid_block.resnets.1"}
        if unet.middle.attention is not None:
            modules["middle.attention"] = "mid_block.attentions.0"
    return layout_from(unet, modules, LEAVES, "time_emb_proj")


# Names of earlier versions, and of the original port to PyTorch, as regular expressions, and today's.
OLDER_NAMES = [
    (r"^temb\.dense\.0\.", r"time_embedding.linear_1."),
    (r"^temb\.dense\.1\.", r"time_embedding.linear_2."),
    (r"^norm_out\.", r"conv_norm_out."),
    (r"^mid\.block_1\.", r"mid_block.resnets.0."),
    (r"^mid\.block_2\.", r"mid_block.resnets.1."),
    (r"^mid\.attn_1\.", r"mid_block.attentions.0."),
    (r"^(down|up)\.(\d+)\.block\.", r"\1_blocks.\2.resnets."),
    (r"^(down|up)\.(\d+)\.attn\.", r"\1_blocks.\2.attentions."),
    (r"^(down|up)\.(\d+)\.\1sample\.(?:op|conv)\.", r"\1_blocks.\2.\1samplers.0.conv."),
    (r"\.temb_proj\.", r".time_emb_proj."),
    (r"\.(?:nin|in)_shortcut\.", r".conv_shortcut."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.(?:q|query)\.", r"\1.to_q."),
    (r"(\.attentions\.\d+)\.(?:k|key)\.", r"\1.to_k."),
    (r"(\.attentions\.\d+)\.(?:v|value)\.", r"\1.to_v."),
    (r"(\.attentions\.\d+)\.(?:proj_out|proj_attn)\.", r"\1.to_out.0."),
]
IN_THE_PORT = re.compile(r"up\.(\d+)\.")


def with_current_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under today's names. The original port counts the levels of the way up from the largest."""
    ported = [int(match[1]) for match in map(IN_THE_PORT.match, state) if match]
    last = max(ported, default=0)
    renamed = {}
    for name, value in state.items():
        current = IN_THE_PORT.sub(lambda match: f"up.{last - int(match[1])}.", name) if name.startswith("up.") else name
        for older, newer in OLDER_NAMES:
            current = re.sub(older, newer, current)
        renamed[current] = value
    return renamed


def _check_levels(c: Mapping[str, Any], faults: list[Fault], options: Mapping[str, Any]) -> None:
    """What depends on several keys: sizes, divisors, one way to change the size."""
    widths, down, up = c["block_out_channels"], c["down_block_types"], c["up_block_types"]
    levels = range(len(widths))
    attended = [any(kind.startswith("Attn") for kind in both) for both in zip(down, reversed(up), strict=True)]

    divisor = 2 ** (len(widths) - 1)
    size = c["sample_size"] if options.get("image_size") is None else options["image_size"]
    if size is None:
        faults.append(Fault("sample_size", None, "the size of the images; pass image_size="))
    elif not all(_is_count(n) and n % divisor == 0 for n in _pair(size)):
        faults.append(Fault("sample_size", size, f"multiples of {divisor} = 2^(levels - 1); pass image_size="))

    groups = c["norm_num_groups"]
    if _is_count(groups) and any(width % groups for width in widths):
        faults.append(Fault("norm_num_groups", groups, f"a divisor of each of block_out_channels {widths}"))
    in_middle = c["mid_block_type"] is not None and c["add_attention"]
    with_attention = [width for i, width in enumerate(widths) if attended[i] or (in_middle and i == levels[-1])]
    head = c["attention_head_dim"]
    if _is_count(head) and any(width % head for width in with_attention):
        faults.append(Fault("attention_head_dim", head, f"a divisor of the widths with attention, {with_attention}"))
    if in_middle and c["attn_norm_num_groups"] not in (None, groups):
        faults.append(Fault("attn_norm_num_groups", c["attn_norm_num_groups"], f"null or norm_num_groups, {groups}"))

    used = {_resample(c, down, i, "downsample_type") for i in levels[:-1]}
    used |= {_resample(c, up, i, "upsample_type") for i in levels[:-1]}
    if not used <= {"conv", "resnet"}:
        faults.extend(
            Fault(key, c[key], "'conv' or 'resnet'")
            for key in ("downsample_type", "upsample_type")
            if c[key] not in ("conv", "resnet", None)
        )
    elif len(used) > 1:
        same = "one way to change the size everywhere: convolutions, or residual blocks"
        keys = ["down_block_types", "up_block_types"]
        keys += ["downsample_type", "upsample_type"] if any(attended) else []
        faults.extend(Fault(key, c[key], same) for key in keys)
    if used == {"conv"} and c["downsample_padding"] not in (0, 1):
        faults.append(Fault("downsample_padding", c["downsample_padding"], "0 or 1"))


def _resample(c: Mapping[str, Any], kinds: list[str], i: int, key: str) -> str:
    """How a block changes the size: those with attention take it from a key, which says nothing to the others."""
    if kinds[i].startswith("Attn"):
        return c[key] or "conv"
    return "resnet" if kinds[i].startswith("Resnet") else "conv"


def _represented(c: Mapping[str, Any], options: Mapping[str, Any], saved: Mapping[str, Any], source: str) -> UNetConfig:
    """Our options of a configuration that has been checked."""
    widths = c["block_out_channels"]
    size = _pair(c["sample_size"] if options.get("image_size") is None else options["image_size"])
    attended = [kind.startswith("Attn") for kind in c["down_block_types"]]
    up_attended = [kind.startswith("Attn") for kind in reversed(c["up_block_types"])]
    resampled = [
        _resample(c, c[f"{way}_block_types"], i, f"{way}sample_type")
        for way in ("down", "up")
        for i in range(len(widths) - 1)
    ]
    if c["mid_block_type"] is None:
        middle = "none"
    elif not c["add_attention"]:
        middle = "blocks"
    elif c["attn_norm_num_groups"] is None and c["resnet_time_scale_shift"] == "scale_shift":
        middle = "plain_attention"
    else:
        middle = "attention"
    classes, null_class = c["num_class_embeds"], False
    if classes is not None:
        null_class = bool(options.get("null_class", saved.get("null_class", False)))
        if null_class and classes < 2:
            raise ValueError(
                f"{WHO}: expected num_class_embeds >= 2 with null_class=True, got {classes}; leave null_class out"
            )
    told = {name: options[name] for name in FREE if name in options}
    if "learned_variance" in saved:
        told.setdefault("learned_variance", saved["learned_variance"])
    made: dict[str, Any] = dict(
        in_channels=c["in_channels"],
        num_res_blocks=c["layers_per_block"],
        num_heads=1,
        head_channels=c["attention_head_dim"],
        scale_shift=c["resnet_time_scale_shift"] == "scale_shift",
        dropout=options.get("dropout", c["dropout"]),
        num_classes=None if classes is None else classes - null_class,
        null_class=null_class if classes is not None else True,
        num_groups=c["norm_num_groups"],
        norm_eps=c["norm_eps"],
        embedding=EMBEDDING_OF[c["flip_sin_to_cos"], int(c["freq_shift"])],
        downsample_padding="same" if c["downsample_padding"] == 0 else "symmetric",
        resample="resblock" if "resnet" in resampled else "conv",
        **width_options(widths[0], widths),
        time_width=c["time_embedding_dim"] if c["time_embedding_dim"] != 4 * widths[0] else None,
        middle=middle,
        middle_scale=float(c["mid_block_scale_factor"]),
        center_input=c["center_input_sample"],
        **size_options(size, attended, up_attended),
        **prediction_options(c["in_channels"], c["out_channels"], told, source),
    )
    return UNetConfig(**made)


def _pair(size: Any) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    return pair if len(pair) == 2 else (0, 0)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
