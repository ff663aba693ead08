"""Networks in and out of files: our own form, what is refused and in which words, pickles, the hub."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastddpm.nn import UNet, UNetConfig
from fastddpm.nn.pretrained.diffusers_unet import DEFAULTS, from_unet_config, to_unet_config
from tests.fake_hub import put_in_place
from tests.nn.networks import TINY, VARIANTS, filled, inputs, variant

WIDENED: dict[str, dict[str, Any]] = {  # the options that came with other libraries' networks
    "widths": dict(base_channels=16, widths=(8, 12)),
    "time width": dict(time_width=20),
    "time scale": dict(time_scale=0.25),
    "no null class": dict(num_classes=3, null_class=False),
    "plain attention": dict(middle="plain_attention", scale_shift=True),
    "blocks": dict(middle="blocks"),
    "no middle": dict(middle="none"),
    "middle scale": dict(middle_scale=2**0.5),
    "condition in the input": dict(in_channels=6, prediction_channels=3),
    "centred input": dict(center_input=True),
    "attention on the way up alone": dict(attention_resolutions=(), up_attention_resolutions=(8, 4)),
    "attention on the way down alone": dict(attention_resolutions=(4,), up_attention_resolutions=()),
    "cosine first": dict(embedding="ddpm_cos_first"),
    "sine first": dict(embedding="adm_sin_first"),
}


def widened(name: str) -> UNet:
    return filled(UNet(**{**TINY, **WIDENED[name]})).eval()


def run(unet: UNet) -> Tensor:
    x, t, labels = inputs(unet)
    with torch.no_grad():
        return unet.eval()(x, t, labels)


def rewritten(folder: Path, **changes: Any) -> Path:
    """Change keys of config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


# --- our own form


@pytest.mark.parametrize(
    "make", [*(lambda n=n: variant(n) for n in VARIANTS), *(lambda n=n: widened(n) for n in WIDENED)]
)
def test_own_form_there_and_back(make: Callable[[], UNet], tmp_path: Path) -> None:
    unet = make()
    unet.save_pretrained(tmp_path / "network")
    again = UNet.from_pretrained(tmp_path / "network")
    assert again.config == unet.config
    assert torch.equal(run(again), run(unet))
    assert not again.training
    assert {file.name for file in (tmp_path / "network").iterdir()} == {"config.json", "model.safetensors"}
    modes = {file.stat().st_mode for file in (tmp_path / "network").iterdir()}
    assert len(modes) == 1  # whoever can read the one can read the other


@pytest.mark.parametrize("name", [n for n in WIDENED if n not in ("widths", "time scale")])
def test_form_of_diffusers_there_and_back(name: str, tmp_path: Path) -> None:
    unet = widened(name)
    unet.save_pretrained(tmp_path, format="diffusers")
    again = UNet.from_pretrained(tmp_path)
    assert again.config == unet.config
    assert torch.equal(run(again), run(unet))


def test_half_precision_is_kept(tmp_path: Path) -> None:
    unet = variant("improved").bfloat16()
    for form in ("fastddpm", "diffusers"):
        # diffusers has one length of a head for all levels, and this network one number of heads
        if form == "diffusers":
            unet.config = UNetConfig(**{**unet.to_config(), "num_heads": 1})
        unet.save_pretrained(tmp_path / form, format=form)  # type: ignore[arg-type]
        again = UNet.from_pretrained(tmp_path / form, dtype=torch.bfloat16)
        assert all(torch.equal(p, q) for p, q in zip(again.parameters(), unet.parameters(), strict=True))
        exact = UNet.from_pretrained(tmp_path / form)
        assert all(torch.equal(p, q.float()) for p, q in zip(exact.parameters(), unet.parameters(), strict=True))


def test_what_was_there_is_replaced(tmp_path: Path) -> None:
    variant("ddpm").save_pretrained(tmp_path)
    unet = variant("adm")
    for form in ("fastddpm", "diffusers", "fastddpm"):
        unet.save_pretrained(tmp_path, form)  # type: ignore[arg-type]
        assert torch.equal(run(UNet.from_pretrained(tmp_path)), run(unet))
        for p in unet.parameters():
            p.data.mul_(1.5)


def test_options_that_the_file_leaves_open(tmp_path: Path) -> None:
    variant("ddpm").save_pretrained(tmp_path)
    unet = UNet.from_pretrained(tmp_path, dropout=0.2, image_size=16)
    assert unet.config == UNetConfig(**{**TINY, "dropout": 0.2, "image_size": (16, 16), "attention_resolutions": (8,)})
    assert UNet.from_pretrained(tmp_path, base_channels=8).config.base_channels == 8  # what it says anyway
    message = r"leaves open \(image_size, dropout\), got num_heads=2 where it has 1, num_timesteps; leave it out$"
    with pytest.raises(ValueError, match=message.replace(", num_timesteps", "")):
        UNet.from_pretrained(tmp_path, num_heads=2)
    with pytest.raises(ValueError, match=message):
        UNet.from_pretrained(tmp_path, num_heads=2, num_timesteps=1000)


def test_a_file_of_a_folder(tmp_path: Path) -> None:
    unet = variant("ddpm")
    unet.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert torch.equal(run(UNet.from_pretrained(tmp_path / "other.safetensors")), run(unet))
    assert torch.equal(run(UNet.from_pretrained(str(tmp_path / "other.safetensors"))), run(unet))


def test_training_goes_on(tmp_path: Path) -> None:
    variant("ddpm").save_pretrained(tmp_path)
    unet = UNet.from_pretrained(tmp_path).train()
    x, t, labels = inputs(unet)
    unet(x, t, labels).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in unet.parameters())


# --- what is refused

NEITHER = "expected a folder, a file or a repository on the Hugging Face hub such as 'google/ddpm-cifar10-32', got "


def with_text(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def without_file(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def as_a_checkpoint(folder: Path) -> None:
    """As `Trainer` writes them."""
    (folder / "state.json").write_text("{}")


def as_a_run(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "checkpoint-0000000128").mkdir()


def without_a_tensor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["conv_out.bias"]
    save_file(state, folder / "model.safetensors")


def as_index(weight_map: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        variant("ddpm").save_pretrained(folder, "diffusers")
        (folder / "diffusion_pytorch_model.safetensors").unlink()
        (folder / "model.safetensors").rename(folder.parent / "model.safetensors")  # there, but not in the folder
        text = json.dumps({"weight_map": weight_map})
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), re.escape(NEITHER)),
        (without_file("config.json"), r"expected config.json in .* or .*unet, got model.safetensors; pass the folder"),
        (as_a_run, r"got checkpoint-0000000128, model.safetensors; for a training run .*load_diffusion\(path\).model"),
        (as_a_checkpoint, "expected a network, got the checkpoint of a training run, .*; use fastddpm.load_diffusion"),
        (without_file("model.safetensors"), "expected weights in .*, got no model.safetensors; pass the file"),
        (with_text("config.json", "{"), r"expected .*config.json to be JSON, got .*; get the file again"),
        (with_text("config.json", "[]"), r"expected .*config.json to be a JSON object, got list; get it again"),
        (with_text("model.safetensors", "x"), r"expected .* to be safetensors, got .*; get the file again"),
        (without_a_tensor, r"expected the tensors of the network in .*, got 1 missing: conv_out.bias; the file is of"),
        (lambda folder: rewritten(folder, version=2), "expected version 1 of fastddpm.UNet in .*, got 2; read it with"),
        (lambda folder: rewritten(folder, config=None), "expected config in config.json of .*, got None; get the file"),
        (lambda folder: rewritten(folder, config={"depth": 3}), "expected options of UNetConfig, got 'depth'"),
        (as_index({"conv_in.weight": "../model.safetensors"}), r"got no \.\./model.safetensors; get them again"),
        (as_index({"conv_in.weight": "absent.safetensors"}), "got no absent.safetensors; get them again"),
        (as_index(None), "expected the files that .* names, got no names; get them again"),
    ],
)  # fmt: skip
def test_damaged_and_other_folders_are_refused(change: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    variant("ddpm").save_pretrained(tmp_path / "network")
    change(tmp_path / "network")
    with pytest.raises(ValueError, match=rf"^UNet.from_pretrained.*{message}"):
        UNet.from_pretrained(tmp_path / "network")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(time_scale=0.5), r"time_scale=0.5 \(supported: 1\); save with format='fastddpm'"),
        (
            dict(time_scale=0.5, base_channels=16, widths=(8, 12), middle="plain_attention"),
            r"time_scale=0.5 \(supported: 1\); base_channels=16 \(supported: the first of widths, 8\); "
            r"middle='plain_attention' \(supported: this with scale_shift alone\); save",
        ),
        (dict(channel_mult=(2, 2)), r"channel_mult=\(2, 2\) \(supported: 1 in front\)"),
        (
            dict(num_heads=2, attention_resolutions=(8, 4)),
            r"num_heads=2 \(supported: 1, or head_channels, with attention of widths \[8, 16\]\)",
        ),
    ],
)  # fmt: skip
def test_options_that_diffusers_does_not_have_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    unet = UNet(**{**TINY, **options})
    with pytest.raises(ValueError, match=rf"^UNet.save_pretrained: expected options that a UNet2DModel .*{message}"):
        unet.save_pretrained(tmp_path / "network", format="diffusers")
    assert not (tmp_path / "network").exists()
    with pytest.raises(ValueError, match="expected format 'fastddpm' or 'diffusers', got 'keras'; choose one"):
        unet.save_pretrained(tmp_path / "network", format="keras")  # type: ignore[arg-type]


GOOD = from_unet_config(UNetConfig(image_size=(32, 32)))


def refused(config: dict[str, Any], folder: Path, **options: Any) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        UNet.from_pretrained(folder, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "supported"),
    [
        ("_class_name", "UNet2DConditionModel", "UNet2DModel"),
        ("in_channels", "3", "an integer >= 1"),
        ("layers_per_block", [2, 2, 2, 2], "an integer >= 1"),
        ("norm_num_groups", None, "an integer >= 1"),
        ("norm_num_groups", 24, "a divisor of each of block_out_channels [128, 256, 256, 256]"),
        ("norm_eps", 0, "a number > 0"),
        ("mid_block_scale_factor", None, "a number > 0"),
        ("dropout", 1.5, "a number in [0, 1)"),
        ("freq_shift", 0.5, "0 or 1"),
        ("flip_sin_to_cos", None, "true or false"),
        ("time_embedding_type", "fourier", "'positional'"),
        ("act_fn", "gelu", "'silu' or 'swish'"),
        ("class_embed_type", "timestep", "null"),
        ("num_class_embeds", 0, "null or an integer >= 1"),
        ("mid_block_type", "UNetMidBlock2DCrossAttn", "'UNetMidBlock2D' or null"),
        ("resnet_time_scale_shift", "spatial", "default or scale_shift"),
        ("block_out_channels", 128, "a list of integers >= 1"),
        ("block_out_channels", [128, 256], "one for each of block_out_channels"),
        ("down_block_types", ["DownBlock2D", "SkipDownBlock2D", "DownBlock2D", "DownBlock2D"],
         "of DownBlock2D, AttnDownBlock2D, ResnetDownsampleBlock2D"),
        ("up_block_types", ["UpBlock2D", "UpBlock2D", "SkipUpBlock2D", "UpBlock2D"],
         "of UpBlock2D, AttnUpBlock2D, ResnetUpsampleBlock2D"),
        ("sample_size", None, "the size of the images; pass image_size="),
        ("sample_size", 28, "multiples of 8 = 2^(levels - 1); pass image_size="),
        ("sample_size", [32, 32, 32], "multiples of 8 = 2^(levels - 1); pass image_size="),
        ("attention_head_dim", 96, "a divisor of the widths with attention, [256, 256]"),
        ("attn_norm_num_groups", 16, "null or norm_num_groups, 32"),
        ("downsample_padding", 2, "0 or 1"),
        ("upsample_type", "fir", "'conv' or 'resnet'"),
        ("downsample_type", "resnet", "one way to change the size everywhere"),
        ("cross_attention_dim", 64, "no such key"),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_represented_is_refused(
    key: str, value: Any, supported: str, tmp_path: Path
) -> None:
    message = refused({**GOOD, key: value}, tmp_path)
    assert message.startswith("UNet.from_pretrained: expected a configuration that a fastddpm.UNet can represent, got")
    shown = "'UNet2DConditionModel'" if key == "_class_name" else value
    assert f"{key} {shown if key == '_class_name' else repr(value)} (supported: {supported}" in message or (
        key == "block_out_channels" and supported in message
    )
    assert message.endswith("; run this network with diffusers, fastddpm.optimize makes it faster there")


def test_all_keys_at_fault_are_named_at_once(tmp_path: Path) -> None:
    faults = dict(act_fn="mish", class_embed_type="identity", freq_shift=3, norm_num_groups=7, downsample_padding=4,
                  time_embedding_type="learned", encoder_hid_dim=8)  # fmt: skip
    message = refused({**GOOD, **faults}, tmp_path)
    found = re.findall(r"(\w+) \S+ \(supported: ", message)
    assert sorted(found) == sorted(faults)


def test_missing_keys_have_the_defaults_of_diffusers(tmp_path: Path) -> None:
    """UNet2DModel(sample_size=32) without more."""
    message = refused({"_class_name": "UNet2DModel", "sample_size": 32}, tmp_path)
    assert "expected weights in" in message  # the configuration was taken
    assert "sample_size None (supported: the size of the images" in refused({"_class_name": "UNet2DModel"}, tmp_path)
    assert DEFAULTS["attention_head_dim"] == 8


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (dict(sample_size=32), 274_056_163),
        (
            dict(
                sample_size=64, block_out_channels=[128, 128, 256, 256, 512, 512],
                down_block_types=["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
                up_block_types=["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
            ),
            113_673_219,
        ),
    ],
)  # fmt: skip
def test_the_default_network_and_that_of_the_training_script(config: dict[str, Any], count: int) -> None:
    """As many parameters as diffusers says of them."""
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(to_unet_config(config, {}, "test")).parameters()) == count


def test_two_classes_are_needed_for_one_that_stands_for_none(tmp_path: Path) -> None:
    message = refused({**GOOD, "num_class_embeds": 1}, tmp_path, null_class=True)
    assert message.endswith("expected num_class_embeds >= 2 with null_class=True, got 1; leave null_class out")


# --- pickles


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["model.pt", "diffusion_pytorch_model.bin"])
def test_a_pickle_with_code_is_refused_and_not_run(name: str, legacy: bool, tmp_path: Path) -> None:
    file, trace = tmp_path / name, tmp_path / "trace"
    state = {"input_blocks.0.0.weight": torch.ones(1), "x": Payload(f"touch {trace}")}
    torch.save(state, file, _use_new_zipfile_serialization=not legacy)
    if name.endswith(".bin"):
        (tmp_path / "config.json").write_text(json.dumps(GOOD))
    with pytest.raises(ValueError, match="to hold tensors alone, got a pickle with other objects, which could run any"):
        UNet.from_pretrained(file if name.endswith(".pt") else tmp_path)
    assert not trace.exists()
    torch.load(file, weights_only=False)  # it would have run
    assert trace.exists()


@pytest.mark.parametrize("contents", [b"", b"PK\x03\x04 no archive", b"text"])
def test_a_damaged_file_is_refused(contents: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(contents)
    with pytest.raises(ValueError, match=r"^UNet.from_pretrained: expected .*model.pt to .*, got .*; "):
        UNet.from_pretrained(tmp_path / "model.pt")


# --- the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return put_in_place(tmp_path, monkeypatch)


@pytest.mark.parametrize("place", ["", "unet"])
@pytest.mark.parametrize("form", ["fastddpm", "diffusers"])
def test_a_repository(place: str, form: str, hub: Path) -> None:
    unet = variant("ddpm")
    repository = hub / "someone" / "a-network"
    unet.save_pretrained(repository / place, format=form)  # type: ignore[arg-type]
    torch.save({}, repository / place / "diffusion_pytorch_model.bin")  # not fetched where there are safetensors
    (repository / "README.md").write_text("large")
    assert torch.equal(run(UNet.from_pretrained("someone/a-network")), run(unet))
    weights = "model.safetensors" if form == "fastddpm" else "diffusion_pytorch_model.safetensors"
    below = f"{place}/" if place else ""
    assert (hub / "asked").read_text().split() == [f"{below}config.json", f"{below}{weights}"]


def test_a_repository_with_pickles_alone_and_with_revisions(hub: Path) -> None:
    unet = variant("ddpm")
    old = hub / "someone" / "a-network" / "v1"
    unet.save_pretrained(old, format="diffusers")
    torch.save(load_file(old / "diffusion_pytorch_model.safetensors"), old / "diffusion_pytorch_model.bin")
    (old / "diffusion_pytorch_model.safetensors").unlink()
    assert torch.equal(run(UNet.from_pretrained("someone/a-network", revision="v1")), run(unet))


def test_a_folder_comes_before_a_repository(hub: Path, tmp_path: Path) -> None:
    variant("ddpm").save_pretrained(hub / "someone" / "a-network")
    mine = variant("improved")
    mine.save_pretrained(tmp_path / "someone" / "a-network")
    assert torch.equal(run(UNet.from_pretrained("someone/a-network")), run(mine))


def test_no_such_repository(hub: Path) -> None:
    message = re.escape(
        "got 'someone/else': no folder, and the hub says: 404 Client Error; check the name, the network"
    )
    with pytest.raises(ValueError, match=message):
        UNet.from_pretrained("someone/else")


@pytest.mark.parametrize("path", ["network", "/absent/network", "a/b/c", "../a", "a/b?c", Path("a/b")])
def test_what_cannot_name_a_repository_is_not_looked_for(path: str | Path, hub: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{NEITHER}{str(path)!r}, where nothing is; check the path")):
        UNet.from_pretrained(path)


def test_without_the_package_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ImportError, match=r"expected the package huggingface_hub to get someone/a-network .* pip install"
    ):
        UNet.from_pretrained("someone/a-network")
