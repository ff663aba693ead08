"""The loop: what it calls, draws, keeps and refuses, and which bits it promises."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastddpm import _graph
from fastddpm.nn import UNet
from fastddpm.ops import philox
from fastddpm.ops.solver_step import solver_step
from fastddpm.sampling import (
    blend_table,
    ddim_table,
    ddpm_table,
    dpmpp_2m_table,
    initial_noise,
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
    sample_in_chunks,
    sample_loop,
    timesteps,
)
from fastddpm.schedule import make_schedule
from tests.sampling.networks import ConvNet, pointwise
from tests.tolerance import assert_equal_to_rounding, assert_normals_within

SCHEDULE = make_schedule("linear", 1000)
STEPS = timesteps(1000, 6)
TABLES = {
    "ddpm": ddpm_table(SCHEDULE, STEPS),
    "ddim": ddim_table(SCHEDULE, STEPS),
    "ddim, eta 0.5, raw": ddim_table(SCHEDULE, STEPS, "eps", 0.5, use_clipped=False),
    "dpmpp_2m": dpmpp_2m_table(SCHEDULE, STEPS),
}
SHAPE = (4, 3, 8, 8)


def start(dtype: torch.dtype = torch.float32) -> Tensor:
    return initial_noise(SHAPE, seed=7, sample=torch.arange(4), dtype=dtype)


def test_initial_noise_belongs_to_the_sample() -> None:
    whole = initial_noise((6, 3, 8, 8), seed=7, sample=torch.arange(6))
    assert torch.equal(initial_noise((2, 3, 8, 8), seed=7, sample=torch.tensor([4, 1])), whole[[4, 1]])
    expected = philox.normal((6, 3, 8, 8), seed=7, sample=torch.arange(6), step=0, stream=philox.X_T)
    assert_normals_within(whole, expected)
    assert whole.dtype == torch.float32
    assert not torch.equal(whole, initial_noise((6, 3, 8, 8), seed=8, sample=torch.arange(6)))
    with pytest.raises(ValueError, match=r"initial_noise: expected sample of shape \[2\], got \[3\]"):
        initial_noise((2, 3, 8, 8), seed=7, sample=torch.arange(3))


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_the_loop_is_its_steps_written_out(name: str, memory_format: torch.memory_format) -> None:
    table, network = TABLES[name], ConvNet().to(memory_format=memory_format)
    x = start().contiguous(memory_format=memory_format)
    before = x.clone()
    ours = sample_loop(network, x, table, STEPS, seed=7)
    assert torch.equal(x, before)
    pred = None
    for i, t in enumerate(STEPS):
        with torch.no_grad():
            out = network(x, t.repeat(4))
        x, pred = solver_step(
            x, out, table.float(), i, pred_prev=pred if name == "dpmpp_2m" else None, clamp=1.0, seed=7,
            sample=torch.arange(4),
        )  # fmt: skip
    assert torch.equal(ours, x) and ours.dtype == torch.float32
    assert ours.is_contiguous(memory_format=memory_format) and ours.abs().max() <= 1


def test_the_state_stays_in_its_own_dtype() -> None:
    def half(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return pointwise(x, t).bfloat16()

    for dtype in (torch.float32, torch.float64):
        seen: list[torch.dtype] = []

        def record(i: int, n: int, x: Tensor, pred: Tensor, seen: list[torch.dtype] = seen) -> None:
            seen.extend([x.dtype, pred.dtype])

        x = sample_loop(half, start(dtype), TABLES["dpmpp_2m"], STEPS, callback=record)
        assert x.dtype == dtype and set(seen) == {dtype} and len(seen) == 12


def test_the_samplers_by_name_are_the_loop_over_their_tables() -> None:
    network, x = ConvNet(), initial_noise(SHAPE, seed=7, sample=torch.arange(10, 14))
    given: dict[str, Any] = {"seed": 7, "sample": torch.arange(10, 14)}
    leading = timesteps(1000, 6, "leading")
    for ours, table in (
        (
            sample_ddpm(network, SCHEDULE, SHAPE, variance="fixed_small", num_steps=6, spacing="leading", **given),
            ddpm_table(SCHEDULE, leading, "eps", "fixed_small"),
        ),
        (
            sample_ddim(network, SCHEDULE, SHAPE, prediction="v", eta=0.5, num_steps=6, spacing="leading", **given),
            ddim_table(SCHEDULE, leading, "v", 0.5),
        ),
        (
            sample_ddim(network, SCHEDULE, SHAPE, use_clipped=False, num_steps=6, spacing="leading", **given),
            ddim_table(SCHEDULE, leading, use_clipped=False),
        ),
        (
            sample_dpmpp_2m(network, SCHEDULE, SHAPE, prediction="x0", num_steps=6, spacing="leading", **given),
            dpmpp_2m_table(SCHEDULE, leading, "x0"),
        ),
    ):
        assert torch.equal(ours, sample_loop(network, x, table, leading, **given))
    short = make_schedule("linear", 8, beta_end=0.5)
    calls: list[int] = []
    sample_ddpm(lambda x, t, y: pointwise(x, t), short, SHAPE, callback=lambda i, n, x, p: calls.append(n))
    assert calls == [8] * 8  # the whole chain unless told otherwise


@pytest.mark.parametrize("sampler", [sample_ddpm, sample_ddim, sample_dpmpp_2m])
def test_a_single_step_returns_the_prediction(sampler: Callable[..., Tensor]) -> None:
    schedule = make_schedule("cosine", 100, zero_terminal_snr=True)
    x = initial_noise(SHAPE, seed=0, sample=torch.arange(4))
    ours = sampler(lambda x, t, y: 0.5 * x, schedule, SHAPE, prediction="x0", num_steps=1)
    assert torch.equal(ours, (0.5 * x).clamp(-1, 1))


class HostSyncs(TorchDispatchMode):
    """Notes every operator that would make the host wait for a device, or that takes a tensor to another device."""

    WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal", "unique", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.armed, self.count, self.found = False, 0, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if self.armed:
            self.count += 1
            moves = name == "_to_copy" and (kwargs or {}).get("device") is not None
            made_from_data = name in ("lift_fresh", "scalar_tensor")  # a host value that would be copied to the device
            if name in self.WAITS or moves or made_from_data:
                self.found.append(name)
        return func(*args, **(kwargs or {}))


def armed_from_first_call(syncs: Any, network: ConvNet) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    def call(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        syncs.armed = True
        return network(x, t, labels)

    return call


def full_options(device: str = "cpu") -> dict[str, Any]:
    return {
        "labels": torch.arange(4, device=device),
        "null_label": 4,
        "guidance_scale": torch.tensor(2.0, device=device),
        "dynamic_threshold_ratio": 0.9,
        "seed": torch.tensor(7, device=device),
        "sample": torch.arange(4, device=device),
        "mask": torch.ones(1, 1, 8, 8, device=device).tril(),
        "known": torch.zeros(SHAPE, device=device),
        "known_table": blend_table(SCHEDULE, STEPS),
    }


def chosen_options(name: str, every_option: bool, device: str) -> dict[str, Any]:
    """For a table of `TABLES`; one that takes the raw output excludes dynamic thresholding."""
    options = full_options(device) if every_option else {"seed": 7}
    if "raw" in name:
        options.pop("dynamic_threshold_ratio", None)
    return options


@pytest.mark.parametrize("options", [{"seed": 7}, full_options()], ids=["plain", "every option"])
def test_no_host_sync_in_the_loop(options: dict[str, Any]) -> None:
    syncs = HostSyncs()

    def last(i: int, num_steps: int, x: Tensor, pred: Tensor) -> None:
        syncs.armed = i < num_steps - 1

    table = ddpm_table(SCHEDULE, STEPS, "eps", "learned_range")
    with syncs:
        network = armed_from_first_call(syncs, ConvNet(learned_variance=True))
        sample_loop(network, start(), table, STEPS, callback=last, **options)
        assert syncs.found == [] and syncs.count > 20
        syncs.armed = True
        start()[0, 0, 0, 0].item()
    assert syncs.found == ["_local_scalar_dense"]  # what is looked for is found


@pytest.mark.gpu
@pytest.mark.parametrize("every_option", [False, True])
def test_no_host_sync_on_a_gpu(every_option: bool) -> None:
    class Armed:
        def __setattr__(self, name: str, value: bool) -> None:
            torch.cuda.set_sync_debug_mode("error" if value else "default")

    syncs: Any = Armed()

    def last(i: int, num_steps: int, x: Tensor, pred: Tensor) -> None:
        syncs.armed = i < num_steps - 1

    table = ddpm_table(SCHEDULE, STEPS, "eps", "learned_range")
    options = full_options("cuda") if every_option else {"seed": 7}
    network = ConvNet(learned_variance=True).cuda()
    try:
        x = sample_loop(armed_from_first_call(syncs, network), start().cuda(), table, STEPS, callback=last, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.device.type == "cuda" and bool(x.isfinite().all())


@pytest.mark.gpu
@pytest.mark.parametrize("every_option", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_a_cuda_graph_gives_the_same_bits(name: str, every_option: bool) -> None:
    options = chosen_options(name, every_option, "cuda")
    network, x = ConvNet().cuda(), start().cuda()
    seen: tuple[list[Tensor], list[Tensor]] = ([], [])
    plain = sample_loop(network, x, TABLES[name], STEPS, callback=lambda *a: seen[0].append(a[3].clone()), **options)
    options.update(cuda_graph=True, callback=lambda *a: seen[1].append(a[3].clone()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorded = sample_loop(network, x, TABLES[name], STEPS, **options)
    assert torch.equal(recorded, plain)
    assert len(seen[0]) == len(STEPS) > _graph.WARM_UP and all(map(torch.equal, *seen))


@pytest.mark.parametrize("name", TABLES)
def test_memory_is_that_of_two_states(name: str) -> None:
    """Tensors of the state's shape alive in the callback, beside the caller's x."""
    alive: list[int] = []
    shape = (2, 3, 11, 13)

    def count(i: int, num_steps: int, x: Tensor, pred: Tensor) -> None:
        alive.append(len({o.data_ptr() for o in gc.get_objects() if type(o) is Tensor and o.shape == shape}))

    x = initial_noise(shape, seed=1, sample=torch.arange(2))
    sample_loop(pointwise, x, TABLES[name], STEPS, seed=1, callback=count)
    assert alive == [3] * 6


def test_callback_sees_every_step() -> None:
    seen: list[tuple[int, int]] = []
    states: list[Tensor] = []

    def callback(i: int, num_steps: int, x: Tensor, pred: Tensor) -> None:
        seen.append((i, num_steps))
        states.extend([x.clone(), pred.clone()])

    x = sample_loop(ConvNet(), start(), TABLES["ddpm"], STEPS, seed=7, callback=callback)
    assert seen == [(i, 6) for i in range(6)]
    assert torch.equal(states[-1], x) and torch.equal(states[-2], x)
    assert all(pred.abs().max() <= 1 for pred in states[1::2])
    assert torch.equal(x, sample_loop(ConvNet(), start(), TABLES["ddpm"], STEPS, seed=7))


def test_callback_ends_the_sampling() -> None:
    calls: list[int] = []

    def stop(i: int, num_steps: int, x: Tensor, pred: Tensor) -> bool:
        calls.append(i)
        return i == 2

    x = sample_loop(ConvNet(), start(), TABLES["ddpm"], STEPS, seed=7, callback=stop)
    assert calls == [0, 1, 2]
    assert torch.equal(x, sample_loop(ConvNet(), start(), TABLES["ddpm"][:3], STEPS[:3], seed=7))


def test_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    sample_loop(pointwise, start(), TABLES["ddim"], STEPS)
    assert capfd.readouterr().err == ""
    sample_loop(pointwise, start(), TABLES["ddim"], STEPS, progress=True)
    shown = capfd.readouterr().err
    assert "sampling" in shown and "6/6" in shown


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("mask_shape", [(4, 3, 8, 8), (1, 1, 8, 8)], ids=str)
def test_inpainting_keeps_the_known_pixels(name: str, mask_shape: tuple[int, ...]) -> None:
    mask = (torch.arange(64).reshape(8, 8) % 3 == 0).float().expand(mask_shape).contiguous()
    known = torch.rand(SHAPE) * 2 - 1
    seen: list[Tensor] = []
    blend = blend_table(SCHEDULE, STEPS)
    given: dict[str, Any] = {"mask": mask, "known": known, "known_table": blend}
    record = lambda i, n, x, pred: seen.append(x.clone())  # noqa: E731
    ours = sample_loop(pointwise, start(), TABLES[name], STEPS, seed=7, callback=record, **given)
    inside = mask.expand(SHAPE).bool()
    assert torch.equal(ours[inside], known[inside])
    plain = sample_loop(pointwise, start(), TABLES[name], STEPS, seed=7)
    assert torch.equal(ours[~inside], plain[~inside])  # pixel by pixel, nothing else changes
    for i, x in enumerate(seen):  # in between, known pixels have the noise of the coming timestep
        draw: dict[str, Any] = {"seed": 7, "sample": torch.arange(4), "step": i}
        noise = philox.normal(SHAPE, **draw, stream=philox.TRAINING_NOISE)
        signal, sigma = blend[i].float()
        assert_equal_to_rounding(x[inside], (signal * known + sigma * noise)[inside], 4, scale=4.0)
    assert not torch.equal(seen[0][inside], known[inside])


def test_inpainting_by_name() -> None:
    known, mask = torch.rand(SHAPE) * 2 - 1, torch.ones(1, 1, 8, 8).triu()
    for sampler in (sample_ddpm, sample_ddim, sample_dpmpp_2m):
        x = sampler(ConvNet(), SCHEDULE, SHAPE, num_steps=5, known=known, mask=mask)
        inside = mask.expand(SHAPE).bool()
        assert torch.equal(x[inside], known[inside]) and not torch.equal(x[~inside], known[~inside])


class TestBits:
    @pytest.mark.parametrize("name", TABLES)
    def test_two_runs_agree_and_seeds_differ(self, name: str) -> None:
        runs = [sample_loop(ConvNet(), start(), TABLES[name], STEPS, seed=seed) for seed in (7, 7, 8)]
        assert torch.equal(runs[0], runs[1])
        assert torch.equal(runs[0], runs[2]) == (name in ("ddim", "dpmpp_2m"))
        seed = torch.tensor(7)
        assert torch.equal(runs[0], sample_loop(ConvNet(), start(), TABLES[name], STEPS, seed=seed))

    @pytest.mark.parametrize("name", TABLES)
    def test_any_batch_split_draws_the_same_noise(self, name: str) -> None:
        whole = sample_loop(pointwise, start(), TABLES[name], STEPS, seed=7)
        for part in ([0, 1], [2, 3], [3, 0]):
            sample = torch.tensor(part)
            x = initial_noise((2, 3, 8, 8), seed=7, sample=sample)
            assert torch.equal(sample_loop(pointwise, x, TABLES[name], STEPS, seed=7, sample=sample), whole[part])

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    @pytest.mark.parametrize("net", ["conv", "unet"])
    def test_an_image_alone_in_its_slot_has_the_bits_of_the_whole_run(self, net: str, precision: str) -> None:
        torch.manual_seed(5)
        network: torch.nn.Module = ConvNet()
        if net == "unet":
            network = UNet(image_size=(8, 8), base_channels=32, channel_mult=(1, 2), num_res_blocks=1,
                           attention_resolutions=(4,)).eval()  # fmt: skip
            for parameter in network.parameters():  # a network as it starts predicts zero
                torch.nn.init.normal_(parameter, std=0.05)

        def call(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                out: Tensor = network(x, t)
            return out

        asked: list[list[int]] = []

        def chunk(index: Tensor) -> Tensor:
            asked.append(index.tolist())
            return sample_ddpm(call, SCHEDULE, SHAPE, num_steps=3, seed=7, sample=index)

        run = sample_in_chunks(chunk, 12, batch_size=4, first_image=4704)
        assert len(run) == 12 and len({image.sum().item() for image in run}) == 12
        asked.clear()
        alone = sample_in_chunks(chunk, 1, batch_size=4, first_image=4711)
        assert asked == [[4708, 4709, 4710, 4711]]
        assert torch.equal(alone[0], run[7])
        other = chunk(torch.tensor([1, 99, 12345, 4711]))  # whoever its neighbours are
        assert torch.equal(other[3], run[7])


@pytest.mark.parametrize(("first", "count"), [(0, 1), (0, 4), (0, 9), (3, 1), (3, 2), (5, 7), (8, 4)])
def test_chunks_are_full_and_aligned(first: int, count: int) -> None:
    asked: list[Tensor] = []

    def chunk(index: Tensor) -> Tensor:
        asked.append(index)
        return index.reshape(4, 1, 1, 1).expand(4, 3, 2, 2)

    images = sample_in_chunks(chunk, count, batch_size=4, first_image=first)
    assert images.shape == (count, 3, 2, 2)
    assert images[:, 0, 0, 0].tolist() == list(range(first, first + count))
    for index in asked:
        assert index.dtype == torch.int64 and (index % 4).tolist() == [0, 1, 2, 3]
        assert bool((index.diff() == 1).all())
    assert len(asked) == (first + count - 1) // 4 - first // 4 + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0, "batch_size": 4}, r"sample_in_chunks: expected num_images >= 1, got 0; images are counted"),
        ({"num_images": 1, "batch_size": 0}, r"sample_in_chunks: expected batch_size >= 1, got 0"),
        ({"num_images": 1, "batch_size": 1, "first_image": -1}, r"sample_in_chunks: expected first_image >= 0, got -1"),
    ],
)
def test_errors_of_chunks(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_in_chunks(lambda index: index, **arguments)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": start().bfloat16()}, TypeError, r"sample_loop: expected x of dtype float32 or float64, got"),
        ({"table": TABLES["ddpm"][:, :8]}, ValueError, r"sample_loop: expected table of shape \[6, 9\], got \[6, 8\]"),
        ({"steps": STEPS[1:]}, ValueError, r"sample_loop: expected steps of shape \[6\], got \[5\]"),
        ({"steps": STEPS.float()}, TypeError, r"sample_loop: expected steps of dtype int64, got torch.float32"),
        ({"seed": None}, ValueError, r"sample_loop: expected seed for a sampler that draws noise, got None"),
        ({"sample": torch.arange(3)}, ValueError, r"solver_step: expected sample of shape \[4\], got \[3\]"),
        ({"mask": torch.ones(1, 1, 8, 8)}, ValueError, r"solver_step: expected mask, known and known_table together"),
        (
            {"table": ddpm_table(SCHEDULE, STEPS, "eps", "learned")},
            ValueError,
            r"sample_loop: expected a network with 6 output channels for a learned variance, got 3; use such a network",
        ),
    ],
)
def test_errors_of_the_loop(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"x": start(), "table": TABLES["ddpm"], "steps": STEPS, "seed": 7, **changed}
    with pytest.raises(error, match=message):
        sample_loop(ConvNet(), given.pop("x"), given.pop("table"), given.pop("steps"), **given)
