"""channels_last from the first layer to the last, without a hidden copy and without waiting for the device."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastddpm.nn import UNet
from fastddpm.nn.attention import SelfAttention
from tests.nn.networks import VARIANTS, inputs, variant

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def to_device(unet: UNet, device: str, batch: int) -> tuple[UNet, list[Tensor | None]]:
    return unet.to(device), [v if v is None else v.to(device) for v in inputs(unet, batch)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", VARIANTS)
def test_strides_of_every_activation(name: str, device: str) -> None:
    unet = variant(name)
    for training, batch, autocast in itertools.product((False, True), (1, 2, 65), (False, True)):
        unet, (x, t, labels) = to_device(unet.train(training), device, batch)
        seen, wrong = set(), []

        def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for place, values in (("input", args), ("output", output if isinstance(output, list) else [output])):
                for v in values:
                    if isinstance(v, Tensor) and v.dim() == 4:
                        seen.add(module)  # noqa: B023
                        if not is_channels_last(v):
                            wrong.append((type(module).__name__, place, tuple(v.shape), v.stride()))  # noqa: B023

        with contextlib.ExitStack() as hooks, torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            for part in unet.children():
                for module in part.modules():
                    hooks.enter_context(module.register_forward_hook(look))
            y = unet(x, t, labels)
        assert not wrong
        assert is_channels_last(y)
        # conv1 of a block lends its weight alone, and is seen as the input of the norm behind it
        convs = {m for n, m in unet.named_modules() if isinstance(m, nn.Conv2d) and not n.endswith("conv1")}
        assert convs <= seen


class NoCopy(TorchDispatchMode):
    """Notes every op that does nothing but write an activation down again."""

    COPIES = ("aten::clone", "aten::_to_copy", "aten::copy_", "aten::contiguous", "aten::_reshape_copy")

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.found = least, list[tuple[str, tuple[int, ...]]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.name().split(".")[0] in self.COPIES and out.numel() >= self.least and out.dtype == args[0].dtype:
            self.found.append((func.name(), tuple(out.shape)))
        return out


NOT_COPIED = ["ddpm", "improved", "adm", "wide, odd numbers"]


def not_copied(name: str, device: str) -> UNet:
    """A variant whose attention copies nothing: on a GPU torch reads heads of float32 as they lie in fours alone, and
    those of 3 and 6 channels are 4 and 8 there, three of them as before."""
    return variant(name, **(dict(base_channels=12) if device == "cuda" and name == "wide, odd numbers" else {}))


@pytest.mark.parametrize("name", NOT_COPIED)
def test_on_a_gpu_attention_can_read_heads_as_they_lie(name: str) -> None:
    found = [m for m in not_copied(name, "cuda").modules() if isinstance(m, SelfAttention)]
    assert found and all(m.qkv.in_features // m.num_heads % 4 == 0 for m in found)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NOT_COPIED)
def test_the_image_is_converted_once_and_nothing_else_is_copied(name: str, device: str) -> None:
    unet = not_copied(name, device)
    for training in (False, True):
        unet, (x, t, labels) = to_device(unet.train(training), device, 3)
        assert x is not None
        least = 3 * min(unet.config.level_widths) * 2 * 6  # the smallest feature map, 4x4 or 2x6
        assert least <= x.numel()
        with NoCopy(least) as mode:
            unet(x, t, labels)
        assert [shape for _, shape in mode.found] == [tuple(x.shape)]
        x = x.to(memory_format=torch.channels_last)
        with NoCopy(least) as mode:
            unet(x, t, labels)
        assert not mode.found


def test_the_search_for_copies_finds_one() -> None:
    x = torch.zeros(2, 8, 4, 4)
    with NoCopy(x.numel()) as mode:
        x.contiguous(memory_format=torch.channels_last)
    assert mode.found == [("aten::clone", (2, 8, 4, 4))]


@pytest.mark.parametrize("device", DEVICES)
def test_weights_and_their_gradients_are_channels_last(device: str) -> None:
    unet, (x, t, labels) = to_device(variant("ddpm"), device, 2)
    unet(x, t, labels).square().sum().backward()
    for name, p in unet.named_parameters():
        if p.dim() == 4:
            assert p.grad is not None
            assert is_channels_last(p), name
            assert is_channels_last(p.grad), name


class NoSync(TorchDispatchMode):
    """Raises where the host would have to wait for a value."""

    SYNCS = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::masked_select",
             "aten::equal", "aten::_unique2", "aten::_assert_async")  # fmt: skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split(".")[0] in self.SYNCS:
            raise AssertionError(f"{func.name()} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_waits_for_the_device(name: str, device: str) -> None:
    unet, (x, t, labels) = to_device(variant(name), device, 2)
    with NoSync():
        unet(x, t, labels).square().sum().backward()


def test_the_search_for_syncs_finds_one() -> None:
    with NoSync(), pytest.raises(AssertionError, match="waits for the device"):
        float(torch.zeros(()))


@pytest.mark.parametrize("name", VARIANTS)
def test_runs_on_fake_tensors_where_no_value_can_be_read(name: str) -> None:
    config = variant(name).config
    with FakeTensorMode():
        unet = UNet(config)
        x = torch.empty(3, unet.in_channels, *config.image_size)
        labels = torch.zeros(3, dtype=torch.int64) if config.num_classes else None
        y = unet(x, torch.zeros(3, dtype=torch.int64), labels)
        assert y.shape == (3, unet.out_channels, *config.image_size)
        assert is_channels_last(y)


@pytest.mark.parametrize("name", VARIANTS)
def test_runs_on_meta_tensors(name: str) -> None:
    unet = variant(name).to("meta")
    x, t, labels = (v if v is None else v.to("meta") for v in inputs(unet))
    assert x is not None
    assert t is not None
    assert unet(x, t, labels).shape == (2, unet.out_channels, *unet.config.image_size)
