"""Networks of diffusers: over a generated grid of its configurations, the same output, and every tensor kept."""

from __future__ import annotations

import inspect
import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddpm.nn import UNet
from fastddpm.nn.pretrained.diffusers_unet import DEFAULTS
from tests.tolerance import assert_near_peer, assert_within

pytestmark = pytest.mark.peer

GRID, MORE, HALF = 32, 400, 8  # cases by default, of the slow test, and in bfloat16


def choices(of: random.Random) -> dict[str, Any]:
    """A configuration of UNet2DModel, of all kinds that we can represent."""
    levels, groups = of.randint(1, 4), of.choice([2, 4])
    attended = up_attended = [of.random() < 0.5 for _ in range(levels)]
    if of.random() < 0.3:
        up_attended = [of.random() < 0.5 for _ in range(levels)]
    size_changes = of.choice(["conv", "resnet"])
    plain = ("DownBlock2D", "UpBlock2D")
    if size_changes == "resnet":
        plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    return dict(
        sample_size=of.choice([8, 16, (8, 16)]),
        in_channels=of.choice([1, 3, 4]),
        out_channels=of.choice([1, 3, 6, 8]),
        center_input_sample=of.random() < 0.3,
        time_embedding_dim=of.choice([None, 24]),
        freq_shift=of.choice([0, 1]),
        flip_sin_to_cos=of.random() < 0.5,
        down_block_types=tuple("AttnDownBlock2D" if a else plain[0] for a in attended),
        mid_block_type=of.choice(["UNetMidBlock2D"] * 4 + [None]),
        up_block_types=tuple("AttnUpBlock2D" if a else plain[1] for a in reversed(up_attended)),
        block_out_channels=tuple(groups * of.choice([2, 4, 6, 8]) for _ in range(levels)),
        layers_per_block=of.choice([1, 2]),
        mid_block_scale_factor=of.choice([1, 1, 2**0.5]),
        downsample_padding=of.choice([0, 1]),
        downsample_type=size_changes,
        upsample_type=size_changes,
        dropout=of.choice([0.0, 0.1]),
        act_fn=of.choice(["silu", "swish"]),
        attention_head_dim=of.choice([None, 1, 2, 4]),
        norm_num_groups=groups,
        attn_norm_num_groups=of.choice([None, groups]),
        norm_eps=of.choice([1e-5, 1e-6, 1e-2]),
        resnet_time_scale_shift=of.choice(["default", "scale_shift"]),
        add_attention=of.random() < 0.8,
        num_class_embeds=of.choice([None, None, 5]),
    )


def case(seed: int) -> dict[str, Any]:
    return choices(random.Random(seed))


def their_network(options: dict[str, Any], seed: int = 0) -> Any:
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    return UNet2DModel(**options).eval()


def reread(folder: Path) -> Any:
    """What diffusers reads, without a word of complaint."""
    from diffusers import UNet2DModel

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, told = UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


def inputs(options: dict[str, Any], seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    size = options["sample_size"]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(
        2, options["in_channels"], *(size if isinstance(size, tuple) else (size, size)), generator=generator
    )
    labels = torch.tensor([0, 4]) if options["num_class_embeds"] else None
    return x, torch.randint(0, 1000, (2,), generator=generator), labels


def assert_same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def assert_represented(seed: int, folder: Path) -> None:
    """Same output; and there and back, in both formats, every tensor and the configuration."""
    options = case(seed)
    theirs = their_network(options, seed)
    theirs.save_pretrained(folder / "theirs")
    ours = UNet.from_pretrained(folder / "theirs")
    x, t, labels = inputs(options, seed)
    with torch.no_grad():
        expected = theirs(x, t, class_labels=labels).sample
        assert expected.std() > 0.01
        assert_near_peer(ours(x, t, labels), expected)

    ours.save_pretrained(folder / "back", format="diffusers")
    back = reread(folder / "back")
    assert_same_tensors(theirs.state_dict(), back.state_dict())
    with torch.no_grad():
        # the same weights; that torch's products of them have the same bits twice depends on where tensors lie
        assert_near_peer(back(x, t, class_labels=labels).sample, expected)
    assert UNet.from_pretrained(folder / "back").config == ours.config

    ours.save_pretrained(folder / "ours")
    again = UNet.from_pretrained(folder / "ours")
    assert again.config == ours.config
    assert_same_tensors(again.state_dict(), ours.state_dict())


@pytest.mark.parametrize("seed", range(GRID))
def test_same_output_and_there_and_back(seed: int, tmp_path: Path) -> None:
    assert_represented(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("first", range(GRID, GRID + MORE, 20))
def test_same_output_and_there_and_back_hundreds_more(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + 20):
        assert_represented(seed, tmp_path / str(seed))


def test_the_grid_has_every_option() -> None:
    seen: dict[str, set[str]] = {}
    for seed in range(GRID):
        for key, value in case(seed).items():
            seen.setdefault(key, set()).add(str(value))
    lists = {"down_block_types", "up_block_types", "block_out_channels"}
    few = {key: values for key, values in seen.items() if key not in lists and len(values) < 2}
    assert not few
    wanted = {"sample_size": 3, "in_channels": 3, "out_channels": 4, "norm_eps": 3, "attention_head_dim": 4}
    assert {key: len(seen[key]) for key in wanted} == wanted


@pytest.mark.parametrize("seed", range(HALF))
def test_bfloat16_is_as_near_to_float64_as_theirs(seed: int, tmp_path: Path) -> None:
    """The rule of the ops, with r their network in float64 and n theirs in bfloat16: at most twice its error."""
    options = case(seed)
    theirs = their_network(options, seed).bfloat16()
    theirs.save_pretrained(tmp_path)
    ours = UNet.from_pretrained(tmp_path, dtype=torch.bfloat16)
    x, t, labels = inputs(options, seed)
    x = x.bfloat16()
    with torch.no_grad():
        rounded = theirs(x, t, class_labels=labels).sample.float()
        exact = theirs.double()(x.double(), t, class_labels=labels).sample
        assert_within(ours(x, t, labels), exact, rounded)


def test_missing_keys_have_the_defaults_of_diffusers() -> None:
    from diffusers import UNet2DModel

    parameters = inspect.signature(UNet2DModel.__init__).parameters
    theirs = {key: list(p.default) if isinstance(p.default, tuple) else p.default for key, p in parameters.items()}
    assert {**theirs, **DEFAULTS} == {**DEFAULTS, "self": inspect.Parameter.empty} == theirs


def test_files_in_pickle_form_and_in_several_parts(tmp_path: Path) -> None:
    theirs = their_network(case(1))
    theirs.save_pretrained(tmp_path / "safe")
    theirs.save_pretrained(tmp_path / "bin", safe_serialization=False)
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    theirs.save_pretrained(tmp_path / "bin-parts", safe_serialization=False, max_shard_size="20KB")
    expected = UNet.from_pretrained(tmp_path / "safe").state_dict()
    for name in ("bin", "parts", "bin-parts"):
        assert_same_tensors(UNet.from_pretrained(tmp_path / name).state_dict(), expected)


def test_the_weights_of_a_moving_average(tmp_path: Path) -> None:
    """Its class writes its own options into config.json."""
    from diffusers import UNet2DModel
    from diffusers.training_utils import EMAModel

    theirs = their_network(case(1))
    average = EMAModel(theirs.parameters(), model_cls=UNet2DModel, model_config=theirs.config)
    average.save_pretrained(tmp_path / "unet_ema")
    assert "optimization_step" in json.loads((tmp_path / "unet_ema" / "config.json").read_text())
    ours = UNet.from_pretrained(tmp_path, subfolder="unet_ema")
    ours.save_pretrained(tmp_path / "back", format="diffusers")
    assert_same_tensors(theirs.state_dict(), reread(tmp_path / "back").state_dict())


def test_the_last_class_can_stand_for_none(tmp_path: Path) -> None:
    options = {**case(1), "num_class_embeds": 5}
    theirs = their_network(options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = UNet.from_pretrained(tmp_path / "theirs", null_class=True)
    assert (ours.num_classes, ours.null_class) == (4, True)
    x, t, _ = inputs(options, 0)
    with torch.no_grad():
        assert_near_peer(ours(x, t), theirs(x, t, class_labels=torch.tensor([4, 4])).sample)
    ours.save_pretrained(tmp_path / "back", format="diffusers")
    assert reread(tmp_path / "back").config["num_class_embeds"] == 5
    assert UNet.from_pretrained(tmp_path / "back").config == ours.config


def test_another_image_size_keeps_the_attention_where_it_is(tmp_path: Path) -> None:
    options = {**case(1), "sample_size": 8}
    theirs = their_network(options)
    theirs.save_pretrained(tmp_path)
    ours = UNet.from_pretrained(tmp_path, image_size=16, dropout=0.2)
    assert ours.config.image_size == (16, 16)
    assert ours.config.dropout == 0.2
    x, t, labels = inputs({**options, "sample_size": 16}, 0)
    with torch.no_grad():
        assert_near_peer(ours(x, t, labels), theirs(x, t, class_labels=labels).sample)


def test_the_network_of_google_ddpm_cifar10_32(tmp_path: Path) -> None:
    """Its configuration as published, with the names of the first versions and of the original port: 328 tensors."""
    from diffusers import UNet2DModel

    from tests.nn.test_unet_peer import DDPM

    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "UNet2DModel", "_diffusers_version": "0.1", **DDPM})
    )
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in UNet2DModel(**DDPM).state_dict().items()}
    assert len(shapes) == 328
    # one number for each tensor, so the file is small
    state = {name: torch.tensor(float(n)).expand(shape) for n, (name, shape) in enumerate(shapes.items())}
    legacy = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    named = dict(state)
    for name in state:
        for new, old in legacy.items():
            if f".{new}." in name:
                named[name.replace(f".{new}.", f".{old}.")] = named.pop(name)
    torch.save(named, tmp_path / "diffusion_pytorch_model.bin")
    ours = UNet.from_pretrained(tmp_path)
    assert ours.config == UNet().config
    assert sum(p.numel() for p in ours.parameters()) == 35_746_307
    q, k, v = (state[f"mid_block.attentions.0.to_{part}.weight"] for part in "qkv")
    assert torch.equal(ours.middle.attention.qkv.weight, torch.cat([q, k, v]))  # type: ignore[union-attr]
    assert torch.equal(ours.up[3].blocks[2].conv2.bias, state["up_blocks.3.resnets.2.conv2.bias"])
