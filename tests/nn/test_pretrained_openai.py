"""Weights of improved-diffusion, guided-diffusion and the original port: what they gave there they give here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddpm.nn import UNet
from fastddpm.nn.pretrained import diffusers_unet, openai_unet
from fastddpm.nn.pretrained.weights import scatter
from tests.nn.networks import filled, inputs, variant
from tests.nn.openai_networks import NETWORKS, RECORD, weights
from tests.nn.openai_networks import inputs as recorded_inputs
from tests.tolerance import assert_near_peer

IMPROVED_CIFAR10: dict[str, Any] = dict(
    num_res_blocks=3, attention_resolutions=(16, 8), num_heads=4, scale_shift=True, learned_variance=True, dropout=0.3,
    norm_eps=1e-5, embedding="adm", downsample_padding="symmetric",
)  # fmt: skip
ADM_512: dict[str, Any] = dict(  # the class-conditional network for ImageNet at 512x512 pixels
    image_size=512, base_channels=256, widths=(128, 256, 256, 512, 512, 1024, 1024), num_res_blocks=2,
    attention_resolutions=(32, 16, 8), head_channels=64, scale_shift=True, learned_variance=True, num_classes=1000,
    null_class=False, norm_eps=1e-5, embedding="adm", downsample_padding="symmetric", resample="resblock",
)  # fmt: skip


def recorded(name: str) -> tuple[dict[str, list[int]], Tensor]:
    """Names and shapes of the tensors, and the output."""
    entry = json.loads(RECORD.read_text())[name]
    return entry["shapes"], torch.tensor(entry["output"]["values"]).reshape(entry["output"]["shape"])


def saved(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "model.pt")
    return folder / "model.pt"


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


def in_openai_names(unet: UNet, order: str = "legacy") -> dict[str, Tensor]:
    return scatter(unet, openai_unet.layout(unet, order))


def in_openai_names_on_meta(unet: UNet) -> dict[str, Tensor]:
    state, layout = unet.state_dict(), openai_unet.layout(unet, "new")
    return {part.name: torch.empty(part.rows, *state[ours].shape[1:]) for ours, e in layout.items() for part in e.parts}


@pytest.mark.parametrize("name", NETWORKS)
def test_gives_what_their_code_gave(name: str, tmp_path: Path) -> None:
    _, arguments, added = NETWORKS[name]
    shapes, output = recorded(name)
    unet = UNet.from_pretrained(saved(weights(shapes), tmp_path), **added)
    x, t, labels = recorded_inputs(arguments, added)
    with torch.no_grad():
        assert_near_peer(unet(x, t, labels), output)
    assert not unet.training


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("improved, scale and shift", dict(attention_order="new")),
        ("improved, scale and shift", dict(num_heads=2)),
        ("improved, scale and shift", dict(rescale_timesteps=False)),
        ("guided, residual blocks change the size", dict(attention_order="legacy")),
    ],
)
def test_what_is_asked_for_makes_a_difference(name: str, wrong: dict[str, Any], tmp_path: Path) -> None:
    _, arguments, added = NETWORKS[name]
    shapes, output = recorded(name)
    unet = UNet.from_pretrained(saved(weights(shapes), tmp_path), **{**added, **wrong})
    x, t, labels = recorded_inputs(arguments, added)
    with torch.no_grad():
        assert difference(unet(x, t, labels), output) > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_shapes_are_those_of_their_code(name: str, tmp_path: Path) -> None:
    shapes, _ = recorded(name)
    unet = UNet.from_pretrained(saved(weights(shapes), tmp_path), **NETWORKS[name][2])
    state = in_openai_names(unet, NETWORKS[name][2].get("attention_order", "legacy"))
    # where we have a linear layer they have a convolution over one dimension: a 1 more
    assert {key: list(value.shape) for key, value in state.items()} == {
        key: [n for i, n in enumerate(shape) if n > 1 or i < 2 or len(shape) == 4] for key, shape in shapes.items()
    }
    for key, value in weights(shapes).items():
        assert torch.equal(state[key], value.reshape(state[key].shape)), key


def test_the_cifar_10_network_of_improved_diffusion_has_its_446_tensors() -> None:
    with torch.device("meta"):
        unet = UNet(**IMPROVED_CIFAR10)
    shapes = {
        part.name: (part.rows, *unet.state_dict()[ours].shape[1:])
        for ours, entry in openai_unet.layout(unet, "legacy").items()
        for part in entry.parts
    }
    assert len(shapes) == 446
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 52_546_438
    assert shapes["input_blocks.0.0.weight"] == (128, 3, 3, 3)
    assert shapes["input_blocks.4.0.op.weight"] == (128, 128, 3, 3)
    assert shapes["input_blocks.5.1.qkv.weight"] == (768, 256)
    assert shapes["output_blocks.0.0.skip_connection.weight"] == (256, 512, 1, 1)
    assert shapes["output_blocks.3.1.conv.weight"] == (256, 256, 3, 3)  # no attention at 4x4
    assert shapes["output_blocks.7.2.conv.weight"] == (256, 256, 3, 3)  # behind the attention at 8x8
    assert shapes["output_blocks.15.0.emb_layers.1.weight"] == (256, 512)
    assert shapes["out.2.weight"] == (6, 128, 3, 3)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (ADM_512, 558_997_638),
        (dict(ADM_512, image_size=64, base_channels=192, channel_mult=(1, 2, 3, 4), widths=None, num_res_blocks=3),
         295_904_454),
        (dict(ADM_512, image_size=256, channel_mult=(1, 1, 2, 2, 4, 4), widths=None, num_classes=None, null_class=True),
         552_814_086),
    ],
)  # fmt: skip
def test_the_networks_of_guided_diffusion_have_as_many_parameters(options: dict[str, Any], count: int) -> None:
    """At 512x512, 64x64, and 256x256 without classes; as their code makes them."""
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(**options).parameters()) == count


@pytest.mark.parametrize(
    ("options", "added"),
    [
        (IMPROVED_CIFAR10, dict(image_size=32, num_heads=4, attention_order="legacy", num_timesteps=1000, dropout=0.3)),
        (ADM_512, dict(image_size=512, head_channels=64, attention_order="legacy", num_timesteps=1000)),
    ],
)
def test_configurations_of_published_networks_follow_from_their_shapes(
    options: dict[str, Any], added: dict[str, Any]
) -> None:
    about = {key: added.pop(key, None) for key in ("attention_order", "num_timesteps", "rescale_timesteps")}
    with torch.device("meta"):
        unet = UNet(**options)
        state = in_openai_names_on_meta(unet)
    assert openai_unet.to_unet_config(state, added, about, "file") == unet.config


@pytest.mark.parametrize("option", ["image_size", "num_heads", "attention_order", "num_timesteps", "rescale_timesteps"])
def test_what_the_weights_cannot_tell_is_asked_for(option: str, tmp_path: Path) -> None:
    name = "improved, scale and shift"
    added = {key: value for key, value in NETWORKS[name][2].items() if key != option}
    asked = {"rescale_timesteps": "num_timesteps"}.get(option, option)
    with pytest.raises(ValueError, match=rf"^UNet.from_pretrained: expected what the weights in .* got no .*{asked}="):
        UNet.from_pretrained(saved(weights(recorded(name)[0]), tmp_path), **added)


def test_all_that_is_missing_is_asked_for_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no image_size=.*no num_heads= or head_channels=.*no num_timesteps="):
        UNet.from_pretrained(saved(weights(recorded("improved, scale and shift")[0]), tmp_path))


def without(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {name: value for name, value in state.items() if not name.startswith(prefix)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("output_blocks"), "got one without a way up, such as a classifier"),
        (without("out."), "got one without an output"),
        (without("input_blocks.3."), r"got none in \[3\]; a network with conv_resample=False"),
        (without("output_blocks.8."), "expected as many blocks at each level"),
        (without("input_blocks.1.0.in_layers.2.bias"), "got 1 missing: input_blocks.1.0.in_layers.2.bias; the file is"),
        (lambda state: {**state, "extra": torch.ones(1)}, "got 1 without a place: extra; "),
        (
            lambda state: {**state, "time_embed.2.weight": torch.ones(128, 5)},
            r"got 1 of another shape: time_embed.2.weight \[128, 5\] where \[128, 128\] fits; ",
        ),
        (lambda state: {"state_dict": state}, "expected .* to hold a state dict alone, got a dictionary of state_dict"),
        (lambda state: {"init_conv.weight": torch.ones(1)}, "got a Unet of denoising-diffusion-pytorch; use fastddpm"),
        (lambda state: {"time_embedding.linear_1.weight": torch.ones(1)}, "without its config.json; put it beside"),
        (lambda state: {"fc.weight": torch.ones(1)}, "got tensors named fc.weight; pass the file of a network"),
        (lambda state: [1, 2], "to hold a state dict alone, got <class 'list'>"),
    ],
)  # fmt: skip
def test_other_files_are_refused(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    shapes, _ = recorded("improved, scale and shift")
    with pytest.raises(ValueError, match=message):
        UNet.from_pretrained(saved(change(weights(shapes)), tmp_path), **NETWORKS["improved, scale and shift"][2])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(attention_order="old"), "expected attention_order 'legacy' or 'new', got 'old'; choose one"),
        (dict(num_timesteps=0), "expected num_timesteps to be an integer >= 1, got 0"),
        (dict(time_scale=0.25), "expected time_scale alone, got num_timesteps=4000 and rescale_timesteps=True beside"),
        (dict(channel_mult=(1, 2, 4)), r"leaves open .*channel_mult=\(1, 2, 4\) where it has \(1, 2, 2\); leave it"),
        (dict(learned_variance=False, prediction_channels=5), "that give the 6 channels .* got False and 5; leave"),
        (dict(image_size="32"), r"expected image_size to be \(height, width\) or an integer, got '32'; pass the size"),
        (dict(dtype=torch.int64), "expected dtype to be a floating-point dtype, got torch.int64"),
        (dict(chanel_mult=1), "got 'chanel_mult'; did you mean 'channel_mult'"),
    ],
)  # fmt: skip
def test_options_without_a_meaning_are_refused(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    name = "improved, scale and shift"
    with pytest.raises(ValueError, match=message):
        UNet.from_pretrained(saved(weights(recorded(name)[0]), tmp_path), **{**NETWORKS[name][2], **more})


def test_time_scale_stands_for_the_rescaled_timesteps(tmp_path: Path) -> None:
    name = "improved, scale and shift"
    file, added = saved(weights(recorded(name)[0]), tmp_path), NETWORKS[name][2]
    others = {key: value for key, value in added.items() if "timesteps" not in key}
    assert UNet.from_pretrained(file, **others, time_scale=0.25).config == UNet.from_pretrained(file, **added).config


def test_the_last_class_can_stand_for_none(tmp_path: Path) -> None:
    name = "improved, classes"
    file = saved(weights(recorded(name)[0]), tmp_path)
    unet = UNet.from_pretrained(file, **NETWORKS[name][2])
    with_none = UNet.from_pretrained(file, **NETWORKS[name][2], null_class=True)
    assert (unet.num_classes, unet.null_class) == (5, False)
    assert (with_none.num_classes, with_none.null_class) == (4, True)
    x, t, _ = recorded_inputs(*NETWORKS[name][1:])
    with torch.no_grad():
        assert torch.equal(with_none(x, t), unet(x, t, torch.tensor([4, 4])))
    with pytest.raises(ValueError, match="expected labels for a network with 5 classes and no null class, got None"):
        unet(x, t)


def test_half_precision_files_load_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    name = "improved, classes"
    state = {key: value.half() for key, value in weights(recorded(name)[0]).items()}
    file = saved(state, tmp_path)
    unet = UNet.from_pretrained(file, **NETWORKS[name][2])
    assert {p.dtype for p in unet.parameters()} == {torch.float32}
    assert torch.equal(unet.conv_in.weight, state["input_blocks.0.0.weight"].float())
    half = UNet.from_pretrained(file, dtype=torch.bfloat16, **NETWORKS[name][2])
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_convolutions_stay_channels_last(tmp_path: Path) -> None:
    name = "improved, classes"
    unet = UNet.from_pretrained(saved(weights(recorded(name)[0]), tmp_path), **NETWORKS[name][2])
    assert all(
        p.is_contiguous(memory_format=torch.channels_last) for p in unet.parameters() if p.dim() == 4
    )  # fmt: skip


# --- the original port, whose names are also those of the first files in the form of diffusers


def in_port_names(unet: UNet) -> dict[str, Tensor]:
    """The state of a network under the names of the port of the original to PyTorch."""
    last, state = len(unet.up) - 1, {}
    for name, value in scatter(unet, diffusers_unet.layout(unet)).items():
        words = name.split(".")
        if words[0] in ("down_blocks", "up_blocks"):
            way, level = words[0].removesuffix("_blocks"), int(words[1])
            kind = {"resnets": "block", "attentions": "attn"}.get(words[2])
            rest = [kind, *words[3:]] if kind else [f"{way}sample", "conv", words[-1]]
            words = [way, str(last - level if way == "up" else level), *rest]
        elif words[0] == "mid_block":
            words = ["mid", f"{'attn' if words[1] == 'attentions' else 'block'}_{int(words[2]) + 1}", *words[3:]]
        elif words[0] == "time_embedding":
            words = ["temb", "dense", str(int(words[1].removeprefix("linear_")) - 1), words[2]]
        elif words[0] == "conv_norm_out":
            words[0] = "norm_out"
        renamed = {
            "time_emb_proj": "temb_proj", "conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q",
            "to_k": "k", "to_v": "v",
        }  # fmt: skip
        if "to_out" in words:
            words = [*words[: words.index("to_out")], "proj_out", words[-1]]
        words = [renamed.get(word, word) for word in words]
        attention = value.dim() == 2 and ("attn" in words or "attn_1" in words)
        state[".".join(words)] = value[:, :, None, None] if attention else value
    return state


def test_the_original_port(tmp_path: Path) -> None:
    unet = filled(UNet(image_size=16, base_channels=32, channel_mult=(1, 2, 2), attention_resolutions=(8,))).eval()
    state = in_port_names(unet)
    assert {
        "temb.dense.0.weight", "down.1.attn.0.q.weight", "up.1.attn.2.proj_out.bias", "up.2.upsample.conv.bias",
        "down.0.downsample.conv.weight", "mid.attn_1.norm.weight", "up.0.block.0.nin_shortcut.weight",
    } <= state.keys()  # fmt: skip
    again = UNet.from_pretrained(saved(state, tmp_path), image_size=16)
    assert again.config == unet.config
    for name, value in unet.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    with pytest.raises(ValueError, match=r"expected image_size= with .* whose weights cannot tell it"):
        UNet.from_pretrained(tmp_path / "model.pt")


def test_rows_by_head_and_back() -> None:
    """Row (head, kind, channel) of theirs is row (kind, head, channel) of ours."""
    unet = variant("improved")  # two heads
    theirs = in_openai_names(unet, "legacy")["middle_block.1.qkv.weight"]
    ours = unet.middle.attention.qkv.weight  # type: ignore[union-attr]
    c = ours.shape[1]
    for head in range(2):
        for kind in range(3):
            for channel in (0, c // 2 - 1):
                row = head * 3 * c // 2 + kind * c // 2 + channel
                assert torch.equal(theirs[row], ours[kind * c + head * c // 2 + channel])
    x, t, labels = inputs(unet)
    assert unet(x, t, labels).shape == (2, 6, 8, 8)
