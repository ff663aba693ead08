"""More networks of diffusers: all give through `optimize` what they gave, and are what they were after `restore`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastddpm
from tests.optimization.networks import randomise
from tests.tolerance import assert_near_peer

pytestmark = [pytest.mark.peer, pytest.mark.slow]

UNET = dict(sample_size=16, block_out_channels=(32, 64), layers_per_block=1)
TEXT = dict(
    UNET, cross_attention_dim=12, attention_head_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
VIDEO = dict(
    TEXT, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D")
)
CODER = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
PAIR = (32, 64)


def waves(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).mul(0.7).sin().reshape(shape)


T, WORDS = torch.tensor([3, 500]), waves(2, 5, 12)
# the class, its options, the call, and how many blocks and norms are left as they are
CASES: dict[str, tuple[str, dict[str, Any], Callable[[Any], Tensor], int]] = {
    "head dimension 8": (
        "UNet2DModel",
        dict(UNET, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")),
        lambda m: m(waves(2, 3, 16, 16), T).sample,
        0,
    ),
    "FIR resampling": (
        "UNet2DModel",
        dict(
            UNET, down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"), time_embedding_type="fourier",
        ),
        lambda m: m(waves(2, 3, 16, 16), T).sample,
        0,
    ),
    "GELU": (
        "UNet2DModel",
        dict(UNET, act_fn="gelu", down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2),
        lambda m: m(waves(2, 3, 16, 16), T).sample,
        8,
    ),
    "added keys and values": (
        "UNet2DConditionModel",
        dict(
            TEXT, down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift",
        ),
        lambda m: m(waves(2, 4, 16, 16), T, WORDS).sample,
        4,
    ),
    "no activation of the time": (
        "UNet2DConditionModel",
        dict(TEXT, resnet_skip_time_act=True, resnet_out_scale_factor=1.4),
        lambda m: m(waves(2, 4, 16, 16), T, WORDS).sample,
        0,
    ),
    "video": ("UNet3DConditionModel", VIDEO, lambda m: m(waves(2, 4, 3, 16, 16), T, WORDS).sample, 0),
    "spatial norm": (
        "VQModel",
        dict(CODER, block_out_channels=PAIR, norm_type="spatial"),
        lambda m: m(waves(2, 3, 16, 16)).sample,
        2,
    ),
    "two widths": (
        "AsymmetricAutoencoderKL",
        dict(CODER, down_block_out_channels=PAIR, up_block_out_channels=PAIR),
        lambda m: m(waves(2, 3, 16, 16)).sample,
        0,
    ),
    "decoder of video": (
        "AutoencoderKLTemporalDecoder",
        dict(block_out_channels=PAIR, down_block_types=("DownEncoderBlock2D",) * 2),
        lambda m: m.decode(waves(4, 4, 8, 8), num_frames=2).sample,
        0,
    ),
    "without norms": ("AutoencoderTiny", {}, lambda m: m(waves(2, 3, 16, 16)).sample, 0),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_outputs_agree(case: str) -> None:
    import diffusers

    kind, options, run, left = CASES[case]
    network: nn.Module = getattr(diffusers, kind)(**options).eval()
    randomise(network)
    with torch.no_grad():
        expected = run(network)
        report = fastddpm.optimize(network)
        assert_near_peer(run(network), expected, precision=2e-5)
        assert len(report.kept) == left, report
        fastddpm.restore(network)
        assert torch.equal(run(network), expected)
