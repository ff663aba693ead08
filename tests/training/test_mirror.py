"""The weights in half precision that the optimiser keeps, and that the network reads in training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastddpm.diffusion import GaussianDiffusion
from fastddpm.nn import UNet
from fastddpm.nn.layers import torch_layers
from fastddpm.training import Trainer
from fastddpm.training.optimizer import AdamEMA
from tests.training.test_loop import Other, assert_same_bits, weights
from tests.training.toy import stripes, toy_diffusion, toy_trainer

aten = torch.ops.aten

NETWORKS: dict[str, dict[str, Any]] = {
    "attention": dict(attention_resolutions=(4,), channel_mult=(1, 2), center_input=True),
    "scale and shift": dict(scale_shift=True, resample="resblock", channel_mult=(1, 2), learned_variance=True),
    "classes": dict(num_classes=3, middle="plain_attention", downsample_padding="symmetric", channel_mult=(1, 1)),
}


def network(name: str) -> UNet:
    torch.manual_seed(0)
    options = dict(image_size=8, base_channels=8, num_res_blocks=1, attention_resolutions=(), num_groups=4)
    made = UNet(**options | NETWORKS[name])
    for p in made.parameters():  # a new one gives 0
        nn.init.normal_(p, std=0.1)
    return made


@pytest.fixture(params=["bfloat16", "float16"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """On torch's layers, as on a GPU: those of this library widen half precision on most processors."""
    with torch_layers():
        yield request.param


class Casts(TorchDispatchMode):
    """Where what is cast, or copied to other memory, lay."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places: list[int] = []
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (aten._to_copy, aten.copy_, aten.clone):
            given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.places += [x.untyped_storage().data_ptr() for x in given]
            self.shapes += [tuple(given[0].shape)]
        return func(*args, **(kwargs or {}))

    def of(self, tensors: dict[str, Tensor]) -> set[str]:
        """Names of those that were cast."""
        return {name for name, x in tensors.items() if x.untyped_storage().data_ptr() in self.places}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_names_the_parameters_that_autocast_casts(name: str) -> None:
    unet, x = network(name), torch.randn(2, 3, 8, 8)
    labels = torch.tensor([0, 2]) if unet.num_classes else None
    with torch_layers(), Casts() as casts, torch.autocast("cpu", torch.bfloat16):
        unet(x, torch.tensor([3, 5]), labels).float().sum().backward()
    cast = casts.of(dict(unet.named_parameters()))
    assert cast == unet.cast_parameters() and len(cast) > 20


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_reads_the_mirror_and_gives_the_same(name: str) -> None:
    unet, x = network(name), torch.randn(2, 3, 8, 8)
    optimizer = AdamEMA(unet, mirror=torch.bfloat16, mirrored=unet.cast_parameters())
    labels = torch.tensor([0, 2]) if unet.num_classes else None

    def output() -> Tensor:
        with torch_layers(), torch.autocast("cpu", torch.bfloat16):
            y: Tensor = unet(x, torch.tensor([3, 5]), labels)
            return y

    expected = output()
    with optimizer.keeping():
        assert torch.equal(output(), expected)
        for half in optimizer.mirror.values():
            half.zero_()
        assert not torch.equal(output(), expected)
    assert torch.equal(output(), expected)


def test_no_weight_is_cast_in_a_step(tmp_path: Path, precision: str) -> None:
    found = {}
    for mirror in ("off", "on"):
        diffusion = toy_diffusion(dropout=0.1)
        trainer = toy_trainer(tmp_path / mirror, diffusion, precision=precision, weight_mirror=mirror)
        trainer.step()
        with Casts() as casts:
            trainer.step()
        found[mirror] = casts.of(trainer.optimizer.parameters) | casts.of(trainer.optimizer.mirror), len(casts.shapes)
    cast = diffusion.model.cast_parameters()
    assert found["off"][0] == cast and found["on"][0] == set()
    # a weight and its gradient; and images come to order and dtype in one copy, not two
    assert found["off"][1] - found["on"][1] == 2 * len(cast) + 1


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "parts": dict(micro_batch_size=4, recompute=True),
    "gradients in bfloat16": dict(micro_batch_size=4, gradient_dtype="bfloat16", ema_decay=None),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_steps_have_the_bits_of_those_that_cast(
    tmp_path: Path, case: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients are in half precision either way, and summed alike; but that those in float16 that are to wait in
    bfloat16 are not rounded before the first sum."""
    monkeypatch.setattr("fastddpm.training.loop.keep_freed_memory", lambda keep: None)
    trainers = [
        toy_trainer(
            tmp_path / mirror, toy_diffusion(dropout=0.1), precision=precision, weight_mirror=mirror, **OPTIONS[case]
        )
        for mirror in ("off", "on")
    ]
    assert not trainers[0].optimizer.mirror
    optimizer = trainers[1].optimizer
    places = [x.data_ptr() for x in optimizer.mirror.values()]
    steps, overflow = (20, None) if precision == "bfloat16" else (8, 5)  # torch's layers are slow in float16
    for step in range(steps):
        before = {name: x.clone() for name, x in optimizer.mirror.items()}
        for trainer in trainers:
            if trainer.optimizer.scale is not None:  # where gradients overflow, the step is left out
                trainer.optimizer.scale.scale.fill_(2.0**100 if step == overflow else 2.0**10)
            trainer.step()
        rounded = {name: p.detach().to(trainer.dtype) for name, p in optimizer.parameters.items()}
        assert_same_bits(optimizer.mirror, rounded)
        assert all(torch.equal(x, before[name]) for name, x in optimizer.mirror.items()) == (step == overflow)
    assert places == [x.data_ptr() for x in optimizer.mirror.values()]
    if precision == "bfloat16" or case != "gradients in bfloat16":
        assert_same_bits(*map(weights, trainers))
        assert_same_bits(*(trainer.optimizer.exp_avg_sq for trainer in trainers))
        assert_same_bits(*(trainer.optimizer.ema for trainer in trainers))


def test_the_mirror_follows_who_changes_the_weights(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, precision="bfloat16", weight_mirror="on", num_images=64)
    model, mirror = trainer.diffusion.model, trainer.optimizer.mirror
    read: list[Tensor] = []
    model.conv_in.register_forward_pre_hook(lambda module, _: read.append(module.weight.detach().clone()))
    trainer.step()
    assert read[-1].dtype == torch.bfloat16

    def expected() -> Tensor:
        assert model.conv_in.weight.dtype == torch.float32
        return model.conv_in.weight.detach().bfloat16()

    with torch.no_grad():
        model.conv_in.weight.add_(1.0)
    wanted = expected()
    trainer.step()
    assert torch.equal(read[-1], wanted)
    model.load_state_dict({name: x + 0.5 for name, x in model.state_dict().items()})
    wanted = expected()
    trainer.step()
    assert torch.equal(read[-1], wanted)
    model.conv_in.weight.data.mul_(3.0)  # which no version tells
    wanted = expected()
    places = len(read)
    trainer.train()
    assert torch.equal(read[places], wanted) and torch.equal(mirror["conv_in.weight"], expected())


def test_samples_amid_the_training_are_of_the_average_and_leave_it_alone(tmp_path: Path) -> None:
    """Nor does what a sampling keeps of the weights find its way into a step, or the other way round."""
    found, grids = [], []
    for every in (0, 16):
        trainer = toy_trainer(
            tmp_path / str(every), precision="bfloat16", weight_mirror="on", num_images=48, sample_every_images=every
        )
        dtypes = []
        trainer.callbacks = (lambda t, d=dtypes: d.extend(p.dtype for p in t.diffusion.model.parameters()),)
        trainer.train()
        assert set(dtypes) == {torch.float32}
        assert {x.dtype for x in trainer.diffusion.model.state_dict().values()} == {torch.float32}
        found.append(weights(trainer))
        grids.append(trainer.sample_grid())
    assert_same_bits(*found)
    assert torch.equal(*grids)
    changed = toy_trainer(tmp_path / "0", precision="bfloat16", weight_mirror="on")
    assert changed.images_seen == 48 and torch.equal(changed.sample_grid(), grids[0])


def test_a_compiled_network_is_compiled_once_for_all_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode: compile_module(self, backend=counter, fullgraph=True))
    found = []
    with torch_layers():
        for compile in (False, True):
            trainer = toy_trainer(
                tmp_path / str(compile), precision="bfloat16", weight_mirror="on", compile=compile, ema_decay=None
            )
            for _ in range(3):
                trainer.step()
            found.append(weights(trainer))
            assert counter.frame_count == compile
    assert_same_bits(*found)


def test_a_parameter_of_two_layers_has_one_place_in_the_mirror() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    optimizer = AdamEMA(model, mirror=torch.float16, mirrored=["0.weight"])
    own = model[0].weight
    with pytest.raises(RuntimeError, match="inside"), optimizer.keeping():
        assert model[0].weight is model[1].weight and model[0].weight.dtype == torch.float16
        (model[1].weight.sum() + 2 * model[0].weight.sum()).backward()
        raise RuntimeError("inside")
    assert model[0].weight is own and model[1].weight is own
    assert not model[0].weight._post_accumulate_grad_hooks
    optimizer.learning_rate.fill_(0.1)
    optimizer.update(torch.zeros(()))
    assert torch.equal(optimizer.exp_avg["0.weight"], torch.full((3, 3), 3.0) * (1 - 0.9))
    assert torch.equal(optimizer.mirror["0.weight"], own.detach().half())


@pytest.mark.gpu
def test_steps_on_a_gpu_have_the_bits_of_those_that_cast(tmp_path: Path) -> None:
    """Those that a CUDA graph recorded among them."""
    found = []
    for mirror in ("off", "on"):
        trainer = toy_trainer(tmp_path / mirror, device="cuda", precision="bfloat16", weight_mirror=mirror)
        for _ in range(6):
            trainer.step()
        found.append(weights(trainer))
    assert_same_bits(*found)
    assert_same_bits(trainer.optimizer.mirror, {name: x.bfloat16() for name, x in found[1].items()})


def other() -> GaussianDiffusion:
    return GaussianDiffusion(Other(), image_size=8, channels=1, num_timesteps=20, levels=17)


def test_the_mirror_is_kept_where_half_precision_is_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mirrored(name: str, diffusion: GaussianDiffusion | None = None, **options: Any) -> bool:
        trainer: Trainer = toy_trainer(tmp_path / name, diffusion, **options)
        return bool(trainer.optimizer.mirror)

    for slow in (True, False):
        monkeypatch.setattr("fastddpm.training.loop.computes_in_float32", lambda x, slow=slow: slow)
        assert mirrored("default", precision="bfloat16") == mirrored("half", precision="float16") == (not slow)
        assert not mirrored("float32") and not mirrored("off", precision="bfloat16", weight_mirror="off")
        assert not mirrored("other", other(), precision="bfloat16")
        assert mirrored("on", precision="bfloat16", weight_mirror="on")


@pytest.mark.parametrize(
    ("make", "options", "found"),
    [
        (toy_diffusion, {}, "float32 and UNet"),
        (other, {}, "float32 and Other"),
        (other, dict(precision="bfloat16"), "Other"),
    ],
)
def test_a_mirror_of_nothing_is_refused(tmp_path: Path, make: Any, options: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match=rf"a fastddpm\.UNet with weight_mirror 'on', got {found}; leave"):
        toy_trainer(tmp_path, make(), stripes(), weight_mirror="on", **options)
