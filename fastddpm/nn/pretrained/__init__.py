"""Trained networks in and out: folders of this library and of diffusers, `.pt` files of improved- and guided-diffusion.

A library is described by what its tensors are called (`weights`) and by what its configuration means
(`diffusers_unet`), or, where it stores none, by what the shapes of the tensors tell (`openai_unet`). `files` finds and
reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..unet import UNet, UNetConfig, refuse_unknown
from . import diffusers_unet, openai_unet
from .files import DIFFUSERS_FILE, OWN_FILE, OWN_FORMAT, Source, find
from .options import size_options
from .weights import Layout, gather, own_layout, scatter

WHO = "UNet.from_pretrained"
FORMATS = ("fastddpm", "diffusers")
VERSION = 1


def load_unet(
    path: str | Path,
    *,
    subfolder: str | None,
    revision: str | None,
    dtype: torch.dtype,
    options: Mapping[str, Any],
    about: Mapping[str, Any],
) -> UNet:
    """A network in eval mode; see `UNet.from_pretrained`.

    Args:
        options: fields of `UNetConfig`. about: what else the training of a .pt file is asked about; None: not given.
    """
    refuse_unknown(WHO, options)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{WHO}: expected dtype to be a floating-point dtype, got {dtype}; torch.float32 is usual")
    source = find(path, subfolder, revision, WHO)
    told = [name for name, value in about.items() if value is not None]
    state: dict[str, Tensor] | None = None
    layout: Callable[[UNet], Layout]
    if source.config is None:
        state = source.read()
        config, layout, free, asked = _without_config(source, state, options, about)
    elif source.config.get("format") == OWN_FORMAT:
        config, layout, free, asked = _own_config(source, options), own_layout, ("image_size", "dropout"), ()
    else:
        config = diffusers_unet.to_unet_config(source.config, options, source.name)
        layout, free, asked = diffusers_unet.layout, diffusers_unet.FREE, ()
    _refuse_what_is_known(config, options, free, [name for name in told if name not in asked], source)
    with torch.device("meta"):
        unet = UNet(config)
    unet = unet.to(dtype).to_empty(device="cpu")
    if state is None:
        state = source.read()
    if layout is diffusers_unet.layout:
        state = diffusers_unet.with_current_names(state)
    what = f"{WHO}: expected the tensors of the network in {source.name}"
    unet.load_state_dict(gather(unet, layout(unet), state, what))
    return unet.eval()


def save_unet(unet: UNet, folder: str | Path, format: str) -> None:
    """Write config.json and the weights; see `UNet.save_pretrained`."""
    if format not in FORMATS:
        raise ValueError(
            f"UNet.save_pretrained: expected format {' or '.join(map(repr, FORMATS))}, got {format!r}; choose one"
        )
    config: dict[str, Any]
    if format == "diffusers":
        config, layout, file = diffusers_unet.from_unet_config(unet.config), diffusers_unet.layout(unet), DIFFUSERS_FILE
    else:
        config = {"format": OWN_FORMAT, "version": VERSION, "config": unet.to_config()}
        layout, file = own_layout(unet), OWN_FILE
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    tensors = scatter(unet, layout)
    # the weights take their place first: where the configuration is there, they are
    with _unfinished(folder / file) as weights, _unfinished(folder / "config.json") as described:
        described.write_text(text, encoding="utf-8")
        save_file(tensors, weights, metadata={"format": "pt"})
        os.chmod(weights, described.stat().st_mode)  # safetensors makes files that only their owner can read
        os.replace(weights, folder / file)
        os.replace(described, folder / "config.json")


@contextlib.contextmanager
def _unfinished(file: Path) -> Iterator[Path]:
    """A name beside a file to write to, of which nothing is left behind."""
    path = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _without_config(
    source: Source, state: Mapping[str, Tensor], options: Mapping[str, Any], about: Mapping[str, Any]
) -> tuple[UNetConfig, Callable[[UNet], Layout], tuple[str, ...], tuple[str, ...]]:
    """Of a file of weights alone: configuration, layout, and the names of the options and of what may be told."""
    if openai_unet.is_openai(state):
        config = openai_unet.to_unet_config(state, options, about, source.name)
        layout = functools.partial(openai_unet.layout, attention_order=about["attention_order"])
        return config, layout, openai_unet.FREE, tuple(about)
    if openai_unet.is_original_port(state):
        config = openai_unet.port_config(diffusers_unet.with_current_names(state), options, source.name)
        return config, diffusers_unet.layout, openai_unet.FREE_IN_THE_PORT, ()
    if "time_embedding.linear_1.weight" in state:
        what, remedy = "a UNet2DModel of diffusers without its config.json", "put it beside the weights"
    elif "init_conv.weight" in state:
        what, remedy = "a Unet of denoising-diffusion-pytorch", "use fastddpm.compat.denoising_diffusion_pytorch"
    else:
        what, remedy = f"tensors named {', '.join(list(state)[:4])}", "pass the file of a network of one of these"
    raise ValueError(
        f"{WHO}: expected weights of improved-diffusion or guided-diffusion, or config.json beside others, in "
        f"{source.name}, got {what}; {remedy}"
    )


def _own_config(source: Source, options: Mapping[str, Any]) -> UNetConfig:
    """What `save_unet` wrote."""
    assert source.config is not None
    if source.config.get("version") != VERSION:
        raise ValueError(
            f"{WHO}: expected version {VERSION} of {OWN_FORMAT} in {source.name}, got {source.config.get('version')}; "
            "read it with the version of fastddpm that wrote it"
        )
    saved = source.config.get("config")
    if not isinstance(saved, dict):
        raise ValueError(f"{WHO}: expected config in config.json of {source.name}, got {saved!r}; get the file again")
    refuse_unknown(f"{WHO}({source.name!r})", saved)
    config = UNetConfig(**saved)
    if "dropout" in options:
        config = dataclasses.replace(config, dropout=options["dropout"])
    if "image_size" in options:
        attended = config.level_has_attention, config.up_level_has_attention
        config = dataclasses.replace(config, **size_options(options["image_size"], *attended))
    return config


def _refuse_what_is_known(
    config: UNetConfig, options: Mapping[str, Any], free: tuple[str, ...], told: list[str], source: Source
) -> None:
    """Expect options to be free, or to say what the files say."""
    given = dataclasses.asdict(config)
    against = [
        f"{name}={value!r} where it has {given[name]!r}"
        for name, value in options.items()
        if name not in free and (tuple(value) if isinstance(value, list) else value) != given[name]
    ]
    if against or told:
        raise ValueError(
            f"{WHO}: expected options that {source.name} leaves open ({', '.join(free)}), "
            f"got {', '.join([*against, *told])}; leave it out"
        )
