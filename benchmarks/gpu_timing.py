"""How the GPU suite times contestants, each of which may fail: a failure is a row, and the suite goes on."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import fastddpm
from benchmarks import contests
from benchmarks.contests import Call, Contest, Function
from benchmarks.gpu_cases import Case
from fastddpm.bench import GpuClock
from tests.tolerance import assert_within

Line = dict[str, Any]
OURS = ("native", "triton")
MOST_COPIES = 256
FEWEST_CALLS = 4  # between two events


def copies_of(size: int, cache: int) -> int:
    """How many sets of inputs make three times the cache, and how many of results: at least a quarter of what an op
    moves are its inputs, where it has any, and at least a quarter its results."""
    return max(1, min(MOST_COPIES, -(-3 * cache // max(1, size // 4))))


class DeviceLostError(Exception):
    """A contestant left the device unusable for this process; ``rows`` say which."""

    def __init__(self, rows: list[Line]) -> None:
        super().__init__(rows[-1]["error"])
        self.rows = rows


class Rotation:
    """Calls on one set of inputs after the other, of which so many results are held, so that the cache has neither
    what is read nor what is written: torch would give a call the memory of the last result, were it free."""

    def __init__(self, calls: list[Call], held: int) -> None:
        self.calls, self.next = calls, 0
        self.results: deque[object] = deque(maxlen=held)

    def __call__(self) -> None:
        self.results.append(self.calls[self.next]())
        self.next = (self.next + 1) % len(self.calls)


class Timed:
    """A contestant, and the best time of one of its calls so far."""

    def __init__(self, calls: list[Call], held: int) -> None:
        rotation, self.best = Rotation(calls, held), float("inf")
        for _ in range(max(3, held + 1)):  # so that torch has the memory of all
            rotation()
        self.clock = GpuClock(rotation, FEWEST_CALLS)

    def turn(self) -> None:
        self.best = min(self.best, self.clock.read())


class Rates:
    """What this device copies and draws in a second, measured on amounts that no cache holds, and the seconds of a
    kernel that does nothing, as one of many in a row."""

    def __init__(self, cache: int) -> None:
        size = max(2**29, 8 * cache)
        self.copied_bytes = size / best_of(copying(size, 1)[0])
        self.launch = best_of(lambda: torch.cuda._sleep(1))
        sample = torch.arange(64, device="cuda")
        self.draws: dict[str, float] = {}
        for backend in ("native", "triton"):
            with contextlib.suppress(Exception):
                self.draws[backend] = 2**27 / best_of(forced(backend, lambda: _draw(sample)))

    def floor(self, size: int, normals: int) -> float:
        """The least seconds: to move the bytes, or to draw the normal numbers where it is longer."""
        drawing = normals / max(self.draws.values()) if normals and self.draws else 0.0
        return max(size / self.copied_bytes, drawing)


def _draw(sample: torch.Tensor) -> object:
    return fastddpm.ops.normal((64, 2**21), seed=0, sample=sample, step=0, stream=1, dtype=torch.bfloat16)


def best_of(call: Call, turns: int = 10) -> float:
    timed = Timed([call], held=1)
    for _ in range(turns):
        timed.turn()
    return timed.best


def forced(backend: str, function: Function) -> Function:
    def run(*inputs: Any) -> Any:
        with fastddpm.use_backend(backend):
            return function(*inputs)

    return run


def apex_function(case: Case) -> Function | None:
    """apex's GroupNorm with SiLU, where it is installed and takes the shape."""
    if case.op != "group_norm_silu":
        return None
    try:
        module = importlib.import_module("apex.contrib.group_norm")
    except ImportError:
        return None
    norm = module.GroupNorm(32, case.shape[1], eps=1e-6, act="silu").to("cuda", getattr(torch, case.dtype))

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    return run


def functions_of(case: Case, contest: Contest) -> dict[str, Callable[[], Function]]:
    """The contestants by name, made when it is their turn: what fails then is their own failure."""
    makers: dict[str, Callable[[], Function]] = {
        "native": lambda: forced("native", contest.ours),
        "triton": lambda: forced("triton", contest.ours),
        "eager": lambda: contest.eager,
    }
    if case.op not in ("normal", "adam_ema"):  # one kernel already; and an optimizer is none
        makers["compile"] = lambda: contests.compiled(contest.eager)
    apex = apex_function(case)
    if apex is not None:
        makers["apex"] = lambda: apex
    return makers


def results(contest: Contest, function: Function, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """What is compared: the tensors that a call gives, or its gradients for the first input as that of the result."""
    y = function(*inputs)
    if contest.timed == "both":
        y = torch.autograd.grad(y, inputs)
    elif contest.timed == "gradient":
        y = torch.autograd.grad(y, inputs, inputs[0].detach())
    return [z.detach() for z in torch.utils._pytree.tree_leaves(y) if torch.is_tensor(z) and z.is_floating_point()]


def references(case: Case) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What the reference gives in float64 and in float32 for the inputs of a case; where it has none, but makes its
    tensors itself, in float32 for both."""
    found = []
    for dtype in (torch.float64, torch.float32):
        given = contest_of(case).inputs
        contest = contest_of(case, dtype)
        inputs = tuple(x.detach().to(dtype) if x.is_floating_point() else x for x in given)
        inputs = tuple(x.requires_grad_(y.requires_grad) for x, y in zip(inputs, given, strict=True))
        found.append(results(contest, forced("reference", contest.ours), inputs))
    exact, rounded = found
    return (exact if given else [n.double() for n in rounded]), rounded


def contest_of(case: Case, dtype: torch.dtype | None = None) -> Contest:
    """The contest of a case, the same each time; in another dtype its inputs differ, and nothing else."""
    torch.manual_seed(0)
    make: contests.Make = getattr(contests, case.contest)
    return make(case.shape, dtype or getattr(torch, case.dtype))


NORMALS_2, NORMALS_MAXIMUM = 4e-6, 2e-3  # twice what normal numbers may differ by, relative and absolute


def check_values(case: Case, backend: str, expected: tuple[list[torch.Tensor], list[torch.Tensor]]) -> None:
    """Hold an implementation against the reference on the inputs that are timed.

    The one rule; where normal numbers are drawn, they may differ besides, by the bounds that tests hold them to.
    """
    contest = contest_of(case)
    with torch.set_grad_enabled(contest.timed != "call"):
        ours = results(contest, forced(backend, contest.ours), contest.inputs)
    for number, (impl, exact, rounded) in enumerate(zip(ours, *expected, strict=True)):
        what = f"{case.op}, result {number}"
        if not contest.normals:
            assert_within(impl, exact, rounded, what)
            continue
        error, unit = impl.double() - exact, rounded.to(impl.dtype).double() - exact
        size, least = exact.norm(), 4 * torch.finfo(torch.float32).eps
        assert error.norm() <= 2 * unit.norm() + (least + NORMALS_2) * size, f"{what}: 2-norm of the error"
        most = exact.abs().max()
        allowed = 2 * unit.abs().max() + (least + NORMALS_MAXIMUM) * most
        assert error.abs().max() <= allowed, f"{what}: maximum of the error"


def measured(case: Case, rates: Rates, cache: int, seconds: float, without: frozenset[str]) -> list[Line]:
    """The rows of a case: every contestant, in turns, and a copy of as many bytes. Wrong values are no time."""
    contest = contest_of(case)
    held = copies_of(contest.size, cache)
    copies = held if contest.inputs else 1
    inputs = [contest.inputs, *(contest.copied_inputs() for _ in range(copies - 1))]
    name = contests.name_of(getattr(contests, case.contest), case.shape)
    about = dict(
        kind="row", part=case.part, key=case.key, op=case.op, case=name, dtype=case.dtype,
        network=case.network, count=case.count, elements=case.elements, bytes=contest.size, normals=contest.normals,
        copies=copies, floor=rates.floor(contest.size, contest.normals),
    )  # fmt: skip
    entrants: dict[str, Timed] = {}
    rows: list[Line] = []
    expected = functools.cache(lambda: references(case))

    def attempt(name: str, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:
            entrants.pop(name, None)
            rows.append({**about, "contestant": name, "seconds": None, "error": in_short(error), "lost": is_lost()})
            if rows[-1]["lost"]:
                raise DeviceLostError(rows) from error

    def enter(name: str, calls: Callable[[], list[Call]]) -> None:
        def step() -> None:
            if name in OURS:
                check_values(case, name, expected())
            entrants[name] = Timed(calls(), held)

        attempt(name, step)

    with torch.set_grad_enabled(contest.timed != "call"):
        for name, maker in functions_of(case, contest).items():
            if name not in without:
                enter(name, partial(bound_all, contest, maker, inputs))
        expected.cache_clear()
        enter("copy", partial(copying, contest.size, held))
        end = time.perf_counter() + seconds
        turns = 0
        while entrants and (turns < 5 or time.perf_counter() < end):
            for name, entrant in list(entrants.items()):
                attempt(name, entrant.turn)
            turns += 1
    rows += [{**about, "contestant": name, "seconds": e.best, "turns": turns} for name, e in entrants.items()]
    return rows


def bound_all(contest: Contest, maker: Callable[[], Function], inputs: list[tuple[torch.Tensor, ...]]) -> list[Call]:
    function = maker()
    return [contest.bound(function, x) for x in inputs]


def is_lost() -> bool:
    """Whether an error of the device stays: then only another process can go on."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def in_short(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def copying(size: int, copies: int) -> list[Call]:
    """Read half of the bytes and write as many."""

    def one() -> Call:
        source = torch.ones(max(1, size // 8), device="cuda")
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return [one() for _ in range(max(1, min(copies, 64)))]


# The sweep of group_norm_silu.

SLABS, CLUSTERS = (64, 96, 128, 192), (1, 2, 4, 8, 16)
BY_PLAN, TWO_READS, COOPERATIVE = 0, 1, 2
PARTS = (0, 128, 192, 256, 384)  # of a slab, each in one block where the device has room for so many
HOOK = "fastddpm_group_norm_plan"  # void (int slab, int cluster or parts, int way); 0 leaves a choice to the kernels
Cut = tuple[int, int, int]


def plan_hook() -> Callable[[int, int, int], None] | None:
    """The function of the CUDA library that sets how all calls behind it are cut, where it has one."""
    for path in sorted(contests.fastddpm_libraries()):
        with contextlib.suppress(OSError, AttributeError):
            hook = getattr(ctypes.CDLL(str(path)), HOOK)
            hook.argtypes, hook.restype = (ctypes.c_int, ctypes.c_int, ctypes.c_int), None
            return lambda slab, cluster, way: hook(slab, cluster, way)  # type: ignore[no-any-return]
    return None


@contextlib.contextmanager
def planned(hook: Callable[[int, int, int], None], cut: Cut) -> Iterator[None]:
    hook(*cut)
    try:
        yield
    finally:
        hook(0, 0, BY_PLAN)


def cuts_of(case: Case) -> dict[str, Cut]:
    """The ways to cut a case by name: slabs and clusters or, of what is too large for a cluster, slabs and parts."""
    slabs = (0, *(s for s in SLABS if s <= case.shape[1]))
    cuts = {"native, by plan": (0, 0, BY_PLAN), "native, two reads": (0, 0, TWO_READS)}
    narrow = case.shape[2] * case.shape[3] * 64 * 2  # bytes of 64 channels
    fits = narrow <= 16 * 227 * 1024
    for slab in slabs:
        for cluster in CLUSTERS if fits else ():
            cuts[f"native, slab {slab or 'by plan'}, cluster {cluster}"] = (slab, cluster, BY_PLAN)
        for parts in PARTS[:1] if fits else PARTS:
            label = f"native, cooperative, slab {slab or 'by plan'}, parts {parts or 'by plan'}"
            cuts[label] = (slab, parts, COOPERATIVE)
    return cuts


def swept(case: Case, hook: Callable[[int, int, int], None], rates: Rates, cache: int, seconds: float) -> list[Line]:
    """A row for each way to cut a case. The kernels take what is possible of what is asked for."""
    rows: list[Line] = []
    for label, cut in cuts_of(case).items():
        with planned(hook, cut):
            found = measured(case, rates, cache, seconds, frozenset({"triton", "eager", "compile", "apex"}))
        about = dict(part="sweep", contestant=label, slab=cut[0], cluster=cut[1], way=cut[2])
        rows += [row | dict(key=f"sweep {row['key']}") | about for row in found if row["contestant"] == "native"]
    return rows
