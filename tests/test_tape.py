"""A call as the list of its operators: what is repeated, what is kept, what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm import _tape


def repeats(function: Callable[..., Any], *tensors: Tensor, steps: int = 2) -> Callable[..., Any]:
    """Record on ``tensors``, and hold the list against the function on other numbers."""
    with torch.no_grad():
        expected = function(*tensors)
        result, replay = _tape.record(function, list(tensors))
        assert torch.equal(result, expected)
        for _ in range(steps):
            others = [torch.randn_like(x) if x.is_floating_point() else x + 1 for x in tensors]
            assert torch.equal(replay(*others), function(*others))
    return replay


def operators(function: Callable[..., Any], *tensors: Tensor) -> list[str]:
    """What is left in the list."""
    with torch.no_grad():
        tape = _tape._Tape(list(tensors))
        with tape:
            result = function(*tensors)
        tape.replay(result)
    return [str(node.target) for node in tape.graph.nodes if node.op == "call_function"]


def test_a_network_is_repeated() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 6, 1), nn.Dropout(0.5)
    ).eval()
    repeats(lambda x: network(x).chunk(2, dim=1)[1], torch.randn(2, 3, 8, 8))


def test_lists_of_tensors_and_other_arguments_are_repeated() -> None:
    def function(x: Tensor, t: Tensor) -> Tensor:
        parts = [p.clamp(min=-float("inf"), max=0.5) for p in x.split([1, 2], dim=1)]
        emb = torch.exp(torch.arange(3, dtype=torch.float64) * -0.5).float()[None] * t[:, None]
        return torch.cat([*parts, F.pad(x, (1, 1))[..., 1:-1]], dim=1) + emb.repeat(1, 2)[:, :, None]

    repeats(function, torch.randn(2, 3, 5), torch.arange(2))


def test_what_depends_on_weights_alone_is_computed_once() -> None:
    weight = nn.Parameter(torch.randn(4, 4))

    def function(x: Tensor) -> Tensor:
        return x @ (weight.bfloat16().float().exp() + torch.eye(4))

    assert operators(function, torch.randn(2, 4)) == ["aten.mm.default"]
    repeats(function, torch.randn(2, 4))


def test_what_was_computed_on_the_way_is_not_held() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    tape = _tape._Tape([x := torch.randn(2, 4)])
    with torch.no_grad():
        with tape:
            result = x @ weight.bfloat16().float().exp()
        tape.replay(result)
    assert [type(held) for held in vars(tape.held).values()] == [Tensor]


def test_constants_of_the_code_are_made_once() -> None:
    assert operators(lambda x: x * torch.tensor([1.0, 2.0]).exp(), torch.randn(2)) == ["aten.mul.Tensor"]


def test_what_is_written_to_is_made_again() -> None:
    bias = torch.randn(4)

    def function(x: Tensor) -> Tensor:
        y = bias.expand(2, 4).contiguous()  # of the weights alone until x is added
        before = y * 2
        y[:, :2].add_(x[:, :2])
        return torch.cat([y, before, y.exp()])

    repeats(function, torch.randn(2, 4))


def test_a_weight_that_the_call_writes_to_is_read_each_time() -> None:
    def counting() -> Callable[[Tensor], Tensor]:
        count = torch.zeros(())

        def function(x: Tensor) -> Tensor:
            half = count / 2
            count.add_(1)
            return x * half

        return function

    x, plain, listed = torch.ones(2), counting(), counting()
    expected = [plain(x) for _ in range(4)]
    result, replay = _tape.record(listed, [x])
    for found, right in zip([result, *(replay(x) for _ in range(3))], expected, strict=True):
        assert torch.equal(found, right)


def test_noise_is_drawn_anew() -> None:
    def function(x: Tensor) -> Tensor:
        return x + torch.randn(3)

    _, replay = _tape.record(function, [torch.zeros(3)])
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    assert torch.equal(replay(torch.zeros(3)), expected)
    assert not torch.equal(replay(torch.zeros(3)), expected)


def test_a_result_is_nobody_elses() -> None:
    weight = torch.ones(2)
    result, replay = _tape.record(lambda x: weight * 2, [torch.zeros(1)])
    result.zero_()
    first = replay(torch.zeros(1))
    first.zero_()
    assert torch.equal(replay(torch.zeros(1)), torch.full((2,), 2.0))


def test_results_of_other_types() -> None:
    class Pair(NamedTuple):
        a: Tensor
        b: Any

    _, replay = _tape.record(lambda x: {"pair": Pair(x + 1, None), "n": 3}, [torch.zeros(2)])
    found = replay(torch.ones(2))
    assert found["n"] == 3
    assert found["pair"].b is None
    assert torch.equal(found["pair"].a, torch.full((2,), 2.0))


def test_autocast_is_in_the_list_and_not_around_it() -> None:
    layer = nn.Linear(4, 4)

    def function(x: Tensor) -> Tensor:
        y = layer(x)
        with torch.autocast("cpu", enabled=False):
            return y.float() @ layer.weight

    with torch.autocast("cpu", torch.bfloat16):
        repeats(function, torch.randn(2, 4))


def test_autocast_reaches_what_an_operator_is_made_of_in_inference_mode() -> None:
    other = torch.randn(2, 3, 4)

    def function(x: Tensor) -> Tensor:
        product = torch.einsum("bij,bkj->bik", x.softmax(dim=-1), other.bfloat16())  # of two dtypes, but for autocast
        with torch.autocast("cpu", enabled=False):
            return F.silu(product.float() @ other, inplace=True)

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        repeats(function, torch.randn(2, 3, 4))


def test_a_number_that_is_read_is_refused() -> None:
    def counting(x: Tensor) -> Tensor:
        return x * len(x.nonzero())

    for function in (lambda x: x * float(x.sum()), lambda x: x if x.sum() > 0 else -x, counting):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode(), pytest.raises(RuntimeError, match="it reads a number from a tensor"):
                _tape.record(function, [torch.ones(2)])


def test_a_result_that_hides_its_tensors_is_refused() -> None:
    class Hidden:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    with pytest.raises(RuntimeError, match="tensors in its result, of type Hidden, are not to be found"):
        _tape.record(lambda x: Hidden(x + 1), [torch.ones(2)])


def test_activations_are_freed() -> None:
    """The list keeps what depends on the weights, and nothing else of the call."""
    network = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
    tape = _tape._Tape([x := torch.randn(100, 8)])
    with torch.no_grad(), tape:
        result = network(x)
    tape.replay(result)
    sizes = [value.numel() for value in vars(tape.held).values() if isinstance(value, Tensor)]
    assert sizes
    assert max(sizes) <= 64


def test_copies_do_not_share(tmp_path: Any) -> None:
    network = nn.Linear(2, 2)
    other = copy.deepcopy(network)
    replay = repeats(network, torch.randn(1, 2))
    with torch.no_grad():
        other.weight.zero_()
        assert replay(torch.ones(1, 2)).abs().sum() > 0
