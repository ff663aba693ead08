"""The record of the GPU suite: lines of JSON that are appended as it goes, and what has been done already."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

Line = dict[str, Any]
ROOT = Path(__file__).parent.parent


def read(path: Path) -> list[Line]:
    """The lines of a record; one that a killed process left unfinished is none, nor is one of a part that was begun
    again later."""
    lines: list[Line] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and line.get("kind") == "again":
            lines = [earlier for earlier in lines if earlier.get("part") != line["part"]]
        elif isinstance(line, dict):
            lines.append(line)
    return lines


def append(path: Path, lines: list[Line]) -> None:
    """Write lines behind what is there, in one go, so that a case is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    broken = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" + text if broken else text)


def ended(lines: list[Line]) -> set[str]:
    """The parts that are complete."""
    return {line["part"] for line in lines if line.get("kind") == "end"}


def rows(lines: list[Line]) -> list[Line]:
    """The timings; of a contestant that was timed again the last one."""
    latest = {(r["key"], r["contestant"]): r for r in lines if r.get("kind") == "row"}
    return list(latest.values())


def timed(lines: list[Line]) -> set[str]:
    """The keys of the cases that are complete: their rows are written together, that of the copy among them."""
    return {row["key"] for row in rows(lines) if row["contestant"] == "copy" or row["part"] == "sweep"}


def steps(lines: list[Line]) -> list[Line]:
    """The rows of training and sampling; of a contestant that was measured again the last one."""
    latest = {(r["key"], r["contestant"]): r for r in lines if r.get("kind") == "step"}
    return list(latest.values())


def stepped(lines: list[Line]) -> set[tuple[str, str]]:
    """The contestants of training and sampling that have a row: case and name."""
    return {(row["key"], row["contestant"]) for row in steps(lines)}


def scripts(lines: list[Line]) -> list[Line]:
    """What was found of scripts before and after; of a case that was run again the last line."""
    latest = {(r["part"], r["case"]): r for r in lines if r.get("kind") == "script"}
    return list(latest.values())


def harmful(lines: list[Line], key: str) -> frozenset[str]:
    """Contestants that left the device unusable at this case: they are not tried again."""
    return frozenset(row["contestant"] for row in rows(lines) if row["key"] == key and row.get("lost"))


def about(lines: list[Line]) -> Line | None:
    """The machine and the source that a record belongs to."""
    return next((line for line in lines if line.get("kind") == "about"), None)


def source() -> str:
    """What tells one state of the source from another; there need not be a git repository."""
    digest = hashlib.sha256()
    for folder in ("fastddpm", "csrc", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".cu", ".cuh", ".cpp", ".h"}:
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
