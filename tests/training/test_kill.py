"""Killing a training run with SIGKILL, again and again, changes nothing of its result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastddpm.training import latest_checkpoint, read_metrics

SCRIPT = Path(__file__).with_name("killed_run.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_run_killed_ten_times_ends_with_the_weights_of_one_never_killed(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole, *killed, last = json.loads(done.stdout)

    assert (whole["exit"], whole["from"], last["exit"]) == (0, 0, 0), done.stderr
    assert [report["signal"] for report in killed] == [signal.SIGKILL] * 10
    assert sum(report["checkpoints"] >= 1 for report in killed) >= 8, "killed with a checkpoint on the disk"
    writing = [report for report in killed if report["kill"][0] in ("file", "publish")]
    assert len(writing) == 2 and all(report["unfinished"] == 1 for report in writing), "killed while writing one"
    starts = [report["from"] for report in (*killed, last)]
    assert starts[0] == 0 and all(start > 0 for start in starts[1:]), f"resumed from {starts}"
    assert starts == sorted(starts) and starts[-1] > starts[1], "never further back, and further in the end"

    a, b = latest_checkpoint(tmp_path / "whole"), latest_checkpoint(tmp_path / "killed")
    assert a is not None and b is not None and a.images == b.images == 224
    assert a.groups == b.groups and {"model", "ema", "exp_avg", "exp_avg_sq", "timesteps"} <= set(a.groups)
    for group in a.groups:
        ours, theirs = b.tensors(group), a.tensors(group)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == [], group
    assert not list((tmp_path / "killed").glob(".unfinished-*")), "what the kills left has been cleared away"

    lines = [
        [
            (record["images"], record["loss"], record["loss_by_t"])
            for record in read_metrics(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "killed")
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 14
