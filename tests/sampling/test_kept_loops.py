"""A sampling that is recorded once and repeated: by the chunks of a request, and by the requests that follow.

The recorder is `tests/recorded.py`, on a CPU. On a GPU: test_sample_loop.py.
"""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastddpm
from fastddpm import _calls, _graph
from fastddpm._calls import loops_of
from fastddpm.diffusion import GaussianDiffusion
from fastddpm.nn import UNet
from tests.recorded import record_on_cpu

STEPS = 12
RECORDED = ["record", *["replay"] * (STEPS - _graph.WARM_UP)]
"""What the first loop of a kind does, and what another does."""
REPLAYED = ["replay"] * STEPS


@pytest.fixture
def happened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return record_on_cpu(monkeypatch)


def diffusion(**options: Any) -> GaussianDiffusion:
    torch.manual_seed(1)
    network = UNet(
        image_size=8, in_channels=1, base_channels=8, channel_mult=(1,), num_res_blocks=1, num_groups=4,
        attention_resolutions=(), num_classes=3, learned_variance=options.get("variance") == "learned_range",
    )  # fmt: skip
    for p in network.parameters():
        nn.init.normal_(p, std=0.2)
    return GaussianDiffusion(network, **(dict(num_timesteps=STEPS, beta_end=0.5) | options))


def draw(model: GaussianDiffusion, **options: Any) -> Tensor:
    return model.sample(**(dict(num_images=2, labels=1, seed=5) | options))


def plain(model: GaussianDiffusion, **options: Any) -> Tensor:
    return draw(model, cuda_graph=False, **options)


CASES: dict[str, dict[str, Any]] = {
    "ddpm": {},
    "ddim": dict(sampler="ddim", num_steps=STEPS, eta=0.5),
    "dpmpp_2m": dict(sampler="dpmpp_2m", num_steps=STEPS, seed=2**63 + 5),
    "guided, inpainting": dict(
        guidance_scale=2.0, dynamic_threshold_ratio=0.9, mask=torch.ones(1, 1, 8, 8).tril(),
        known=torch.rand(1, 1, 8, 8),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_chunks_and_later_requests_repeat_one_recording(case: str, happened: list[str]) -> None:
    model, options = diffusion(), CASES[case]
    whole = plain(model, num_images=6, batch_size=2, labels=torch.arange(6) % 3, **options)
    given = options | dict(batch_size=2)
    assert torch.equal(draw(model, num_images=6, labels=torch.arange(6) % 3, **given), whole)
    assert happened == RECORDED + 2 * REPLAYED
    happened.clear()
    other = given | dict(seed=6, labels=2, first_image=3)
    images = draw(model, **other)
    assert torch.equal(images, plain(model, **other)) and not torch.equal(images, whole[3:5])
    assert happened == 2 * REPLAYED
    assert torch.equal(draw(model, num_images=6, labels=torch.arange(6) % 3, **given), whole), "overwritten"


def test_a_learned_variance_is_repeated_too(happened: list[str]) -> None:
    model = diffusion(variance="learned_range", loss="hybrid")
    for seed in (1, 2):
        assert torch.equal(draw(model, seed=seed), plain(model, seed=seed))
    assert happened == RECORDED + REPLAYED


def test_callbacks_see_each_step_of_a_repeated_loop(happened: list[str]) -> None:
    model = diffusion()
    draw(model)
    seen: tuple[list[Tensor], list[Tensor]] = ([], [])
    for made, into in ((plain, seen[0]), (draw, seen[1])):
        made(model, seed=9, callback=lambda i, n, x, pred, into=into: into.extend((x.clone(), pred.clone())))
    assert len(seen[0]) == 2 * STEPS and all(map(torch.equal, *seen))
    assert happened == RECORDED + REPLAYED


def test_weights_changed_in_place_are_seen(happened: list[str]) -> None:
    model = diffusion()
    before = draw(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    after = draw(model)
    assert torch.equal(after, plain(model)) and not torch.equal(after, before)
    assert happened == RECORDED + REPLAYED
    state = {name: x * 0.9 for name, x in model.model.state_dict().items()}
    model.model.load_state_dict(state)
    assert torch.equal(draw(model), plain(model))
    assert happened == RECORDED + 2 * REPLAYED


def assign(model: GaussianDiffusion) -> object:
    return model.model.load_state_dict({n: x.clone() for n, x in model.model.state_dict().items()}, assign=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.model.to(torch.bfloat16),
        lambda model: model.model.register_forward_hook(lambda *_: None),
        lambda model: model.model.compile(backend="eager"),
        lambda model: model.model.requires_grad_(False).to(torch.float64).to(torch.float32),
        assign,
    ],
    ids=["cast", "network cast", "hook", "compiled", "moved and back", "assigned"],
)
def test_another_network_is_recorded_anew(change: Any, happened: list[str]) -> None:
    model = diffusion()
    draw(model)
    change(model)
    assert torch.equal(draw(model), plain(model))
    assert happened == RECORDED + RECORDED
    torch._dynamo.reset()  # which remembers for later tests that it did not compile while something was recorded


@pytest.mark.parametrize(
    "options",
    [dict(num_images=3), dict(num_steps=STEPS - 1), dict(guidance_scale=2.0), dict(sampler="ddim", num_steps=STEPS)],
    ids=str,
)
def test_another_kind_is_recorded_on_its_own_and_both_are_kept(options: dict[str, Any], happened: list[str]) -> None:
    model = diffusion()
    draw(model)
    assert torch.equal(draw(model, **options), plain(model, **options))
    assert happened.count("record") == 2
    draw(model)
    draw(model, **options)
    assert happened.count("record") == 2


def test_what_chooses_kernels_makes_another_kind(happened: list[str]) -> None:
    model = diffusion()
    draw(model)
    with fastddpm.use_backend("reference"):
        assert torch.equal(draw(model), plain(model))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            autocast = draw(model)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(autocast, plain(model))
    assert happened == 3 * RECORDED + REPLAYED


def test_weights_that_autocast_casts_are_cast_again(happened: list[str]) -> None:
    """A recording must not read what the cache of autocast held when it was made."""
    linear = nn.Linear(8, 8)
    seen = torch.zeros(1, 8, dtype=torch.bfloat16)
    run = _graph.Replayed(torch.device("cpu"), "a test")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for _ in range(_graph.WARM_UP + 1):
            run(lambda: seen.copy_(linear(torch.ones(1, 8))))
    with torch.no_grad():
        linear.weight.add_(1)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        run(lambda: None)
        assert torch.equal(seen, linear(torch.ones(1, 8)))
    assert happened.count("record") == 1


def test_only_the_last_kinds_are_kept(happened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_calls, "LOOPS", 2)
    model = diffusion()
    for n in (1, 2, 1, 3):  # 2 was the first to be forgotten
        draw(model, num_images=n)
    assert len(loops_of(model.model).kept) == 2
    happened.clear()
    draw(model, num_images=1)
    assert happened == REPLAYED
    draw(model, num_images=2)
    assert "record" in happened


def pools(model: GaussianDiffusion) -> list[weakref.ref[Any]]:
    """The recordings that a network keeps."""
    return [weakref.ref(loop) for loop in loops_of(model.model).kept.values()]


@pytest.mark.parametrize(
    "release",
    [
        lambda model: model.to(torch.float64),
        lambda model: model.model.double(),
        lambda model: model.to("cpu"),
        lambda model: None,
    ],
    ids=["cast", "network cast", "moved", "deleted"],
)
def test_recordings_go_at_once_without_waiting_for_the_collector(release: Any, happened: list[str]) -> None:
    model = diffusion()
    draw(model)
    kept = pools(model)
    assert len(kept) == 1 and kept[0]() is not None
    gc.disable()
    try:
        release(model)
        if release(model) is None:
            del model
        assert kept[0]() is None
    finally:
        gc.enable()


def test_a_network_of_another_library_is_forgotten_when_the_diffusion_moves(happened: list[str]) -> None:
    network = nn.Conv2d(1, 1, 3, padding=1)
    network.forward = lambda x, t, y=None: nn.Conv2d.forward(network, x)  # type: ignore[method-assign]
    model = GaussianDiffusion(network, 8, 1, num_timesteps=STEPS)
    assert torch.equal(model.sample(2, cuda_graph=True), model.sample(2))
    kept = pools(model)
    model.double()
    assert kept[0]() is None and "record" in happened


def test_a_copy_starts_without_recordings(happened: list[str]) -> None:
    model = diffusion()
    images = draw(model)
    other = copy.deepcopy(model)
    assert not loops_of(other.model).kept
    assert torch.equal(draw(other), images)


def test_samplings_within_each_other_and_at_once_share_nothing(happened: list[str]) -> None:
    model = diffusion()
    expected = [plain(model, seed=seed) for seed in range(4)]
    draw(model)
    inner: list[Tensor] = []

    def within(i: int, n: int, x: Tensor, pred: Tensor) -> None:
        if i == 2:
            inner.append(draw(model, seed=1))

    assert torch.equal(draw(model, seed=0, callback=within), expected[0])
    assert torch.equal(inner[0], expected[1])
    found: dict[int, Tensor] = {}
    gate = threading.Barrier(2)

    def meet(i: int, n: int, x: Tensor, pred: Tensor) -> None:
        gate.wait(30)

    def apart(seed: int) -> None:
        found[seed] = draw(model, seed=seed, callback=meet)

    threads = [threading.Thread(target=apart, args=(seed,)) for seed in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in (2, 3))


def test_a_sampling_that_failed_leaves_nothing_behind(happened: list[str]) -> None:
    model = diffusion()
    draw(model)

    def fail(i: int, n: int, x: Tensor, pred: Tensor) -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError):
        draw(model, callback=fail)
    assert torch.equal(draw(model), plain(model))
    draw(model, callback=lambda i, *_: i == 1)  # ended early: the next one starts from the beginning
    assert torch.equal(draw(model), plain(model))


def test_other_recordings_make_room(happened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = diffusion()
    draw(model)
    full = [True]
    forward = UNet.forward

    def short(self: UNet, *args: Any, **kwargs: Any) -> Tensor:
        if full.pop() if full else False:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(UNet, "forward", short)
    assert torch.equal(draw(model, num_images=3), plain(model, num_images=3))
    assert len(loops_of(model.model).kept) == 1
    loops_of(model.model).forget(None)
    full.append(True)
    with pytest.raises(torch.OutOfMemoryError):
        draw(model)


def test_what_cannot_be_recorded_is_told_once(happened: list[str]) -> None:
    model = diffusion()
    model.model.register_forward_hook(lambda module, args, out: out * float(out.isfinite().all()))
    expected = plain(model, num_images=4, batch_size=2)
    with pytest.warns(UserWarning, match="sampling goes on without a CUDA graph.*not permitted") as told:
        assert torch.equal(draw(model, num_images=4, batch_size=2), expected)
        assert torch.equal(draw(model, num_images=4, batch_size=2), expected)
    assert len(told) == 1 and happened == ["record"]


def test_few_steps_are_not_recorded_unless_asked_for(happened: list[str]) -> None:
    model = diffusion()
    draw(model, num_steps=4)
    assert not happened
    draw(model, num_steps=4, num_images=6, batch_size=2)  # 12 calls of the network
    assert happened == ["record", *["replay"] * 9]
    happened.clear()
    with model.frozen():
        draw(model, num_steps=5)
    assert happened == ["record", *["replay"] * 2]
