"""Layers that choose how a CPU computes them: to the precision of float32, with what is kept in half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastddpm
from fastddpm import UNet, _native
from fastddpm.nn import layers
from fastddpm.ops.kept import keep_transformed
from tests.nn.networks import TINY, filled
from tests.tolerance import assert_within

HALF = (torch.bfloat16, torch.float16)


def stock_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


CALLS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, tuple[int, ...]]]] = {
    "3x3, transformed": (
        lambda x, w, b: layers.conv2d(x, w, b, padding=1),
        lambda x, w, b: F.conv2d(x, w, b, padding=1),
        dict(x=(8, 16, 16, 16), w=(24, 16, 3, 3), b=(24,)),
    ),
    "3x3, few pixels": (
        lambda x, w, b: layers.conv2d(x, w, b, padding=1),
        lambda x, w, b: F.conv2d(x, w, b, padding=1),
        dict(x=(2, 16, 4, 4), w=(24, 16, 3, 3), b=(24,)),
    ),
    "3x3, a small map": (
        lambda x, w, b: layers.conv2d(x, w, b, padding=1),
        lambda x, w, b: F.conv2d(x, w, b, padding=1),
        dict(x=(8, 16, 4, 4), w=(24, 16, 3, 3), b=(24,)),
    ),
    "3x3, upsampled": (
        layers.upsampled_conv2d,
        lambda x, w, b: F.conv2d(F.interpolate(x, scale_factor=2.0), w, b, padding=1),
        dict(x=(8, 8, 4, 4), w=(24, 8, 3, 3), b=(24,)),  # of too few channels for conv3x3
    ),
    "stride 2": (
        lambda x, w, b: layers.conv2d(x, w, b, stride=2),
        lambda x, w, b: F.conv2d(x, w, b, stride=2),
        dict(x=(2, 16, 9, 9), w=(16, 16, 3, 3), b=(16,)),
    ),
    "stride 2, to a larger map": (
        lambda x, w, b: layers.conv2d(x, w, b, stride=2),
        lambda x, w, b: F.conv2d(x, w, b, stride=2),
        dict(x=(1, 16, 17, 19), w=(16, 16, 3, 3), b=(16,)),
    ),
    "stride 2, padded": (
        lambda x, w, b: layers.conv2d(x, w, b, stride=2, padding=1),
        lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1),
        dict(x=(3, 17, 7, 10), w=(24, 17, 3, 3), b=(24,)),
    ),
    "1x1, no bias": (layers.conv2d, F.conv2d, dict(x=(2, 16, 5, 5), w=(8, 16, 1, 1))),
    "linear": (layers.linear, F.linear, dict(x=(2, 9, 16), w=(24, 16), b=(24,))),
    "attention": (
        lambda q, k, v: layers.attention(q, k, v, 2),
        lambda q, k, v: stock_attention(q, k, v, 2),
        dict(q=(2, 9, 16), k=(2, 9, 16), v=(2, 9, 16)),
    ),
    "attention, many heads": (
        lambda q, k, v: layers.attention(q, k, v, 4),
        lambda q, k, v: stock_attention(q, k, v, 4),
        dict(q=(2, 9, 16), k=(2, 9, 16), v=(2, 9, 16)),
    ),
    "attention, side by side": (
        lambda qkv: layers.self_attention(qkv, 1),
        lambda qkv: stock_attention(*qkv.chunk(3, dim=2), 1),
        dict(qkv=(2, 9, 36)),
    ),
}


def numbers(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=g).to(dtype) for shape in shapes.values()]
    return [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in made]


def with_gradients(call: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    given = [x.detach().to(dtype).requires_grad_() for x in inputs]
    y = call(*given)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(inputs[0].dtype).to(dtype)
    return [y.detach(), *torch.autograd.grad(y, given, g)]


@pytest.fixture
def slow_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies half precision slowly, whatever this one does."""
    monkeypatch.setattr(layers, "_multiplies_half_slowly", lambda: True)


@pytest.mark.usefixtures("slow_half")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    ours, stock, shapes = CALLS[name]
    inputs = numbers(shapes, dtype)
    found = with_gradients(ours, inputs, dtype)
    in64, in32 = (with_gradients(stock, inputs, wide) for wide in (torch.float64, torch.float32))
    for value, exact, single in zip(found, in64, in32, strict=True):
        assert value.dtype == dtype
        assert_within(value, exact, single, name)


@pytest.mark.skipif(not layers.X86, reason="measured on x86")
@pytest.mark.skipif(not _native.available(), reason=f"no native code: {_native.reason()}")
def test_attention_of_few_tokens_is_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more it is torch's, and in training of many heads, whose weights would take much memory."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)
    monkeypatch.setattr(layers, "MOST_TOKENS", 8)
    few, many = (torch.randn(1, tokens, 24, requires_grad=True) for tokens in (8, 9))
    for qkv, heads in ((few, 1), (few, 2), (few.detach(), 4)):
        y = layers.self_attention(qkv, heads)
        assert torch.equal(layers.attention(*qkv.chunk(3, dim=2), heads), y)
    for qkv, heads in ((many, 1), (many.detach(), 1), (few, 4)):
        for call in (layers.self_attention, lambda qkv, heads: layers.attention(*qkv.chunk(3, dim=2), heads)):
            with pytest.raises(AssertionError, match="not one of"):
                call(qkv, heads)


@pytest.mark.usefixtures("slow_half")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", ["1x1, no bias", "linear"])
@torch.no_grad()
def test_weights_of_linear_layers_are_kept_for_sampling(name: str, dtype: torch.dtype) -> None:
    call, plain, shapes = CALLS[name]
    x, weight, *bias = numbers(shapes, dtype)
    expected = [plain(*(a.to(exact) for a in (x, weight, *bias))) for exact in (torch.float64, torch.float32)]
    with keep_transformed():
        first = call(x, weight, *bias)
        weight.mul_(2)  # which nobody may do here: what was kept is used
        assert torch.equal(call(x, weight, *bias), first)
    assert_within(first, *expected)
    with keep_transformed():
        assert not torch.equal(call(x, weight, *bias), first)


@pytest.mark.usefixtures("slow_half")
def test_what_is_kept_for_backward_is_in_half_precision() -> None:
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    for name in ("3x3, transformed", "3x3, few pixels", "stride 2", "1x1, no bias", "linear"):
        ours, _, shapes = CALLS[name]
        inputs = [x.requires_grad_() for x in numbers(shapes, torch.bfloat16)]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            ours(*inputs)
    assert kept and all(x.dtype == torch.bfloat16 for x in kept)


def test_a_processor_with_matrix_units_computes_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_multiplies_half_slowly", lambda: False)
    x, w, b = numbers(CALLS["linear"][2], torch.bfloat16)
    assert torch.equal(layers.linear(x, w, b), F.linear(x, w, b))
    assert not layers.computes_in_float32(x)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["3x3, transformed", "3x3, few pixels", "1x1, no bias"])
def test_matrix_units_get_half_precision(name: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every convolution: what is faster in float32 alone is not faster than they are."""
    monkeypatch.setattr(layers, "_multiplies_half_slowly", lambda: False)
    for own in ("conv3x3", "conv3x3_products"):
        monkeypatch.setattr(layers, own, refuse)
    ours, stock, shapes = CALLS[name]
    inputs = numbers(shapes, torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(ours(*inputs), stock(*inputs))


@pytest.fixture
def quick_bfloat16(slow_half: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies pairs of bfloat16 for torch, too, and torch's float32 slowly."""
    monkeypatch.setattr(layers, "_multiplies_slowly", lambda: True)
    monkeypatch.setattr(layers, "_multiplies_bfloat16_quickly", lambda: True)


@pytest.mark.usefixtures("quick_bfloat16")
@pytest.mark.parametrize("autocast", [False, True])
def test_what_torch_convolves_quickly_is_left_to_it(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In inference in bfloat16; the gradients stay in float32, and so does float16."""
    monkeypatch.setattr(layers, "conv3x3_products", refuse)
    for side in (3, 5):
        exact = numbers(dict(x=(2, 16, 4, 4), w=(24, 16, side, side), b=(24,)), torch.float32)
        half = [p.bfloat16() for p in exact]
        x, *parameters = exact if autocast else half
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with torch.no_grad():
                found = layers.conv2d(x, *parameters, padding=side // 2)
            trained = layers.conv2d(x, *parameters, padding=side // 2)
        assert torch.equal(found, F.conv2d(*half, padding=side // 2))
        wide = F.conv2d(half[0].float(), *(p.float() for p in parameters), padding=side // 2)
        assert torch.equal(trained, wide.bfloat16())


@pytest.mark.skipif(not layers._has_kernels(), reason="no kernels of conv3x3")
@pytest.mark.usefixtures("quick_bfloat16")
@pytest.mark.parametrize(
    ("dtype", "tiles"), [(torch.float32, 32), (torch.float16, 32), (torch.bfloat16, 128)], ids=str
)
@torch.no_grad()
def test_fewer_tiles_suffice_where_torch_is_slow(
    dtype: torch.dtype, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(layers, "conv3x3", lambda x, *rest: sizes.append(len(x)) or fastddpm.conv3x3(x, *rest))
    weight = torch.randn(16, 16, 3, 3, dtype=dtype)
    for size in (tiles // 4 - 1, tiles // 4):
        x = torch.randn(size, 16, 4, 4).to(dtype, memory_format=torch.channels_last)
        layers.conv2d(x, weight, padding=1)
    assert sizes == [tiles // 4]


def test_without_native_code_convolutions_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_has_kernels", lambda: False)
    monkeypatch.setattr(layers, "conv3x3", refuse)
    x, w, b = numbers(CALLS["3x3, transformed"][2], torch.float32)
    assert torch.equal(layers.conv2d(x, w, b, padding=1), F.conv2d(x, w, b, padding=1))


@pytest.mark.skipif(not layers.X86, reason="measured on x86")
def test_a_small_map_of_stride_2_is_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "strided_conv3x3_product", refuse)
    weight = torch.randn(16, 16, 3, 3)
    small, large, few = (torch.randn(1, c, 17, w) for c, w in ((16, 17), (16, 19), (8, 17)))
    for x, w in ((large, weight), (few, weight[:, :8])):
        layers.conv2d(x.to(memory_format=torch.channels_last), w, stride=2)
    with pytest.raises(AssertionError, match="not one of"):
        layers.conv2d(small.to(memory_format=torch.channels_last), weight, stride=2)


def refuse(*_: Any) -> Tensor:
    raise AssertionError("not one of torch's layers")


def test_torch_layers_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "conv3x3", refuse)
    x, w, b = numbers(CALLS["3x3, transformed"][2], torch.float32)
    with layers.torch_layers():
        assert torch.equal(layers.conv2d(x, w, b, padding=1), F.conv2d(x, w, b, padding=1))
    with pytest.raises(AssertionError, match="not one of"):
        layers.conv2d(x, w, b, padding=1)


@pytest.mark.usefixtures("slow_half")
@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith("attention")])
def test_autocast_gives_half_precision_of_weights_that_are_not_rounded(name: str) -> None:
    ours, stock, shapes = CALLS[name]
    x, *weights = numbers(shapes, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x, *weights)
    assert y.dtype == torch.bfloat16
    x = x.bfloat16()
    exact = stock(x.double(), *(p.double() for p in weights))
    assert_within(y, exact, stock(x.float(), *weights), name)


@pytest.mark.usefixtures("slow_half")
@pytest.mark.parametrize("autocast", [False, True])
def test_a_network_compiles_without_a_break_in_half_precision(autocast: bool) -> None:
    """What it gives is what it gives uncompiled; gradients too, but under autocast: there those of torch's own layers
    are rounded at other places."""
    changed = dict(base_channels=16, image_size=(32, 32), attention_resolutions=(), channel_mult=(1,))
    network = filled(UNet(**TINY | changed))
    network = network if autocast else network.to(torch.bfloat16)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    found = []
    for call in (compiled, network):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = call(x, t)
        y.float().square().sum().backward()
        found.append([y.detach(), *(p.grad for p in network.parameters() if p.grad is not None)])
    assert found[0][0].dtype == torch.bfloat16
    (y, *gradients), (expected, *others) = found
    assert torch.equal(y, expected)
    for one, other in zip(gradients, others, strict=True):
        assert torch.equal(one, other) or autocast
