"""The most memory that a piece of work takes.

On a GPU it is what torch allocated at the most while the work was launched op by op. On a CPU it is measured in a
process of its own, whose allocator has not been used before: the peak of its resident size less what it had after
importing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .timing import wait

STATUS = Path("/proc/self/status")


def resident(name: str) -> int | None:
    """Bytes of this process: its resident size now ("VmRSS"), or its peak ("VmHWM"); None where the system does not
    tell, which is anywhere but on Linux.

    The peak that getrusage tells is not taken: a child starts with that of the process that started it.
    """
    if not STATUS.exists():
        return None
    rows = STATUS.read_text(encoding="utf-8").splitlines()
    return next((int(row.split()[1]) * 1024 for row in rows if row.startswith(f"{name}:")), None)


def peak_on_gpu(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that torch had allocated at the most in a second ``call()``, with what was there before.

    The first is not counted: cuDNN may try its algorithms in it, with all memory that they ask for. A call must not
    replay a CUDA graph: its tensors lie in memory that torch counts as allocated while it records alone.
    """
    call()
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    wait(device)
    return torch.cuda.max_memory_allocated(device)


def peak_of_child(command: list[str], threads: int | None = None) -> int | None:
    """Bytes that a command prints as the last line of its output; None where it prints "None".

    Args:
        command: the program and its arguments. threads: of OpenMP in it; None leaves it as it is.

    Raises:
        RuntimeError: the command failed; the message has the end of what it said.
    """
    environment = dict(os.environ) if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            f"peak_of_child: expected {' '.join(command[:3])} to end without an error, got code {done.returncode}: "
            f"{done.stderr.strip()[-500:]}; run it alone to see more"
        )
    found: int | None = json.loads(done.stdout.strip().splitlines()[-1].replace("None", "null"))
    return found


def peak_since(before: int | None) -> int | None:
    """Bytes of the peak of this process over ``before``, its resident size at some moment."""
    peak = resident("VmHWM")
    return None if peak is None or before is None else peak - before


def peak_of_work(work: dict[str, Any], threads: int | None = None) -> int | None:
    """Bytes that a `Work`, as plain data, takes on the CPU in a process of its own."""
    code = f"import sys; from {__name__} import do_and_tell; do_and_tell(sys.argv[1])"
    return peak_of_child([sys.executable, "-c", code, json.dumps(work)], threads)


def do_and_tell(argument: str) -> None:
    """Do a work twice, which is given as JSON, and print the bytes that it took."""
    from .work import Work  # here, so that it is imported before the size is taken

    before = resident("VmRSS")
    call = Work(**json.loads(argument)).prepare()
    call()
    call()
    print(peak_since(before))
