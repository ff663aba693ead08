"""Recording and replaying: what is called when. On a GPU: tests/sampling/test_sample_loop.py, tests/training."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastddpm import _graph
from fastddpm._graph import WARM_UP, Replayed

CUDA = torch.device("cuda")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done to a function, in order, on a device that is imagined."""
    done: list[str] = []

    def beside(function: Callable[[], None], device: torch.device) -> None:
        done.append("beside")
        function()

    def record(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
        done.append("record")
        return lambda: done.append("replay")

    monkeypatch.setattr(_graph, "beside", beside)
    monkeypatch.setattr(_graph, "record", record)
    return done


def test_the_first_calls_run_then_one_recording_is_replayed(calls: list[str]) -> None:
    run = Replayed(CUDA, "sampling")
    for _ in range(WARM_UP + 2):
        run(lambda: calls.append("function"))
    assert calls == ["beside", "function"] * WARM_UP + ["record", "replay", "replay"]


def test_on_a_cpu_nothing_is_recorded(calls: list[str]) -> None:
    run = Replayed(torch.device("cpu"), "sampling")
    for _ in range(WARM_UP + 2):
        run(lambda: calls.append("function"))
    assert calls == ["function"] * (WARM_UP + 2)


def test_what_cannot_be_recorded_goes_on_with_a_warning(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def record(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(_graph, "record", record)
    run = Replayed(CUDA, "training")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(WARM_UP):
            run(lambda: calls.append("function"))
    with pytest.warns(UserWarning, match="training goes on without a CUDA graph.*not permitted.*turn cuda_graph off"):
        run(lambda: calls.append("function"))
    run(lambda: calls.append("function"))
    assert calls.count("function") == WARM_UP + 2


# --- a recording that fails


class Stream:
    """As torch.cuda.Stream is called."""

    def __init__(self, device: Any = None) -> None:
        self.device = torch.device("cpu")

    def wait_stream(self, other: Stream) -> None:
        pass


class FakeCUDA:
    """What torch keeps of captures: the end of one that fails leaves everything as it is, as in the C++ of torch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream = self.first = Stream()
        self.capturing, self.invalid, self.draws = False, False, True
        self.open, self.held = set[Any](), set[Any]()  # pools that memory is taken from, and those not given back
        numbers = itertools.count(1)
        fake = self

        class Graph:
            def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
                assert fake.stream is not fake.first and not fake.capturing
                self.pool = pool or (next(numbers), 0)
                fake.open.add(self.pool)
                fake.held.add(self.pool)
                fake.capturing, fake.draws = True, False

            def capture_end(self) -> None:
                invalid, fake.capturing, fake.invalid = fake.invalid, False, False
                if invalid:
                    raise RuntimeError("operation failed due to a previous error during capture")
                fake.end(0, self.pool)
                fake.held.remove(self.pool)  # which torch does when the graph is gone
                fake.draws = True

            def reset(self) -> None:
                pass

            def replay(self) -> None:
                pass

        names = dict(
            Stream=Stream, stream=self.on, current_stream=lambda device=None: self.stream, CUDAGraph=Graph,
            synchronize=lambda device=None: None, empty_cache=lambda: None, current_device=lambda: 0,
            graph_pool_handle=lambda: (0, next(numbers)),
        )  # fmt: skip
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: self.held.remove(pool))

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def end(self, device: int, pool: Any) -> None:
        if pool not in self.open:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.open.remove(pool)

    def item(self) -> None:
        if self.capturing:
            self.invalid = True
            raise RuntimeError("operation not permitted when stream is capturing")

    def is_as_it_was(self) -> bool:
        return self.stream is self.first and self.draws and not (self.capturing or self.open or self.held)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCUDA:
    return FakeCUDA(monkeypatch)


def test_a_failed_capture_leaves_torch_as_it_was(cuda: FakeCUDA) -> None:
    """Goes on on the stream it was on; memory is taken from where it was, and random numbers are drawn."""
    run, streams = Replayed(CUDA, "sampling"), []

    def waiting() -> None:
        streams.append(cuda.stream)
        cuda.item()

    for _ in range(WARM_UP):
        run(waiting)
    with pytest.warns(UserWarning, match="goes on without a CUDA graph.*: operation not permitted when stream is capt"):
        run(waiting)
    run(waiting)
    assert streams[-2:] == [cuda.first] * 2 and cuda.is_as_it_was()
    _graph.capture(lambda: None, CUDA)  # and another one can be made
    assert cuda.is_as_it_was()


def hidden(cuda: FakeCUDA) -> None:
    """A wait whose error is swallowed."""
    with contextlib.suppress(RuntimeError):
        cuda.item()


def wrong(cuda: FakeCUDA) -> None:
    """An error that has nothing to do with the capture, which ends well."""
    raise ValueError("expected a batch")


@pytest.mark.parametrize(("function", "why"), [(hidden, "a previous error"), (wrong, "expected a batch")])
def test_whatever_ends_a_capture_is_told(cuda: FakeCUDA, function: Callable[[FakeCUDA], None], why: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=why):
        _graph.capture(lambda: function(cuda), CUDA)
    assert cuda.is_as_it_was()


def test_where_torch_has_other_names_the_error_is_the_same(cuda: FakeCUDA, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool")
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        _graph.capture(cuda.item, CUDA)
    assert cuda.stream is cuda.first and cuda.draws


def test_streams_are_used_again(cuda: FakeCUDA) -> None:
    """One for the calls before a recording and one for recordings, of each thread and beside each stream."""
    found: list[Any] = []

    def streams() -> tuple[Any, Any]:
        for do in (_graph.beside, _graph.capture):
            do(lambda: found.append(cuda.stream), CUDA)
        return found[-2], found[-1]

    first = streams()
    assert streams() == first and first[0] is not first[1] and cuda.first not in first
    with cuda.on(Stream()):
        elsewhere = streams()
        assert streams() == elsewhere
    thread = threading.Thread(target=streams)
    thread.start()
    thread.join()
    assert len({*first, *elsewhere, *found[-2:]}) == 6
    assert streams() == first


@pytest.mark.gpu
def test_recordings_use_two_streams_on_a_gpu() -> None:
    seen, x = set(), torch.zeros(3, device="cuda")

    def adding() -> None:
        seen.add(torch.cuda.current_stream())
        x.add_(1)

    for _ in range(3):
        run = Replayed(CUDA, "a test")
        for _ in range(WARM_UP + 1):
            run(adding)
    assert len(seen) == 2 and torch.cuda.current_stream() not in seen


@pytest.mark.gpu
def test_after_a_failed_capture_work_goes_on_on_a_gpu() -> None:
    """On the stream it was on, with random numbers, memory that is given back, and recordings that do not fail."""
    x, other = torch.ones(1 << 20, device="cuda"), torch.cuda.Stream()

    def waiting() -> None:
        x.add_((x * 2).sum().item() * 0 + 1)

    def segments() -> set[tuple[int, int]]:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return {tuple(segment["segment_pool_id"]) for segment in torch.cuda.memory_snapshot()}

    before, stream, run = segments(), torch.cuda.current_stream(), Replayed(CUDA, "a test")
    with pytest.warns(UserWarning, match="a test goes on without a CUDA graph"):
        for _ in range(WARM_UP + 2):
            run(waiting)
    assert torch.equal(x, torch.full_like(x, WARM_UP + 3)) and torch.cuda.current_stream() == stream
    torch.rand(3, device="cuda")
    assert segments() <= before | {(0, 0)}

    active = torch.cuda.memory_stats()["active_bytes.all.current"]
    lent = torch.empty(1 << 24, device="cuda")
    lent.record_stream(other)
    del lent
    torch.cuda.synchronize()
    torch.empty(1, device="cuda")  # a request, at which torch looks what other streams are done with
    assert torch.cuda.memory_stats()["active_bytes.all.current"] == active

    def adding() -> None:
        x.add_(1)

    again = Replayed(CUDA, "a test")
    for _ in range(WARM_UP + 2):
        again(adding)
    assert again.replay is not None
    assert torch.equal(x, torch.full_like(x, 2 * WARM_UP + 5))
