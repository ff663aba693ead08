"""A network that version 1 wrote loads in every later version, and gives what it gave.

``data/unet-v1.safetensors`` and ``data/unet-v1.json`` are never made again. Where this test fails, the names or the use
of the parameters have changed, and files that users have no longer work.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastddpm import use_backend
from fastddpm.nn import UNet
from tests.tolerance import assert_equal_to_rounding, assert_within

DATA = Path(__file__).parent / "data"
RECORD: dict[str, Any] = json.loads((DATA / "unet-v1.json").read_text())


def restored() -> UNet:
    unet = UNet.from_config(RECORD["config"])
    unet.load_state_dict(load_file(DATA / "unet-v1.safetensors"))
    return unet.eval()


def recorded() -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Input and output, the images in float64."""
    shape = RECORD["input"]["shape"]
    x = torch.sin(torch.arange(torch.Size(shape).numel(), dtype=torch.float64)).reshape(shape)
    output = torch.tensor(RECORD["output"]["values"], dtype=torch.float64).reshape(RECORD["output"]["shape"])
    return (x, torch.tensor(RECORD["input"]["t"]), torch.tensor(RECORD["input"]["labels"])), output


def test_gives_in_float64_what_it_gave() -> None:
    (x, t, labels), output = recorded()
    assert_equal_to_rounding(restored().double()(x, t, labels), output, ulps=1e4, scale=output.abs().max().item())


def test_float32_stays_within_the_rule() -> None:
    (x, t, labels), output = recorded()
    unet = restored()
    with use_backend("reference"):
        reference = unet(x.float(), t, labels)
    assert_within(unet(x.float(), t, labels), output, reference)


def test_the_file_is_small_and_covers_the_options_that_have_parameters() -> None:
    assert (DATA / "unet-v1.safetensors").stat().st_size < 200_000
    unet = restored()
    assert unet.config.scale_shift
    assert unet.learned_variance
    assert unet.class_embedding is not None
    assert unet.config.level_has_attention == (False, True)
    assert unet.to_config() == RECORD["config"]
