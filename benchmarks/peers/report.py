"""The table, the verdicts, the page and the plots of a record of benchmarks/peers.

python -m benchmarks.peers.report RECORD.jsonl --plot docs/peers.png >docs/peers.md
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import make_page

Row = dict[str, Any]

# What was set out to be reached on the CPU with one core left free: against the floor, against diffusers as its example
# uses it (without an average of the weights), and against the fastest setting of any peer; memory against diffusers,
# with an average where ours has it.
BARS = {
    "train": dict(floor=1.2, default=2.2, best=1.35),
    "sample": dict(floor=1.2, default=2.2, best=1.4),
}
MEMORY_BAR = 0.7
TASKS = {"train": "training", "sample": "sampling", "memory": "memory of training"}
SCRIPT = "the script of "
"""Begins the network of rows that are a script of another library, before and after its import line is changed."""
SCRIPT_BAR = 1.3  # on the CPU, in the same precision
OURS = "fastddpm"
DTYPES = ("bfloat16", "float32")
SAMPLER_STEPS = 1000  # of ancestral sampling, in which an image is drawn
COLOURS = {OURS: "#1f6f8b", "diffusers": "#d1603d", "denoising-diffusion-pytorch": "#8a8d3a"}


def cases_of(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each task, network and batch size, in the order of the run, under a name."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        where = f"{row['device']}, {row['threads']} thread(s)"
        name = f"{TASKS[row['task']]}, {row['network']}, batch {row['batch']}, {where}"
        cases.setdefault(name, []).append(row)
    return cases


def images_per_second(row: Row) -> float:
    """Seen in training; drawn by 1000 steps in sampling."""
    steps = SAMPLER_STEPS if row["task"] == "sample" else 1
    return float(row["batch"] / row["seconds"] / steps)


def cells_of(row: Row) -> list[str]:
    """A row as text: library, setting, ms, images per second, floor in ms, step over floor."""
    if row["seconds"] is None:
        return [row["library"], row["setting"], row["note"], "", "", ""]
    ratio = "" if row["floor"] is None else f"{row['seconds'] / row['floor']:.2f}"
    floor = "" if row["floor"] is None else f"{row['floor'] * 1e3:,.1f}"
    return [
        row["library"], row["setting"], f"{row['seconds'] * 1e3:,.1f}", f"{images_per_second(row):,.3g}", floor, ratio,
    ]  # fmt: skip


HEAD = ["library", "setting", "ms a step", "images/s", "floor ms", "step/floor"]
MEMORY_HEAD = ["library", "setting", "MiB", "to diffusers", "without EMA"]


def table_of(case: list[Row]) -> list[list[str]]:
    """Head and rows of a case, as text."""
    if case[0]["task"] != "memory":
        return [HEAD, *(cells_of(row) for row in case)]
    lines = [MEMORY_HEAD]
    for row in case:
        there = row["memory"] is not None
        memory = f"{row['memory'] / 2**20:,.0f}" if there else row["note"]
        yardsticks = [memory_yardstick(case, row["dtype"], ema) for ema in (row["ema"], False)]
        ratios = [f"{row['memory'] / found['memory']:.2f}" if there and found else "" for found in yardsticks]
        lines.append([row["library"], row["setting"], memory, *ratios])
    return lines


def memory_yardstick(case: list[Row], dtype: str, ema: bool) -> Row | None:
    """Diffusers in a precision, with or without an average of the weights."""
    return next((row for row in case if row["library"] == "diffusers" and row["dtype"] == dtype
                 and row["ema"] == ema and row["memory"] is not None), None)  # fmt: skip


def lines_of(rows: list[Row]) -> list[str]:
    """A table in columns for each case."""
    lines = []
    for name, case in cases_of(rows).items():
        lines += ["", name]
        for library, setting, *numbers in table_of(case):
            lines.append(f"  {library:<29}{setting:<60}{''.join(f'{cell:>13}' for cell in numbers)}".rstrip())
    return lines


def fastest(rows: list[Row], fits: Callable[[Row], bool]) -> Row | None:
    """The row with the shortest step among those that ran and fit."""
    there = [row for row in rows if row["seconds"] is not None and fits(row)]
    return min(there, key=lambda row: float(row["seconds"]), default=None)


def verdicts(rows: list[Row]) -> list[str]:
    """Each bar, what was reached, and whether that is enough."""
    lines = []
    for name, case in cases_of(rows).items():
        if case[0]["task"] == "memory":
            pairs = ((False, False), (True, True), (True, False))  # with an average: ours, theirs
            lines += [_memory(name, case, dtype, *pair) for dtype in DTYPES for pair in pairs]
            continue
        if case[0]["network"].startswith(SCRIPT):
            before = fastest(case, lambda row: row["library"] != OURS)
            after = fastest(case, lambda row: row["library"] == OURS)
            lines.append(_against(name, before, after, SCRIPT_BAR if case[0]["device"] == "cpu" else None))
            continue
        bars = BARS[case[0]["task"]] if case[0]["device"] == "cpu" else {}
        ours = fastest(case, lambda row: row["library"] == OURS)
        for dtype in DTYPES:
            mine = fastest(case, lambda row, dtype=dtype: row["library"] == OURS and row["dtype"] == dtype)  # type: ignore[misc]
            if mine is not None and mine["floor"] is not None:
                reached = mine["seconds"] / mine["floor"]
                lines.append(_verdict(f"{name}: step/floor, {dtype}", reached, bars.get("floor"), at_most=True))
        same = [row for row in case if row["library"] != OURS and not row["own"]]
        default = fastest(same, lambda row: row["library"] == "diffusers" and row["default"] and not row["ema"])
        best = fastest(same, lambda row: True)
        lines.append(_against(f"{name}: to diffusers, default", default, ours, bars.get("default")))
        lines.append(_against(f"{name}: to the best peer", best, ours, bars.get("best")))
    return lines


def _against(what: str, peer: Row | None, ours: Row | None, bar: float | None) -> str:
    if peer is None or ours is None:
        return _verdict(what, None, bar)
    who = f"{peer['library']}, {peer['setting']}; ours {ours['setting']}"
    return _verdict(f"{what} ({who})", peer["seconds"] / ours["seconds"], bar)


def _memory(name: str, case: list[Row], dtype: str, ema: bool, their_ema: bool) -> str:
    """The least of ours over that of diffusers in the same precision; held against the bar where both keep the same."""
    both = f"both {'with' if ema else 'without'} EMA"
    what = f"{name}: to diffusers, {dtype}, {both if ema == their_ema else 'ours alone with EMA'}"
    fits = [row for row in case if row["library"] == OURS and row["memory"] is not None]
    ours = min((r for r in fits if r["dtype"] == dtype and r["ema"] == ema), key=lambda r: r["memory"], default=None)
    yardstick, bar = memory_yardstick(case, dtype, their_ema), MEMORY_BAR if ema == their_ema else None
    if ours is None or yardstick is None:
        return _verdict(what, None, bar)
    return _verdict(f"{what} ({ours['setting']})", ours["memory"] / yardstick["memory"], bar, at_most=True)


def _verdict(what: str, reached: float | None, bar: float | None, *, at_most: bool = False) -> str:
    if reached is None:
        return f"{what}: not measured"
    if bar is None:
        return f"{what}: {reached:.2f}x"
    met = reached <= bar if at_most else reached >= bar
    limit = f"{'at most' if at_most else 'at least'} {bar}x"
    return f"{what}: {limit}: {reached:.2f}x, {'met' if met else 'NOT MET'}"


def markdown(about: Row, rows: list[Row], record: Path, picture: Path | None) -> str:
    """The page of the documentation."""
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    lines = [
        "# Against other libraries",
        "",
        f"{about['device']}, {about['cpus']} processors, instruction set {about['instruction set']}; {packages}, "
        f"{about['python']}; {about['date']}, commit {about['commit']}. Record: `{record}`, made by",
        "`pytest benchmarks/peers --benchmark-only --peers-record RECORD`.",
        "",
        "Everyone trains and samples the same network on the same random uint8 images, in turns in one run, and the",
        "best time counts. Ours is a whole step of `Trainer`, with the average of the weights, which the others leave",
        "out but where it says EMA. *default* is the library as its example uses it: eager, float32, NCHW, torch's",
        "AdamW, its own pipeline; other settings have the fused AdamW and, in sampling, weights in their dtype and the",
        "bare loop. denoising-diffusion-pytorch runs its GaussianDiffusion around the network of diffusers; *own Unet*",
        "is another network of 35,711,491 parameters and less than a third of the operations, held against its own",
        "floor alone. The floor is the convolutions, linear layers and attention of the network alone, each the least",
        "of 20 calls of torch's kernels in channels_last, and in training the bytes of the optimiser at the rate of a",
        "copy; ours multiplies less than that in a 3x3 convolution on the CPU, and computes bfloat16 in float32 where",
        "that is faster, so its step can be shorter than the floor. Images per",
        f"second are those of {SAMPLER_STEPS:,} steps in sampling; what ours does once for them on the CPU, to list",
        "the operators of the network and to reorder or transform its weights (about 0.3 s), is not in them. Memory is "
        "the peak resident size of a process of its own, less",
        "that after its imports; against diffusers in the same precision, with EMA where the row has it, and without. "
        "What was not",
        "measured is left empty.",
        "",
        *([] if picture is None else [f"![images per second, ratio to the floor, time by part]({picture.name})", ""]),
    ]
    for name, case in cases_of(rows).items():
        head, *table = table_of(case)
        lines += [f"## {name[0].upper()}{name[1:]}", "", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
        lines += [f"| {' | '.join(cells)} |" for cells in table]
        lines.append("")
    lines += ["## Against what was set out", "", *(f"- {line}" for line in verdicts(rows))]
    return "\n".join(lines)


def plot(about: Row, rows: list[Row], path: Path) -> None:
    """A line of panels for each case: images per second and step over floor; at the end the time by part."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = cases_of([row for row in rows if row["task"] != "memory"])
    cases = {name: [row for row in case if row["seconds"] is not None] for name, case in timed.items()}
    split = [row for row in rows if row["parts"]]
    heights = [1.2 + 0.22 * len(case) for case in cases.values()] + ([1.2 + 0.35 * len(split)] if split else [])
    figure = plt.figure(figsize=(13, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    for line, (name, case) in enumerate(cases.items()):
        bars(figure.add_subplot(grid[line, 0]), case, images_per_second, setting_of, "images per second", name)
        with_floor = [row for row in case if row["floor"] is not None]
        panel = figure.add_subplot(grid[line, 1])
        bars(panel, with_floor, step_to_floor, setting_of, "step / floor (1 is the floor)", "")
        panel.axvline(1, color="grey", linewidth=0.8)
    if split:
        _parts(figure.add_subplot(grid[len(cases), :]), split)
    figure.suptitle(f"{about['device']}, torch {about['packages']['torch']}, {about['date']}", fontsize=9)
    figure.savefig(path, dpi=110)


def bars(
    panel: Any, rows: list[Row], value: Callable[[Row], float], name: Callable[[Row], str], label: str, title: str
) -> None:
    """A bar for each row, from the top down, in the colour of its library."""
    rows = rows[::-1]
    values = [value(row) for row in rows]
    panel.barh(range(len(rows)), values, height=0.7, color=[COLOURS.get(row["library"], "#8a8a8a") for row in rows])
    for i, reached in enumerate(values):
        panel.text(reached, i, f" {reached:.3g}", va="center", fontsize=6)
    panel.set_yticks(range(len(rows)), [name(row) for row in rows], fontsize=6)
    panel.set_xlim(0, 1.12 * max(values, default=1))
    panel.tick_params(axis="x", labelsize=6)
    panel.set_xlabel(label, fontsize=7)
    panel.set_title(title, fontsize=8, loc="left")
    panel.margins(y=0.01)


def setting_of(row: Row) -> str:
    """The contestant of a row."""
    return f"{row['library']}: {row['setting']}"


def step_to_floor(row: Row) -> float:
    """1 is the floor."""
    return float(row["seconds"] / row["floor"])


def _parts(panel: Any, rows: list[Row]) -> None:
    """Shares of the profiler, drawn to the length of the step."""
    names = list(dict.fromkeys(part for row in rows for part in row["parts"]))
    left = [0.0] * len(rows)
    for name in names:
        spent = [row["seconds"] * 1e3 * row["parts"].get(name, 0.0) / sum(row["parts"].values()) for row in rows]
        panel.barh(range(len(rows)), spent, left=left, height=0.7, label=name)
        left = [a + b for a, b in zip(left, spent, strict=True)]
    labels = [f"{row['library']}: {row['setting']}, {row['network']}" for row in rows]
    panel.set_yticks(range(len(rows)), labels, fontsize=6)
    panel.invert_yaxis()
    panel.tick_params(axis="x", labelsize=6)
    panel.set_xlabel("ms of a training step, by kind of op", fontsize=7)
    panel.legend(fontsize=6, ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, 1.3))


if __name__ == "__main__":
    make_page(__doc__, markdown, plot)
