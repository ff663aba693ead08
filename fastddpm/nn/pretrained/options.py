"""Options that follow from numbers which a file has, or which its user adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def prediction_options(inputs: int, outputs: int, told: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The options learned_variance and prediction_channels of a network.

    Twice as many channels as go in are taken for a prediction and its variance, any other number for a prediction.

    Args:
        inputs, outputs: channels of the input and of the output.
        told: learned_variance and prediction_channels, where the user knows better.
        source: named in messages.

    Raises:
        ValueError: what was told does not give ``outputs``.
    """
    predicted = told.get("prediction_channels")
    learned = told.get("learned_variance", outputs == 2 * (inputs if predicted is None else predicted))
    if predicted is None:
        predicted = outputs // 2 if learned else outputs
    if predicted * (1 + bool(learned)) != outputs:
        raise ValueError(
            f"UNet.from_pretrained: expected learned_variance and prediction_channels that give the {outputs} channels "
            f"of {source}, got {learned} and {predicted}; leave them out"
        )
    return {
        "learned_variance": bool(learned),
        "prediction_channels": None if predicted == inputs else predicted,
    }


def size_options(image_size: Any, attended: Sequence[bool], up_attended: Sequence[bool]) -> dict[str, Any]:
    """The options image_size, attention_resolutions and, where it is another, up_attention_resolutions.

    Args:
        image_size: (height, width), or one number for both.
        attended, up_attended: whether each level has attention on the way down and up, the first level first.

    Raises:
        ValueError: neither.
    """
    pair = [image_size] * 2 if isinstance(image_size, int) else image_size
    if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(n, int) for n in pair)):
        raise ValueError(
            f"UNet.from_pretrained: expected image_size to be (height, width) or an integer, got {image_size!r}; "
            "pass the size of the images"
        )
    height, width = pair
    down, up = (tuple(height >> i for i, has in enumerate(way) if has) for way in (attended, up_attended))
    return {
        "image_size": (height, width),
        "attention_resolutions": down,
        "up_attention_resolutions": None if up == down else up,
    }


def width_options(base: int, widths: Sequence[int]) -> dict[str, Any]:
    """The options base_channels and, where they say it in whole numbers, channel_mult, else widths.

    Args:
        base: length of the sinusoids. widths: channels of each level, the first being those of the first convolution.
    """
    if widths[0] == base and all(width % base == 0 for width in widths):
        return {"base_channels": base, "channel_mult": tuple(width // base for width in widths)}
    return {"base_channels": base, "widths": tuple(widths)}
