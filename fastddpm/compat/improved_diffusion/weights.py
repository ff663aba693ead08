"""Tensors of a `fastddpm.UNet` under the original's names, in its shapes and its order, and back.

Nothing is computed, numbers are moved: so the moments of an optimiser go the same way as the weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...nn import UNet
from ...nn.pretrained.openai_unet import layout
from ...nn.pretrained.weights import Layout

WORDS = [
    "time_embed", "label_emb", "input_blocks", "middle_block", "output_blocks", "out",
    "in_layers", "emb_layers", "out_layers", "skip_connection", "norm", "qkv", "proj_out", "op", "conv",
    "weight", "bias",
]  # fmt: skip
"""What names are made of, numbers apart, in the order in which the original makes its layers."""


def layout_of(network: UNet) -> Layout:
    """What each of our tensors is called there."""
    return layout(network, "legacy")


def to_theirs(state: Mapping[str, Tensor], found: Layout) -> dict[str, Tensor]:
    """Our tensors under their names, in the order of their state dict; views, where no rows change places.

    Args:
        state: tensors by our names, all of them. found: see `layout_of`.
    """
    theirs: dict[str, Tensor] = {}
    for name, (parts, order) in found.items():
        value = state[name] if order is None else state[name][torch.argsort(order).to(state[name].device)]
        if name.endswith(("qkv.weight", "proj.weight")):
            value = value.unsqueeze(-1)  # a convolution over one axis, of one tap
        theirs.update(zip((part.name for part in parts), value.split([part.rows for part in parts]), strict=True))
    return {name: theirs[name] for name in sorted(theirs, key=_place)}


def to_ours(state: Mapping[str, Tensor], found: Layout) -> dict[str, Tensor]:
    """Their tensors under our names. Args are those of `to_theirs`, read backwards.

    Raises:
        KeyError: a name that ``state`` lacks.
    """
    ours: dict[str, Tensor] = {}
    for name, (parts, order) in found.items():
        values = [state[part.name] for part in parts]
        value = torch.cat(values) if len(values) > 1 else values[0]
        if name.endswith(("qkv.weight", "proj.weight")):
            value = value.squeeze(-1)
        ours[name] = value if order is None else value[order.to(value.device)]
    return ours


def _place(name: str) -> list[int]:
    return [int(word) if word.isdigit() else WORDS.index(word) for word in name.split(".")]
