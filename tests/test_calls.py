"""Calls on a CPU by lists of operators: which are recorded, when, and what happens where that fails.

On a GPU they are CUDA graphs: tests/optimization/test_optimize.py.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastddpm
from fastddpm import _calls, _native
from fastddpm._calls import Calls, Repeated
from fastddpm.nn.layers import Conv2d
from tests.tolerance import assert_near_peer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def calls_of(calls: Calls, function: Callable[..., Any], *args: Any, state: Any = (), **kwargs: Any) -> Any:
    return calls(function, CPU, state, args, kwargs)


class Counted(nn.Module):
    """How often Python was here."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.count = 0

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        """[.., 4] to the same."""
        self.count += 1
        y: Tensor = self.layer(x) * factor
        return y


def test_after_one_call_one_recording_and_one_comparison_python_is_left_out() -> None:
    network, calls = Counted(), Calls("a test", "stop")
    for i in range(6):
        x = torch.randn(2, 4)
        before = network.count
        y = calls_of(calls, network, x)
        assert network.count - before == (1 if i < 3 else 0)
        assert torch.equal(y, network.layer(x))


def test_other_shapes_numbers_and_modes_are_other_kinds() -> None:
    network, calls = Counted(), Calls("a test", "stop")
    kinds: list[tuple[Tensor, dict[str, Any]]] = [
        (torch.randn(2, 4), {}),
        (torch.randn(3, 4), {}),
        (torch.randn(2, 4), {"factor": 2.0}),
    ]
    for _ in range(4):
        for x, kwargs in kinds:
            y = calls_of(calls, network, x, **kwargs)
            assert torch.equal(y, network.layer(x) * kwargs.get("factor", 1.0))
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(4):
            assert calls_of(calls, network, kinds[0][0]).dtype == torch.bfloat16
    with fastddpm.use_backend("reference"):
        for _ in range(4):
            calls_of(calls, network, kinds[0][0])
    assert len(calls.recorded) == 5


def test_another_state_makes_all_anew() -> None:
    network, calls = Counted(), Calls("a test", "stop")
    for state in ("some weights", "others"):
        with torch.no_grad():
            network.layer.weight.mul_(2)
        for _ in range(4):
            x = torch.randn(2, 4)
            assert torch.equal(calls_of(calls, network, x, state=state), network.layer(x))
        assert len(calls.recorded) == 1


@pytest.mark.skipif(not _native.available(), reason="native code is not built")
def test_transformed_weights_are_shared_by_kinds_of_calls() -> None:
    layer, calls = Conv2d(16, 16, 3, padding=1).to(memory_format=torch.channels_last), Calls("a test", "stop")
    for batch in (1, 2):
        for _ in range(4):
            x = torch.randn(batch, 16, 16, 16).contiguous(memory_format=torch.channels_last)
            assert_near_peer(calls_of(calls, layer, x), F.conv2d(x, layer.weight, layer.bias, padding=1))
    assert len(calls.recorded) == 2
    assert len(calls.transformed) == 1


def test_what_differs_when_repeated_is_given_up() -> None:
    network, calls = Counted(), Calls("a test", "stop it")

    def growing(x: Tensor) -> Tensor:
        return network(x, factor=float(network.count))

    for _ in range(2):
        calls_of(calls, growing, torch.randn(2, 4))
    x = torch.randn(2, 4)
    with pytest.warns(UserWarning, match="a test goes on without further recordings: repeating .* else; stop it"):
        y = calls_of(calls, growing, x)
    assert torch.equal(y, network.layer(x) * (network.count - 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = network.count
        for _ in range(4):
            calls_of(calls, growing, x)
    assert network.count == before + 4


def test_a_number_that_is_read_is_given_up() -> None:
    calls = Calls("a test", "stop")
    calls_of(calls, lambda x: x * float(x.sum()), torch.ones(2))
    with pytest.warns(UserWarning, match="it reads a number from a tensor"):
        y = calls_of(calls, lambda x: x * float(x.sum()), torch.ones(2))
    assert torch.equal(y, torch.full((2,), 2.0))


def test_an_error_of_the_function_is_raised() -> None:
    calls = Calls("a test", "stop")
    network = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        calls_of(calls, network, torch.ones(2, 3))
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        calls_of(calls, network, torch.ones(2, 3))


def test_an_argument_that_cannot_be_compared_is_passed_on() -> None:
    calls = Calls("a test", "stop")
    for _ in range(4):
        assert calls_of(calls, lambda x, extra: x + len(extra), torch.ones(1), {1, 2}).item() == 3
    assert not calls.recorded


def test_only_so_many_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_calls, "KINDS", 1)
    calls, network = Calls("a test", "stop"), Counted()
    with pytest.warns(UserWarning, match="it was called in more than 1 ways"):
        for batch in (1, 2):
            for _ in range(2):
                calls_of(calls, network, torch.ones(batch, 4))


def test_a_copy_starts_without_recordings() -> None:
    calls, network = Calls("a test", "stop"), Counted()
    for _ in range(3):
        calls_of(calls, network, torch.ones(1, 4))
    assert calls.recorded
    assert not pickle.loads(pickle.dumps(calls)).recorded


# steps of a training


def descent(network: Counted, x: Tensor, total: Tensor, peek: Callable[[Tensor], object] = id) -> Callable[[], None]:
    """A step of gradient descent, in place."""

    def step() -> None:
        loss = network(x).square().mean()
        loss.backward()
        peek(loss)
        with torch.no_grad():
            for p in network.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
                p.grad = None
            total.add_(loss)

    return step


@torch.inference_mode(False)
@torch.enable_grad()
def repeated(steps: int, before: Callable[[int, Counted], None] = lambda i, network: None, **options: Any) -> Counted:
    """That many steps through `Repeated`, held against as many without; returns the network that was repeated."""
    found = []
    for wanted in (True, False):
        torch.manual_seed(0)
        network, x, total = Counted(), torch.zeros(2, 4), torch.zeros(())
        step, run = descent(network, x, total, **options), Repeated(network, wanted)
        for i in range(steps):
            before(i, network)
            x.copy_(torch.full((2, 4), float(i)))
            run(step, [x])
        found.append((network, [*(p.detach() for p in network.parameters()), total]))
    assert all(map(torch.equal, found[0][1], found[1][1]))
    return found[0][0]


def test_steps_of_a_training_are_repeated_without_python() -> None:
    assert repeated(Repeated.WARM_UP + 5).count == Repeated.WARM_UP + 1


def test_weights_that_others_write_to_are_read_anew() -> None:
    def before(i: int, network: Counted) -> None:
        if i == Repeated.WARM_UP + 2:
            with torch.no_grad():
                network.layer.weight.fill_(0.5)

    assert repeated(Repeated.WARM_UP + 5, before).count == Repeated.WARM_UP + 1


@pytest.mark.parametrize("change", ["weight", "freeze", "eval", "layer"])
def test_steps_of_another_network_are_recorded_anew(change: str) -> None:
    def before(i: int, network: Counted) -> None:
        if i == Repeated.WARM_UP + 2:
            if change == "weight":
                network.layer.weight = nn.Parameter(torch.ones(4, 4))
            elif change == "freeze":
                network.layer.bias.requires_grad_(False)
            elif change == "eval":
                network.eval()
            else:
                network.layer = nn.Linear(4, 4)

    assert repeated(2 * Repeated.WARM_UP + 5, before).count == 2 * Repeated.WARM_UP + 2


def test_with_a_hook_steps_are_done_as_they_are() -> None:
    seen: list[int] = []
    handles: list[Any] = []

    def before(i: int, network: Counted) -> None:
        if i == Repeated.WARM_UP + 2:
            handles.append(network.layer.register_forward_hook(lambda *_: seen.append(i)))
        elif i == Repeated.WARM_UP + 4:
            handles.pop().remove()

    network = repeated(Repeated.WARM_UP + 6, before)
    assert len(seen) == 2 * 2 and network.count == Repeated.WARM_UP + 1 + 2


def test_a_step_that_reads_a_number_is_done_once_and_not_recorded() -> None:
    with pytest.warns(UserWarning, match="goes on without a list of its operators: it reads a number from a tensor"):
        network = repeated(Repeated.WARM_UP + 3, peek=float)
    assert network.count == Repeated.WARM_UP + 3
