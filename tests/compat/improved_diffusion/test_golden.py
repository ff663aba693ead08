"""Every method gives the numbers of the original, taken from it once; and where it is importable, in a whole grid."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from torch import Tensor

import fastddpm.compat.improved_diffusion as ours
from benchmarks.peers.improved_diffusion import is_there, original
from tests.compat.improved_diffusion import golden
from tests.tolerance import assert_near_peer

needs_original = pytest.mark.skipif(
    not is_there(), reason="peer: needs a checkout of openai/improved-diffusion on PYTHONPATH"
)
GOLDEN: dict[str, Any] = json.loads(golden.GOLDEN.read_text())
GRID = {
    "schedule": ("linear", "cosine"),
    "mean": ("PREVIOUS_X", "START_X", "EPSILON"),
    "var": ("LEARNED", "FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE"),
    "loss": ("MSE", "RESCALED_MSE", "KL", "RESCALED_KL"),
    "respacing": ([golden.TOTAL], "10", "ddim8", "7,3"),
    "rescale": (False, True),
}


def precision_of(name: str) -> float:
    """The original's DDIM with noise takes a root of what float32 leaves of 1 - abar' - sigma^2."""
    return 1e-4 if name.startswith("ddim") else 5e-6


def assert_same(found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Any]]) -> None:
    assert found.keys() == expected.keys()
    for call, values in expected.items():
        assert found[call].keys() == values.keys(), call
        for name, value in values.items():
            told = value if isinstance(value, Tensor) else torch.tensor(value).reshape(found[call][name].shape)
            try:
                assert_near_peer(found[call][name], told, precision_of(call))
            except AssertionError as error:
                raise AssertionError(f"{call}{name}: {error}") from None


def test_the_golden_cases_hold_every_option() -> None:
    for i, values in enumerate(GRID.values()):
        assert {str(case[i]) for case in golden.CASES} == {str(value) for value in values}


@pytest.mark.parametrize("number", range(len(golden.CASES)), ids=lambda i: "-".join(map(str, golden.CASES[i])))
def test_every_method_gives_the_numbers_of_the_original(number: int) -> None:
    assert_same(golden.of_case(ours, golden.CASES[number]), GOLDEN["cases"][number])


@pytest.mark.parametrize("name", golden.NETWORKS)
def test_networks_start_and_compute_as_the_original(name: str) -> None:
    assert_same({"network": golden.of_network(ours, name)}, {"network": GOLDEN["networks"][name]})


@pytest.mark.parametrize("what", GOLDEN["flags"])
def test_flags_names_respacings_and_timesteps_are_those_of_the_original(what: str) -> None:
    found, expected = golden.of_flags(ours)[what], GOLDEN["flags"][what]
    if what == "cosine":
        assert found == pytest.approx(expected, rel=1e-9)
    elif what == "timesteps":
        for mine, theirs in zip(found, expected, strict=True):
            assert mine[".0"] == theirs[".0"]
            assert mine[".1"] == pytest.approx(theirs[".1"], rel=1e-6)
    else:
        assert found == expected


@needs_original
@pytest.mark.peer
@pytest.mark.parametrize(("schedule", "mean"), list(itertools.product(GRID["schedule"], GRID["mean"])))
def test_every_method_agrees_with_the_original(schedule: str, mean: str) -> None:
    """Two of the six options a test, so that each is short: 768 configurations in all, with `--run-slow`."""
    theirs = original()
    rest = itertools.product(*(GRID[name] for name in ("var", "loss", "respacing", "rescale")))
    for i, options in enumerate(rest):
        if i % 16 == 5:  # the slow test takes all
            check(theirs, (schedule, mean, *options), seed=i)


@needs_original
@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("schedule", "mean"), list(itertools.product(GRID["schedule"], GRID["mean"])))
def test_every_method_agrees_with_the_original_everywhere(schedule: str, mean: str) -> None:
    theirs = original()
    rest = itertools.product(*(GRID[name] for name in ("var", "loss", "respacing", "rescale")))
    for i, options in enumerate(rest):
        check(theirs, (schedule, mean, *options), seed=i)


def check(theirs: Any, case: tuple[Any, ...], seed: int) -> None:
    """One configuration, with torch's own noise: it is drawn as often, in the same order."""
    made = [golden.diffusion(library, case) for library in (theirs, ours)]
    assert made[0].timestep_map == made[1].timestep_map
    calls = [golden.calls_of(d, case) for d in made]
    for name in calls[0]:
        results, states = [], []
        for side in calls:
            torch.manual_seed(seed)
            results.append(golden.tensors_of(side[name]()))
            states.append(torch.get_rng_state())
        assert torch.equal(*states), f"{name}: another number of draws"
        assert_same({name: results[1]}, {name: results[0]})


@needs_original
@pytest.mark.peer
@pytest.mark.parametrize("name", golden.NETWORKS)
def test_networks_agree_with_the_original(name: str) -> None:
    theirs = original()
    flags = dict(theirs.script_util.model_and_diffusion_defaults(), **golden.NETWORKS[name])
    flags.update(image_size=64, num_channels=32, num_res_blocks=1)
    models = []
    for library in (theirs, ours):
        torch.manual_seed(1)
        models.append(library.script_util.create_model_and_diffusion(**flags)[0])
    states = [model.state_dict() for model in models]
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])  # a seed gives the same weights

    for p in models[0].parameters():
        torch.nn.init.normal_(p, std=0.05)
    models[1].load_state_dict(models[0].state_dict())
    x, t = torch.randn(2, 3, 32, 64), torch.tensor([3.5, 700.0])
    y = torch.tensor([3, 999]) if flags["class_cond"] else None
    with torch.no_grad():
        assert_near_peer(models[1](x, t, y), models[0](x, t, y), 1e-6)
    for p in itertools.chain(*(model.parameters() for model in models)):
        p.requires_grad_(False)
    features = [model.get_feature_vectors(x, t, y) for model in models]
    for key in ("down", "up"):
        for expected, found in zip(features[0][key], features[1][key], strict=True):
            assert_near_peer(found, expected, 2e-6)
    assert_near_peer(features[1]["middle"], features[0]["middle"], 2e-6)
