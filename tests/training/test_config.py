"""Options: ranges, types, and the recipes."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch._inductor

from fastddpm.nn import UNet
from fastddpm.training import PRESETS, TrainConfig, make_configs
from fastddpm.training.config import choose_device, choose_precision, compile_network, free_on_resume

OUT_OF_RANGE: list[tuple[str, Any]] = [
    ("num_images", 0),
    ("batch_size", 0),
    ("micro_batch_size", 0),
    ("learning_rate", 0.0),
    ("learning_rate", float("nan")),
    ("learning_rate", float("inf")),
    ("warmup_images", -1),
    ("lr_decay", "exponential"),
    ("final_learning_rate", -1e-9),
    ("adam_beta1", 1.0),
    ("adam_beta1", -0.1),
    ("adam_beta2", 1.0),
    ("adam_eps", 0.0),
    ("weight_decay", -0.1),
    ("max_grad_norm", 0.0),
    ("ema_decay", 1.0),
    ("ema_decay", -0.1),
    ("ema_halflife_images", 0.0),
    ("precision", "float8"),
    ("compile_mode", "slow"),
    ("gradient_dtype", "float16"),
    ("weight_mirror", "maybe"),
    ("device", "toaster"),
    ("data_on", "disk"),
    ("cuda_graph", "maybe"),
    ("seed", -1),
    ("seed", 2**63),
    ("log_every_images", 0),
    ("checkpoint_every_images", 0),
    ("checkpoint_every_minutes", 0.0),
    ("keep_checkpoints", 0),
    ("sample_every_images", -1),
    ("num_grid_samples", 0),
    ("grid_sampler", "euler"),
    ("grid_steps", 0),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_value_out_of_range_is_named_with_its_range_and_a_remedy(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"TrainConfig: expected {name} .*got .*{str(value)[:6]}.*; "):
        TrainConfig(**{name: value})


def test_a_mode_of_compiling_needs_compile() -> None:
    with pytest.raises(ValueError, match="expected compile=True with compile_mode, got compile_mode 'max-autotune'"):
        TrainConfig(compile_mode="max-autotune")
    assert TrainConfig(compile_mode="max-autotune", compile=True).compile


def test_compile_modes_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    network = torch.nn.Linear(1, 1)
    monkeypatch.setattr(network, "compile", lambda mode: told.append(mode))
    for mode in (None, "default", "max-autotune"):
        compile_network(network, mode)
    assert told == ["default", "default", "max-autotune-no-cudagraphs"]
    assert set(told) <= set(torch._inductor.list_mode_options())
    with pytest.raises(ValueError, match="expected mode default or max-autotune, got 'fast'"):
        compile_network(network, "fast")


def test_no_average_and_its_half_life_are_refused_together() -> None:
    with pytest.raises(ValueError, match="expected no ema_halflife_images without an average"):
        TrainConfig(ema_decay=None, ema_halflife_images=1000)


def test_every_number_has_a_test_of_its_range() -> None:
    limited = {f.name for f in fields(TrainConfig) if {"least", "above", "below", "choices"} & f.metadata.keys()}
    assert limited <= {name for name, _ in OUT_OF_RANGE}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 1.5),
        ("batch_size", True),
        ("learning_rate", "1e-3"),
        ("compile", 1),
        ("output_dir", 3),
        ("seed", None),
    ],
)
def test_value_of_another_type_is_refused(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"TrainConfig: expected {name} of type"):
        TrainConfig(**{name: value})


def test_a_whole_number_is_taken_where_a_float_is_meant() -> None:
    assert isinstance(TrainConfig(max_grad_norm=1).max_grad_norm, float)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch_size=6, micro_batch_size=4), "expected micro_batch_size to divide batch_size 6, got 4; choose"),
        (dict(learning_rate=1e-4, final_learning_rate=1e-3), "final_learning_rate <= learning_rate 0.0001, got 0.001"),
        (dict(lr_decay="cosine", num_images=100, warmup_images=100), "warmup_images < num_images 100, got 100"),
        (dict(num_images=12_000, warmup_images=640_000), "got 640000; .* peak, give fewer, or none for 1200"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


@pytest.mark.parametrize(
    ("num_images", "warmup"), [(12_800_000, 640_000), (6_400_000, 640_000), (12_000, 1200), (9, 0)]
)
def test_warm_up_that_is_not_given_is_a_tenth_at_most(num_images: int, warmup: int) -> None:
    config = TrainConfig(num_images=num_images)
    assert config.warmup == config.to_dict()["warmup_images"] == warmup
    assert replace(TrainConfig(), num_images=num_images).warmup == warmup
    assert TrainConfig(num_images=num_images, warmup_images=7).warmup == 7


def test_every_option_has_a_help() -> None:
    for f in fields(TrainConfig):
        assert len(f.metadata["help"]) > 10, f.name


def test_number_of_images_may_grow_unless_the_learning_rate_depends_on_it() -> None:
    assert "num_images" in free_on_resume(TrainConfig())
    assert "num_images" not in free_on_resume(TrainConfig(lr_decay="linear"))


def test_device_and_precision_are_chosen() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_precision("auto", torch.device("cpu")) == torch.float32
    assert choose_precision("bfloat16", torch.device("cpu")) == torch.bfloat16
    assert choose_precision("float16", torch.device("cpu")) == torch.float16
    assert choose_precision("tf32", torch.device("cuda")) == torch.float32
    with pytest.raises(ValueError, match="expected a GPU for precision tf32, got cpu; use float32"):
        choose_precision("tf32", torch.device("cpu"))
    with pytest.raises(ValueError, match="expected device cuda:99 to exist, got"):
        choose_device("cuda:99")
    with pytest.raises(ValueError, match="expected device cpu or cuda, got mps"):
        choose_device("mps")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_make_networks_that_fit_their_diffusion(name: str) -> None:
    unet, diffusion, train = make_configs(name)
    assert unet.learned_variance == diffusion.variance.startswith("learned")
    assert train.warmup_images is not None and train.num_images > train.warmup_images


def test_preset_of_the_ddpm_paper_has_its_number_of_parameters() -> None:
    unet, diffusion, train = make_configs("cifar10")
    with torch.device("meta"):
        model = UNet(unet)
    assert sum(p.numel() for p in model.parameters()) == 35_746_307
    assert (diffusion.schedule, diffusion.num_timesteps, diffusion.prediction, diffusion.variance) == (
        "linear",
        1000,
        "eps",
        "fixed_large",
    )
    assert (train.learning_rate, train.warmup_images, train.batch_size, train.ema_decay) == (
        2e-4,
        5000 * 128,
        128,
        0.9999,
    )
    assert (train.max_grad_norm, unet.dropout, train.horizontal_flip, train.num_images) == (
        1.0,
        0.1,
        True,
        800_000 * 128,
    )


def test_preset_of_improved_ddpm_has_its_number_of_parameters() -> None:
    unet = make_configs("improved-cifar10")[0]
    with torch.device("meta"):
        model = UNet(unet)
    assert sum(p.numel() for p in model.parameters()) == 52_546_438


def test_fields_given_win_over_those_of_the_preset() -> None:
    unet, diffusion, train = make_configs(
        "digits", unet={"dropout": 0.2}, diffusion={"num_timesteps": 7}, train={"seed": 3}
    )
    assert (unet.dropout, unet.image_size, diffusion.num_timesteps, diffusion.levels, train.seed) == (
        0.2,
        (8, 8),
        7,
        17,
        3,
    )
    assert make_configs()[2] == TrainConfig()


def test_unknown_presets_and_fields_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected preset to be one of digits, cifar10.*got 'mnist'"):
        make_configs("mnist")
    with pytest.raises(ValueError, match="expected fields of TrainConfig, got batchsize; it has output_dir"):
        make_configs("digits", train={"batchsize": 3})


def test_auto_is_bfloat16_where_the_gpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_it, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has_it=has_it: has_it)
        assert choose_precision("auto", torch.device("cuda")) == expected
