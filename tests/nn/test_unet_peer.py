"""The same weights in the network of diffusers give the same output: blocks, order and conventions agree."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddpm.nn import ResBlock, UNet
from tests.nn.networks import inputs
from tests.tolerance import assert_near_peer

pytestmark = pytest.mark.peer

DDPM: dict[str, Any] = dict(
    act_fn="silu", attention_head_dim=None, block_out_channels=[128, 256, 256, 256], center_input_sample=False,
    down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"], downsample_padding=0,
    flip_sin_to_cos=False, freq_shift=1, in_channels=3, layers_per_block=2, mid_block_scale_factor=1, norm_eps=1e-6,
    norm_num_groups=32, out_channels=3, sample_size=32, time_embedding_type="positional",
    up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
)  # fmt: skip
SMALL = dict(
    DDPM, block_out_channels=[8, 16, 24], norm_num_groups=4, sample_size=8,
    down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
)  # fmt: skip
OURS = dict(
    image_size=(8, 8), base_channels=8, channel_mult=(1, 2, 3), attention_resolutions=(4,), num_groups=4
)  # fmt: skip
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ddpm": ({}, {}),
    "heads": (dict(attention_head_dim=4), dict(head_channels=4)),
    "adm, convolutions": (
        dict(
            resnet_time_scale_shift="scale_shift", flip_sin_to_cos=True, freq_shift=0, norm_eps=1e-5,
            downsample_padding=1, num_class_embeds=4, layers_per_block=1, out_channels=6, attention_head_dim=8,
            attn_norm_num_groups=4,
        ),
        dict(
            scale_shift=True, embedding="adm", norm_eps=1e-5, downsample_padding="symmetric", num_classes=3,
            num_res_blocks=1, learned_variance=True, head_channels=8,
        ),
    ),
    "adm, residual blocks": (
        dict(
            resnet_time_scale_shift="scale_shift", flip_sin_to_cos=True, freq_shift=0, norm_eps=1e-5,
            attn_norm_num_groups=4, downsample_type="resnet", upsample_type="resnet",
            down_block_types=["ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"],
            up_block_types=["ResnetUpsampleBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        ),
        dict(scale_shift=True, embedding="adm", norm_eps=1e-5, resample="resblock"),
    ),
}  # fmt: skip


NAMES = [  # ours, as a regular expression, and theirs
    (r"time_embedding\.linear(\d)", r"time_embedding.linear_\1"),
    (r"norm_out", r"conv_norm_out"),
    (r"(down|up)\.(\d)\.", r"\1_blocks.\2."),
    (r"_blocks\.(\d)\.blocks\.", r"_blocks.\1.resnets."),
    (r"\.(down|up)sample", r".\1samplers.0"),
    (r"middle\.attention", r"mid_block.attentions.0"),
    (r"middle\.block1", r"mid_block.resnets.0"),
    (r"middle\.block2", r"mid_block.resnets.1"),
    (r"attentions\.(\d)\.norm", r"attentions.\1.group_norm"),
    (r"attentions\.(\d)\.proj", r"attentions.\1.to_out.0"),
    (r"\.shortcut", r".conv_shortcut"),
]


def name_in_peer(name: str) -> str:
    for ours, theirs in NAMES:
        name = re.sub(ours, theirs, name)
    return name


def weights_of(peer: Any, ours: UNet) -> dict[str, Tensor]:
    """The state of a UNet2DModel under our names, with its separate projections joined."""
    theirs, state = peer.state_dict(), {}
    blocks = {module.layer: name for name, module in ours.named_modules() if isinstance(module, ResBlock)}
    for name in ours.state_dict():
        if name.startswith("time_projection."):
            parts = [f"{blocks[i]}.{name.replace('time_projection', 'time_emb_proj')}" for i in range(len(blocks))]
        elif ".qkv." in name:
            parts = [name.replace("qkv", f"to_{part}") for part in "qkv"]
        else:
            parts = [name]
        state[name] = torch.cat([theirs.pop(name_in_peer(part)) for part in parts])
    assert not theirs  # every weight of theirs has a place
    return state


def test_the_published_cifar_10_network_has_as_many_parameters() -> None:
    from diffusers import UNet2DModel

    with torch.device("meta"):
        peer, ours = UNet2DModel(**DDPM), UNet()
    state = weights_of(peer, ours)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in ours.state_dict().items()}
    assert sum(p.numel() for p in peer.parameters()) == sum(p.numel() for p in ours.parameters()) == 35_746_307


@pytest.mark.parametrize("case", CASES)
def test_same_weights_same_output(case: str) -> None:
    from diffusers import UNet2DModel

    theirs, options = CASES[case]
    peer = UNet2DModel(**{**SMALL, **theirs}).eval()
    ours = UNet(**{**OURS, **options}).eval()
    ours.load_state_dict(weights_of(peer, ours))
    x, t, labels = inputs(ours, 4)
    with torch.no_grad():
        expected = peer(x, t, class_labels=labels).sample
        assert expected.std() > 0.01
        assert_near_peer(ours(x, t, labels), expected)
