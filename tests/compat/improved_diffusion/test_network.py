"""The network that is stored as the original: its names, what loads and what is refused, and how it computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastddpm
from fastddpm.compat import improved_diffusion
from fastddpm.compat.improved_diffusion import SuperResModel, UNetModel, create_model, sr_create_model_and_diffusion
from fastddpm.compat.improved_diffusion.script_util import sr_model_and_diffusion_defaults
from tests.tolerance import assert_near_peer

SMALL: dict[str, Any] = dict(
    in_channels=3, model_channels=32, out_channels=6, num_res_blocks=1, attention_resolutions=(2, 8),
    channel_mult=(1, 2), num_heads=2, use_scale_shift_norm=True,
)  # fmt: skip


def trained(**options: Any) -> UNetModel:
    """A small network whose weights are nowhere 0."""
    model = UNetModel(**{**SMALL, **options})
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model


def inputs(model: UNetModel) -> tuple[Tensor, Tensor, Tensor | None]:
    y = None if model.num_classes is None else torch.tensor([0, model.num_classes - 1])
    return torch.randn(2, 3, 8, 12), torch.tensor([1.5, 700.0]), y


@pytest.mark.parametrize("options", [{}, dict(num_classes=5, num_heads_upsample=4), dict(use_scale_shift_norm=False)])
def test_a_state_goes_out_and_in(options: dict[str, Any], tmp_path: Path) -> None:
    first, second = trained(**options), UNetModel(**{**SMALL, **options})
    torch.save(first.state_dict(), tmp_path / "model000000.pt")
    state = torch.load(tmp_path / "model000000.pt", weights_only=True)
    assert sum(value.numel() for value in state.values()) == sum(p.numel() for p in first.parameters())
    assert str(second.load_state_dict(state)) == "<All keys matched successfully>"
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q), name
    x, t, y = inputs(first)
    assert torch.equal(first(x, t, y), second(x, t, y))


def test_a_new_network_gives_0() -> None:
    model = UNetModel(**SMALL)
    x, t, y = inputs(model)
    assert not model(x, t, y).any()
    zero = {name.rsplit(".", 1)[0] for name, value in model.state_dict().items() if not value.any()}
    zero = {name for name in zero if not name.endswith(("in_layers.0", "out_layers.0", "norm", "out.0"))}  # biases
    assert {name.split(".", 3 if "blocks" in name else 2)[-1] for name in zero} == {"out_layers.3", "proj_out", "2"}
    assert sum(name.endswith("proj_out") for name in zero) == 1 + 1 + 2  # down, middle, up


def test_our_own_reader_takes_its_files(tmp_path: Path) -> None:
    model = trained().eval()
    torch.save(model.state_dict(), tmp_path / "ema_0.9999_000010.pt")
    network = fastddpm.UNet.from_pretrained(
        tmp_path / "ema_0.9999_000010.pt", image_size=8, num_heads=2, attention_order="legacy", num_timesteps=1000
    )
    x, t, _ = inputs(model)
    with torch.no_grad():
        assert_near_peer(network(x, t), model(x, t), 1e-6)


def test_it_can_be_a_part_of_a_module() -> None:
    whole = nn.ModuleDict({"unet": trained()})
    state = whole.state_dict()
    assert "unet.input_blocks.0.0.weight" in state
    assert not any("network" in name for name in state)
    other = nn.ModuleDict({"unet": UNetModel(**SMALL)})
    other.load_state_dict(state)
    assert torch.equal(other.state_dict()["unet.middle_block.1.qkv.weight"], state["unet.middle_block.1.qkv.weight"])
    again = copy.deepcopy(other)
    assert list(again.state_dict()) == list(state)


def test_what_does_not_fit_is_named_as_in_the_file() -> None:
    model = trained()
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = model.state_dict()
    del state["middle_block.0.emb_layers.1.bias"]
    state["input_blocks.0.0.weight"] = torch.zeros(32, 1, 3, 3)
    state["input_blocks.9.0.op.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state)
    for words in (
        'Missing key(s) in state_dict: "middle_block.0.emb_layers.1.bias"',
        'Unexpected key(s) in state_dict: "input_blocks.9.0.op.weight"',
        "size mismatch for input_blocks.0.0.weight: expected shape [32, 3, 3, 3], got [32, 1, 3, 3]",
    ):
        assert words in str(error.value)
    for name in ("network.conv_in.weight", "network.time_projection.bias"):
        assert torch.equal(dict(model.named_parameters())[name], before[name])
    state["input_blocks.0.0.weight"] = torch.zeros(32, 3, 3, 3)
    found = model.load_state_dict(state, strict=False)
    assert found.missing_keys == ["middle_block.0.emb_layers.1.bias"]


@torch.no_grad()
def test_layout_and_dtype_of_what_it_gives() -> None:
    model, (x, t, _) = trained(), inputs(trained())
    assert model(x, t).is_contiguous()
    last = model(x.to(memory_format=torch.channels_last), t)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert_near_peer(last, model(x, t), 1e-6)
    assert model.double()(x.double(), t).dtype == torch.float64


@torch.no_grad()
def test_half_precision_leaves_the_weights_alone() -> None:
    model, (x, t, _) = trained(), inputs(trained())
    exact = model(x, t)
    model.convert_to_fp16()
    assert model.inner_dtype == torch.float16
    half = model(x, t)
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    assert_near_peer(half, exact, 2e-2)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.convert_to_fp32()
    assert torch.equal(model(x, t), exact)
    with torch.autocast("cpu", torch.bfloat16):  # that of the user counts
        assert not torch.equal(model(x, t), exact)


def test_dropout_and_recomputation() -> None:
    model = trained(dropout=0.5, use_checkpoint=True)
    x, t, _ = inputs(model)
    torch.manual_seed(1)
    out = model(x, t)
    out.sum().backward()
    torch.manual_seed(1)
    assert torch.equal(model(x, t), out)
    assert not torch.equal(model(x, t), out)
    assert torch.equal(model.eval()(x, t), model(x, t))


def test_super_resolution() -> None:
    flags = dict(sr_model_and_diffusion_defaults(), large_size=64, small_size=16, num_channels=32, num_res_blocks=1)
    for learned in (False, True):  # 6 channels in; 3 out or 6
        model, diffusion = sr_create_model_and_diffusion(**dict(flags, learn_sigma=learned))
        assert isinstance(model, SuperResModel)
        low, x, t = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 64, 64), torch.tensor([1, 2])
        out = model(x, t, low_res=low)
        assert out.shape == (2, 6 if learned else 3, 64, 64)
        assert diffusion.training_losses(model, x, t, model_kwargs={"low_res": low})["loss"].shape == (2,)
    assert len(model.get_feature_vectors(x, t, low_res=low)["up"]) == len(model.network.up) * 2
    with pytest.raises(ValueError, match="expected low_res, got None"):
        model(x, t)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: UNetModel(**SMALL, dims=3), NotImplementedError, "expected dims=2, got 3"),
        (lambda: UNetModel(**SMALL, conv_resample=False), NotImplementedError, "expected conv_resample=True"),
        (lambda: UNetModel(**SMALL, num_heads_upsample=5), ValueError, "expected num_heads_upsample to divide"),
        (lambda: UNetModel(**{**SMALL, "model_channels": 48}), ValueError, "num_groups to divide the width"),
        (lambda: trained()(torch.randn(1, 3, 8, 8), torch.ones(1), torch.ones(1)), ValueError, "for no other, got y"),
        (lambda: trained(num_classes=4)(torch.randn(1, 3, 8, 8), torch.ones(1)), ValueError, "got none with"),
        (lambda: create_model(48, 32, 1, False, False, False, "16", 1, -1, True, 0.0), ValueError, "among 32, 64, 256"),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_names_that_are_not_here_say_which_are() -> None:
    from fastddpm.compat.improved_diffusion import dist_util, logger

    assert dist_util.__name__.endswith("improved_diffusion.dist_util")
    assert logger.INFO == 20
    assert not hasattr(improved_diffusion, "__wrapped__")
    with pytest.raises(ImportError, match=r"expected one of .*UNetModel.*train_util.*, got 'ClassifierModel'"):
        from fastddpm.compat.improved_diffusion import ClassifierModel  # noqa: F401
    with pytest.raises(ImportError, match=r"unet: expected one of UNetModel, SuperResModel, got 'ResBlock'"):
        from fastddpm.compat.improved_diffusion.unet import ResBlock  # noqa: F401
    with pytest.raises(ImportError, match="got 'CheckpointFunction'"):
        from fastddpm.compat.improved_diffusion.nn import CheckpointFunction  # noqa: F401
    with pytest.raises(ImportError, match=r"expected UNetModel.convert_to_fp16 or .*, got 'zero_grad'"):
        from fastddpm.compat.improved_diffusion.fp16_util import zero_grad  # noqa: F401
