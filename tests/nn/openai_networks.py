"""What the networks of improved-diffusion and guided-diffusion give, recorded with their own code.

Neither package is in a registry, so the test reads a record. Weights are not in it but a formula, in float64, whose
value does not depend on a generator: only names, shapes and the output are kept. To make it again, with a clone of each
of openai/improved-diffusion and openai/guided-diffusion:

    python -m tests.nn.openai_networks IMPROVED_CLONE GUIDED_CLONE >tests/nn/data/openai-unets.json
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RECORD = Path(__file__).parent / "data" / "openai-unets.json"

# library, arguments of its UNetModel, what the user of from_pretrained adds
NETWORKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "improved, scale and shift": (
        "improved_diffusion",
        dict(in_channels=3, model_channels=32, out_channels=6, num_res_blocks=2, attention_resolutions=(2, 4),
             channel_mult=(1, 2, 2), num_heads=4, use_scale_shift_norm=True, dropout=0.3),
        dict(image_size=8, num_heads=4, attention_order="legacy", num_timesteps=4000, rescale_timesteps=True),
    ),
    "improved, classes": (
        "improved_diffusion",
        dict(in_channels=1, model_channels=32, out_channels=1, num_res_blocks=1, attention_resolutions=(1,),
             channel_mult=(1, 1), num_heads=1, use_scale_shift_norm=False, num_classes=5),
        dict(image_size=4, num_heads=1, num_timesteps=1000),
    ),
    "guided, residual blocks change the size": (
        "guided_diffusion",
        dict(image_size=8, in_channels=3, model_channels=32, out_channels=6, num_res_blocks=2,
             attention_resolutions=(2,), channel_mult=(1, 2), num_head_channels=16, use_scale_shift_norm=True,
             resblock_updown=True, use_new_attention_order=True, num_classes=7),
        dict(image_size=8, head_channels=16, attention_order="new", num_timesteps=1000),
    ),
    "guided, legacy order, half a width": (
        "guided_diffusion",
        dict(image_size=8, in_channels=1, model_channels=64, out_channels=2, num_res_blocks=1,
             attention_resolutions=(2,), channel_mult=(0.5, 1), num_heads=2, use_scale_shift_norm=True,
             resblock_updown=True),
        dict(image_size=(4, 8), num_heads=2, attention_order="legacy", num_timesteps=500, rescale_timesteps=False),
    ),
}  # fmt: skip


def weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """A state dict by formula: sines, about as large as the weights of a trained network; norms about one."""
    state = {}
    for n, (name, shape) in enumerate(sorted(shapes.items())):
        values = torch.sin(1.7 * n + math.sqrt(2) * torch.arange(math.prod(shape), dtype=torch.float64)).reshape(shape)
        is_norm = len(shape) == 1 and name.endswith("weight")
        fan_in = math.prod(shape[1:])
        state[name] = (1 + values / 4 if is_norm else values * fan_in**-0.5 if len(shape) > 1 else values / 4).float()
    return state


def inputs(arguments: dict[str, Any], added: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Two images, timesteps as the diffusion counts them, and labels."""
    size = added["image_size"]
    shape = (2, arguments["in_channels"], *((size, size) if isinstance(size, int) else size))
    x = torch.cos(1.3 * torch.arange(math.prod(shape), dtype=torch.float64)).reshape(shape).float()
    t = torch.tensor([7, added["num_timesteps"] - 1])
    return x, t, torch.tensor([0, 4]) if arguments.get("num_classes") else None


def main(clones: list[str]) -> None:
    sys.path[:0] = clones
    record = {}
    for name, (library, arguments, added) in NETWORKS.items():
        model = importlib.import_module(f"{library}.unet").UNetModel(**arguments).eval()
        shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        model.load_state_dict(weights(shapes))
        x, t, labels = inputs(arguments, added)
        # what their diffusion hands to the network
        scale = 1000 / added["num_timesteps"] if added.get("rescale_timesteps") else 1.0
        with torch.no_grad():
            output = model(x, t.float() * scale, labels)
        values = [float(f"{v:.7g}") for v in output.flatten().tolist()]
        record[name] = {"shapes": shapes, "output": {"shape": list(output.shape), "values": values}}
    print(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1:])
