"""The networks of improved-diffusion and guided-diffusion, whose files are weights alone, and of the original port.

What the shapes tell is taken from them. The number of heads, the order of their rows, the size of the images and the
scale of the timesteps leave no trace there; a wrong guess gives wrong images without an error, so they are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..blocks import ResBlock
from ..unet import DownLevel, UNet, UNetConfig, UpLevel
from .options import prediction_options, size_options, width_options
from .weights import Layout, layout_from

WHO = "UNet.from_pretrained"
FREE = ("image_size", "num_heads", "head_channels", "dropout", "null_class", "learned_variance", "prediction_channels",
        "time_scale")  # fmt: skip
FREE_IN_THE_PORT = ("image_size", "dropout")

LEAVES = {
    "norm1": ("in_layers.0",),
    "conv1": ("in_layers.2",),
    "norm2": ("out_layers.0",),
    "conv2": ("out_layers.3",),
    "shortcut": ("skip_connection",),
    "proj": ("proj_out",),
    "linear1": ("0",),
    "linear2": ("2",),
}


def is_openai(state: Mapping[str, Tensor]) -> bool:
    """Whether these are names of improved-diffusion or guided-diffusion."""
    return "input_blocks.0.0.weight" in state


def is_original_port(state: Mapping[str, Tensor]) -> bool:
    """Whether these are names of the port of the original DDPM to PyTorch."""
    return "temb.dense.0.weight" in state


def to_unet_config(
    state: Mapping[str, Tensor], options: Mapping[str, Any], about: Mapping[str, Any], source: str
) -> UNetConfig:
    """Our configuration of a UNetModel.

    Args:
        state: its state dict. options: what the user adds, of `FREE` here. about: attention_order, num_timesteps,
            rescale_timesteps; None: not given. source: named in messages.

    Raises:
        ValueError: tensors that are no such network; what is missing, all of it; what has no meaning.
    """
    downs, ups = _blocks(state, "input_blocks", source), _blocks(state, "output_blocks", source)
    if not ups or "out.2.weight" not in state or "middle_block.1.qkv.weight" not in state:
        raise ValueError(
            f"{WHO}: expected a UNetModel in {source}, got one without "
            f"{'a way up' if not ups else 'an output'}, such as a classifier; pass the file of the diffusion model"
        )
    # the way up tells where a level ends: there stands what doubles the size, after the block and its attention
    ends = [i for i, names in enumerate(ups) if _changes_size(names)]
    per_level = ends[0] + 1 if ends else len(ups)
    num_levels, num_res_blocks = len(ups) // per_level, per_level - 1
    if len(ups) != num_levels * per_level or len(downs) != len(ups) or num_res_blocks < 1:
        raise ValueError(
            f"{WHO}: expected as many blocks at each level in {source}, got {len(downs)} on the way down and "
            f"{len(ups)} on the way up, the size changing at {ends}; the file is damaged, or of another network"
        )
    first = [1 + i * per_level for i in range(num_levels)]  # block of the way down that a level starts with
    widths = [state[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in first]
    attended = [f"input_blocks.{i}.1.qkv.weight" in state for i in first]
    outputs, inputs = state["out.2.weight"].shape[0], state["input_blocks.0.0.weight"].shape[1]
    time_width, base = state["time_embed.0.weight"].shape
    rows = state["input_blocks.1.0.emb_layers.1.weight"].shape[0]

    heads = _told_heads(options, [w for w, a in zip(widths, attended, strict=True) if a] + widths[-1:])
    scale = _time_scale(options, about)
    missing = [] if options.get("image_size") is not None else ["image_size= (of the images it was trained on)"]
    missing += [] if heads is not None else ["num_heads= or head_channels= (num_heads, num_head_channels there)"]
    if heads is not None and heads > 1 and about["attention_order"] is None:
        missing.append("attention_order= ('new' where it was trained with use_new_attention_order, else 'legacy')")
    if scale is None:
        missing.append("num_timesteps= (diffusion_steps there), and rescale_timesteps= where they are not 1000")
    if missing:
        raise ValueError(
            f"{WHO}: expected what the weights in {source} cannot tell, got no {'; no '.join(missing)}; "
            "take them from the flags of its training"
        )
    if about["attention_order"] not in ("legacy", "new", None):
        raise ValueError(
            f"{WHO}: expected attention_order 'legacy' or 'new', got {about['attention_order']!r}; choose one"
        )
    classes, null_class = None, True
    if "label_emb.weight" in state:
        null_class = bool(options.get("null_class", False))
        classes = state["label_emb.weight"].shape[0] - null_class
    down = f"input_blocks.{per_level}.0.in_layers.0.weight"
    made: dict[str, Any] = dict(
        in_channels=inputs,
        **width_options(base, widths),
        time_width=None if time_width == 4 * base else time_width,
        time_scale=scale,
        num_res_blocks=num_res_blocks,
        num_heads=options.get("num_heads", 1),
        head_channels=options.get("head_channels"),
        scale_shift=rows == 2 * widths[0],
        dropout=options.get("dropout", 0.0),
        num_classes=classes,
        null_class=null_class,
        norm_eps=1e-5,
        embedding="adm",
        downsample_padding="symmetric",
        resample="resblock" if num_levels > 1 and down in state else "conv",
        **size_options(options["image_size"], attended, attended),
        **prediction_options(inputs, outputs, options, source),
    )
    return UNetConfig(**made)


def port_config(state: Mapping[str, Tensor], options: Mapping[str, Any], source: str) -> UNetConfig:
    """Our configuration of the original DDPM as it was ported to PyTorch: one head, 32 groups, eps 1e-6.

    Args:
        state: under the current names of diffusers. options: what the user adds, of `FREE_IN_THE_PORT`.

    Raises:
        ValueError: no image_size.
    """
    if options.get("image_size") is None:
        raise ValueError(
            f"{WHO}: expected image_size= with {source}, whose weights cannot tell it, got none; "
            "pass the size of the images that it was trained on"
        )
    num_levels = _count(state, r"down_blocks\.(\d+)\.")
    base = state["conv_in.weight"].shape[0]
    widths = [state[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(num_levels)]
    attended = [f"down_blocks.{i}.attentions.0.to_q.weight" in state for i in range(num_levels)]
    inputs, outputs = state["conv_in.weight"].shape[1], state["conv_out.weight"].shape[0]
    made: dict[str, Any] = dict(
        in_channels=inputs,
        **width_options(base, widths),
        num_res_blocks=_count(state, r"down_blocks\.0\.resnets\.(\d+)\."),
        dropout=options.get("dropout", 0.0),
        **size_options(options["image_size"], attended, attended),
        **prediction_options(inputs, outputs, {}, source),
    )
    return UNetConfig(**made)


def layout(unet: UNet, attention_order: str | None) -> Layout:
    """What our tensors are called in a UNetModel."""
    modules = {
        "conv_in": "input_blocks.0.0",
        "time_embedding": "time_embed",
        "norm_out": "out.0",
        "conv_out": "out.2",
        "middle.block1": "middle_block.0",
        "middle.attention": "middle_block.1",
        "middle.block2": "middle_block.2",
    }
    if unet.class_embedding is not None:
        modules["class_embedding"] = "label_emb"
    number = 1
    for i, level in enumerate(unet.down):
        assert isinstance(level, DownLevel)
        for j in range(len(level.blocks)):
            modules[f"down.{i}.blocks.{j}"] = f"input_blocks.{number}.0"
            if level.attentions:
                modules[f"down.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        if level.downsample is not None:
            by_block = isinstance(level.downsample, ResBlock)
            name, theirs = ("downsample", "0") if by_block else ("downsample.conv", "0.op")
            modules[f"down.{i}.{name}"] = f"input_blocks.{number}.{theirs}"
            number += 1
    number = 0
    for i, level in enumerate(unet.up):
        assert isinstance(level, UpLevel)
        for j in range(len(level.blocks)):
            modules[f"up.{i}.blocks.{j}"] = f"output_blocks.{number}.0"
            if level.attentions:
                modules[f"up.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
            number += 1
        if level.upsample is not None:
            modules[f"up.{i}.upsample"] = f"output_blocks.{number - 1}.{2 if level.attentions else 1}"
    return layout_from(unet, modules, LEAVES, "emb_layers.1", legacy_attention=attention_order != "new")


def _told_heads(options: Mapping[str, Any], attended: list[int]) -> int | None:
    """The largest number of heads of an attention; None where nothing was told."""
    per_head, heads = options.get("head_channels"), options.get("num_heads")
    if isinstance(per_head, int) and per_head > 0:
        return max(attended) // per_head
    return heads if isinstance(heads, int) else None


def _time_scale(options: Mapping[str, Any], about: Mapping[str, Any]) -> Any:
    """What timesteps are multiplied by, for `UNetConfig` to check; None where it was not told."""
    steps, rescaled = about["num_timesteps"], about["rescale_timesteps"]
    if "time_scale" in options:
        if steps is not None or rescaled is not None:
            raise ValueError(
                f"{WHO}: expected time_scale alone, got num_timesteps={steps} and rescale_timesteps={rescaled} beside "
                "it; leave it out"
            )
        return options["time_scale"]
    if steps is None:
        return None
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{WHO}: expected num_timesteps to be an integer >= 1, got {steps!r}; 1000 and 4000 are usual")
    if steps == 1000:
        return 1.0
    return None if rescaled is None else 1000 / steps if rescaled else 1.0


def _blocks(state: Mapping[str, Tensor], way: str, source: str) -> list[set[str]]:
    """Names of the tensors of each block of a way."""
    found: dict[int, set[str]] = {}
    for name in state:
        match = re.match(rf"{way}\.(\d+)\.(.*)", name)
        if match:
            found.setdefault(int(match[1]), set()).add(match[2])
    absent = sorted(set(range(max(found, default=-1) + 1)) - found.keys())
    if absent:
        raise ValueError(
            f"{WHO}: expected tensors in each of the {way} of {source}, got none in {absent}; "
            "a network with conv_resample=False, which changes the size without weights, cannot be represented"
        )
    return [found[i] for i in range(len(found))]


def _changes_size(names: set[str]) -> bool:
    """Whether something in a block of the way up doubles the size: a convolution, or a second residual block."""
    return any(re.fullmatch(r"[12]\.(conv|in_layers\.0)\.weight", name) for name in names)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(match[1]) for match in (re.match(pattern, name) for name in state) if match), default=-1)
