"""How many images fit: by what a call takes, in whole batches, whatever is free."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastddpm
from fastddpm.sampling.memory import available_memory, fitting_batch, free_memory


def test_the_batch_is_halved_until_it_takes_half_of_the_free_memory() -> None:
    assert fitting_batch(1000, 64, 10, 10**9) == 64
    assert fitting_batch(5, 64, 10, 10**9) == 5
    assert fitting_batch(1000, 64, 10, 1280) == 64
    assert fitting_batch(1000, 64, 10, 1279) == 32
    assert fitting_batch(9, 64, 100, 1000) == 5
    assert fitting_batch(1000, 64, 10, 0) == 1


class Live(TorchDispatchMode):
    """Counts the memory of tensors from their making to their end, and the most at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        for x in made if isinstance(made, (list, tuple)) else (made,):
            if not isinstance(x, Tensor):
                continue
            storage = x.untyped_storage()
            if storage._cdata not in given | self.seen:  # no view, and not written in place
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._end, storage._cdata, storage.nbytes())
        return made

    def _end(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize(
    "options",
    [
        dict(image_size=16, base_channels=32, attention_resolutions=(8,), num_groups=8),
        dict(image_size=32, base_channels=16, channel_mult=(1, 1, 2, 4), num_groups=8, num_res_blocks=1),
        dict(image_size=(16, 24), base_channels=16, channel_mult=(1, 4), attention_resolutions=(), num_groups=8),
    ],
    ids=str,
)
def test_what_a_network_keeps_for_an_image_is_about_what_is_found(options: dict[str, Any]) -> None:
    unet, live = fastddpm.UNet(**options), Live()
    x, t = torch.zeros(4, 3, *unet.config.image_size), torch.zeros(4, dtype=torch.int64)
    with torch.inference_mode(), live:
        unet(x, t)
    assert 0.9 < 4 * 4 * unet.config.live_elements / live.peak < 2


def test_free_memory_is_that_of_the_machine() -> None:
    assert 2**24 < available_memory() < 2**50
    assert available_memory() == pytest.approx(free_memory(torch.device("cpu")), rel=0.5)


def diffusion() -> fastddpm.GaussianDiffusion:
    torch.manual_seed(0)
    unet = fastddpm.UNet(
        image_size=8, in_channels=1, base_channels=8, channel_mult=(1,), num_groups=4, attention_resolutions=()
    )
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return fastddpm.GaussianDiffusion(unet, num_timesteps=4)


def test_images_are_those_of_the_batch_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = diffusion()
    shapes: list[int] = []
    model.model.register_forward_pre_hook(lambda _, args: shapes.append(len(args[0])))
    assert model.sample(7, seed=1).shape == (7, 1, 8, 8)
    assert set(shapes) == {7}
    cost = 4 * model.model.config.live_elements  # type: ignore[union-attr,operator]
    monkeypatch.setattr("fastddpm.diffusion.free_memory", lambda device: 7 * cost)
    shapes.clear()
    few = model.sample(7, seed=1)
    assert set(shapes) == {2}, "7, 4, 2: half of what is free is for three"
    assert torch.equal(few, model.sample(7, seed=1, batch_size=2))
    assert torch.equal(few[5:6], model.sample(1, seed=1, first_image=5, batch_size=2))


def test_a_guided_image_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = diffusion()
    cost = 4 * model.model.config.live_elements  # type: ignore[union-attr,operator]
    monkeypatch.setattr("fastddpm.diffusion.free_memory", lambda device: 16 * cost)
    assert (model._fitting_batch(8, guided=False), model._fitting_batch(8, guided=True)) == (8, 4)
