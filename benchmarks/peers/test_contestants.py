"""Who takes part is what it says: the same network, the layers of the floor, no package that is not needed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import conv_floor
from benchmarks.peers import contestants, report
from benchmarks.peers.contestants import CIFAR10, DIFFUSERS, LARGE, LUCIDRAINS, OURS, TINY, Contestant, PeerNetwork
from benchmarks.peers.memory import peak_of
from benchmarks.peers.records import Row
from benchmarks.peers.test_peers import Case, calls_of, row_of
from fastddpm import UNet
from fastddpm.bench import flops, record

needs_diffusers = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="peer: needs pip install fastddpm[peer]"
)
ROW = Row("cpu", "train", "CIFAR-10", 8, 3, OURS, "float32, EMA", "float32", False, True, False, 1.0, 0.9, 700)


@pytest.mark.parametrize("who", [OURS, pytest.param(DIFFUSERS, marks=needs_diffusers)])
def test_the_floor_has_the_layers_of_both_networks(who: str) -> None:
    network = UNet(**CIFAR10.unet) if who == OURS else PeerNetwork(CIFAR10)
    layers = record(lambda: network(torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64)))
    found = conv_floor.shapes_of(layers, sum(p.numel() for p in network.parameters()))
    wanted = conv_floor.CIFAR10
    assert (found.convs, found.attention, found.parameters) == (wanted.convs, wanted.attention, wanted.parameters)
    assert conv_floor.flops(found) == flops(layers)
    if who == DIFFUSERS:  # ours has one product for three projections, and one for those of the time
        assert found.linears == wanted.linears


@needs_diffusers
@pytest.mark.parametrize(("network", "parameters"), [(CIFAR10, 35_746_307), (LARGE, 113_673_219), (TINY, None)])
def test_networks_are_the_same(network: contestants.Network, parameters: int | None) -> None:
    with torch.device("meta"):
        ours, theirs = UNet(**network.unet), PeerNetwork(network)
    counts = [sum(p.numel() for p in made.parameters()) for made in (ours, theirs)]
    assert counts[0] == counts[1] == (parameters or counts[0])


def test_conv_floor_adds_up() -> None:
    shapes = conv_floor.Shapes({(3, 8, 3, 1, 8): 2, (8, 8, 3, 2, 9): 1}, {(8, 8, 16): 2}, {(16, 8): 1}, 1000)
    rows: list[dict[str, Any]] = []
    found = conv_floor.conv_floor(2, torch.bfloat16, repeat=2, shapes=shapes, found=rows)
    assert [row["shape"] for row in rows] == [[3, 8, 3, 1, 8], [8, 8, 3, 2, 9], [8, 8, 16], [16, 8]]
    for what, part in (("forward", "forward"), ("train", "train")):
        assert found[part] == pytest.approx(sum(row["count"] * row[what] for row in rows[:3]))
        assert found[f"attention_{part}"] == pytest.approx(rows[3][what])
    assert found["floor_sample"] == pytest.approx(found["forward"] + found["attention_forward"])
    parts = found["train"] + found["attention_train"] + found["optimizer"]
    assert found["floor_train"] == pytest.approx(parts)
    assert found["optimizer"] == pytest.approx(38_000 / found["copy_rate"])
    assert "train" not in conv_floor.conv_floor(1, torch.float32, training=False, repeat=1, shapes=shapes)


def test_packages_that_are_missing_have_stand_ins_for_a_moment() -> None:
    with contestants.stand_ins(("no_such_package", "json")):
        from no_such_package.deep import Anything  # type: ignore[import-not-found]

        assert isinstance(Anything, type)
        assert "no_such_package" in sys.modules
    assert not [name for name in sys.modules if name.startswith("no_such_package")]
    assert json.dumps({}) == "{}"  # what is there is left alone
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_package")


def test_who_is_not_installed_has_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contestants.PACKAGES, LUCIDRAINS, ("no_such_package",))
    case, who = Case("train", TINY, 2, 1), Contestant(LUCIDRAINS, default=True)
    assert who.missing == "no_such_package"
    assert calls_of(case, [who]) == {}
    row = row_of(case, who, None, {}, {})
    assert row.seconds is None
    assert any("not installed" in line for line in report.lines_of([asdict(row)]))


def test_the_memory_of_a_training_is_that_of_a_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the child finds this package from anywhere
    found = peak_of(Contestant(OURS, recompute=True), TINY, 2, threads=1)
    assert found is None or 2**20 < found < 2**30


def test_settings_are_told_apart() -> None:
    for which in ("eager", "some", "all"):
        for device in ("cpu", "cuda"):
            found = contestants.contestants(which, device)
            assert len({(who.library, who.setting) for who in found}) == len(found)
    compiled = [sum(bool(w.compiled) for w in contestants.contestants(n)) for n in ("eager", "some", "all")]
    assert compiled[0] == 0 < compiled[1] < compiled[2]


def rows() -> list[dict[str, object]]:
    """Ours at 1 s over a floor of 0.9 s, diffusers by default at 2.5 s, its best setting at 1.3 s."""
    theirs = replace(
        ROW, library=DIFFUSERS, setting="default, float32", default=True, ema=False, seconds=2.5, memory=1000
    )
    best = replace(theirs, setting="bfloat16", dtype="bfloat16", default=False, seconds=1.3, memory=None)
    own = replace(best, library=LUCIDRAINS, setting="own Unet, bfloat16", own=True, seconds=0.1)
    gone = replace(theirs, library=LUCIDRAINS, seconds=None, floor=None, memory=None, note="not installed")
    split = replace(ROW, parts={"convolution": 0.8, "other": 0.2})
    memory = [replace(row, task="memory", seconds=None, parts={}) for row in (ROW, theirs, gone)]
    memory.append(replace(memory[0], memory=650, ema=False, setting="float32"))
    memory.append(replace(memory[1], memory=1120, ema=True, setting="default, float32, EMA"))
    return [asdict(row) for row in (split, theirs, best, own, gone, *memory)]


def test_verdicts() -> None:
    lines = report.verdicts(rows())
    told = {line.rpartition(": at ")[0].partition(" (diff")[0]: line.rpartition(": ")[2] for line in lines}
    case = "training, CIFAR-10, batch 8, cpu, 3 thread(s)"
    assert told[f"{case}: step/floor, float32"] == "1.11x, met"
    assert told[f"{case}: to diffusers, default"] == "2.50x, met"
    assert told[f"{case}: to the best peer"] == "1.30x, NOT MET"  # another network does not count
    memory = f"memory of {case}: to diffusers, float32"
    reached = {line.partition(" (float32")[0]: line.rpartition(": ")[2] for line in lines if line.startswith("memory")}
    assert reached[f"{memory}, both without EMA"] == "0.65x, met"
    assert reached[f"{memory}, both with EMA"] == "0.62x, met"
    assert reached[f"{memory}, ours alone with EMA"] == "0.70x"  # there is no bar: it is not the same
    assert any(line.endswith("bfloat16, both with EMA: not measured") for line in lines)


def test_memory_is_held_against_all_that_diffusers_can_be() -> None:
    found = {(who.dtype, who.ema) for who in contestants.memory_contestants() if who.library == DIFFUSERS}
    assert found == {(dtype, ema) for dtype in report.DTYPES for ema in (False, True)}


def test_a_script_before_and_after_has_a_bar_of_its_own() -> None:
    after = replace(ROW, network=f"{report.SCRIPT}{LUCIDRAINS} at 32x32", own=True, floor=None, memory=None)
    before = replace(after, library=LUCIDRAINS, seconds=1.4)
    (line,) = report.verdicts([asdict(before), asdict(after)])
    assert line.startswith(f"training, the script of {LUCIDRAINS} at 32x32, batch 8, cpu, 3 thread(s) (")
    assert line.endswith(": at least 1.3x: 1.40x, met")
    assert report.verdicts([asdict(replace(before, seconds=1.2)), asdict(after)])[0].endswith("1.20x, NOT MET")


def test_the_page_and_the_picture(tmp_path: Path) -> None:
    about = {"device": "a processor", "cpus": 4, "instruction set": "avx2", "packages": {"torch": "2.13"},
             "python": "3.11", "date": "today", "commit": "abc"}  # fmt: skip
    report.plot(about, rows(), tmp_path / "peers.png")
    page = report.markdown(about, rows(), Path("record.jsonl"), tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 10_000
    assert "| denoising-diffusion-pytorch | default, float32 | not installed |" in page
    assert "NOT MET" in page
    assert "## Memory of training, CIFAR-10" in page and "| fastddpm | float32, EMA | 0 | 0.62 | 0.70 |" in page
    assert "(peers.png)" in page
