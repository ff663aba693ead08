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
from fastddpm._calls import Calls
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
