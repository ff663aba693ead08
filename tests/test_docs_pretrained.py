"""The examples of docs/pretrained.md run, with small networks under the published names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastddpm import UNet
from fastddpm.nn.pretrained.openai_unet import layout
from fastddpm.nn.pretrained.weights import scatter
from tests.nn.networks import filled
from tests.training.test_pipeline import pipeline

PAGE = Path(__file__).parents[1] / "docs" / "pretrained.md"
SMALLER = {"(16, seed=0)": '(2, seed=0, sampler="ddim", num_steps=2)', "(16, num_steps=50": "(2, num_steps=2"}


def test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small: dict[str, Any] = dict(base_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(16,))
    ddpm = filled(UNet(**small))
    (tmp_path / "google").mkdir()
    pipeline(tmp_path / "google" / "ddpm-cifar10-32", unet=ddpm)
    adm = dict(scale_shift=True, norm_eps=1e-5, embedding="adm", downsample_padding="symmetric")
    improved = filled(UNet(**small, **adm, num_heads=4, learned_variance=True, time_scale=0.25))
    torch.save(scatter(improved, layout(improved, "legacy")), "cifar10_uncond_50M_500K.pt")

    text = "".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    for large, smaller in SMALLER.items():
        assert large in text
        text = text.replace(large, smaller)
    names: dict[str, Any] = {}
    exec(compile(text, "pretrained.md", "exec"), names)
    assert names["network"].config == improved.config
    assert names["images"].shape == (2, 3, 32, 32)
    assert UNet.from_pretrained("my-network").config == UNet.from_pretrained("for-diffusers").config == ddpm.config


def test_links_lead_somewhere() -> None:
    for linked in re.findall(r"\]\(([\w/.-]+)\)", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parent / linked).exists(), linked
