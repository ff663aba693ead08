"""The configuration: what it refuses, in which words, and its way through JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastddpm.nn import UNet, UNetConfig
from tests.nn.networks import TINY, VARIANTS, variant


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip_through_json(name: str) -> None:
    unet = variant(name)
    written = json.dumps(unet.to_config())
    again = UNet.from_config(json.loads(written))
    assert again.config == unet.config
    assert [(k, v.shape) for k, v in again.state_dict().items()] == [(k, v.shape) for k, v in unet.state_dict().items()]


def test_missing_options_have_their_defaults() -> None:
    assert UNet.from_config(TINY).config == UNetConfig(**TINY)


def test_an_integer_image_size_is_square() -> None:
    assert UNetConfig(image_size=64) == UNetConfig(image_size=(64, 64))  # type: ignore[arg-type]


def test_properties_of_the_levels() -> None:
    config = UNetConfig(image_size=(32, 64), attention_resolutions=(8, 32))
    assert config.level_heights == (32, 16, 8, 4)
    assert config.level_widths == (128, 256, 256, 256)
    assert config.level_has_attention == (True, False, True, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(image_size=(30, 32)), "image_size with height and width divisible by 8 = 2^(levels - 1), got 30x32; "),
        (dict(image_size=(32, 20)), "image_size with height and width divisible by 8 = 2^(levels - 1), got 32x20; "),
        (dict(image_size=(32,)), "image_size to be (height, width), got (32,); "),
        (dict(image_size=(0, 32)), "image_size to be a sequence of integers >= 1, got (0, 32); "),
        (dict(image_size="32"), "image_size to be a sequence of integers >= 1, got '32'; "),
        (dict(channel_mult=()), "channel_mult to have a number per level, got (); "),
        (dict(channel_mult=(1, 2.0)), "channel_mult to be a sequence of integers >= 1, got (1, 2.0); "),
        (dict(channel_mult=(True, 2)), "channel_mult to be a sequence of integers >= 1, got (True, 2); "),
        (dict(in_channels=0), "in_channels to be an integer >= 1, got 0; "),
        (dict(base_channels=1), "base_channels to be an integer >= 2, got 1; "),
        (dict(base_channels=64.0), "base_channels to be an integer >= 2, got 64.0; "),
        (dict(num_res_blocks=0), "num_res_blocks to be an integer >= 1, got 0; "),
        (dict(num_heads=None), "num_heads to be an integer >= 1, got None; "),
        (dict(head_channels=0), "head_channels to be an integer >= 1, got 0; "),
        (dict(num_classes=0), "num_classes to be an integer >= 1, got 0; "),
        (dict(num_groups=-1), "num_groups to be an integer >= 1, got -1; "),
        (dict(learned_variance=1), "learned_variance to be True or False, got 1; "),
        (dict(scale_shift="yes"), "scale_shift to be True or False, got 'yes'; "),
        (dict(dropout=1.0), "dropout in [0, 1), got 1.0; "),
        (dict(dropout=float("nan")), "dropout in [0, 1), got nan; "),
        (dict(dropout="0.1"), "dropout in [0, 1), got '0.1'; "),
        (dict(norm_eps=0.0), "norm_eps > 0 and finite, got 0.0; "),
        (dict(norm_eps=float("inf")), "norm_eps > 0 and finite, got inf; "),
        (
            dict(embedding="fourier"),
            "embedding to be 'ddpm' or 'adm' or 'ddpm_cos_first' or 'adm_sin_first', got 'fourier'; ",
        ),
        (dict(downsample_padding="valid"), "downsample_padding to be 'same' or 'symmetric', got 'valid'; "),
        (dict(resample="pool"), "resample to be 'conv' or 'resblock', got 'pool'; "),
        (dict(widths=()), "widths to have a number per level, got (); or leave it out and give channel_mult"),
        (dict(widths=(32, 0.5)), "widths to be a sequence of integers >= 1, got (32, 0.5); "),
        (dict(widths=(32, 40)), "num_groups to divide the width of every level, here (32, 40), got 32; "),
        (dict(time_width=0), "time_width to be an integer >= 1, got 0; "),
        (dict(time_scale=0), "time_scale > 0 and finite, got 0; 1 is usual"),
        (dict(null_class=None), "null_class to be True or False, got None; "),
        (dict(middle="bottom"), "middle to be 'attention' or 'plain_attention' or 'blocks' or 'none', got 'bottom'; "),
        (dict(middle_scale=-1.0), "middle_scale > 0 and finite, got -1.0; 1 is usual"),
        (dict(prediction_channels=0), "prediction_channels to be an integer >= 1, got 0; "),
        (dict(up_attention_resolutions=16), "up_attention_resolutions to be a sequence of integers >= 1, got 16; "),
        (dict(up_attention_resolutions=(5,)), "up_attention_resolutions to be heights of feature maps, here (32, 16, "),
        (
            dict(up_attention_resolutions=(32,), num_heads=96),
            "num_heads to divide the width 128 of a level with attention, got 96; ",
        ),
        (dict(center_input=1), "center_input to be True or False, got 1; "),
        (
            dict(attention_resolutions=(16, 12)),
            "attention_resolutions to be heights of feature maps, here (32, 16, 8, 4), got 12; choose among these",
        ),
        (dict(attention_resolutions=16), "attention_resolutions to be a sequence of integers >= 1, got 16; "),
        (
            dict(base_channels=40),
            "num_groups to divide the width of every level, here (40, 80, 80, 80), got 32; "
            "set num_groups to a divisor of 40, or base_channels to a multiple of num_groups",
        ),
        (dict(num_heads=3), "num_heads to divide the width 256 of a level with attention, got 3; set num_heads to"),
        (dict(head_channels=96), "head_channels to divide the width 256 of a level with attention, got 96; set head_c"),
        (
            dict(channel_mult=(1, 2, 3), attention_resolutions=(), num_heads=256),
            "num_heads to divide the width 384 of a level with attention, got 256; ",  # that of the middle
        ),
    ],
)  # fmt: skip
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        UNetConfig(**options)
    assert str(error.value).startswith(f"UNetConfig: expected {message}")


def test_widths_take_the_place_of_the_multiples() -> None:
    config = UNetConfig(widths=(32, 96), image_size=(6, 6), attention_resolutions=(3,))
    assert config.level_widths == (32, 96)
    assert config.level_has_attention == (False, True)
    unet = UNet(config)
    assert unet.conv_in.out_channels == unet.conv_out.in_channels == 32
    assert unet.time_embedding.linear1.weight.shape == (512, 128)  # base_channels stays the length of the sinusoids


def test_heads_need_not_divide_where_there_is_no_attention() -> None:
    options = dict(TINY, attention_resolutions=(), num_heads=3)
    for middle in ("blocks", "none"):
        UNetConfig(**options, middle=middle)
    with pytest.raises(ValueError, match="num_heads to divide the width 16"):
        UNetConfig(**options, middle="plain_attention")


def test_later_options_are_written_where_they_differ_from_their_defaults() -> None:
    """So the configuration of a run that an earlier version began compares equal, and the run can be resumed."""
    assert "middle" not in UNet(**TINY).to_config()
    assert UNet(**TINY, middle="none").to_config() == {**UNet(**TINY).to_config(), "middle": "none"}


def test_unknown_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"^UNet.from_config: expected options of UNetConfig, got 'channel_mul'; "):
        UNet.from_config({"image_size": [32, 32], "channel_mul": [1, 2]})
    with pytest.raises(ValueError, match=r"^UNet: expected options of UNetConfig, got 'xyz'; choose among im"):
        UNet(xyz=1)


@pytest.mark.parametrize(
    ("options", "padded", "recipe"),
    [
        (dict(image_size=28), "32x32", "channel_mult=(1, 2, 2) and attention_resolutions=(14,)"),
        (dict(image_size=(30, 32)), "32x32", "channel_mult=(1, 2) and attention_resolutions=(15,)"),
        (dict(image_size=12, attention_resolutions=()), "16x16", "channel_mult=(1, 2, 2)"),
        (
            dict(image_size=28, widths=(32, 64, 64, 96), up_attention_resolutions=(16, 8)),
            "32x32",
            "widths=(32, 64, 64) and attention_resolutions=(14,) and up_attention_resolutions=(14, 7)",
        ),
    ],
)
def test_the_recipe_for_a_size_that_cannot_be_halved_works(options: dict[str, Any], padded: str, recipe: str) -> None:
    with pytest.raises(ValueError, match="expected image_size") as caught:
        UNetConfig(**options)
    assert str(caught.value).endswith(f"; pad or resize the images to {padded}, or for this size give {recipe}")
    UNetConfig(**options | eval(f"dict({recipe.replace(' and ', ', ')})"))


def test_a_size_that_cannot_be_halved_at_all_has_no_recipe() -> None:
    with pytest.raises(ValueError, match=r"got 27x27; pad or resize the images to 32x32, or give channel_mult fewer l"):
        UNetConfig(image_size=27)
