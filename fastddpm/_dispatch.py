"""Which implementation of an op runs, and why.

An op is a package ``fastddpm/ops/<op>/`` whose ``interface.py`` holds one `Op`. Its implementations are modules beside
it: ``reference.py`` (always there, the specification), ``native_impl.py`` and ``triton_impl.py``. Each has
``forward(...)``, and ``backward(...)`` where the op has one; all but the reference answer ``unsupported(...)`` with the
reason, in words, why they cannot run on these arguments, or with None.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ._checks import is_nhwc
from ._gpu_defaults import range_of, source

Function = TypeVar("Function", bound=Callable[..., Any])
BACKENDS = ("native", "triton", "reference")
NO_SECOND = b"fastddpm's ops have no gradient of the gradient; use torch's own layers for a penalty on gradients"
_forced: str | None = None
_copied: Counter[str] = Counter()  # op to the gradients that came with other strides than the kernels take


def _constant(function: Function) -> Function:
    """What torch.compiler.assume_constant_result does, which itself takes a second to import what it does not need."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@_constant
def _import_all(package: str) -> None:
    """Import every implementation of an op: where torch.compile reads this call, since it does not follow an import."""
    op: Op = sys.modules[f"{package}.interface"].OP
    for backend in op.present:
        if backend != "triton" or _has_triton():
            op.load(backend)


class Op:
    """One op: its name and the implementations that stand beside its interface, in order of preference.

    Args:
        package: ``__package__`` of the op's interface.
        reference: the imported reference module; the others are imported on first use.
    """

    def __init__(self, package: str, reference: ModuleType) -> None:
        self.package = package
        self.name = package.rpartition(".")[2]
        folder = Path(str(reference.__file__)).parent
        self.present = ("reference", *(b for b in BACKENDS if (folder / f"{b}_impl.py").exists()))
        self.loaded: dict[str, ModuleType] = {"reference": reference}
        self.on_cpu: dict[tuple[torch.dtype | None, ...], ModuleType] = {}  # what choose has found

    def implementation(self, backend: str) -> ModuleType:
        """The module of a backend that is `present`, imported when first asked for."""
        if torch.compiler.is_compiling():
            # before it reads `loaded`: it does not see what comes later, or compiles again because of that
            _import_all(self.package)
        else:
            self.load(backend)
        return self.loaded[backend]

    def load(self, backend: str) -> None:
        """Import the module of a backend that is `present`, where that was not done."""
        if backend not in self.loaded:
            self.loaded[backend] = importlib.import_module(f"{self.package}.{backend}_impl")

    def order(self, arguments: dict[str, Any]) -> tuple[str, ...]:
        """Backends in the order in which they are tried when none is forced: on a GPU as `_gpu_defaults` says."""
        images = _images(arguments)
        if not images or not images[0].is_cuda:
            return BACKENDS
        elements = torch.Size(arguments["shape"]).numel() if "shape" in arguments else sum(x.numel() for x in images)
        return range_of(self.name, elements).prefer

    def reason_against(self, backend: str, arguments: dict[str, Any]) -> str | None:
        """Why this backend cannot run on these arguments, in words; None where it can."""
        if backend not in self.present:
            return f"this version of fastddpm has no {backend} implementation of {self.name}"
        if backend == "reference":
            return None
        if backend == "triton" and not _has_triton():
            return "Triton is not installed; pip install triton"
        reason: str | None = self.implementation(backend).unsupported(**arguments)
        return reason

    def choose(self, x: Tensor, arguments: dict[str, Any]) -> ModuleType:
        """The implementation to run: the forced one, else the first of `order` that can.

        On a CPU that is asked once for each dtype of ``x`` and each argument ``dtype``: there the native kernels, which
        come first, look at nothing else. After large images every function that Python goes through comes out of
        memory: 2 instead of 8 us.

        Args:
            x: what the call is about. arguments: the call, by its names; no more of it than `unsupported` looks at.

        Raises:
            NotImplementedError: a backend is forced and cannot run; the message gives its reason.
        """
        quick = _forced is None and x.is_cpu and not is_dynamo_compiling()
        dtypes = (x.dtype, arguments.get("dtype"))
        chosen = self.on_cpu.get(dtypes) if quick else None
        if chosen is None:
            chosen = self.first_that_can(arguments)
            if quick and chosen is self.loaded.get("native"):
                self.on_cpu[dtypes] = chosen
        return chosen

    def first_that_can(self, arguments: dict[str, Any]) -> ModuleType:
        """See `choose`."""
        if _forced is not None:
            reason = self.reason_against(_forced, arguments)
            if reason is not None:
                raise NotImplementedError(
                    f"{self.name}: expected a case that the forced backend {_forced!r} can run, got: {reason}; "
                    f"leave the use_backend block, or see fastddpm.explain({self.name}, ...)"
                )
            return self.implementation(_forced)
        for backend in self.order(arguments):
            if self.reason_against(backend, arguments) is None:
                return self.implementation(backend)
        raise AssertionError(f"{self.name}: the reference runs everywhere")

    def run(self, x: Tensor, arguments: dict[str, Any]) -> Any:
        """What the implementation to run makes of an op that has no gradient: `choose` with the same arguments."""
        forward = self.choose(x, arguments).forward
        if not torch.is_grad_enabled():
            return forward(**arguments)
        with torch.no_grad():
            return forward(**arguments)


def _images(arguments: dict[str, Any]) -> list[Tensor]:
    """The first tensor of a call, or the first list of them: what it is about."""
    for x in arguments.values():
        if isinstance(x, Tensor):
            return [x]
        if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor):
            return list(x)
    return []


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Force one implementation of every op inside a ``with`` block, for the whole process.

    Args:
        backend: "reference", "triton" or "native".

    Raises:
        ValueError: no backend of that name exists.
        NotImplementedError: raised by an op inside the block that the forced backend cannot run, with its reason.
    """
    global _forced
    if backend not in BACKENDS:
        raise ValueError(
            f"use_backend: expected backend to be one of {', '.join(BACKENDS)}, got {backend!r}; choose one of these"
        )
    before = _forced
    _forced = backend
    try:
        yield
    finally:
        _forced = before


def dense_gradient(op: str, nchw: bool, gradient: Tensor) -> Tensor:
    """A gradient in NCHW or NHWC order: itself, or a copy where it has other strides, which `explain` counts.

    Under torch.compile no tensor is asked for its strides: in a backward Dynamo does not allow it, and begins again
    with a copy of every gradient in NCHW order. So forward notes the order of x for it.
    """
    order = torch.contiguous_format if nchw else torch.channels_last
    if not torch.compiler.is_compiling():
        if gradient.is_contiguous() if nchw else is_nhwc(gradient):
            return gradient
        _copied[op] += 1
    return gradient.contiguous(memory_format=order)


def once_differentiable(backward: Function) -> Function:
    """Of an autograd.Function's backward: its result has no gradient, and who asks for one is told.

    torch's own tells only those whose upstream gradient has a gradient; that of a loss, 1, has none, and the gradient
    of a penalty on the gradient would be missing without a word.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *gradients: Tensor) -> Any:
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return found
        outputs = found if isinstance(found, tuple) else (found,)
        refuse = torch._C._functions.DelayedError(NO_SECOND, len(outputs))
        return refuse(*[None if g is None else g.detach().requires_grad_() for g in outputs])  # type: ignore[arg-type]

    return once  # type: ignore[return-value]


def needs_gradient(*inputs: Tensor | None) -> bool:
    """Whether autograd is to know of an op on these inputs."""
    return torch.is_grad_enabled() and True in [p is not None and p.requires_grad for p in inputs]


def own(y: Tensor) -> Tensor:
    """What an autograd.Function of ours gives out: y, as a tensor object of its own under torch.compile.

    In torch 2.11 an output that is a tensor which forward had before, as ``y.contiguous()`` may be, has no gradient
    there: zeros, without an error.
    """
    return y.detach() if torch.compiler.is_compiling() else y


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Print, and return, which implementation of an op would run on these arguments, and why the others would not.

    Args:
        op: an op of this package, such as ``fastddpm.q_sample``.
        *args, **kwargs: what the op would be called with.

    Raises:
        TypeError: ``op`` is not an op of fastddpm, or the arguments do not fit its signature.
    """
    holder = getattr(sys.modules.get(getattr(op, "__module__", "")), "OP", None)
    if not isinstance(holder, Op):
        raise TypeError(
            f"explain: expected op to be an op of fastddpm.ops, got {op!r}; pass for example fastddpm.q_sample"
        )
    bound = inspect.signature(op).bind(*args, **kwargs)
    bound.apply_defaults()
    order = holder.order(bound.arguments)
    reasons = {backend: holder.reason_against(backend, bound.arguments) for backend in order}
    candidates = (_forced,) if _forced is not None else order
    chosen = next((b for b in candidates if reasons[b] is None), None)
    lines = [f"{holder.name}" + (f" (forced: {_forced})" if _forced is not None else "")]
    for backend in order:
        note = "chosen" if backend == chosen else "can run" if reasons[backend] is None else reasons[backend]
        lines.append(f"  {backend:<10} {note}")
    if order is not BACKENDS:
        lines.append(f"  in the order for a GPU: {source(holder.name)}")
    if _copied[holder.name]:
        lines.append(f"  {_copied[holder.name]} gradients came with other strides, and were copied")
    text = "\n".join(lines)
    print(text)
    return text
