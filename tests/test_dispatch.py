"""Which implementation runs: forced, explained, refused with its reason."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import fastddpm
from fastddpm._dispatch import Op
from fastddpm.ops.rms_norm_silu.interface import OP

ARGUMENTS = (torch.randn(1, 4, 2, 2), torch.ones(4))


def test_a_forced_backend_that_is_not_there_raises_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OP, "present", ("reference", "native"))
    with fastddpm.use_backend("triton"), pytest.raises(NotImplementedError, match="no triton implementation"):
        fastddpm.rms_norm_silu(*ARGUMENTS)
    assert torch.isfinite(fastddpm.rms_norm_silu(*ARGUMENTS)).all()  # and the block ends


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="one of native, triton, reference"), fastddpm.use_backend("cuda"):
        pass


def test_explain_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    text = fastddpm.explain(fastddpm.rms_norm_silu, *ARGUMENTS)
    assert capsys.readouterr().out.strip() == text
    lines = {line.split()[0]: line for line in text.splitlines()[1:] if "copied" not in line}
    assert set(lines) == {"native", "triton", "reference"}
    assert "chosen" in lines["native"] and "can run" in lines["reference"]
    with fastddpm.use_backend("native"):
        assert "forced: native" in fastddpm.explain(fastddpm.rms_norm_silu, *ARGUMENTS)


def test_explain_wants_an_op() -> None:
    with pytest.raises(TypeError, match="op of fastddpm"):
        fastddpm.explain(print)
    with pytest.raises(TypeError):
        fastddpm.explain(fastddpm.rms_norm_silu, ARGUMENTS[0])


def _planted(reason: str | None) -> Any:
    """A native implementation that says why not, or doubles the reference."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        y, saved = OP.loaded["reference"].forward(*args, **kwargs)
        return 2 * y, saved

    return SimpleNamespace(unsupported=lambda **_: reason, forward=forward)


@pytest.mark.parametrize(("reason", "factor"), [(None, 2), ("too small a picture", 1)])
def test_the_first_that_can_is_taken(monkeypatch: pytest.MonkeyPatch, reason: str | None, factor: int) -> None:
    with fastddpm.use_backend("reference"):
        expected = factor * fastddpm.rms_norm_silu(*ARGUMENTS)
    monkeypatch.setattr(OP, "present", ("reference", "native"))
    monkeypatch.setitem(OP.loaded, "native", _planted(reason))
    monkeypatch.setattr(OP, "on_cpu", {})
    assert torch.equal(fastddpm.rms_norm_silu(*ARGUMENTS), expected)
    if reason is not None:
        assert reason in fastddpm.explain(fastddpm.rms_norm_silu, *ARGUMENTS)
        with fastddpm.use_backend("native"), pytest.raises(NotImplementedError, match=reason):
            fastddpm.rms_norm_silu(*ARGUMENTS)


def test_on_a_cpu_native_kernels_are_asked_once_for_each_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []

    def unsupported(x: torch.Tensor, **_: Any) -> str | None:
        asked.append(x.dtype)
        return "too wide" if x.dtype == torch.float64 else None

    planted = _planted(None)
    planted.unsupported = unsupported
    monkeypatch.setattr(OP, "present", ("reference", "native"))
    monkeypatch.setitem(OP.loaded, "native", planted)
    monkeypatch.setattr(OP, "on_cpu", {})
    for dtype in (torch.float32, torch.float64, torch.bfloat16) * 3:
        x, weight = (p.to(dtype) for p in ARGUMENTS)
        factor = 1 if dtype == torch.float64 else 2
        y = fastddpm.rms_norm_silu(x, weight)
        with fastddpm.use_backend("reference"):  # what is forced is asked for at each call
            assert torch.equal(y, factor * fastddpm.rms_norm_silu(x, weight))
    assert sorted(asked, key=str) == [torch.bfloat16, torch.float32, *[torch.float64] * 3]


def test_an_op_finds_the_implementations_beside_it(tmp_path: Any) -> None:
    (tmp_path / "triton_impl.py").touch()
    reference = ModuleType("reference")
    reference.__file__ = str(tmp_path / "reference.py")
    assert Op("somewhere.thing", reference).present == ("reference", "triton")


def test_explain_counts_copied_gradients() -> None:
    x = torch.randn(1, 4, 2, 2, requires_grad=True)
    before = fastddpm.explain(fastddpm.rms_norm_silu, x, ARGUMENTS[1])
    y = fastddpm.rms_norm_silu(x, ARGUMENTS[1])
    torch.autograd.grad(y, x, torch.ones(()).expand_as(y), retain_graph=True)
    torch.autograd.grad(y, x, torch.ones_like(y))
    after = fastddpm.explain(fastddpm.rms_norm_silu, x, ARGUMENTS[1])
    counts = [int(text.split("\n  ")[-1].split()[0]) if "copied" in text else 0 for text in (before, after)]
    assert counts[1] == counts[0] + 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])  # of which no kernel takes the second: all are imported
def test_ops_that_were_never_called_compile(dtype: str) -> None:
    """The import of an implementation, on first use, neither breaks a graph nor makes it anew at the second call."""
    code = f"""
import torch, fastddpm
from torch._dynamo.testing import CompileCounterWithBackend

def norms(x, p):
    return fastddpm.rms_norm_silu(x, p) + fastddpm.group_norm_silu(x, p, p, 2)

counter = CompileCounterWithBackend("eager")
compiled = torch.compile(norms, fullgraph=True, backend=counter)
x, p = torch.arange(16, dtype=torch.{dtype}).reshape(1, 4, 2, 2), torch.ones(4, dtype=torch.{dtype})
assert torch.equal(compiled(x, p), compiled(x, p))
assert torch.equal(compiled(x, p), norms(x, p))
print(counter.frame_count)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["1"]
