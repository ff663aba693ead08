"""Trains in processes of its own, kills them with SIGKILL, and prints what happened as JSON.

Run as ``python killed_run.py <directory>`` by test_kill.py. torch is imported once; each process is a fork, made while
there is one thread.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastddpm.training import checkpoint
from tests.training.toy import stripes, toy_diffusion, toy_trainer

# (what to wait for, how often): steps of this process, files of a checkpoint half written, or written and not published
KILLS = (
    ("step", 5), ("step", 3), ("file", 2), ("step", 6), ("step", 1), ("publish", 1), ("step", 9), ("step", 2),
    ("step", 7), ("step", 4),
)  # fmt: skip
NUM_IMAGES = 224


def slowed(function: Callable[..., Any], name: str, say: Callable[[str], None]) -> Callable[..., Any]:
    """The function, and a second's rest at the moment that matters: behind a file, of which half is there, or before
    the checkpoint gets its name."""

    def slow(*args: Any) -> None:
        if name == "file":
            function(*args)
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
            say(name)
            time.sleep(1)
            function(*args)
        else:
            say(name)
            time.sleep(1)
            function(*args)

    return slow


def train(directory: Path, pipe: int, slow: str | None) -> None:
    """What a process does."""

    def say(text: str) -> None:
        os.write(pipe, f"{text}\n".encode())

    if slow == "file":
        checkpoint.save_file = slowed(checkpoint.save_file, slow, say)
    elif slow == "publish":
        checkpoint.publish = slowed(checkpoint.publish, slow, say)
    trainer = toy_trainer(
        directory, toy_diffusion(dropout=0.1, num_classes=2, timestep_sampling="importance", num_timesteps=3),
        stripes(True), num_images=NUM_IMAGES, callbacks=[lambda _: say("step")],
    )  # fmt: skip
    say(f"from {trainer.images_seen}")
    trainer.train()


def run(directory: Path, kill: tuple[str, int] | None, delay: float) -> dict[str, Any]:
    """Start a process, kill it at its moment, and tell what was there then."""
    reader, writer = os.pipe()
    slow = kill[0] if kill is not None and kill[0] != "step" else None
    process = os.fork()
    if process == 0:
        try:
            os.close(reader)
            train(directory, writer, slow)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    seen: list[str] = []
    report: dict[str, Any] = {"kill": kill}
    with os.fdopen(reader) as lines:
        for line in lines:
            seen.append(line.strip())
            if kill is not None and seen.count(kill[0]) == kill[1]:
                time.sleep(delay)
                os.kill(process, signal.SIGKILL)
                break
    status = os.waitpid(process, 0)[1]
    return {
        **report,
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
        "exit": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        "from": next((int(line.split()[1]) for line in seen if line.startswith("from")), None),
        "checkpoints": len(list(directory.glob("checkpoint-*"))),
        "unfinished": len(list(directory.glob(".unfinished-*"))),
    }


def main() -> None:
    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    delays = random.Random(0)
    # at any moment behind a step; at once where the moment is that of a file
    moments = [(kill, delays.uniform(0, 0.03) if kill[0] == "step" else 0.0) for kill in KILLS]
    reports = [run(directory / "whole", None, 0.0)]
    reports += [run(directory / "killed", kill, delay) for kill, delay in [*moments, (None, 0.0)]]
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
