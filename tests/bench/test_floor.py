"""What a network multiplies is found, counted and timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.bench import Layer, copy_rate, floor, flops, product_rate, record, times, timing, update_rate
from fastddpm.nn import UNet

CPU = torch.device("cpu")


def layers_of(network: nn.Module, batch: int = 1, size: int = 32) -> Counter[Layer]:
    x, t = torch.randn(batch, 3, size, size), torch.zeros(batch, dtype=torch.int64)
    return record(lambda: network(x, t))


def test_operations_of_the_network_of_ho_et_al() -> None:
    """12.44 GFLOP an image is the published figure: 12.11 without the two products of attention."""
    layers = layers_of(UNet())
    assert flops(layers) / 1e9 == pytest.approx(12.44, abs=0.005)
    without = {layer: count for layer, count in layers.items() if layer.kind != "attention"}
    assert flops(without) / 1e9 == pytest.approx(12.11, abs=0.005)
    assert sum(count for layer, count in layers.items() if layer.kind == "convolution") == 65
    assert sum(count for layer, count in layers.items() if layer.kind == "attention") == 6


def test_a_batch_multiplies_the_operations() -> None:
    network = UNet(image_size=8, base_channels=8, channel_mult=(1, 2), attention_resolutions=(4,), num_groups=4)
    assert flops(layers_of(network, batch=3, size=8)) == 3 * flops(layers_of(network, batch=1, size=8))


@pytest.mark.parametrize(
    ("call", "kind", "operations"),
    [
        (lambda: F.conv2d(torch.ones(2, 4, 5, 5), torch.ones(6, 2, 3, 3), groups=2), "convolution", 2 * 2 * 6 * 9 * 18),
        (lambda: F.conv_transpose2d(torch.ones(1, 2, 3, 3), torch.ones(2, 5, 2, 2)), "convolution", 2 * 18 * 20),
        (lambda: F.linear(torch.ones(2, 7, 3), weight=torch.ones(5, 3)), "linear", 2 * 14 * 15),
        (lambda: torch.ones(2, 3, 4) @ torch.ones(2, 4, 5), "matmul", 2 * 2 * 3 * 4 * 5),
        (lambda: torch.ones(3, 4).matmul(torch.ones(4, 5)), "matmul", 2 * 3 * 4 * 5),
        (lambda: torch.bmm(torch.ones(2, 3, 4), mat2=torch.ones(2, 4, 5)), "matmul", 2 * 2 * 3 * 4 * 5),
        (lambda: torch.einsum("b h n, b h m -> b n m", torch.ones(2, 3, 4), torch.ones(2, 3, 5)), "matmul", 240),
        (
            lambda: F.scaled_dot_product_attention(*(torch.ones(1, 2, n, 4) for n in (3, 5, 5))),
            "attention",
            2 * 2 * (2 * 3 * 5 * 4),
        ),
    ],
)
def test_each_call_is_seen_counted_and_played_again(call: Callable[[], Tensor], kind: str, operations: int) -> None:
    layers = record(call)
    assert [layer.kind for layer in layers] == [kind]
    assert flops(layers) == operations
    least = floor(layers, torch.float32, CPU, parameters=1, training=False, repeat=1)
    assert least.forward[kind] > 0


def test_the_floor_counts_what_a_step_has() -> None:
    """Twice the layers take twice the time, since each is timed once; training takes longer; the first layer's input
    needs no gradient."""
    layers = record(lambda: nn.Conv2d(3, 16, 3)(torch.ones(4, 3, 32, 32)))
    (layer,) = layers
    assert [operand.needs_gradient for operand in layer.operands] == [False, True, True]
    least = floor(Counter({layer: 2}), torch.bfloat16, CPU, parameters=1000, repeat=3)
    assert least.train_step > least.sample_step > 0
    assert least.optimizer == pytest.approx(38 * 1000 / least.copy_rate)
    assert least.train_step == pytest.approx(least.train["convolution"] + least.optimizer)


def test_calls_are_counted_and_stopped() -> None:
    calls = []
    assert len(times(lambda: calls.append(0), CPU, repeat=5)) == 5
    assert len(calls) == 6  # the first is not timed
    assert len(times(lambda: None, CPU, repeat=100, seconds=1e-9)) == 3
    for repeat, seconds in ((0, 1.0), (1, 0.0)):
        with pytest.raises(ValueError, match="repeat >= 1 and seconds > 0"):
            times(lambda: None, CPU, repeat, seconds)


def test_rates_are_those_of_a_machine() -> None:
    assert 1e8 < copy_rate(2**22, CPU, repeat=3) < 1e13
    assert 1e8 < update_rate(2**22, CPU, repeat=3) < 1e13
    assert 1e6 < product_rate(torch.float32, CPU, repeat=2, size=128) < 1e15


def test_the_faster_product_is_what_a_machine_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of our layers, which on some processors is twice as fast as torch's."""
    monkeypatch.setattr(timing, "linear", lambda a, b: None)
    assert product_rate(torch.float32, CPU, repeat=3, size=512) > 1e13
