"""Tensors of a `UNet` under other names, in parts, or with their rows in another order.

We keep as one tensor what other libraries keep apart: the three projections of an attention, and what all residual
blocks take of the time embedding. A `Layout` says for each of our tensors which parts it is made of, along its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import SelfAttention
from ..blocks import ResBlock
from ..unet import UNet

MOST_NAMED = 8


class Part(NamedTuple):
    """A stored tensor: its name, and how many rows of ours it is."""

    name: str
    rows: int


class Entry(NamedTuple):
    """One tensor of ours: its parts, and ``order`` such that ours = cat(parts)[order]; None leaves them in order."""

    parts: tuple[Part, ...]
    order: Tensor | None = None


Layout = dict[str, Entry]
"""For each name in the state of our network, what it is made of."""


def own_layout(unet: UNet) -> Layout:
    """Each tensor under its own name."""
    return {name: Entry((Part(name, value.shape[0]),)) for name, value in unet.state_dict().items()}


def layout_from(
    unet: UNet,
    modules: Mapping[str, str],
    leaves: Mapping[str, tuple[str, ...]],
    time_projection: str,
    legacy_attention: bool = False,
) -> Layout:
    """The layout of a library that has the modules of ours under other names.

    Args:
        modules: its name of each block and each layer outside of blocks, by ours; `time_projection` aside.
        leaves: its name of each layer in a block, by ours, where they differ; several names are parts.
        time_projection: its name, in each residual block, of the layer that takes the time embedding.
        legacy_attention: the rows of an attention's projection are ordered by head first: q, k and v of head 0, then
            those of head 1, and so on.
    """
    layout: Layout = {}
    for ours, theirs in modules.items():
        module = unet.get_submodule(ours)
        for name, value in module.state_dict().items():
            leaf, _, parameter = name.rpartition(".")
            names = leaves.get(leaf, (leaf,))
            parts = tuple(Part(_joined(theirs, n, parameter), value.shape[0] // len(names)) for n in names)
            order = None
            if legacy_attention and leaf == "qkv":
                assert isinstance(module, SelfAttention)
                order = _by_kind(value.shape[0], module.num_heads)
            layout[f"{ours}.{name}"] = Entry(parts, order)
    blocks = {module.layer: name for name, module in unet.named_modules() if isinstance(module, ResBlock)}
    for parameter in ("weight", "bias"):
        parts = tuple(
            Part(_joined(modules[blocks[layer]], time_projection, parameter), rows)
            for layer, rows in enumerate(unet.projected)
        )
        layout[f"time_projection.{parameter}"] = Entry(parts)
    assert layout.keys() == unet.state_dict().keys()
    return layout


def gather(unet: UNet, layout: Layout, state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The state of our network, made of stored tensors.

    Args:
        what: start of the message where they do not fit: "op: expected ...".

    Raises:
        ValueError: tensors that are missing, that have no place, or of another shape; the first few named.
    """
    ours = unet.state_dict()
    shapes = {part.name: (part.rows, *ours[name].shape[1:]) for name, entry in layout.items() for part in entry.parts}
    missing = [name for name in shapes if name not in state]
    unexpected = [name for name in state if name not in shapes]
    misshapen = [
        f"{name} {list(state[name].shape)} where {list(shape)} fits"
        for name, shape in shapes.items()
        if name in state and not _same_but_for_ones(tuple(state[name].shape), shape)
    ]
    if missing or unexpected or misshapen:
        wrong = (("missing", missing), ("without a place", unexpected), ("of another shape", misshapen))
        told = "; ".join(f"{len(names)} {kind}: {_listed(names)}" for kind, names in wrong if names)
        raise ValueError(f"{what}, got {told}; the file is of another network than its configuration says, or damaged")
    gathered = {}
    for name, (parts, order) in layout.items():
        tensors = [state[part.name].reshape(shapes[part.name]).to(ours[name].dtype) for part in parts]
        whole = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        gathered[name] = whole if order is None else whole[order]
    return gathered


def scatter(unet: UNet, layout: Layout) -> dict[str, Tensor]:
    """What the other library stores: the inverse of `gather`; dense, on the CPU, none a view of another."""
    scattered = {}
    for name, value in unet.state_dict().items():
        parts, order = layout[name]
        value = value.detach().cpu()
        if order is not None:
            value = value[torch.argsort(order)]
        for part, tensor in zip(parts, value.split([part.rows for part in parts]), strict=True):
            scattered[part.name] = tensor.contiguous() if len(parts) == 1 else tensor.clone().contiguous()
    return scattered


def _by_kind(rows: int, num_heads: int) -> Tensor:
    """Where the rows q, k, v of all heads lie, if they are stored by head: index [3C] into [heads, 3, d]."""
    return torch.arange(rows).view(num_heads, 3, -1).transpose(0, 1).reshape(-1)


def _same_but_for_ones(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a shape is the one wanted, or ends in ones more, as 1x1 convolutions do where we have a linear layer."""
    return found[: len(wanted)] == wanted and all(n == 1 for n in found[len(wanted) :])


def _joined(*names: str) -> str:
    return ".".join(name for name in names if name)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
