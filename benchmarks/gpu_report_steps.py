"""Training, sampling and scripts in the page of the GPU suite: tables, what was reached of what was set out, a plot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import gpu_record
from benchmarks.peers.report import bars, step_to_floor

Line = dict[str, Any]
OURS, DIFFUSERS, TORCH = "fastddpm", "diffusers", "torch"
BAR_TRAIN, BAR_SAMPLE = 128, 256
"""The batch sizes of CIFAR-10 that the bars are about."""
SMALL = (1, 16)
BEFORE = ("before", "as it was", "denoising-diffusion-pytorch", "improved_diffusion")
"""What a script is called that is as its library has it."""
SAMPLER_STEPS = 1000
HEAD = (
    "precision", "contestant", "ms a step", "images/s", "floor ms", "step/floor", "MiB", "MiB reserved", "graphs",
    "kernels", "copies", "first call s",
)  # fmt: skip


def cases_of(rows: list[Line]) -> dict[tuple[str, str, int], list[Line]]:
    """The rows of each task, network and batch size, in the order of the run."""
    cases: dict[tuple[str, str, int], list[Line]] = {}
    for row in rows:
        cases.setdefault((row["task"], row["network"], row["batch"]), []).append(row)
    return cases


def title_of(case: tuple[str, str, int]) -> str:
    return f"{'Training' if case[0] == 'train' else 'Sampling'}, {case[1]}, batch {case[2]}"


def images_per_second(row: Line) -> float:
    """Seen in training; drawn by 1000 steps in sampling."""
    return float(row["batch"] / row["seconds"] / (SAMPLER_STEPS if row["task"] == "sample" else 1))


def cells_of(row: Line) -> list[str]:
    """A row as text; where there is no time, why."""
    name = row["contestant"] + "".join(f" ({warning})" for warning in row.get("warnings", []))
    if row["seconds"] is None:
        return [row["precision"], name, row.get("note") or row.get("error", ""), *[""] * (len(HEAD) - 3)]
    memory = [f"{row[what] / 2**20:,.0f}" if row.get(what) else "" for what in ("memory", "reserved")]
    launched = [f"{row['launches'][kind]:,.3g}" for kind in ("graphs", "kernels", "copies")]
    floor = row.get("floor")
    return [
        row["precision"], name, f"{row['seconds'] * 1e3:,.2f}", f"{images_per_second(row):,.4g}",
        f"{floor * 1e3:,.2f}" if floor else "", f"{row['seconds'] / floor:.2f}" if floor else "", *memory, *launched,
        f"{row['first']:.1f}",
    ]  # fmt: skip


def markdown(lines: list[Line], picture: str | None = None) -> list[str]:
    """The tables and the verdicts, as lines of the page."""
    rows = gpu_record.steps(lines)
    text = ["## Training and sampling", ""]
    if not rows:
        return [*text, "not measured", ""]
    text += [
        "A step is one of a long run, the host's share included: the best of turns of many steps in a row, alone on",
        "the device; in sampling the difference of two samplings, by the steps that one has more. Images per second",
        f"are those of {SAMPLER_STEPS:,} steps in sampling. *floor*: the convolutions, linear layers and attention of",
        "the network alone, each the best of 20 calls between events in channels_last, and in training the bytes of",
        "the optimiser at the rate of a copy; measured by the same process, in tf32 where the precision is *default*.",
        "*graphs*, *kernels*, *copies*: launches in a step, counted by the profiler. *MiB*: of tensors, at the most.",
        "Ours trains with the average of the weights, others where it says EMA. *default*: as the example of the",
        "library does. Compiled is the network, of ours too; a CUDA graph of ours holds the whole step.",
        "",
        *([f"![images per second, and step over floor]({picture})", ""] if picture else []),
    ]
    for case, found in cases_of(rows).items():
        text += [f"### {title_of(case)}", "", f"| {' | '.join(HEAD)} |", "| --- " * len(HEAD) + "|"]
        text += [f"| {' | '.join(cells_of(row))} |" for row in found]
        text.append("")
    return [*text, "### Against what was set out", "", *(f"- {line}" for line in verdicts(rows)), ""]


# What was set out to be reached.


def fastest(rows: list[Line], fits: Callable[[Line], bool]) -> Line | None:
    """The row with the shortest step among those that have one and fit."""
    return min((r for r in rows if r["seconds"] and fits(r)), key=lambda row: float(row["seconds"]), default=None)


def verdicts(rows: list[Line]) -> list[str]:
    """Each bar, what was reached, and whether that is enough."""
    train, sample = (
        [r for r in rows if (r["task"], r["network"], r["batch"]) == (task, "cifar-10", batch)]
        for task, batch in (("train", BAR_TRAIN), ("sample", BAR_SAMPLE))
    )
    half = [r for r in train if r["precision"] == "bfloat16"]
    text = [
        floor_verdict(f"training step / floor, batch {BAR_TRAIN}, bfloat16", half, 1.35),
        faster("training with EMA, to diffusers by default", train, is_default, 3),
        faster("training with EMA, to diffusers eager under bfloat16 autocast", train, is_autocast, 2),
        faster("training, to compiled diffusers", train, lambda r: is_peer(r) and bool(r["compiled"]), 1.2),
        floor_verdict(f"sampling step / floor, batch {BAR_SAMPLE}, bfloat16",
                      [r for r in sample if r["precision"] == "bfloat16"], 1.3),
    ]  # fmt: skip
    for batch in SMALL:
        case = [r for r in rows if (r["task"], r["network"], r["batch"]) == ("sample", "cifar-10", batch)]
        text.append(faster(f"sampling at batch {batch}, to diffusers eager", case, is_default, 10))
        text.append(faster(f"sampling at batch {batch}, to compiled diffusers with graphs", case, has_graphs, 2))
    return [*text, memory_verdict(half), graph_verdict(train)]


def is_peer(row: Line) -> bool:
    """Diffusers, or the plain network that stands in where it is not installed."""
    return row["library"] in (DIFFUSERS, TORCH)


def is_default(row: Line) -> bool:
    """As the example of diffusers does, without an average of the weights; of the plain network tf32, eager."""
    if row["library"] == TORCH:
        return row["precision"] == "tf32" and not row["compiled"]
    return row["library"] == DIFFUSERS and row["default"] and not row["ema"]


def is_autocast(row: Line) -> bool:
    return is_peer(row) and row["precision"] == "bfloat16" and not row["compiled"]


def has_graphs(row: Line) -> bool:
    return is_peer(row) and row["compiled"] == "reduce-overhead"


def floor_verdict(what: str, rows: list[Line], bar: float) -> str:
    ours = fastest(rows, lambda r: r["library"] == OURS and bool(r.get("floor")))
    return told(what, None if ours is None else ours["seconds"] / ours["floor"], bar, ours, at_most=True)


def faster(what: str, rows: list[Line], fits: Callable[[Line], bool], bar: float) -> str:
    ours, other = fastest(rows, lambda r: r["library"] == OURS), fastest(rows, fits)
    if ours is None or other is None:
        return told(what, None, bar, ours)
    return told(what, other["seconds"] / ours["seconds"], bar, ours, other)


def memory_verdict(rows: list[Line]) -> str:
    """Of training in bfloat16: eager, each in its best layout."""
    ours = fastest(rows, lambda r: r["library"] == OURS and not r["compiled"] and bool(r.get("memory")))
    other = fastest(rows, lambda r: is_peer(r) and not r["compiled"] and bool(r.get("memory")))
    reached = ours["memory"] / other["memory"] if ours and other else None
    return told("peak training memory, to diffusers, bfloat16", reached, 0.7, ours, other, at_most=True)


def graph_verdict(rows: list[Line]) -> str:
    found = fastest(rows, lambda r: r["library"] == OURS and r["graph"] == "on")
    what = "launches of a training step of ours"
    if found is None:
        return f"{what}: not measured"
    n = found["launches"]
    met = "met" if n["graphs"] == 1 else "NOT MET"
    return f"{what}: one CUDA graph: {n['graphs']:g} graphs, {n['kernels']:g} kernels, {n['copies']:g} copies, {met}"


def told(what: str, reached: float | None, bar: float, *rows: Line | None, at_most: bool = False) -> str:
    limit = f"{'at most' if at_most else 'at least'} {bar:g}x"
    if reached is None:
        return f"{what}: {limit}: not measured"
    met = reached <= bar if at_most else reached >= bar
    names = "; ".join(f"{row['contestant']} ({row['precision']})" for row in rows if row)
    stands_in = any(row and row["library"] == TORCH for row in rows)
    note = "; diffusers is not installed, the same network on torch's ops stands in" if stands_in else ""
    return f"{what}: {limit}: {reached:.2f}x, {'met' if met else 'NOT MET'} ({names}{note})"


# Scripts of other libraries.


def scripts(lines: list[Line]) -> list[str]:
    """Before and after, milliseconds of each case."""
    text = ["## Scripts of other libraries, before and after", ""]
    found = gpu_record.scripts(lines)
    for row in found:
        times = row["seconds"]
        if not times:
            text.append(f"- {row['part']}, {row['case']}: {row.get('note') or row.get('error') or 'not timed'}")
            continue
        before = next((times[name] for name in times if name in BEFORE), None)
        said = [
            f"{name} {seconds * 1e3:,.3g} ms" + (f" ({before / seconds:.2f}x)" if before and name not in BEFORE else "")
            for name, seconds in times.items()
        ]
        text.append(f"- {row['part']}, {row['case']}: {'; '.join(said)}")
    return [*text, *([] if found else ["not measured"]), ""]


# The plot.


def plot(lines: list[Line], path: Path) -> bool:
    """For each case images per second and step over floor. Returns whether there is matplotlib, and a row."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in gpu_record.steps(lines) if row["seconds"]]
    cases = cases_of(rows)
    if not cases:
        return False
    heights = [1.0 + 0.2 * len(case) for case in cases.values()]
    figure = plt.figure(figsize=(13, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    for i, (case, found) in enumerate(cases.items()):
        panel = figure.add_subplot(grid[i, 0])
        bars(panel, found, images_per_second, contestant_of, "images per second", title_of(case))
        with_floor = [row for row in found if row.get("floor")]
        panel = figure.add_subplot(grid[i, 1])
        bars(panel, with_floor, step_to_floor, contestant_of, "step / floor (1 is the floor)", "")
        panel.axvline(1, color="grey", linewidth=0.8)
    figure.suptitle(str((gpu_record.about(lines) or {}).get("device", "")), fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return True


def contestant_of(row: Line) -> str:
    """With its precision."""
    return f"{row['contestant']}, {row['precision']}"
