"""The tables, the plots and the proposed defaults of a record of the GPU suite.

    python -m benchmarks.gpu_report DIR/record.jsonl                      table.md and pictures beside the record
    python -m benchmarks.gpu_report RECORD.jsonl --page docs/gpu.md       the page of the documentation
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import gpu_record, gpu_report_steps

Line = dict[str, Any]
OURS, OTHERS = ("native", "triton"), ("eager", "compile", "apex")


def cases_of(rows: list[Line]) -> list[dict[str, Line]]:
    """The rows of each case by contestant, in the order of the run."""
    cases: dict[str, dict[str, Line]] = {}
    for row in rows:
        cases.setdefault(row["key"], {})[row["contestant"]] = row
    return list(cases.values())


def seconds_of(case: dict[str, Line], name: str) -> float | None:
    value = case[name]["seconds"] if name in case else None
    return None if value is None else float(value)


def best_of(case: dict[str, Line]) -> tuple[str, float] | None:
    """The faster of our implementations."""
    found = [(s, name) for name in OURS if (s := seconds_of(case, name)) is not None]
    return (min(found)[1], min(found)[0]) if found else None


def markdown(lines: list[Line], parts: list[str], picture: str | None = None, of_steps: str | None = None) -> str:
    """The page: what ran, what failed, training and sampling, scripts, the ops, whole networks, the sweep, defaults."""
    about = gpu_record.about(lines) or {}
    rows = gpu_record.rows(lines)
    timings = [row for row in rows if row["part"] != "sweep"]
    text = ["# Timings on a GPU", "", *(f"- {k}: {v}" for k, v in about.items() if k not in ("kind", "part")), ""]
    text += ["## Parts", "", *_parts(lines, parts), "", "## Tests and checks", "", *_checks(lines), ""]
    text += [*gpu_report_steps.markdown(lines, of_steps), *gpu_report_steps.scripts(lines)]
    text += ["## Against what was set out", "", *bars(timings, launch_of(lines)), ""]
    text += [
        "## Timings of the ops",
        "",
        "Microseconds of one call on the GPU, the best of many turns; inputs rotate over three times the L2 cache.",
        "*floor*: the bytes that the op must move over the measured copy rate, or its normal numbers over the rate of",
        "the kernel that only draws, where that is longer; *copy*: a copy of as many bytes, timed in the same turns.",
        "*share*: of the floor that the faster of native (CUDA C++) and Triton reaches; *x*: times as fast as the best",
        "of the others.",
        "",
    ]
    if picture:
        text += [f"![share of the floor]({picture})", ""]
    names = ("floor", "copy", *OURS, *OTHERS)
    text += [f"| case | dtype | MB | {' | '.join(names)} | share | x |", "| --- " * (len(names) + 5) + "|"]
    text += [_line(case) for case in cases_of(timings)]
    text += ["", "## Whole networks, all norms of a pass, ms", "", *_networks(timings)]
    text += ["", "## Sweep of group_norm_silu", "", *_sweep(rows)]
    text += ["", "## Proposed entries for fastddpm/_gpu_defaults.py", "", "```python"]
    text += [*proposed(timings), *proposed_cuts(rows), "```", ""]
    failures = [row for row in [*rows, *gpu_record.steps(lines)] if row.get("error")]
    text += ["## Failures", "", *(f"- {r['key']}, {r['contestant']}: {r['error']}" for r in failures)]
    failed = [line for line in lines if line.get("kind") == "floor" and line.get("error")]
    text += [f"- {line['key']}, floor: {line['error']}" for line in failed]
    return "\n".join(text if failures or failed else [*text, "none"]) + "\n"


def _parts(lines: list[Line], parts: list[str]) -> Iterator[str]:
    for name in parts:
        end = [line for line in lines if line.get("part") == name and line.get("kind") in ("end", "stopped")]
        if not end:
            yield f"- {name}: not run"
        elif end[-1]["kind"] == "end":
            yield f"- {name}: complete, {end[-1]['seconds']:.0f} s"
        else:
            yield f"- {name}: {end[-1]['reason']}"


def _checks(lines: list[Line]) -> list[str]:
    found = {(c["part"], c["name"]): c for c in lines if c.get("kind") == "check"}.values()
    text = []
    for check in found:
        text.append(f"- {check['name']}: {'passed' if check['ok'] else 'FAILED'}; {check['summary']}")
        text += [f"  - {failure}" for failure in check.get("failures", [])]
    return text or ["not run"]


def _line(case: dict[str, Line]) -> str:
    first = next(iter(case.values()))
    cells = [f"{first['floor'] * 1e6:.1f}"]
    for name in ("copy", *OURS, *OTHERS):
        seconds = seconds_of(case, name)
        cells.append(f"{seconds * 1e6:.1f}" if seconds is not None else "error" if name in case else "")
    ours = best_of(case)
    others = [s for name in OTHERS if (s := seconds_of(case, name)) is not None]
    cells.append(f"{first['floor'] / ours[1]:.0%}" if ours else "")
    cells.append(f"{min(others) / ours[1]:.2f}" if ours and others else "")
    return f"| {first['case']} | {first['dtype']} | {first['bytes'] / 1e6:.2f} | {' | '.join(cells)} |"


@dataclass(frozen=True)
class Bar:
    """What a set of cases shall reach: ``reached`` gives a case's number, of which ``least`` is wanted."""

    what: str
    least: float
    applies: Callable[[Line], bool]
    reached: Callable[[dict[str, Line]], float | None]


def launch_of(lines: list[Line]) -> float | None:
    """Seconds of a kernel that does nothing."""
    found = [line["launch"] for line in lines if line.get("kind") == "rates" and line.get("launch")]
    return min(found) if found else None


def of_floor(case: dict[str, Line]) -> float | None:
    """The share of the floor that the faster of ours reaches."""
    ours = best_of(case)
    return next(iter(case.values()))["floor"] / ours[1] if ours else None


def to_compile(case: dict[str, Line]) -> float | None:
    """Times as fast as torch.compile."""
    ours, compiled = best_of(case), seconds_of(case, "compile")
    return compiled / ours[1] if ours and compiled else None


def every_bar(launch: float | None) -> list[Bar]:
    """The bars for an H100 of the issues; a norm of up to 8 MB may take the launch and half as long again."""

    def norm(row: Line) -> bool:
        return row["op"] == "group_norm_silu" and row["network"] in ("cifar-10", "adm-64", "sd-1.5")

    def of_launch(case: dict[str, Line]) -> float | None:
        ours = best_of(case)
        return (launch + next(iter(case.values()))["floor"]) / ours[1] if ours and launch else None

    def by_memory(row: Line) -> bool:
        return row["op"] != "normal" and row["bytes"] > 8e6 and row["network"] != "lsun-256"

    def is_backward(row: Line) -> bool:
        return " backward" in row["case"]

    pictures = ("q_sample", "solver_step", "diffusion_loss")
    return [
        Bar("group_norm_silu above 8 MB, of the floor", 0.9, lambda r: norm(r) and r["bytes"] > 8e6, of_floor),
        Bar("group_norm_silu up to 8 MB, of a launch and the floor", 1 / 1.5,
            lambda r: norm(r) and r["bytes"] <= 8e6, of_launch),
        Bar("q_sample, solver_step, diffusion_loss above 64 MB, of the floor", 0.9,
            lambda r: r["op"] in pictures and r["bytes"] > 64e6, of_floor),
        Bar("adam_ema, of the floor", 0.85, lambda r: r["op"] == "adam_ema", of_floor),
        Bar("every op above 8 MB that fits on chip, of the floor", 0.85, by_memory, of_floor),
        Bar("group_norm_silu forward, to torch.compile", 1.5, lambda r: norm(r) and not is_backward(r), to_compile),
        Bar("group_norm_silu backward, to torch.compile", 3.0, lambda r: norm(r) and is_backward(r), to_compile),
    ]  # fmt: skip


def bars(rows: list[Line], launch: float | None) -> list[str]:
    """A line for each bar: how many of its cases reach it, and the one that is furthest below."""
    text = ["| of the issues, for an H100 | wanted | cases that reach it | least | at |", "| --- " * 5 + "|"]
    for bar in every_bar(launch):
        cases = [case for case in cases_of(rows) if bar.applies(next(iter(case.values())))]
        found = [(v, next(iter(case.values()))["key"]) for case in cases if (v := bar.reached(case)) is not None]
        least, key = min(found, default=(0.0, ""))
        reached = f"{sum(value >= bar.least for value, _ in found)} of {len(found)} | {least:.2f}"
        text.append(f"| {bar.what} | {bar.least:.2f} | {reached if found else 'not measured | '} | {key} |")
    return text


def _networks(rows: list[Line]) -> list[str]:
    """Sums over the norms of a pass, of the contestants that have a time for each."""
    groups: dict[tuple[str, str, str], list[dict[str, Line]]] = {}
    for case in cases_of(rows):
        first = next(iter(case.values()))
        if "norm" in first["op"] and first["dtype"] == "bfloat16":
            backward = "backward" if " backward" in first["case"] else "forward"
            groups.setdefault((first["network"], first["op"], backward), []).append(case)
    text = [f"| network | op | pass | {' | '.join(('floor', *OURS, *OTHERS))} |", "| --- " * 9 + "|"]
    for group, cases in groups.items():
        cells = [f"{1e3 * sum(next(iter(c.values()))['floor'] * next(iter(c.values()))['count'] for c in cases):.3f}"]
        for name in (*OURS, *OTHERS):
            times = [seconds_of(case, name) for case in cases]
            counts = [next(iter(case.values()))["count"] for case in cases]
            known = [t for t in times if t is not None]
            complete = len(known) == len(times)
            cells.append(f"{1e3 * sum(t * n for t, n in zip(known, counts, strict=True)):.3f}" if complete else "")
        text.append(f"| {' | '.join(group)} | {' | '.join(cells)} |")
    return text if groups else ["not measured"]


def _sweep(rows: list[Line]) -> list[str]:
    """For each shape the plan's own choice, and the fastest."""
    text = []
    for case in cases_of([row for row in rows if row["part"] == "sweep" and row["seconds"] is not None]):
        best = min(case.values(), key=lambda row: row["seconds"])
        plan = case.get("native, by plan")
        text.append(
            f"- {best['case']} {best['dtype']}: best {best['contestant'].removeprefix('native, ')} "
            f"{best['seconds'] * 1e6:.1f} us; by plan {plan['seconds'] * 1e6:.1f} us"
            if plan
            else f"- {best['case']}: best {best['contestant']} {best['seconds'] * 1e6:.1f} us"
        )
    return text or ["not measured"]


def proposed(rows: list[Line]) -> list[str]:
    """For each op the faster of CUDA and Triton by the elements of a call, neighbours that agree in one range.

    Calls of one size are added up, forward and backward: an op runs both by the same implementation.
    """
    totals: dict[str, dict[int, dict[str, float]]] = {}
    for case in cases_of(rows):
        first = next(iter(case.values()))
        times = {name: seconds_of(case, name) for name in OURS}
        if any(t is None for t in times.values()):
            continue
        size = totals.setdefault(first["op"], {}).setdefault(first["elements"], dict.fromkeys(OURS, 0.0))
        for name, t in times.items():
            size[name] += (t or 0.0) / first["floor"]  # each case weighs by what it could take at best
    text = ["RANGES = {"]
    for op, sizes in totals.items():
        ranges: list[tuple[float, str]] = []
        for elements, times_of in sorted(sizes.items()):
            winner = "CUDA" if times_of["native"] <= times_of["triton"] else "TRITON"
            if ranges and ranges[-1][1] == winner:
                ranges.pop()
            ranges.append((elements, winner))
        ranges[-1] = (float("inf"), ranges[-1][1])
        entries = ", ".join(f"Range({'math.inf' if n == float('inf') else f'{n:_}'}, {w})" for n, w in ranges)
        text.append(f'    "{op}": ({entries},),')
    return [*text, "}"] if totals else ["# not measured"]


WAYS = ("cluster", "two reads", "cooperative")  # by what `gpu_timing.planned` is given, of which 0 is also by plan
WORTH = 0.98  # of the time of the plan's own choice, at most: less is noise


def proposed_cuts(rows: list[Line]) -> list[str]:
    """For each shape of the sweep how CUDA C++ is to cut it, where that is faster than what it chooses itself."""
    text = []
    for case in cases_of([row for row in rows if row["part"] == "sweep" and row["seconds"] is not None]):
        plan = case.get("native, by plan")
        best = min(case.values(), key=lambda row: row["seconds"])
        if plan is None or best["seconds"] > WORTH * plan["seconds"]:
            continue
        direction = "backward" if " backward" in best["case"] else "forward"
        _, channels, height, width = map(int, best["case"].rpartition(" ")[2].split("x"))
        pixels, size = height * width, 4 if best["dtype"] == "float32" else 2
        text.append(
            f'    Cut("{direction}", ({channels}, {channels}), ({pixels}, {pixels}), {size}, "{WAYS[best["way"]]}", '
            f"{best['slab']}, {best['cluster']}),"
        )
    return ["CUTS = (", *text, ")"] if text else ["# CUTS: not measured, or nothing faster than by estimates"]


def plot(lines: list[Line], path: Path) -> bool:
    """The share of the floor by size, a panel for each op and pass. Returns whether there is matplotlib, and a row."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in gpu_record.rows(lines) if r["part"] != "sweep" and r["seconds"] is not None]
    panels = sorted({(r["op"], " backward" in r["case"]) for r in rows if r["contestant"] in (*OURS, *OTHERS)})
    if not panels:
        return False
    wide = 3
    high = -(-len(panels) // wide)
    figure, axes = plt.subplots(high, wide, figsize=(5 * wide, 3.2 * high), squeeze=False)
    colours = dict(zip((*OURS, *OTHERS), ("#1f6f8b", "#3aa17e", "#8a8a8a", "#d1603d", "#8e5ea2"), strict=True))
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (op, backward) in zip(axes.flat, panels, strict=False):
        for name, colour in colours.items():
            mine = [r for r in rows if (r["op"], " backward" in r["case"], r["contestant"]) == (op, backward, name)]
            points = [(r["bytes"] / 1e6, 100 * r["floor"] / r["seconds"]) for r in mine]
            if points:
                axis.scatter(*zip(*points, strict=True), s=14, color=colour, label=name)
        axis.set_xscale("log")
        axis.set_ylim(0, 110)
        axis.set_title(f"{op}{' backward' if backward else ''}", fontsize=9)
        axis.set_xlabel("MB moved", fontsize=7)
        axis.set_ylabel("% of the floor", fontsize=7)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=6)
    figure.suptitle(str((gpu_record.about(lines) or {}).get("device", "")), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def write(record: Path, parts: list[str], page: Path | None = None) -> list[Path]:
    """The page, and the plots where there can be some, beside it; without a page table.md beside the record."""
    lines = gpu_record.read(record)
    page = record.with_name("table.md") if page is None else page
    stem = "plot" if page.name == "table.md" else page.stem
    pictures = [page.with_name(f"{stem}.png"), page.with_name(f"{stem}-steps.png")]
    drawn = [plot(lines, pictures[0]), gpu_report_steps.plot(lines, pictures[1])]
    names = [picture.name if there else None for picture, there in zip(pictures, drawn, strict=True)]
    page.write_text(markdown(lines, parts, *names), encoding="utf-8")
    return [page, *(picture for picture, there in zip(pictures, drawn, strict=True) if there)]


def main() -> None:
    from benchmarks.gpu_suite import every_part

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--page", type=Path, help="where the page goes (default: table.md beside the record)")
    given = parser.parse_args()
    for path in write(given.record, [part.name for part in every_part()], given.page):
        print(path)


if __name__ == "__main__":
    main()
