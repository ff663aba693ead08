"""The table and the plot of a record of the benchmarks, and what others reached.

    python -m benchmarks.report benchmarks/results/RECORD.jsonl --plot docs/benchmarks.png >docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]

# What was set out to be reached: case, dtype, least ratio to eager at one thread. At n threads 0.8 n times it where
# eager uses one thread whatever it is given, as random numbers do.
BARS = [
    ("normal 128x3x32x32", "float32", 3.5, True),
    ("q_sample 128x3x32x32", "float32", 4.0, True),
    ("solver_step 128x3x32x32", "float32", 3.0, True),
    ("group_norm_silu 16x128x32x32", "float32", 2.5, False),
    ("group_norm_silu 1x128x256x256", "float32", 2.5, False),
    ("group_norm_silu backward 16x128x32x32", "float32", 8.0, False),
    ("group_norm_silu 16x128x32x32", "bfloat16", 2.0, False),
    ("group_norm_silu backward 16x128x32x32", "bfloat16", 2.0, False),
    ("rms_norm_silu 16x128x32x32", "float32", 2.0, False),
    ("rms_norm_silu backward 16x128x32x32", "float32", 2.0, False),
    ("rms_norm_silu 16x128x32x32", "bfloat16", 2.0, False),
    ("rms_norm_silu backward 16x128x32x32", "bfloat16", 2.0, False),
    ("training step CIFAR-10 U-Net, batch 8", "bfloat16", 1.4, False),
]


# What a call takes beside its work, and what was set out: microseconds of Python beside the operator, those that an
# autograd.Function took where the numbers to reach were written down, and twice as many where a gradient is recorded.
CALL, YARDSTICKS, PYTHON = "call of ", "PyTorch", 6.8


# How a record was measured, as its header has it; one without the word is of the time before.
FIVE, TURNS = "two to five calls in a row", "two to twenty calls in a row, in an order that is drawn"
COPIED, UPDATED = "copy", "copy, or update in place"
FLOORS = {
    COPIED: [
        "The bytes were moved by a copy. A CPU first reads the memory that it writes, unless it has read it before, so",
        "a copy moves half as many bytes again as are counted. adam_ema writes where it has read, and does not: to it",
        "the copy is no floor, and a share above 100% says how much faster than those of a copy its bytes moved.",
    ],
    UPDATED: [
        "The bytes are moved by a copy and, of adam_ema, by an update in place: a CPU first reads the memory that it",
        "writes, unless it has read it before, so a copy moves half as many bytes again as are counted.",
    ],
}


def lines_of(rows: Rows) -> list[str]:
    """A row for each case and number of threads, as text in columns."""
    head = f"{'case':<40}{'dtype':<10}{'threads':>7}{'MB':>8}{'ms':>10}{'floor ms':>10}{'share':>7}"
    lines = [head + "".join(f"{'to ' + name:>12}" for name in ("eager", "compile", "native op"))]
    for case in cases_of(rows):
        ours = case["fastddpm"]
        others = "".join(
            f"{case[name]['seconds'] / ours['seconds']:>11.2f}x" if name in case else f"{'':>12}"
            for name in ("eager", "compile", "native op")
        )
        lines.append(
            f"{ours['case']:<40}{ours['dtype']:<10}{ours['threads']:>7}{ours['bytes'] / 1e6:>8.2f}"
            f"{ours['seconds'] * 1e3:>10.3f}{ours['floor'] * 1e3:>10.3f}{ours['floor'] / ours['seconds']:>7.0%}{others}"
        )
    return lines


def cases_of(rows: Rows, calls: bool = False) -> list[dict[str, dict[str, Any]]]:
    """The rows of each case and number of threads, by contestant, in the order of the run: of work, or of calls."""
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in (row for row in rows if row["case"].startswith(CALL) == calls):
        cases.setdefault((row["case"], row["dtype"], row["threads"]), {})[row["contestant"]] = row
    return list(cases.values())


def verdicts(rows: Rows) -> list[str]:
    """Each bar, what was reached, and whether that is enough."""
    found = {(r["case"], r["dtype"], r["threads"]): r["to_eager"] for r in rows if r["contestant"] == "fastddpm"}
    lines = []
    for case, dtype, least, scales in BARS:
        for threads in sorted({key[2] for key in found}):
            reached = found.get((case, dtype, threads))
            bar = least * (0.8 * threads if scales and threads > 1 else 1)
            verdict = "not measured" if reached is None else f"{reached:.2f}x, {'met' if reached >= bar else 'NOT MET'}"
            lines.append(f"{case} {dtype}, {threads} thread(s): at least {bar:.1f}x to eager: {verdict}")
    return lines


def calls_in(rows: Rows) -> list[str]:
    """The section on what a call takes beside its work; none where the record has nothing of it."""
    found = {next(iter(case.values()))["case"].removeprefix(CALL): case for case in cases_of(rows, calls=True)}
    if not found:
        return []
    micro = {op: {name: row["seconds"] * 1e6 for name, row in case.items()} for op, case in found.items()}
    told = ", ".join(f"{name} {us:.1f}" for name, us in micro.pop(YARDSTICKS, {}).items())
    lines = [
        "",
        "## Microseconds of a call",
        "",
        "Each op at a size that takes no time, on one thread, the best of calls in turns. *operator* is what C++",
        "registered, called with the same arguments; *Python*, which checks them and chooses the implementation, is",
        "what the call takes beside it. Where a gradient is wanted an autograd.Function is part of that. *eager* is",
        "what a user of PyTorch writes, several operators for most ops.",
        *(["", f"Of PyTorch itself: {told}."] if told else []),
        "",
        "| op | call | operator | Python | eager | with gradient | Python | eager |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for op, us in micro.items():
        cells = [us["fastddpm"], us["operator"], us["fastddpm"] - us["operator"], us["eager"]]
        if "fastddpm, gradient" in us:
            with_gradient = us["fastddpm, gradient"]
            cells += [with_gradient, with_gradient - us["operator"], us["eager, gradient"]]
        text = [f"{cell:.1f}" for cell in cells] + [""] * (7 - len(cells))
        lines.append(f"| {op} | {' | '.join(text)} |")
    beside = {op: us["fastddpm"] - us["operator"] for op, us in micro.items()}
    further = {op: us["fastddpm, gradient"] - us["operator"] for op, us in micro.items() if "fastddpm, gradient" in us}
    lines.append("")
    for what, taken, bar in (("a call", beside, PYTHON), ("a call with gradient", further, 2 * PYTHON)):
        if taken:  # a run may have had some of the ops
            most, op = max((us, op) for op, us in taken.items())
            verdict = "met" if most <= bar else "NOT MET"
            lines.append(f"- Python of {what}: at most {bar:.1f} us: {most:.1f} ({op}), {verdict}")
    return lines


def markdown(
    about: dict[str, Any], rows: Rows, record: Path, picture: Path | None, others: Sequence[Path] = ()
) -> str:
    """The page of the documentation."""
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    rounds = about.get("rounds", 1)
    settings = f" --bench-seconds {about['seconds']:g}" if "seconds" in about else ""
    settings += f" --bench-rounds {rounds}" if rounds > 1 else ""
    best = f"the best call of {rounds} rounds through all cases" if rounds > 1 else "the best call"
    lines = [
        "# Timings of the ops",
        "",
        f"{about['device']}, {about['cpus']} processors, instruction set {about['instruction set']}; "
        f"{about['compiler']}, {packages}, {about['python']}; {about['date']}, commit "
        f"{about['commit']}. Record: `{record}`, made by `pytest benchmarks/ --benchmark-only{settings} "
        "--bench-record RECORD`.",
        "",
        f"Contestants take turns of {about.get('turns', FIVE)}, and {best} counts: so threads are awake, as in",
        "a network, and what fits in a cache may lie there, for every contestant and for the floor. *eager* is the",
        "shortest PyTorch that a good user would write, *compile* is `torch.compile` of it, *native op* the one ATen",
        "operator that does the heart of it. The floor is the time to move as many bytes as the op must, measured in",
        "the same turns, or that to draw as many normal numbers where it is longer; *share* is the floor by our time.",
        *FLOORS[about.get("floor", COPIED)],
        "What stays in the cache moves faster than memory does: a share exceeds 100%, too, where more of the op's data",
        "lies there than of the copy's. Of conv3x3, linear and self_attention arithmetic is the limit: conv3x3",
        "multiplies 2.25 times less than the direct sum that it is compared with, in half precision 4 times. Of linear",
        "the numbers are rows, inputs and outputs, of self_attention samples, tokens and three times the channels of",
        "its one head; eager is `scaled_dot_product_attention`. On a GPU: not measured.",
        "",
        *([] if picture is None else [f"![times as fast as eager PyTorch]({picture.name})", ""]),
        "| case | dtype | threads | MB | ms | floor ms | share | to eager | to compile | to native op |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in cases_of(rows):
        ours = case["fastddpm"]
        ratios = (
            f"{case[name]['seconds'] / ours['seconds']:.2f}x" if name in case else ""
            for name in ("eager", "compile", "native op")
        )
        lines.append(
            f"| {ours['case']} | {ours['dtype']} | {ours['threads']} | {ours['bytes'] / 1e6:.2f} "
            f"| {ours['seconds'] * 1e3:.3f} | {ours['floor'] * 1e3:.3f} | {ours['floor'] / ours['seconds']:.0%} "
            f"| {' | '.join(ratios)} |"
        )
    lines += ["", "## Against what was set out", ""]
    lines += [f"- {line}" for line in verdicts(rows)]
    told = calls_in(rows)
    for other in others:
        about, rows = read(other)
        lines += ["", f"With torch {about['packages']['torch']} on {about['device']}, {about['date']}, commit "
                  f"{about['commit']}, turns of {about.get('turns', FIVE)} (`{other}`):", ""]  # fmt: skip
        lines += [f"- {line}" for line in verdicts(rows) if not line.endswith("not measured")]
    return "\n".join(lines + told)


def plot(about: dict[str, Any], rows: Rows, path: Path) -> None:
    """Bars of the ratio to eager, ours and torch.compile's, one panel for each number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = cases_of(rows)
    counts = sorted({case["fastddpm"]["threads"] for case in cases})
    most = max(sum(case["fastddpm"]["threads"] == n for case in cases) for n in counts)
    figure, panels = plt.subplots(1, len(counts), figsize=(6.5 * len(counts), 1.6 + 0.3 * most), squeeze=False)
    for panel, threads in zip(panels[0], counts, strict=True):
        mine = [case for case in cases if case["fastddpm"]["threads"] == threads][::-1]
        labels = [f"{case['fastddpm']['case']}, {case['fastddpm']['dtype']}" for case in mine]
        ours = [case["fastddpm"]["to_eager"] for case in mine]
        panel.barh(range(len(mine)), ours, height=0.7, color="#1f6f8b", label="fastddpm")
        theirs = [(i, case["compile"]["to_eager"]) for i, case in enumerate(mine) if "compile" in case]
        if theirs:
            panel.scatter(*zip(*[(x, i) for i, x in theirs], strict=True), color="#d1603d", zorder=3, s=22,
                          label="torch.compile")  # fmt: skip
        for i, case in enumerate(mine):
            share = case["fastddpm"]["floor"] / case["fastddpm"]["seconds"]
            panel.text(ours[i] * 1.03, i, f"{ours[i]:.1f}x  ({share:.0%})", va="center", fontsize=7)
        panel.axvline(1, color="grey", linewidth=0.8)
        panel.set_xscale("log")
        panel.set_xlim(0.3, max(ours) * 3)
        panel.set_yticks(range(len(mine)), labels, fontsize=7)
        panel.set_xlabel("times as fast as eager PyTorch (share of the floor reached)", fontsize=8)
        panel.set_xticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"])
        panel.minorticks_off()
        panel.margins(y=0.01)
        panel.set_title(f"{threads} thread{'s' if threads > 1 else ''}")
        panel.legend(fontsize=7, loc="lower right")
    figure.suptitle(f"{about['device']}, torch {about['packages']['torch']}, {about['date']}", fontsize=9, y=0.998)
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    figure.savefig(path, dpi=130)


def read(record: Path) -> tuple[dict[str, Any], Rows]:
    """The header of a record, and its rows."""
    about, *rows = (json.loads(line) for line in record.read_text(encoding="utf-8").splitlines())
    return about, rows


def make_page(
    description: str | None,
    page: Callable[..., str],
    plot: Callable[[dict[str, Any], Rows, Path], None],
    has_others: bool = False,
) -> None:
    """The command line of a report: a record, and where its plot goes; the page is printed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--plot", type=Path)
    if has_others:
        parser.add_argument("--also", type=Path, nargs="*", default=(), help="further records, for what they reached")
    options = parser.parse_args()
    about, rows = read(options.record)
    if options.plot:
        plot(about, rows, options.plot)
    print(page(about, rows, options.record, options.plot, *([options.also] if has_others else [])))


if __name__ == "__main__":
    make_page(__doc__, markdown, plot, has_others=True)
