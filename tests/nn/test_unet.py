"""The U-Net: its published sizes, its equations, and what its arguments promise."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastddpm.nn import ResBlock, SelfAttention, UNet, UNetConfig, sinusoidal_embedding
from tests.nn.networks import TINY, VARIANTS, filled, inputs, variant
from tests.tolerance import assert_equal_to_rounding, assert_within

IMPROVED = dict(
    num_res_blocks=3, attention_resolutions=(16, 8), num_heads=4, scale_shift=True, learned_variance=True, dropout=0.3,
    norm_eps=1e-5, embedding="adm", downsample_padding="symmetric",
)  # fmt: skip


def on_meta(**options: object) -> UNet:
    with torch.device("meta"):
        return UNet(**options)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_defaults_are_the_cifar_10_network_of_the_paper() -> None:
    assert count(on_meta()) == 35_746_307


def test_the_cifar_10_network_of_improved_ddpm() -> None:
    unet = on_meta(**IMPROVED)
    assert count(unet) == 52_546_438
    assert unet.out_channels == 6


def test_the_256_pixel_network_of_the_paper() -> None:
    unet = on_meta(image_size=(256, 256), channel_mult=(1, 1, 2, 2, 4, 4))
    assert round(count(unet) / 1e6) == 114  # Ho et al. 2020, appendix B: 114 million for 256 x 256 images


@pytest.mark.parametrize(("options", "gflop"), [({}, 12.11), (IMPROVED, None)])
def test_arithmetic_of_a_forward_pass(options: dict[str, object], gflop: float | None) -> None:
    unet = on_meta(**options)
    with FlopCounterMode(display=False) as counter:
        unet(torch.empty(1, 3, 32, 32, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta"))
    counts = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in counts.items() if "bmm" in str(op) or "attention" in str(op))
    if gflop is not None:
        assert round((counter.get_total_flops() - attention) / 1e9, 2) == gflop
        assert round(counter.get_total_flops() / 1e9, 2) == 12.44
    else:
        assert round(counter.get_total_flops() / 1e9, 2) == 16.77


def test_size_of_the_output() -> None:
    for name in VARIANTS:
        unet = variant(name)
        x, t, labels = inputs(unet)
        channels = unet.config.prediction_channels or unet.in_channels
        channels *= 2 if unet.learned_variance else 1
        assert unet(x, t, labels).shape == (2, channels, *unet.config.image_size)
        assert unet.out_channels == unet.config.out_channels == channels
        assert (unet.num_classes, unet.in_channels) == (unet.config.num_classes, unet.config.in_channels)


def plain_unet(unet: UNet, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    """The network written down once more, from the papers, over the weights of ``unet`` by name."""
    config, w = unet.config, dict(unet.named_parameters())

    def conv(name: str, h: Tensor, **options: int) -> Tensor:
        return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], **options)

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, h: Tensor) -> Tensor:
        return F.group_norm(h, config.num_groups, w[f"{name}.weight"], w[f"{name}.bias"], config.norm_eps)

    sinusoid = sinusoidal_embedding(t * config.time_scale, config.base_channels, config.embedding, x.dtype)
    embedding = linear("time_embedding.linear2", F.silu(linear("time_embedding.linear1", sinusoid)))
    if config.num_classes is not None:
        assert labels is not None
        embedding = embedding + w["class_embedding.weight"][labels]
    projections = linear("time_projection", F.silu(embedding))
    used = 0

    def scaled(name: str, h: Tensor) -> Tensor:
        return h / config.middle_scale if name.startswith("middle") else h

    def res(name: str, h: Tensor, resample: str = "") -> Tensor:
        nonlocal used
        y, x = F.silu(norm(f"{name}.norm1", h)), h
        if resample == "up":
            x, y = (F.interpolate(v, scale_factor=2.0) for v in (x, y))
        if resample == "down":
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        y = conv(f"{name}.conv1", y, padding=1)
        c = y.shape[1]
        e = projections[:, used : used + (2 * c if config.scale_shift else c), None, None]
        used += e.shape[1]
        if config.scale_shift:
            y = norm(f"{name}.norm2", y) * (1 + e[:, :c]) + e[:, c:]
        else:
            y = norm(f"{name}.norm2", y + e)
        y = conv(f"{name}.conv2", F.silu(y), padding=1)
        return scaled(name, y + (conv(f"{name}.shortcut", x) if f"{name}.shortcut.weight" in w else x))

    def attend(name: str, h: Tensor) -> Tensor:
        if f"{name}.qkv.weight" not in w:
            return h
        c = h.shape[1]
        d = config.head_channels or c // config.num_heads
        z = norm(f"{name}.norm", h) if f"{name}.norm.weight" in w else h
        qkv = linear(f"{name}.qkv", z.flatten(2).mT)
        q, k, v = (part.unflatten(2, (c // d, d)) for part in qkv.split(c, dim=2))
        scores = torch.softmax(torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(d), dim=3)
        y = linear(f"{name}.proj", torch.einsum("bhnm,bmhd->bnhd", scores, v).flatten(2))
        return scaled(name, h + y.mT.unflatten(2, h.shape[2:]))

    h = conv("conv_in", 2 * x - 1 if config.center_input else x, padding=1)
    skips = [h]
    levels = len(config.level_widths)
    for i in range(levels):
        for j in range(config.num_res_blocks):
            h = attend(f"down.{i}.attentions.{j}", res(f"down.{i}.blocks.{j}", h))
            skips.append(h)
        if i < levels - 1:
            if config.resample == "resblock":
                h = res(f"down.{i}.downsample", h, "down")
            elif config.downsample_padding == "same":
                h = conv(f"down.{i}.downsample.conv", F.pad(h, (0, 1, 0, 1)), stride=2)
            else:
                h = conv(f"down.{i}.downsample.conv", h, stride=2, padding=1)
            skips.append(h)
    if config.middle != "none":
        h = res("middle.block2", attend("middle.attention", res("middle.block1", h)))
    for i in range(levels):
        for j in range(config.num_res_blocks + 1):
            h = attend(f"up.{i}.attentions.{j}", res(f"up.{i}.blocks.{j}", torch.cat([h, skips.pop()], dim=1)))
        if i < levels - 1:
            name = f"up.{i}.upsample"
            h = res(name, h, "up") if config.resample == "resblock" else conv(
                f"{name}.conv", F.interpolate(h, scale_factor=2.0), padding=1
            )  # fmt: skip
    assert used == projections.shape[1]
    return conv("conv_out", F.silu(norm("norm_out", h)), padding=1)


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_network_written_from_the_papers(name: str) -> None:
    unet = variant(name).double().eval()
    x, t, labels = inputs(unet, 3, torch.float64)
    expected = plain_unet(unet, x, t, labels)
    assert_equal_to_rounding(unet(x, t, labels), expected, ulps=1e4, scale=expected.abs().max().item())


@pytest.mark.parametrize("name", VARIANTS)
def test_float32_stays_within_the_rule(name: str) -> None:
    unet = variant(name).eval()
    x, t, labels = inputs(unet)
    ref64 = plain_unet(copy.deepcopy(unet).double(), x.double(), t, labels)
    assert_within(unet(x, t, labels), ref64, plain_unet(unet, x, t, labels))


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_every_parameter(name: str) -> None:
    unet = variant(name)
    x, t, labels = inputs(unet, 4)
    unet(x, t, labels).square().sum().backward()
    for parameter_name, p in unet.named_parameters():
        assert p.grad is not None, parameter_name
        rows = p.grad.flatten(1) if "class_embedding" in parameter_name else p.grad.flatten().unsqueeze(0)
        assert (rows.abs().amax(dim=1) > 0).all(), parameter_name


def test_a_new_network_gives_zero_and_its_weights_have_the_variance_of_the_paper() -> None:
    unet = UNet(**{**TINY, "base_channels": 32, "num_classes": 3})
    x, t, labels = inputs(unet)
    assert unet(x, t, labels).abs().max() == 0
    fans: list[tuple[Tensor, int, int]] = []
    for module in unet.modules():
        if isinstance(module, ResBlock):
            assert module.conv2.weight.abs().max() == 0
            c_out, c_in = module.conv1.weight.shape[:2]
            fans.append((module.conv1.weight, 9 * c_in, 9 * c_out))
        if isinstance(module, SelfAttention):
            assert module.proj.weight.abs().max() == 0
            fans += [(part, part.shape[1], part.shape[0]) for part in module.qkv.weight.chunk(3)]
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.bias is not None
            assert module.bias.abs().max() == 0
    for part in unet.time_projection.weight.split([b.embedding_width for b in blocks_by_layer(unet)]):
        fans.append((part, part.shape[1], part.shape[0]))
    for weight, fan_in, fan_out in fans:
        bound, n = math.sqrt(6 / (fan_in + fan_out)), weight.numel()
        assert weight.abs().max() <= bound
        z = (weight.square().mean() / (bound**2 / 3) - 1) / math.sqrt(4 / 5 / n)  # the variance of a uniform's square
        assert z.abs() < 5


def blocks_by_layer(unet: UNet) -> list[ResBlock]:
    blocks = [module for module in unet.modules() if isinstance(module, ResBlock)]
    assert sorted(b.layer for b in blocks) == list(range(len(blocks)))
    return sorted(blocks, key=lambda b: b.layer)


def test_no_labels_mean_the_null_class() -> None:
    unet = variant("adm").eval()
    x, t, _ = inputs(unet)
    null = unet(x, t, torch.full((2,), 3))
    assert torch.equal(unet(x, t), null)
    assert not torch.equal(unet(x, t, torch.tensor([0, 3]))[0], null[0])


def test_the_timestep_matters_and_may_be_a_float() -> None:
    unet = variant("ddpm").eval()
    x, t, _ = inputs(unet)
    for same in (t.int(), t.float(), t.double()):
        assert torch.equal(unet(x, same), unet(x, t))
    assert not torch.equal(unet(x, t.float() + 0.5), unet(x, t))


def test_rows_of_a_batch_do_not_meet() -> None:
    unet = variant("improved").double().eval()
    x, t, labels = inputs(unet, 4, torch.float64)
    whole = unet(x, t, labels)
    scale = whole.abs().max().item()
    for i in range(4):
        assert_equal_to_rounding(unet(x[i : i + 1], t[i : i + 1]), whole[i : i + 1], ulps=1e4, scale=scale)


def test_other_sizes_than_the_configured_one() -> None:
    unet = variant("ddpm").eval()
    x = torch.randn(2, 3, 12, 6)
    assert unet(x, torch.tensor([1, 2])).shape == x.shape


def test_an_empty_batch() -> None:
    unet = variant("ddpm").eval()
    assert unet(torch.empty(0, 3, 8, 8), torch.empty(0, dtype=torch.int64)).shape == (0, 3, 8, 8)


class TestDropout:
    @pytest.fixture
    def unet(self) -> UNet:
        return variant("improved").double().train()

    def test_belongs_to_the_sample_and_not_to_the_batch(self, unet: UNet) -> None:
        x, t, _ = inputs(unet, 4, torch.float64)
        sample = torch.tensor([40, 2, 17, 3])
        whole = unet(x, t, seed=7, sample=sample, step=5)
        for rows in ([0, 1], [2], [3, 0]):
            part = unet(x[rows], t[rows], seed=torch.tensor(7), sample=sample[rows], step=torch.tensor(5))
            assert_equal_to_rounding(part, whole[rows], ulps=1e4, scale=whole.abs().max().item())

    def test_depends_on_seed_sample_and_step(self, unet: UNet) -> None:
        x, t, _ = inputs(unet, 1, torch.float64)
        keys = [(7, 0, 0), (8, 0, 0), (7, 1, 0), (7, 0, 1)]
        results = [unet(x, t, seed=a, sample=torch.tensor([b]), step=c) for a, b, c in keys]
        for one, other in itertools.combinations(results, 2):
            assert not torch.equal(one, other)
        assert torch.equal(unet(x, t, seed=7), results[0])  # rows are numbered from 0, and step is 0

    def test_draws_a_seed_from_the_generator_of_torch(self, unet: UNet) -> None:
        x, t, _ = inputs(unet, 2, torch.float64)
        torch.manual_seed(3)
        first, second = unet(x, t), unet(x, t)
        torch.manual_seed(3)
        assert torch.equal(unet(x, t), first)
        assert not torch.equal(first, second)

    def test_is_off_in_evaluation(self, unet: UNet) -> None:
        x, t, _ = inputs(unet, 2, torch.float64)
        before = torch.get_rng_state()
        assert torch.equal(unet.eval()(x, t), unet(x, t, seed=1))
        assert torch.equal(torch.get_rng_state(), before)


def half_precision(unet: UNet) -> Iterator[tuple[torch.dtype, UNet]]:
    for dtype in (torch.bfloat16, torch.float16):
        yield dtype, copy.deepcopy(unet).to(dtype)


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_in_half_precision(name: str) -> None:
    unet = variant(name).eval()
    x, t, labels = inputs(unet)
    exact = unet(x, t, labels).detach()
    for dtype, half in half_precision(unet):
        y = half(x, t, labels)  # a float32 image: it is rounded once, at the start
        assert y.dtype == dtype
        assert_equal_to_rounding(y, exact, ulps=roundings(unet), scale=exact.abs().max().item())


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_autocast(name: str) -> None:
    unet = variant(name)
    x, t, labels = inputs(unet)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = unet(x, t, labels, seed=1)
    assert y.dtype == torch.bfloat16
    exact = unet(x, t, labels, seed=1)
    assert_equal_to_rounding(y, exact, ulps=roundings(unet), scale=exact.abs().max().item())
    y.float().square().mean().backward()
    for p in unet.parameters():
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        assert p.grad.isfinite().all()


def roundings(unet: UNet) -> int:
    """Each layer rounds its input, weights and output once."""
    return 3 * sum(isinstance(module, nn.Conv2d | nn.Linear) for module in unet.modules())


def test_copies_and_files() -> None:
    unet = variant("adm").eval()
    x, t, labels = inputs(unet)
    y = unet(x, t, labels)
    other = filled(UNet.from_config(unet.to_config()), seed=1).eval()
    assert not torch.equal(other(x, t, labels), y)
    other.load_state_dict(unet.state_dict())
    for twin in (other, copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert torch.equal(twin(x, t, labels), y)
        assert twin.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_parameters_are_stored_fused() -> None:
    names = dict(UNet(**TINY).named_parameters())
    assert sum(name.startswith("time_projection.") for name in names) == 2
    assert names["middle.attention.qkv.weight"].shape == (48, 16)
    assert not any("block" in name and ("time" in name or "embedding" in name) for name in names)


def test_configuration_and_overrides() -> None:
    config = UNetConfig(**TINY)
    unet = UNet(config, learned_variance=True)
    assert unet.config == UNetConfig(**TINY, learned_variance=True)
    assert config == UNetConfig(**TINY)


def test_errors_of_forward() -> None:
    unet = variant("adm").eval()
    x, t, labels = inputs(unet)
    assert labels is not None
    with pytest.raises(ValueError, match=r"UNet: expected x of shape \[B, 3, H, W\], got \[2, 4, 8, 8\]; reshape"):
        unet(torch.zeros(2, 4, 8, 8), t)
    with pytest.raises(ValueError, match=r"UNet: expected x of shape \[B, 3, H, W\], got \[3, 8, 8\]"):
        unet(torch.zeros(3, 8, 8), t)
    with pytest.raises(TypeError, match=r"UNet: expected x of a floating-point dtype, got torch.uint8; bring pixels"):
        unet(x.byte(), t)
    with pytest.raises(ValueError, match=r"UNet: expected x with height and width divisible by 2 .*got 8x7; pad or"):
        unet(x[..., :7], t)
    with pytest.raises(ValueError, match=r"UNet: expected t of shape \[2\], got \[1\]"):
        unet(x, t[:1])
    with pytest.raises(TypeError, match=r"UNet: expected t of an integer dtype, float32 or float64, got torch.bfloat"):
        unet(x, t.bfloat16())
    with pytest.raises(ValueError, match="UNet: expected t on cpu, got meta"):
        unet(x, t.to("meta"))
    with pytest.raises(ValueError, match=r"UNet: expected labels of shape \[2\], got \[3\]"):
        unet(x, t, torch.tensor([0, 1, 2]))
    with pytest.raises(TypeError, match=r"UNet: expected labels of dtype int64, got torch.int32"):
        unet(x, t, labels.int())
    with pytest.raises(ValueError, match="UNet: expected labels to be None for a network without classes, got a"):
        variant("ddpm")(x, t, labels)
