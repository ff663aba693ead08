"""Which blocks of other libraries are known, and how one is known: by its name, by its parts, and by what it gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .attention import DiffusersAttention, DiffusersTransformer, DiffusersUpsample
from .fused import exchange, untouched
from .norms import agree, is_norm
from .residual import Block, DDIMResnetBlock, DiffusersResnetBlock, LucidrainsBlock, OpenAIResBlock

BLOCKS: dict[str, tuple[tuple[str, ...], type[Block]]] = {
    "ResnetBlock2D": (
        ("norm1", "norm2", "nonlinearity", "conv1", "conv2", "conv_shortcut", "dropout", "upsample", "downsample",
         "time_emb_proj", "time_embedding_norm", "skip_time_act", "output_scale_factor", "in_channels"),
        DiffusersResnetBlock,
    ),
    "ResBlock": (
        ("in_layers", "out_layers", "emb_layers", "skip_connection", "use_scale_shift_norm", "_forward"),
        OpenAIResBlock,
    ),
    "ResnetBlock": (
        ("norm1", "norm2", "conv1", "conv2", "dropout", "in_channels", "out_channels", "use_conv_shortcut"),
        DDIMResnetBlock,
    ),
    "Attention": (
        ("group_norm", "spatial_norm", "norm_q", "norm_k", "processor", "to_q", "to_k", "to_v", "to_out", "heads",
         "residual_connection", "rescale_output_factor"),
        DiffusersAttention,
    ),
    "Transformer2DModel": (
        ("is_input_continuous", "use_linear_projection", "proj_out", "norm", "_get_output_for_continuous_inputs"),
        DiffusersTransformer,
    ),
    "Upsample2D": (
        ("norm", "interpolate", "use_conv", "use_conv_transpose", "name", "channels"),
        DiffusersUpsample,
    ),
    "Block": (("proj", "norm", "act", "dropout"), LucidrainsBlock),
}  # fmt: skip
"""By the name of the class: the attributes that it must have, and what takes its place."""


def fit(module: nn.Module) -> tuple[type[Block] | None, str | None]:
    """What takes the place of a block, or why nothing does; neither for what has no such name and parts, or no norm."""
    parts, block = BLOCKS.get(type(module).__name__, ((), None))
    if block is None or not all(hasattr(module, name) for name in parts):
        return None, None
    why = block.against(module) or against_trial(module, block)
    if why is None:
        return block, None
    return None, why if any(is_norm(m) for m in module.modules()) else None


def against_trial(module: nn.Module, block: type[Block]) -> str | None:
    """Run the module as it is and with the other forward, on the same numbers: why the results differ, or None.

    The input of one module inside is compared, too: the last convolution of many blocks starts at 0, and hides it.
    """
    weight = next(module.parameters(), None)
    if weight is not None and weight.is_meta:
        return None  # there are no values; its name and its parts must do
    if not untouched(*module.modules()):
        return "it has hooks, which a trial would call"
    method, inside, arguments = block.trial(module)
    before, training = type(module), [m for m in module.modules() if m.training]
    results: list[list[Any]] = []
    try:
        module.eval()
        results.append(_what_it_gives(module, method, inside, arguments))
        exchange(module, block)
        results.append(_what_it_gives(module, method, inside, arguments))
    except Exception as error:
        return f"it could not be tried: {error}"
    finally:
        module.__class__ = before
        for m in training:
            m.training = True
    same = len(results[0]) == len(results[1]) and all(map(agree, results[1], results[0]))
    return None if same else "it does not give what a block of this name usually gives"


def _what_it_gives(module: nn.Module, method: str, inside: nn.Module, arguments: tuple[Any, ...]) -> list[Any]:
    seen: list[Any] = []
    watch = inside.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        with torch.no_grad():
            return [getattr(module, method)(*arguments), *seen]
    finally:
        watch.remove()
