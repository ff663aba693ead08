"""The file of metrics: whole lines, and none twice after a resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastddpm.training.metrics import append_metrics, read_metrics, set_aside, truncate_metrics


def test_lines_behind_a_checkpoint_and_unfinished_ones_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for images in (10, 20, 30):
        append_metrics(path, {"images": images})
    with path.open("a") as file:
        file.write('{"images": 4')
    assert [record["images"] for record in read_metrics(path)] == [10, 20, 30]
    truncate_metrics(path, 25)
    assert path.read_text() == '{"images": 10}\n{"images": 20}\n'
    truncate_metrics(path, 0)
    assert path.read_text() == ""
    truncate_metrics(tmp_path / "none", 0)
    assert not (tmp_path / "none").exists()


def test_number_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        append_metrics(tmp_path / "metrics.jsonl", {"images": 1, "loss": float("nan")})
    assert not (tmp_path / "metrics.jsonl").exists() or read_metrics(tmp_path / "metrics.jsonl") == []


def test_what_is_in_the_way_gets_a_free_name(tmp_path: Path) -> None:
    for content in ("first", "second"):
        (tmp_path / "file").write_text(content)
        set_aside(tmp_path / "file")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file.1": "first", "file.2": "second"}
