"""Networks of diffusers and denoising-diffusion-pytorch give through `optimize` what they gave, gradients included."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastddpm
from benchmarks.peers.contestants import PACKAGES, lucidrains
from fastddpm.optimization.fused import Fused
from tests.nn.test_unet_peer import CASES, SMALL
from tests.optimization.networks import Call, call, check_gradients, check_outputs, gradients, randomise
from tests.tolerance import assert_near_peer

pytestmark = pytest.mark.peer
HALF = [torch.bfloat16, torch.float16]
WITHOUT = [name for name in PACKAGES["denoising-diffusion-pytorch"] if importlib.util.find_spec(name) is None]
needs_lucidrains = pytest.mark.skipif(bool(WITHOUT), reason=f"peer: needs {', '.join(WITHOUT)}")


def unet(case: str = "ddpm", **options: Any) -> tuple[nn.Module, Call]:
    from diffusers import UNet2DModel

    theirs = {**SMALL, **CASES[case][0], **options}
    network = UNet2DModel(**theirs)
    randomise(network)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 500])
    labels = torch.tensor([1, 3]) if theirs.get("num_class_embeds") else None
    return network, lambda made: made(x.to(made.dtype), t, class_labels=labels).sample


def text_unet(**options: Any) -> tuple[nn.Module, Call]:
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **options,
    )  # fmt: skip
    randomise(network)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 12)
    return network, lambda made: made(x.to(made.dtype), t, text.to(made.dtype)).sample


def autoencoder() -> tuple[nn.Module, Call]:
    from diffusers import AutoencoderKL

    network = AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    randomise(network)
    x = torch.randn(2, 3, 16, 16)
    return network, lambda made: made(x.to(made.dtype)).sample


def lucidrains_unet(**options: Any) -> tuple[nn.Module, Call]:
    network = lucidrains().Unet(8, dim_mults=(1, 2), **options)
    randomise(network)
    return network, call(network)


NETWORKS = {
    **{f"UNet2DModel {case}": (lambda case=case: unet(case)) for case in CASES},
    "UNet2DModel odd": lambda: unet(mid_block_scale_factor=2.0, upsample_type="resnet", downsample_type="resnet"),
    "UNet2DConditionModel": text_unet,
    "UNet2DConditionModel linear": lambda: text_unet(use_linear_projection=True),
    "AutoencoderKL": autoencoder,
    "Unet": lucidrains_unet,
}  # fmt: skip
EACH = [pytest.param(name, marks=needs_lucidrains if name == "Unet" else ()) for name in NETWORKS]


@pytest.mark.parametrize("name", EACH)
def test_outputs_agree(name: str) -> None:
    report = check_outputs(*NETWORKS[name]())
    assert not report.kept, report


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ["UNet2DModel adm, convolutions", "UNet2DConditionModel", "AutoencoderKL"])
def test_outputs_agree_in_half_precision(name: str, dtype: torch.dtype) -> None:
    check_outputs(*NETWORKS[name](), dtype)


@pytest.mark.parametrize("name", EACH)
def test_gradients_agree(name: str) -> None:
    check_gradients(*NETWORKS[name]())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [EACH[0], EACH[-1]])
def test_the_other_memory_order_agrees_too(name: str, training: bool) -> None:
    network, run = NETWORKS[name]()
    (check_gradients if training else check_outputs)(network, run, channels_last=False)


@pytest.mark.parametrize("name", ["UNet2DModel ddpm", "UNet2DConditionModel"])
def test_every_norm_is_fused(name: str) -> None:
    network, _ = NETWORKS[name]()
    norms = [name for name, m in network.named_modules() if isinstance(m, nn.GroupNorm)]
    report = fastddpm.optimize(network)
    assert not report.kept
    names = {module.name for module in report.replaced}
    assert all({norm, norm.rpartition(".")[0]} & names for norm in norms)
    assert str(report).count("ResnetBlock2D") == 1


@contextlib.contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


def test_autocast_gives_the_same_dtypes_and_as_good_a_result() -> None:
    network, run = unet("adm, convolutions")
    network.eval()
    exact = run(copy.deepcopy(network).double())
    with torch.no_grad(), autocast():
        before = run(network)
        fastddpm.optimize(network)
        after = run(network)
    assert before.dtype == after.dtype
    assert (after.double() - exact).norm() <= 2 * (before.double() - exact).norm()
    with autocast():
        found = gradients(network, run)
    assert {g.dtype for g in found} == {torch.float32}


def test_dropout_draws_what_it_drew() -> None:
    network, run = unet(dropout=0.3)
    network.to(memory_format=torch.channels_last)  # torch draws a mask in the order of the memory
    expected = gradients(network, lambda made: run(made).contiguous(), dropout=True)
    fastddpm.optimize(network)
    found = gradients(network, lambda made: run(made).contiguous(), dropout=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert_near_peer(ours / theirs.abs().max().clamp(min=1e-3), theirs / theirs.abs().max().clamp(min=1e-3))


def test_gradient_checkpointing_and_frozen_weights() -> None:
    network, run = text_unet()
    expected = gradients(network, run)
    fastddpm.optimize(network)
    network.enable_gradient_checkpointing()
    network.train()
    for ours, theirs in zip(gradients(network, run, dropout=True), expected, strict=True):
        scale = theirs.abs().max().clamp(min=1e-2)
        assert_near_peer(ours / scale, theirs / scale)
    network.requires_grad_(False)
    network.conv_in.requires_grad_(True)
    assert len(gradients(network, run)) == 2


def test_save_pretrained(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    network, run = unet()
    network.eval()
    with torch.no_grad():
        expected = run(network)
        network.save_pretrained(tmp_path / "before")
        keys = list(network.state_dict())
        fastddpm.optimize(network)
        assert list(network.state_dict()) == keys
        network.save_pretrained(tmp_path / "after")
        files = [(tmp_path / when / "config.json").read_text(encoding="utf-8") for when in ("before", "after")]
        assert files[0].replace("before", "after") == files[1]
        assert torch.equal(run(UNet2DModel.from_pretrained(tmp_path / "after").eval()), expected)
        network.load_state_dict(UNet2DModel.from_pretrained(tmp_path / "before").state_dict())
        assert_near_peer(run(network), expected)


def test_other_processors_run_as_they_did() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    network, run = unet()
    network.eval()
    with torch.no_grad():
        expected = run(network)
        fastddpm.optimize(network)
        attentions = [m for m in network.modules() if hasattr(m, "set_processor")]
        for attention in attentions:
            attention.set_processor(AttnProcessor())
        assert_near_peer(run(network), expected)
        fastddpm.restore(network)
        kept = fastddpm.optimize(network).kept
        assert [module.reason for module in kept] == ["its processor is AttnProcessor"] * len(attentions)
        assert_near_peer(run(network), expected)


def test_an_activation_that_is_called_elsewhere_too_is_left_alone() -> None:
    network, run = unet()
    network.eval()
    network.mid_block.resnets[0].nonlinearity = network.conv_act
    with torch.no_grad():
        expected = run(network)
        report = fastddpm.optimize(network)
        assert_near_peer(run(network), expected)
    assert [(module.name, module.reason) for module in report.kept] == [
        ("conv_norm_out", "its activation is called elsewhere, too")
    ]


def test_an_encoder_and_a_decoder_alone() -> None:
    network, _ = autoencoder()
    network.eval()
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        mean = network.encode(x).latent_dist.mean
        image = network.decode(mean).sample
        fastddpm.optimize(network)
        assert_near_peer(network.encode(x).latent_dist.mean, mean)
        assert_near_peer(network.decode(mean).sample, image)


@needs_lucidrains
def test_a_network_of_one_dimension() -> None:
    import benchmarks.peers.contestants as contestants

    lucidrains()
    with contestants.stand_ins(contestants.NOT_NEEDED):
        from denoising_diffusion_pytorch.denoising_diffusion_pytorch_1d import Unet1D
    network = Unet1D(8, dim_mults=(1, 2), channels=3).eval()
    randomise(network)
    x, t = torch.randn(2, 3, 16), torch.tensor([3, 500])
    with torch.no_grad():
        expected: Tensor = network(x, t)
        report = fastddpm.optimize(network)
        assert_near_peer(network(x, t), expected)
    assert sum("Block" in module.pattern for module in report.replaced) > 10
    assert not report.kept


def test_restore_gives_the_network_back() -> None:
    network, run = text_unet()
    network.eval()
    state = [(p.stride(), p.data_ptr() is not None) for p in network.parameters()]
    classes = [type(m) for m in network.modules()]
    parameters = list(network.parameters())
    with torch.no_grad():
        before = run(network)
        fastddpm.optimize(network)
        assert any(isinstance(m, Fused) for m in network.modules())
        fastddpm.restore(network)
        assert torch.equal(run(network), before)
    assert [type(m) for m in network.modules()] == classes
    assert [(p.stride(), True) for p in network.parameters()] == state
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
