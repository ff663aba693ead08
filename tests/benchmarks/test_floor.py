"""The floor of a benchmark moves memory as the op does, and the page says how that of its record was measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import contests, report
from benchmarks.conftest import moving

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("updates", [False, True], ids=["a copy", "an update in place"])
def test_as_many_bytes_are_moved(updates: bool) -> None:
    move = moving(800, updates)
    first, second = move(), move()
    assert isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
    assert first.nbytes == 400 and first.data_ptr() == second.data_ptr()  # each read once, and written once
    assert set(first.tolist()) == {1.0}  # of an update, negated twice


def test_adam_ema_updates_and_others_do_not() -> None:
    assert contests.adam_ema((2, 3), torch.float32).updates
    assert not contests.q_sample((1, 3, 4, 4), torch.float32).updates


def page(**header: str) -> str:
    record = ROOT / "benchmarks" / "results" / "2026-11-22-epyc-4-cores.jsonl"
    about, rows = report.read(record)
    about.pop("floor")
    return report.markdown(about | header, rows, record, None)


def test_the_page_tells_how_its_floor_was_measured() -> None:
    """Of records that do not say, it was a copy."""
    assert "the copy is no floor" in page()
    new = page(floor=report.UPDATED)
    assert "of adam_ema, by an update in place" in new and "no floor" not in new


def test_the_page_is_made_of_its_record() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    record, *others = (Path(name) for name in re.findall(r"`(benchmarks/results/\S+)`", text))
    about, rows = report.read(ROOT / record)
    made = report.markdown(about, rows, ROOT / record, Path("benchmarks.png"), [ROOT / other for other in others])
    assert made.replace(f"{ROOT}/", "") + "\n" == text
