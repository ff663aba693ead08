"""`optimize` on networks of no library: what is replaced and what is not, what does not change, and the way back."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastddpm
from fastddpm import _calls, _graph, _native
from fastddpm.nn import layers
from fastddpm.optimization import capture
from fastddpm.optimization.fused import Fused
from fastddpm.optimization.norms import as_image
from tests.optimization.networks import (
    Embedded,
    GroupNorm32,
    OddResBlock,
    Swish,
    call,
    check_gradients,
    check_outputs,
    ddim,
    gradients,
    guided,
)
from tests.tolerance import assert_near_peer, assert_within

NETWORKS = {
    "bias": lambda: guided(scale_shift=False),
    "scale and shift": lambda: guided(scale_shift=True),
    "resampling": lambda: guided(scale_shift=True, resample=True),
    "functions": ddim,
}


def fused(module: nn.Module) -> list[str]:
    return [name for name, m in module.named_modules() if isinstance(m, Fused)]


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_agree(name: str) -> None:
    network = NETWORKS[name]()
    report = check_outputs(network, call(network))
    assert len([module for module in report.replaced if "Res" in module.pattern]) == len(network.blocks)
    assert "GroupNorm + SiLU in nn.Sequential" in {module.pattern for module in report.replaced}
    assert not report.kept


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_agree(name: str) -> None:
    network = NETWORKS[name]()
    check_gradients(network, call(network))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_good_as_it_was(dtype: torch.dtype) -> None:
    network = ddim()
    check_outputs(network, call(network), dtype)


def test_a_network_changes_dtype_and_mode_afterwards() -> None:
    network = ddim()
    run, other = call(network), copy.deepcopy(network)
    fastddpm.optimize(network)
    for made in (network, other):
        made.to(torch.bfloat16).eval()
    with torch.no_grad():
        exact = run(copy.deepcopy(other).double())
        assert (run(network) - exact).norm() <= 2 * (run(other) - exact).norm()
    assert network.out[0].weight.dtype == torch.bfloat16


def test_convolutions_in_half_precision_among_weights_in_float32() -> None:
    network = guided(scale_shift=True).eval()  # as guided-diffusion's use_fp16 makes it
    exact, run = copy.deepcopy(network), call(network)
    for m in [network.conv_in, network.out[2], *(m for m in network.blocks.modules() if isinstance(m, nn.Conv2d))]:
        m.to(torch.bfloat16)
    with torch.no_grad():
        before, expected = run(network), run(exact.double())
        report = fastddpm.optimize(network)
        after = run(network)
    assert sum("ResBlock" in module.pattern for module in report.replaced) == 3
    assert before.dtype == after.dtype == torch.bfloat16
    assert (after - expected).norm() <= 2 * (before - expected).norm()


def test_a_second_call_changes_nothing_and_restore_undoes_both() -> None:
    network = guided(scale_shift=True)
    network.conv_in.weight.data = network.conv_in.weight.data.transpose(2, 3).contiguous().transpose(2, 3)
    before = copy.deepcopy(network)
    parameters = list(network.parameters())
    first = fastddpm.optimize(network)
    classes = [type(m) for m in network.modules()]
    second = fastddpm.optimize(network)
    assert (first, str(first)) == (second, str(second))
    assert [type(m) for m in network.modules()] == classes
    assert len(network._forward_hooks) == 1
    assert network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert list(network.state_dict()) == list(before.state_dict())
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))

    assert fastddpm.restore(network) is network
    assert [type(m) for m in network.modules()] == [type(m) for m in before.modules()]
    assert [sorted(m.__dict__) for m in network.modules()] == [sorted(m.__dict__) for m in before.modules()]
    assert [p.stride() for p in network.parameters()] == [p.stride() for p in before.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before.parameters(), strict=True))
    assert not network._forward_hooks
    fastddpm.restore(network)  # there is nothing left to undo


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_optimized_and_can_be_restored(way: str) -> None:
    network = guided(scale_shift=False).eval()
    run = call(network)
    fastddpm.optimize(network)
    if way == "deepcopy":
        made = copy.deepcopy(network)
    elif way == "pickle":
        made = pickle.loads(pickle.dumps(network))
    else:
        file = io.BytesIO()
        torch.save(network, file)
        file.seek(0)
        made = torch.load(file, weights_only=False)
    with torch.no_grad():
        assert fused(made) == fused(network)
        assert repr(made) == repr(network)
        assert torch.equal(run(made), run(network))
        assert fastddpm.optimize(made) == fastddpm.optimize(network)
        fastddpm.restore(made)
        assert not fused(made)
        assert not made._forward_hooks
        assert fused(network)


def test_a_block_of_a_known_name_and_another_function_is_left_alone() -> None:
    network = Embedded(OddResBlock(8, 16, 16, True), channels=16).eval()
    run = call(network)
    with torch.no_grad():
        expected = run(network)
        report = fastddpm.optimize(network)
        assert_near_peer(run(network), expected)
    [kept] = report.kept
    assert (kept.name, kept.kind) == ("blocks.0", "ResBlock")
    assert "it does not give what a block of this name usually gives" in kept.reason
    assert "ResBlock: it does not give" in str(report)


def test_the_trial_leaves_no_trace() -> None:
    network = guided(scale_shift=True).train()
    network.blocks[0].out_layers[2].eval()
    modes, state = [m.training for m in network.modules()], torch.get_rng_state()
    before = [p.clone() for p in network.parameters()]
    fastddpm.optimize(network)
    assert [m.training for m in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert all(p.grad is None for p in network.parameters())


def test_hooks_are_called_before_and_after() -> None:
    network = guided(scale_shift=True).eval()
    run = call(network)
    seen: list[Tensor] = []
    first = network.blocks[0].in_layers[0].register_forward_hook(lambda *given: seen.append(given[2]))
    report = fastddpm.optimize(network)
    assert [module.name for module in report.kept] == ["blocks.0"]
    assert "hooks" in report.kept[0].reason
    network.blocks[1].out_layers[0].register_forward_hook(lambda *given: seen.append(given[2]))
    network.out[1].register_forward_hook(lambda *given: seen.append(given[1][0]))
    with torch.no_grad():
        found = run(network)
        assert len(seen) == 3
        assert min(x.min() for x in seen) < -0.5  # what SiLU does not give
        first.remove()
        fastddpm.restore(network)
        assert_near_peer(found, run(network))


def test_a_sequence_that_is_sliced_or_changed_is_what_it_says() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.SiLU(), nn.GroupNorm(4, 8), Swish()).eval()
    other, x = copy.deepcopy(network), torch.randn(2, 3, 4, 4)
    fastddpm.optimize(network)
    assert len(fused(network)) >= 4
    with torch.no_grad():
        for part in (slice(0, 2), slice(2, None), slice(1, 4), slice(None)):
            given = x if not part.start else torch.randn(2, 8, 4, 4)
            assert_near_peer(network[part](given), other[part](given))
        network[2] = other[2] = nn.GELU()
        assert_near_peer(network(x), other(x))


def test_a_class_that_others_made_since_stays() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.SiLU())
    fastddpm.optimize(network)
    nn.utils.parametrizations.weight_norm(network[1])
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        expected = network(x)
        fastddpm.restore(network)
        assert hasattr(network[1], "parametrizations")
        assert_near_peer(network(x), expected)


class Reversed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self):
            x = layer(x)
        return x


def test_a_sequence_with_a_forward_of_its_own_is_left_alone() -> None:
    network, x = Reversed(nn.GroupNorm(2, 8), nn.SiLU()), torch.randn(2, 8, 4, 4)
    with torch.no_grad():
        expected = network(x)
        report = fastddpm.optimize(network)
        assert [module.reason for module in report.kept] == ["it has a forward of its own"]
        assert "(the network)" in str(report)
        assert_near_peer(network(x), expected)


class Loose(nn.Module):
    """Norms whose followers nobody can see."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.without = nn.GroupNorm(2, 8), nn.GroupNorm(2, 8, affine=False)
        self.inner = GroupNorm32(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x)) + self.inner(F.silu(self.without(x)))


@pytest.mark.parametrize("shape", [(2, 8, 6), (2, 8, 4, 4), (2, 8, 3, 4, 2), (2, 8)], ids=str)
def test_norms_alone_take_any_shape(shape: tuple[int, ...]) -> None:
    network, x = Loose(), torch.randn(shape)
    nn.init.normal_(network.norm.weight)
    nn.init.normal_(network.inner.bias)
    with torch.no_grad():
        expected = network(x)
        report = fastddpm.optimize(network)
        assert [module.name for module in report.kept] == ["without"]
        assert [module.name for module in report.replaced] == ["norm", "inner"]
        assert_near_peer(network(x), expected)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "neither", "NHWC in 3-D"])
def test_images_are_copied_only_where_they_are_dense_in_no_order(layout: str) -> None:
    x = torch.randn(2, 8, 4, 5)
    x = {
        "NCHW": x, "NHWC": x.to(memory_format=torch.channels_last), "neither": x.transpose(2, 3),
        "NHWC in 3-D": torch.randn(2, 4, 5, 6, 8).movedim(-1, 1),
    }[layout]  # fmt: skip
    image = as_image(x)
    assert (image.data_ptr() == x.data_ptr()) == (layout != "neither")
    assert torch.equal(image.reshape(x.shape), x)


def test_what_is_given_in_nchw_comes_back_in_nchw() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x: Tensor, kind: str) -> Any:
            y = self.conv(x)
            return {"one": y, "tuple": (y, 1), "dict": {"sample": y, "other": None}, "text": "text"}[kind]

    network, x = Two(), torch.randn(2, 3, 4, 4)
    fastddpm.optimize(network)
    assert not network.conv(x).is_contiguous()
    assert network(x, "one").is_contiguous()
    assert network(x, kind="tuple")[0].is_contiguous()
    assert network(x=x, kind="dict")["sample"].is_contiguous()
    assert network(x, "text") == "text"
    assert not network(x.to(memory_format=torch.channels_last), "one").is_contiguous()
    fastddpm.restore(network)
    fastddpm.optimize(network, channels_last=False)
    assert network.conv(x).is_contiguous()
    assert "0 of 1" in str(fastddpm.optimize(network, channels_last=False))


def test_where_there_is_no_fast_op_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not fused(guided(True))
    network = guided(scale_shift=True).double()
    report = fastddpm.optimize(network)
    assert {module.reason for module in report.kept} == {"it is in float64, in which the ops are not faster"}
    monkeypatch.setattr(_native, "available", lambda: False)
    monkeypatch.setattr(_native, "reason", lambda: "it was not built")
    report = fastddpm.optimize(guided(scale_shift=True))
    assert all("no native code here: it was not built" in module.reason for module in report.kept)
    assert len(report.kept) == 7


def test_a_network_without_values_is_recognised_by_its_parts() -> None:
    with torch.device("meta"):
        network = guided(scale_shift=True)
    assert len([module for module in fastddpm.optimize(network).replaced if "ResBlock" in module.pattern]) == 3


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"optimize: expected module to be an nn\.Module .*, got dict; pass"):
        fastddpm.optimize({})  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()))
    with pytest.raises(TypeError, match=r"optimize: expected .* not of TorchScript, got RecursiveScriptModule"):
        fastddpm.optimize(scripted)
    with pytest.raises(TypeError, match=r"restore: expected module to be an nn\.Module, got NoneType; pass"):
        fastddpm.restore(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("grad", [False, True])
def test_torch_compile_takes_it_in_one_graph(grad: bool) -> None:
    network = guided(scale_shift=True).eval()
    run = call(network)
    fastddpm.optimize(network)
    with torch.set_grad_enabled(grad):
        expected = run(network)
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        assert_near_peer(run(compiled), expected)


def test_compile_is_asked_for_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def compile_(self: nn.Module) -> None:
        asked.append(self)
        self._compiled_call_impl = self._call_impl

    monkeypatch.setattr(nn.Module, "compile", compile_)
    network = guided(scale_shift=True)
    report = fastddpm.optimize(network, compile=True)
    assert fastddpm.optimize(network, compile=True) == report
    assert report.compiled
    assert asked == [network]
    fastddpm.restore(network)
    assert network._compiled_call_impl is None


# --- convolutions in half precision


@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_in_half_precision_may_compute_in_float32(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, padding=1, bias=bias)
            self.second = nn.Conv2d(8, 4, 3, stride=2, bias=bias)

        def forward(self, x: Tensor, t: Any = None) -> Tensor:
            out: Tensor = self.second(self.first(x))
            return out

    network = Two().eval()
    x = torch.randn(4, 3, 32, 32)
    monkeypatch.setattr(layers, "_multiplies_half_slowly", lambda: True)
    monkeypatch.setattr(layers, "_multiplies_bfloat16_quickly", lambda: False)
    dtypes: list[torch.dtype] = []
    conv2d = F.conv2d

    def watched(input: Tensor, *args: Any) -> Tensor:
        dtypes.append(input.dtype)
        return conv2d(input, *args)

    monkeypatch.setattr(F, "conv2d", watched)
    before = copy.deepcopy(network)
    fastddpm.optimize(network)
    with torch.no_grad():
        exact = copy.deepcopy(before).to(torch.bfloat16).double()(x.bfloat16().double())
        as_it_was = copy.deepcopy(before).to(torch.bfloat16)(x.bfloat16())
        dtypes.clear()
        found = copy.deepcopy(network).to(torch.bfloat16)(x.bfloat16())
        assert found.dtype == torch.bfloat16
        assert dtypes == [torch.float32] * 2
        assert (found - exact).norm() <= 2 * (as_it_was - exact).norm()
        with torch.autocast("cpu", torch.bfloat16):
            assert network(x).dtype == torch.bfloat16
        dtypes.clear()
        network(x)
        assert dtypes == [torch.float32] * 2
    run = call(network, size=32)
    exact, before, after = (copy.deepcopy(made).to(torch.bfloat16) for made in (before, before, network))
    expected, as_it_was, found = (
        torch.cat([g.flatten() for g in gradients(made, run)]) for made in (exact.double(), before, after)
    )
    assert found.dtype == torch.bfloat16
    assert_within(found, expected, as_it_was.float())


@pytest.mark.parametrize("side", [1, 3])
def test_a_convolution_that_is_given_the_other_order_copies_it_as_torch_would(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bool] = []
    real = layers.conv2d

    def watched(x: Tensor, *args: Any) -> Tensor:
        given.append(x.is_contiguous(memory_format=torch.channels_last))
        return real(x, *args)

    monkeypatch.setattr(layers, "conv2d", watched)
    conv = nn.Conv2d(16, 8, side, padding=side // 2)
    before, x = conv.weight.stride(), torch.randn(2, 16, 8, 8)
    expected = conv(x)
    for channels_last in (False, True):
        fastddpm.optimize(conv, channels_last=channels_last)
        torch.testing.assert_close(conv(x), expected)
    fastddpm.restore(conv)
    assert given == [False, True]
    assert conv.weight.stride() == before


def waves(size: int) -> Tensor:
    return torch.arange(16.0 * size * size).mul(0.7).sin().reshape(1, 16, size, size)


def test_wide_convolutions_take_the_faster_way(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1, groups=2), nn.Conv2d(16, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding="same"), nn.Conv2d(16, 16, 3, padding=(1, 0)), nn.Conv2d(16, 16, 1),
        nn.GroupNorm(4, 16), nn.SiLU(),
    )  # fmt: skip
    called: list[Any] = []
    conv3x3 = layers.conv3x3
    monkeypatch.setattr(layers, "conv3x3", lambda *given: called.append(given) or conv3x3(*given))
    for size, dtype in ((48, torch.float32), (48, torch.bfloat16), (4, torch.float32)):
        check_outputs(network, lambda made, size=size: made(waves(size).to(made[0].weight)), dtype)
    assert len(called) == 2  # by the second layer, on the larger map
    check_gradients(network, lambda made: made(waves(48).to(made[0].weight)))
    assert len(called) == 3


# --- CUDA graphs, with a recorder that runs the work again in place of one


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []

    def record(function: Any, device: Any) -> Any:
        made.append(function)
        return function

    monkeypatch.setattr(_graph, "record", record)
    monkeypatch.setattr(capture.Captured, "_records", lambda self, weight: True)
    monkeypatch.setattr(_calls, "_List", _calls._Graph)  # on this device
    return made


def test_each_kind_of_call_is_recorded_once(recordings: list[Any]) -> None:
    network = guided(scale_shift=True).eval()
    other = copy.deepcopy(network)
    report = fastddpm.optimize(network, cuda_graph=True)
    assert report.captured
    outputs = []
    with torch.inference_mode():
        for step in range(6):
            for batch in (1, 2):
                x, t = torch.randn(batch, 3, 8, 8), torch.full((batch,), 10 * step)
                outputs.append((network(x, t), other(x, t)))
    assert len(recordings) == 2
    for ours, theirs in outputs:  # none of them was overwritten by a later one
        assert_near_peer(ours, theirs)
    calls = network.__dict__[capture.CALLS]
    assert len(calls.recorded) == 2
    assert not copy.deepcopy(network).__dict__[capture.CALLS].recorded
    network.to(torch.bfloat16)
    with torch.inference_mode():
        network(torch.randn(1, 3, 8, 8).bfloat16(), torch.zeros(1))
    assert len(calls.seen) == 1  # of other weights nothing is recorded yet
    gradients(network, call(network))
    assert len(recordings) == 2
    fastddpm.restore(network)
    assert capture.CALLS not in network.__dict__
    assert not fused(network)


def test_what_cannot_be_recorded_goes_on(recordings: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    network = guided(scale_shift=True).eval()
    fastddpm.optimize(network, cuda_graph=True)
    x = torch.randn(1, 3, 8, 8)

    def refuse(function: Any, device: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(_graph, "record", refuse)
    with torch.inference_mode():
        for _ in range(_graph.WARM_UP):
            network(x, torch.zeros(1))
        with pytest.warns(UserWarning, match=r"without further recordings: operation not permitted"):
            network(x, torch.zeros(1))
        network(x, torch.zeros(1))


def test_only_so_many_kinds_of_calls_are_recorded(recordings: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_calls, "KINDS", 1)
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.SiLU())
    fastddpm.optimize(network, cuda_graph=True)
    with torch.inference_mode(), pytest.warns(UserWarning, match=r"it was called in more than 1 ways"):
        for size in (4, 8):
            for _ in range(_graph.WARM_UP + 1):
                network(torch.randn(1, 3, size, size))
    assert len(recordings) == 1


def test_frozen_leaves_python_out_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    network = guided(scale_shift=True).eval()
    other = copy.deepcopy(network)
    report = fastddpm.optimize(network, frozen=True)
    assert report.frozen
    assert "frozen: on" in str(report)
    calls_seen: list[None] = []
    network.register_forward_pre_hook(lambda *_: None)  # of the network itself: it is called each time
    next(m for m in network.modules() if isinstance(m, nn.Linear)).register_forward_hook(
        lambda *_: calls_seen.append(None)
    )
    with torch.inference_mode():
        for step in range(6):
            x, t = torch.randn(1, 3, 8, 8), torch.full((1,), 10 * step)
            assert_near_peer(network(x, t), other(x, t))
    assert len(calls_seen) == 3  # a first call, one that is recorded, one to compare


def test_frozen_notices_other_weights() -> None:
    network = guided(scale_shift=True).eval()
    other = copy.deepcopy(network)
    fastddpm.optimize(network, frozen=True)
    x, t = torch.randn(1, 3, 8, 8), torch.full((1,), 10)
    for change in (lambda p: p.mul_(1.5), lambda p: p.copy_(p.flip(0))):
        for _ in range(4):
            with torch.no_grad():
                assert_near_peer(network(x, t), other(x, t))
        with torch.no_grad():
            for p in (*network.parameters(), *other.parameters()):
                change(p)
    with torch.no_grad():
        assert_near_peer(network(x, t), other(x, t))
    network.load_state_dict(guided(scale_shift=True).state_dict())
    other.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert_near_peer(network(x, t), other(x, t))
    gradients(network, call(network))  # a training step goes by the modules
    fastddpm.restore(network)
    assert not fused(network)
