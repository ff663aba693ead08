"""The table of docs/memory.md against the record that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_table_against_diffusers_is_that_of_its_record() -> None:
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    page = page[page.index("## Against the bar") :]
    named = re.search(r"`(benchmarks/results/\S+\.jsonl)`", page)
    assert named is not None
    rows = [json.loads(line) for line in (ROOT / named[1]).read_text(encoding="utf-8").splitlines()]
    taken = {(row["library"], row["setting"]): row["memory"] for row in rows if row.get("task") == "memory"}
    wanted = []
    for dtype, theirs in (("float32", "default, float32"), ("bfloat16", "bfloat16")):
        for title, ema in (("", ""), (", both with EMA", ", EMA")):
            bar = taken["diffusers", theirs + ema]
            ours = [taken.get(("fastddpm", f"{dtype}, channels_last{ema}{more}"))
                    for more in ("", ", recompute", ", recompute, bfloat16 gradients")]  # fmt: skip
            cells = ["" if size is None else f"{size / 2**20:,.0f}, {size / bar:.2f}x" for size in ours]
            wanted.append(f"| {dtype}{title} | {bar / 2**20:,.0f} | {' | '.join(cells)} |")
    table = [line for line in page.splitlines() if line.startswith(("| float32", "| bfloat16"))]
    assert table == wanted
