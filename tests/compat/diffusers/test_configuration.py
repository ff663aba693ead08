"""Configurations and their files, from diffusers to here and back."""

from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastddpm.compat.diffusers as ours
from fastddpm.compat.diffusers.configuration import KEYS_OF_SCHEDULERS, NOT_GIVEN, Config
from tests.compat.diffusers.cases import NAMES
from tests.tolerance import assert_near_peer

GIVEN: dict[str, dict[str, Any]] = {
    "DDPMScheduler": dict(beta_schedule="sigmoid", variance_type="fixed_large", num_train_timesteps=50),
    "DDIMScheduler": dict(set_alpha_to_one=False, steps_offset=1, clip_sample=False),
    "DPMSolverMultistepScheduler": dict(solver_order=3, use_karras_sigmas=True, lambda_min_clipped=-5.1),
}


def public(config: Any) -> dict[str, Any]:
    """Without what diffusers keeps of its own beside the arguments."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def original(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


@pytest.mark.peer
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NAMES)
def test_files_of_either_make_a_scheduler_of_the_other(name: str, tmp_path: Path) -> None:
    theirs, mine = original(name)(**GIVEN[name]), getattr(ours, name)(**GIVEN[name])
    assert public(mine.config) == public(theirs.config)
    assert set(mine.config[NOT_GIVEN]) == set(theirs.config[NOT_GIVEN])
    mine.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    texts = [(tmp_path / who / "scheduler_config.json").read_text() for who in ("ours", "theirs")]
    assert texts[0] == texts[1]
    for made in (
        original(name).from_pretrained(tmp_path / "ours"),
        getattr(ours, name).from_pretrained(tmp_path / "theirs"),
    ):
        assert public(made.config) == public(theirs.config)
        assert_near_peer(made.alphas_cumprod, theirs.alphas_cumprod, precision=1e-6)


@pytest.mark.peer
@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", NAMES)
def test_a_scheduler_of_the_configuration_of_another(source: str, target: str) -> None:
    """What the first was not given is at the default of the second, and what the second has not is kept."""
    arguments = {key: value for key, value in GIVEN[source].items() if key != "steps_offset"}
    if target != "DDPMScheduler":
        arguments.pop("beta_schedule", None)  # the others have no "sigmoid"
    theirs, mine = original(source)(**arguments), getattr(ours, source)(**arguments)
    expected = original(target).from_config(theirs.config).config
    for config in (theirs.config, mine.config):
        made = getattr(ours, target).from_config(config).config
        assert {k: v for k, v in made.items() if k != NOT_GIVEN} == {
            k: v for k, v in expected.items() if k != NOT_GIVEN
        }
        assert set(made[NOT_GIVEN]) == set(expected[NOT_GIVEN])
    back = original(target).from_config(mine.config).config
    assert public(back) == public(expected)


@pytest.mark.peer
def test_unknown_keys_are_kept_and_warned_of(tmp_path: Path) -> None:
    config = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.1.1",
        "beta_end": 0.01,
        "colour": "blue",
        "rho": 7,
    }
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="no argument colour, which"):
        mine, unused = ours.DDPMScheduler.from_pretrained(tmp_path, return_unused_kwargs=True, size=3)
    theirs, expected = original("DDPMScheduler").from_pretrained(tmp_path, return_unused_kwargs=True, size=3)
    assert unused == expected and {k: v for k, v in mine.config.items() if k != NOT_GIVEN} == {
        k: v for k, v in theirs.config.items() if k != NOT_GIVEN
    }
    with pytest.warns(UserWarning, match="no argument colour, which"):
        mine = ours.DDPMScheduler.from_config({**config, "_class_name": "DDIMScheduler"})
    theirs = type(theirs).from_config({**config, "_class_name": "DDIMScheduler"})
    assert mine.config["_class_name"] == theirs.config["_class_name"] == "DDPMScheduler"
    assert mine.config.colour == "blue" and json.loads(mine.to_json_string())["rho"] == 7
    with pytest.warns(UserWarning, match="colour"):
        ours.DDIMScheduler.from_config(mine.config)


@pytest.mark.peer
def test_the_keys_that_bring_no_warning_are_those_of_diffusers() -> None:
    import inspect

    import diffusers
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

    known = {"noise_sampler_seed"}  # of one that needs another package
    for member in KarrasDiffusionSchedulers:
        known |= set(inspect.signature(getattr(diffusers, member.name).__init__).parameters)
    assert set(KEYS_OF_SCHEDULERS.split()) == known - {"self", "args", "kwargs"}


def test_names_of_other_multistep_solvers_are_taken() -> None:
    """Configurations of DEIS and UniPC, as the original takes them."""
    made = ours.DPMSolverMultistepScheduler(algorithm_type="deis", solver_type="logrho")
    assert (made.config.algorithm_type, made.config.solver_type) == ("dpmsolver++", "midpoint")


def test_the_name_of_a_repository(tmp_path: Path) -> None:
    """As it lies in the cache of the hub once it was downloaded."""
    pytest.importorskip("huggingface_hub")
    repository = tmp_path / "models--google--ddpm-cifar10-32"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    (snapshot / "scheduler").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    ours.DDPMScheduler(variance_type="fixed_large").save_pretrained(snapshot)
    ours.DDPMScheduler(variance_type="learned").save_pretrained(snapshot / "scheduler")
    where: dict[str, Any] = dict(cache_dir=tmp_path, local_files_only=True)
    made = ours.DDPMScheduler.from_pretrained("google/ddpm-cifar10-32", **where)
    assert made.config.variance_type == "fixed_large"
    made = ours.DDPMScheduler.from_pretrained("google/ddpm-cifar10-32", subfolder="scheduler", beta_end=0.01, **where)
    assert made.config.variance_type == "learned" and made.config.beta_end == 0.01
    with pytest.raises(OSError, match=r"expected 'google/nothing' to be a folder, or a repository"):
        ours.DDPMScheduler.from_pretrained("google/nothing", **where)


def test_the_folder_of_a_pipeline(tmp_path: Path) -> None:
    ours.DDIMScheduler(beta_end=0.03).save_pretrained(tmp_path / "scheduler")
    assert ours.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler").config.beta_end == 0.03
    assert ours.DDIMScheduler.from_pretrained(tmp_path / "scheduler", subfolder="other").config.beta_end == 0.03
    file = tmp_path / "scheduler" / "scheduler_config.json"
    assert ours.DDIMScheduler.from_pretrained(str(file)).config.beta_end == 0.03
    assert ours.DDIMScheduler.from_config(str(file)).config.beta_end == 0.03
    with pytest.raises(OSError, match=r"expected scheduler_config\.json in"):
        ours.DDIMScheduler.from_pretrained(tmp_path)
    file.write_text("{")
    with pytest.raises(OSError, match="expected a JSON file"):
        ours.DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    with pytest.raises(NotADirectoryError, match="expected save_directory to be a folder"):
        ours.DDIMScheduler().save_pretrained(file)
    with pytest.raises(NotImplementedError, match="expected push_to_hub=False"):
        ours.DDIMScheduler().save_pretrained(tmp_path, push_to_hub=True)


def test_corrected_is_in_the_file_only_where_it_is_set(tmp_path: Path) -> None:
    assert "corrected" not in ours.DDPMScheduler(corrected=False).config
    chosen = ours.DDPMScheduler(corrected=True)
    assert chosen.config.corrected and chosen.config.timestep_spacing == "trailing"
    chosen.save_pretrained(tmp_path)
    again = ours.DDPMScheduler.from_pretrained(tmp_path)
    assert again.config.corrected and again.config.timestep_spacing == "trailing"
    assert ours.DDPMScheduler(corrected=True, timestep_spacing="leading").config.timestep_spacing == "leading"
    assert "corrected" not in ours.DDPMScheduler.from_config(again.config, corrected=False).config


def test_arrays_are_written_as_lists(tmp_path: Path) -> None:
    for betas in (np.linspace(0.01, 0.1, 5), torch.linspace(0.01, 0.1, 5), tuple(np.linspace(0.01, 0.1, 5))):
        scheduler = ours.DDPMScheduler(num_train_timesteps=5, trained_betas=betas)
        scheduler.save_pretrained(tmp_path)
        again = ours.DDPMScheduler.from_pretrained(tmp_path)
        assert torch.equal(again.betas, scheduler.betas)
    solver = ours.DPMSolverMultistepScheduler()
    solver.save_pretrained(tmp_path)
    assert ours.DPMSolverMultistepScheduler.from_pretrained(tmp_path).config.lambda_min_clipped == -math.inf


def test_a_configuration_is_read_as_attributes_and_as_a_mapping() -> None:
    scheduler = ours.DDPMScheduler(1000, 0.0002, beta_end=0.01, _name_or_path="here")
    config = scheduler.config
    assert config.beta_start == config["beta_start"] == 0.0002 and config._name_or_path == "here"
    assert "beta_start" not in config[NOT_GIVEN] and "steps_offset" in config[NOT_GIVEN]
    assert not hasattr(config, "colour") and isinstance(config, dict)
    for change in (
        lambda: setattr(config, "beta_end", 1),
        lambda: config.__setitem__("beta_end", 1),
        lambda: config.update(beta_end=1),
        lambda: config.pop("beta_end"),
    ):
        with pytest.raises((AttributeError, TypeError), match="expected a configuration to stay as it is"):
            change()
    with pytest.warns(FutureWarning, match=r"scheduler\.config\.beta_end"):
        assert scheduler.beta_end == 0.01
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        _ = scheduler.colour
    assert '"beta_end": 0.01' in repr(scheduler)
    scheduler._internal_dict = Config({**config, "steps_offset": 1})  # as pipelines do with old files
    assert scheduler.config.steps_offset == 1
    with pytest.raises(TypeError, match="expected config to be a mapping, got int"):
        ours.DDPMScheduler.from_config(3)


@pytest.mark.parametrize("name", NAMES)
def test_copies(name: str) -> None:
    scheduler = getattr(ours, name)(**GIVEN[name])
    scheduler.set_timesteps(7)
    x = torch.randn(1, 3, 4, 4)
    for made in (copy.deepcopy(scheduler), copy.copy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert made.config == scheduler.config and torch.equal(made.timesteps, scheduler.timesteps)
        expected = scheduler.step(x, 7 if name.startswith("DPM") else int(made.timesteps[0]), x).prev_sample
        scheduler.set_timesteps(7)
        found = made.step(x, 7 if name.startswith("DPM") else int(made.timesteps[0]), x).prev_sample
        assert name == "DDPMScheduler" or torch.equal(found, expected)


def test_a_subclass_has_a_configuration_of_its_own_arguments() -> None:
    class Mine(ours.DDIMScheduler):
        pass

    made = Mine(beta_end=0.01)
    assert made.config.beta_end == 0.01 and json.loads(made.to_json_string())["_class_name"] == "Mine"


def test_what_is_not_here_says_what_is() -> None:
    with pytest.raises(
        ImportError, match=r"expected one of DDIMScheduler, .*, got EulerDiscreteScheduler; take that one"
    ):
        from fastddpm.compat.diffusers import EulerDiscreteScheduler  # noqa: F401
    assert not hasattr(ours, "nonsense")
    from fastddpm.compat.diffusers import tables

    assert tables.__name__ == "fastddpm.compat.diffusers.tables"


@pytest.mark.parametrize("name", NAMES)
def test_an_argument_that_there_is_not_is_told_with_its_class(name: str) -> None:
    for given, remedy in (
        ("beta_schedul", r"did you mean 'beta_schedule'\?"),
        ("colour", "choose among num_train_timest"),
    ):
        with pytest.raises(TypeError, match=f"^{name}: expected arguments of its constructor, got '{given}'; {remedy}"):
            getattr(ours, name)(**{given: "linear"})


@pytest.mark.parametrize("output", [ours.DDPMSchedulerOutput, ours.DDIMSchedulerOutput])
def test_outputs(output: type) -> None:
    a, b = torch.zeros(1), torch.ones(1)
    found = output(a, b)
    assert found.prev_sample is found["prev_sample"] is found[0] is a and found[1] is b
    assert found[:1] == (a,) and found.to_tuple() == (a, b) and list(found) == ["prev_sample", "pred_original_sample"]
    found.prev_sample = b
    assert found["prev_sample"] is found[0] is b
    found["prev_sample"] = a
    assert found.prev_sample is a
    alone = output(prev_sample=a)
    assert len(alone) == 1 and alone.pred_original_sample is None and alone.to_tuple() == (a,)
    assert torch.equal(pickle.loads(pickle.dumps(found)).prev_sample, a)
    assert ours.SchedulerOutput(a).to_tuple() == (a,)


@pytest.mark.parametrize("name", NAMES)
def test_a_tuple_in_place_of_an_output(name: str) -> None:
    scheduler = getattr(ours, name)()
    scheduler.set_timesteps(5)
    x = torch.randn(1, 3, 4, 4)
    found = scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)
    assert type(found) is tuple and len(found) == (1 if name.startswith("DPM") else 2)


def test_diffusers_is_not_needed() -> None:
    code = "import sys, fastddpm.compat.diffusers as d; d.DDPMScheduler(); assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})


def test_no_warning_without_a_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in NAMES:
            scheduler = getattr(ours, name)(**GIVEN[name])
            getattr(ours, name).from_config(scheduler.config)
