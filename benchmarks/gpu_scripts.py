"""Scripts of other libraries before and after, on a GPU: benchmarks/peers/test_migration_*.py, a part for each.

pytest runs them; what it reports becomes lines of the record: the times of a case by contestant, or why there are none.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from benchmarks.gpu_cases import Part

Line = dict[str, Any]
GROUP = "scripts"
FOLDER = Path(__file__).parent / "peers"
BEGINS = "test_migration_"
CASES = {"denoising_diffusion_pytorch": 3, "optimize": 16, "improved_diffusion": 4, "diffusers": 7}
"""How many a script has: for the estimate of its time."""
SECONDS = 2.0  # of each contestant
MAKING = 8.0  # seconds of a case beside its turns: an estimate


def parts() -> list[Part]:
    """A part for each script."""
    return [
        Part(f"script {name}", 300, group=GROUP, predicted=20 + count * (MAKING + 3 * SECONDS), least=60)
        for name, count in CASES.items()
    ]


def command(part: str, tiny: bool, reports: Path) -> list[str]:
    """What runs a script, and leaves junit.xml and, unless tiny, times.json in ``reports``."""
    script = FOLDER / f"{BEGINS}{part.removeprefix('script ')}.py"
    mode = ["--benchmark-disable"] if tiny else ["--benchmark-only", f"--benchmark-json={reports / 'times.json'}"]
    return [
        sys.executable, "-m", "pytest", str(script), *mode, "-q", "-p", "no:cacheprovider", "-o", "timeout=0",
        "-o", "addopts=--import-mode=importlib", "--bench-threads", "1", "--peers-seconds", str(SECONDS),
        f"--junitxml={reports / 'junit.xml'}",
    ]  # fmt: skip


def lines_of(part: str, reports: Path) -> list[Line]:
    """A line for each case: seconds by contestant, or that it was not run, or failed, and why."""
    times: dict[str, dict[str, float]] = {}
    if (reports / "times.json").exists():
        for found in json.loads((reports / "times.json").read_text(encoding="utf-8"))["benchmarks"]:
            times[found["name"]] = found["extra_info"].get("seconds", {})
    lines = []
    for case in ET.parse(reports / "junit.xml").getroot().iter("testcase"):
        name = case.get("name") or ""
        line: Line = {"kind": "script", "part": part, "case": name, "seconds": times.get(name, {})}
        ended = next((child for child in case if child.tag in ("skipped", "failure", "error")), None)
        if ended is not None:
            kind = "note" if ended.tag == "skipped" else "error"
            line[kind] = " ".join((ended.get("message") or ended.tag).split())[:300]
        lines.append(line)
    return lines
