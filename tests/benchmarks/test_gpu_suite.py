"""What the GPU suite does without a GPU: which cases there are, the record, going on, the table, the plot."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import contests, gpu_cases, gpu_record, gpu_report, gpu_suite, gpu_timing
from benchmarks.gpu_suite import Options
from fastddpm import _gpu_defaults
from tests.launched import launch_on_cpu

PARTS = gpu_cases.parts()
CASES = [case for part in PARTS for case in part.cases]
ABOUT = {"kind": "about", "device": "a GPU", "source": "abc"}


def row(key: str, contestant: str, seconds: float | None, **others: Any) -> dict[str, Any]:
    case = next(case for case in CASES if case.key == key)
    name = f"{case.op}{' backward' if case.contest != case.op else ''} {'x'.join(map(str, case.shape))}"
    return dict(
        kind="row", part=case.part, key=key, op=case.op, case=name, dtype=case.dtype, network=case.network,
        count=case.count, elements=case.elements, bytes=1000, normals=0, floor=1e-6, contestant=contestant,
        seconds=seconds,
    ) | others  # fmt: skip


def rows_of(case: gpu_cases.Case, native: float = 2e-6, triton: float = 3e-6) -> list[dict[str, Any]]:
    times = {"native": native, "triton": triton, "eager": 9e-6, "compile": 6e-6, "copy": 1e-6}
    return [row(case.key, name, seconds) for name, seconds in times.items()]


# what is timed


def test_every_norm_of_the_networks_is_a_case() -> None:
    assert len({case.key for case in CASES}) == len(CASES)
    assert len({part.name for part in PARTS}) == len(PARTS)
    for name, network in gpu_cases.NETWORKS.items():
        for op in ("group_norm_silu", "group_norm_silu_backward", "rms_norm_silu", "rms_norm_silu_backward"):
            mine = [c for c in CASES if (c.network, c.contest, c.dtype) == (name, op, "bfloat16")]
            assert {c.shape[1:3] for c in mine} == set(network.norms)
            assert all(c.shape[0] == network.batch and c.shape[2] == c.shape[3] for c in mine)
    for case in CASES:
        assert case.shape[1] % 32 == 0 or "norm_silu" not in case.op  # 32 groups
        assert hasattr(contests, case.contest)


@pytest.mark.parametrize(
    ("name", "calls", "elements"),
    [("cifar-10", 51, 3.367e6), ("lsun-256", 71, 165.9e6), ("adm-64", 95, 35.06e6), ("sd-1.5", 61, 45.06e6)],
)
def test_norms_of_the_published_networks(name: str, calls: int, elements: float) -> None:
    """As many calls and elements as hooks counted on the networks themselves."""
    norms = gpu_cases.NETWORKS[name].norms
    assert sum(norms.values()) == calls
    assert sum(n * channels * size**2 for (channels, size), n in norms.items()) == pytest.approx(elements, rel=2e-4)


def test_inputs_fill_three_caches() -> None:
    cache = 50 * 2**20
    for size in (2**16, 2**24, 2**27, 2**31):
        copies = gpu_timing.copies_of(size, cache)
        assert copies == gpu_timing.MOST_COPIES or copies * size / 4 >= 3 * cache
        assert 1 <= copies <= gpu_timing.MOST_COPIES


# timing, with a clock in place of the device


class Clock:
    """Runs the calls once, and takes a second."""

    def __init__(self, calls: list[Any], held: int) -> None:
        for call in calls:
            call()
        self.best = 1.0

    def turn(self) -> None:
        pass


class Rates:
    def floor(self, size: int, normals: int) -> float:
        return 1e-6


@pytest.mark.parametrize("contest", sorted({case.contest for case in CASES} - {"adam_ema"}))
def test_contestants_of_every_case_run(contest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each on its own copy of the inputs; one that fails is a row, and the others have theirs."""
    monkeypatch.setattr(gpu_timing, "Timed", Clock)
    monkeypatch.setattr(gpu_timing, "is_lost", lambda: False)
    monkeypatch.setattr(gpu_timing, "copying", lambda size, copies: [lambda: None])

    def fails(*_: Any) -> Any:
        raise RuntimeError("no such shape\nand more")

    monkeypatch.setattr(contests, "compiled", lambda eager: fails)
    monkeypatch.setattr(contests, "DEVICE", "cpu")
    monkeypatch.setattr(contests, "TABLE", contests.TABLE.cpu())
    case = gpu_cases.Case("elementwise", contest, (2, 32, 4, 4), "float32", "cifar-10")
    rows = gpu_timing.measured(case, Rates(), 2**14, 0.0, frozenset({"triton"}))  # type: ignore[arg-type]
    found = {r["contestant"]: r for r in rows}
    assert found["native"]["seconds"] == found["eager"]["seconds"] == found["copy"]["seconds"] == 1.0
    assert "triton" not in found
    if contest != "normal":
        assert found["compile"]["seconds"] is None and found["compile"]["error"] == "RuntimeError: no such shape"
    assert all(r["key"] == case.key and r["floor"] == 1e-6 for r in rows)
    json.dumps(rows)


@pytest.mark.parametrize("contest", sorted({case.contest for case in CASES} - {"adam_ema"}))
def test_results_that_are_held_fill_three_caches(contest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every contestant, as its inputs do. adam_ema has none: it writes to its 40 tensors, which no cache holds."""
    written = []

    class Held(Clock):
        def __init__(self, calls: list[Any], held: int) -> None:
            self.best = 1.0
            result = torch.utils._pytree.tree_leaves(calls[0]())
            written.append(held * sum(x.nbytes for x in result if torch.is_tensor(x)))

    monkeypatch.setattr(gpu_timing, "Timed", Held)
    monkeypatch.setattr(gpu_timing, "copying", lambda size, copies: [lambda: torch.empty(size // 2 // 4)])
    monkeypatch.setattr(contests, "DEVICE", "cpu")
    monkeypatch.setattr(contests, "TABLE", contests.TABLE.cpu())
    case = gpu_cases.Case("elementwise", contest, (2, 32, 4, 4), "float32", "cifar-10")
    cache = 2**16
    gpu_timing.measured(case, Rates(), cache, 0.0, frozenset({"triton", "compile"}))  # type: ignore[arg-type]
    assert len(written) == 3 and min(written) >= 3 * cache


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_result_lies_where_none_of_those_held_does(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the memory of all is there before the clock runs."""
    gpu = launch_on_cpu(monkeypatch)
    places, before = [], []

    def call() -> torch.Tensor:
        result = torch.empty(2**18, device=device)
        places.append(result.data_ptr())
        before.append(gpu.slept == 0)
        gpu.launch(1e-5, 1e-5)
        return result

    gpu_timing.Timed([call], held=5).turn()
    assert sum(before) > 5
    assert all(len(set(places[at : at + 6])) == 6 for at in range(len(places) - 5))


@pytest.mark.parametrize("contest", sorted({case.contest for case in CASES}))
def test_wrong_values_are_no_time(contest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An implementation is held against the reference before it is timed; one number in a thousand is enough."""
    monkeypatch.setattr(contests, "DEVICE", "cpu")
    monkeypatch.setattr(contests, "TABLE", contests.TABLE.cpu())
    case = gpu_cases.Case("elementwise", contest, (2, 32, 4, 4), "bfloat16", "cifar-10")
    exact, rounded = gpu_timing.references(case)
    gpu_timing.check_values(case, "native", (exact, rounded))
    right = gpu_timing.results

    def wrong(*given: Any) -> list[torch.Tensor]:
        first, *others = right(*given)
        at = torch.arange(first.numel()).reshape(first.shape) == first.abs().argmax()
        return [torch.where(at, 1.05 * first, first), *others]

    monkeypatch.setattr(gpu_timing, "results", wrong)
    with pytest.raises(AssertionError, match="of the error"):
        gpu_timing.check_values(case, "native", (exact, rounded))


def test_a_contestant_that_loses_the_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_timing, "is_lost", lambda: True)
    case = gpu_cases.Case("elementwise", "q_sample", (2, 3, 4, 4), "float32", "cifar-10")

    def fails(calls: Any, held: int) -> Any:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(gpu_timing, "Timed", fails)
    monkeypatch.setattr(contests, "DEVICE", "cpu")
    with pytest.raises(gpu_timing.DeviceLostError, match="illegal memory access") as caught:
        gpu_timing.measured(case, Rates(), 2**14, 0.0, frozenset())  # type: ignore[arg-type]
    assert gpu_record.harmful(caught.value.rows, case.key) == {"native"}
    assert gpu_record.timed(caught.value.rows) == set()


# the record, and going on


def test_a_record_outlives_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.jsonl"
    assert gpu_record.read(path) == []
    gpu_record.append(path, [ABOUT])
    with path.open("a") as file:
        file.write('{"kind": "row", "key": "half of a')
    gpu_record.append(path, rows_of(CASES[0]))
    lines = gpu_record.read(path)
    assert gpu_record.about(lines) == ABOUT
    assert gpu_record.timed(lines) == {CASES[0].key}
    assert len(gpu_record.rows(lines)) == 5
    gpu_record.append(path, [row(CASES[0].key, "native", 1e-6)])  # timed again: the last one counts
    assert {r["seconds"] for r in gpu_record.rows(gpu_record.read(path)) if r["contestant"] == "native"} == {1e-6}


def test_a_part_that_is_wanted_again_has_no_lines_from_before(tmp_path: Path) -> None:
    path, (first, other) = tmp_path / "record.jsonl", [c for c in CASES if c.part != CASES[0].part][:1] + CASES[:1]
    gpu_record.append(path, [ABOUT, *rows_of(first), *rows_of(other), {"kind": "end", "part": first.part}])
    gpu_record.append(path, [{"kind": "again", "part": first.part}])
    lines = gpu_record.read(path)
    assert gpu_record.timed(lines) == {other.key} and not gpu_record.ended(lines) and gpu_record.about(lines) == ABOUT
    gpu_record.append(path, rows_of(first))
    assert gpu_record.timed(gpu_record.read(path)) == {first.key, other.key}


def test_a_complete_part_is_skipped() -> None:
    lines = [ABOUT, {"kind": "end", "part": "build"}, {"kind": "stopped", "part": "tests"}]
    names = [part.name for part in gpu_suite.pending(lines, PARTS)]
    assert names == [part.name for part in PARTS if part.name != "build"]
    assert gpu_suite.status_of(lines, PARTS) == 3


def test_status_when_all_is_complete() -> None:
    ends = [{"kind": "end", "part": part.name, "seconds": 1.0} for part in PARTS]
    good = [*ends, *rows_of(CASES[0]), {"kind": "check", "part": "tests", "name": "a", "ok": True, "summary": ""}]
    assert gpu_suite.status_of(good, PARTS) == 0
    assert gpu_suite.status_of([*good, row(CASES[1].key, "compile", None, error="too slow")], PARTS) == 0
    assert gpu_suite.status_of([*good, row(CASES[1].key, "native", None, error="wrong")], PARTS) == 1
    failed = {"kind": "check", "part": "tests", "name": "b", "ok": False, "summary": "1 failed"}
    assert gpu_suite.status_of([*good, failed], PARTS) == 1
    assert gpu_suite.status_of([*good, failed, failed | {"ok": True}], PARTS) == 0


def test_a_record_of_another_machine_or_source_is_not_gone_on_with() -> None:
    assert gpu_suite.differs(None, ABOUT) is None and gpu_suite.differs(ABOUT, ABOUT) is None
    assert "another --out" in str(gpu_suite.differs(ABOUT, ABOUT | {"device": "another"}))
    assert "source" in str(gpu_suite.differs(ABOUT, ABOUT | {"source": "def"}))
    assert gpu_record.source() == gpu_record.source()


def test_a_process_has_a_limit_and_its_output_is_logged(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert gpu_suite.run_logged([sys.executable, "-c", "print('here'); raise SystemExit(7)"], log, 20.0) == 7
    assert gpu_suite.run_logged([sys.executable, "-c", "import time; time.sleep(60)"], log, 0.1) is None
    assert "here" in log.read_text()


def test_parts_run_until_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run_part(options: Options, part: gpu_cases.Part, end: float) -> str | None:
        ran.append(part.name)
        return "it broke" if part.name == "tests" else None

    monkeypatch.setattr(gpu_suite, "run_part", run_part)
    options = Options(tmp_path)
    gpu_suite.run_parts(options, PARTS[:3])
    lines = gpu_record.read(options.record)
    assert ran == ["build", "tests", "sanitizer"] and gpu_record.ended(lines) == {"build", "sanitizer"}
    gpu_suite.run_parts(Options(tmp_path, minutes=0.1), gpu_suite.pending(lines, PARTS))
    assert len(ran) == 3


def test_another_process_follows_one_that_lost_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, case = Options(tmp_path), CASES[0]
    statuses = [gpu_suite.LOST, gpu_suite.LOST, 0]

    def run_logged(*_: Any) -> int:
        gpu_record.append(options.record, [row(case.key, f"of turn {len(statuses)}", None, error="x", lost=True)])
        return statuses.pop(0)

    monkeypatch.setattr(gpu_suite, "run_logged", run_logged)
    assert gpu_suite.run_part(options, PARTS[3], float("inf")) is None and not statuses
    monkeypatch.setattr(gpu_suite, "run_logged", lambda *_: gpu_suite.LOST)  # and records nothing: it would do so again
    assert "status 75" in str(gpu_suite.run_part(options, PARTS[3], float("inf")))


def test_what_pytest_prints_is_understood() -> None:
    output = "FAILED tests/a.py::b - AssertionError: x\n==== 1 failed, 3 passed, 9 deselected in 1.23s (0:00:01) ====\n"
    assert gpu_suite.summary_of(output) == (
        "1 failed, 3 passed, 9 deselected in 1.23s (0:00:01)", ["FAILED tests/a.py::b - AssertionError: x"],
    )  # fmt: skip
    assert gpu_suite.summary_of("3 passed in 0.1s\n")[0] == "3 passed in 0.1s"
    assert gpu_suite.summary_of("Killed") == ("no summary", [])
    selected = gpu_suite.groups()
    assert set(gpu_suite.OPS) < set(selected) and all(f"not {op}" in selected["others"] for op in gpu_suite.OPS)


# without a GPU


def test_it_fits_on_a_machine_that_has_little() -> None:
    """No module that it collects or runs imports more than the package needs, beside torch, Triton and pytest."""
    enough = {"torch", "triton", "pytest", "numpy", "PIL", "safetensors", "tqdm", "fastddpm", "tests", "benchmarks"}
    for path in (path for folder in ("tests", "benchmarks") for path in (gpu_record.ROOT / folder).rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else modules
            names = {name.partition(".")[0] for name in modules}
            assert names <= enough | sys.stdlib_module_names, path


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_no_gpu_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--out", str(tmp_path)]) == 2
    assert "expected a CUDA GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_listings_need_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_record.append(tmp_path / "record.jsonl", [ABOUT, {"kind": "end", "part": "build", "seconds": 1.0}])
    gpu_record.append(tmp_path / "record.jsonl", rows_of(CASES[0]))
    assert gpu_suite.main(["--out", str(tmp_path), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert all(case.key in text for case in CASES) and f"{CASES[0].key}  done" in text
    assert "complete, 1 s" in text.splitlines()[0]
    assert gpu_suite.main(["--out", str(tmp_path), "--parts"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(PARTS)
    with pytest.raises(SystemExit):
        gpu_suite.main(["--out", str(tmp_path), "--only", "nothing"])
    with pytest.raises(SystemExit):
        gpu_suite.main(["--out", str(tmp_path), "--device", "cpu"])
    assert "expected --tiny with --device cpu" in capsys.readouterr().err


def test_the_sweep_cuts_large_images_for_the_cooperative_kernel() -> None:
    """And small ones for clusters; each beside two reads, and no way twice."""
    large, small = (next(c for c in CASES if c.contest == "group_norm_silu" and c.shape[2] == n) for n in (256, 32))
    for case in (large, small):
        cuts = gpu_timing.cuts_of(case)
        assert len(set(cuts.values())) == len(cuts)
        assert cuts["native, by plan"] == (0, 0, 0) and cuts["native, two reads"] == (0, 0, gpu_timing.TWO_READS)
        assert (64, 0, gpu_timing.COOPERATIVE) in cuts.values()
    assert (64, 256, gpu_timing.COOPERATIVE) in gpu_timing.cuts_of(large).values()
    assert (64, 4, gpu_timing.BY_PLAN) not in gpu_timing.cuts_of(large).values()
    assert (64, 4, gpu_timing.BY_PLAN) in gpu_timing.cuts_of(small).values()


# the table, the plot and the defaults


def full_record() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [ABOUT, {"kind": "end", "part": "build", "seconds": 61.0}]
    for case in CASES:
        lines += rows_of(case, native=(2e-6 if case.elements > 10**6 else 4e-6))
    lines.append(row(CASES[1].key, "triton", None, error="OutOfResources: shared memory"))
    lines.append({"kind": "stopped", "part": "tests", "seconds": 240.0, "reason": "the time was over"})
    failed: dict[str, Any] = dict(ok=False, summary="1 failed", failures=["FAILED tests/x.py"])
    lines.append({"kind": "check", "part": "tests", "name": "tests, normal"} | failed)
    for label, seconds, cut in (("by plan", 5e-6, (0, 0, 0)), ("slab 64, cluster 4", 4e-6, (64, 4, 0))):
        key = next(case.key for case in CASES if case.op == "group_norm_silu")
        about = dict(zip(("slab", "cluster", "way"), cut, strict=True), key=f"sweep {key}", part="sweep")
        lines.append(row(key, f"native, {label}", seconds) | about)
    return lines


def test_the_table_says_everything() -> None:
    text = gpu_report.markdown(full_record(), [part.name for part in PARTS], "plot.png")
    assert "- build: complete, 61 s" in text and "- tests: the time was over" in text and "- sweep: not run" in text
    assert "tests, normal: FAILED; 1 failed" in text and "  - FAILED tests/x.py" in text
    line = next(line for line in text.splitlines() if line.startswith("| group_norm_silu 128x128x32x32 | bfloat16"))
    assert line.partition("bfloat16 ")[2] == "| 0.00 | 1.0 | 1.0 | 2.0 | 3.0 | 9.0 | 6.0 |  | 50% | 3.00 |"
    assert f"- {CASES[1].key}, triton: OutOfResources" in text and "| error |" in text
    cifar = next(line for line in text.splitlines() if line.startswith("| cifar-10 | group_norm_silu | forward |"))
    assert cifar.split("|")[4].strip() == "0.051"  # 51 calls of a microsecond
    assert "best slab 64, cluster 4 4.0 us; by plan 5.0 us" in text


def test_the_bars_of_the_issues() -> None:
    """Each has cases; those of its kind alone, which count as they should."""
    lines = [*full_record(), {"kind": "rates", "launch": 1e-6}, {"kind": "rates", "launch": 2e-6}]
    assert gpu_report.launch_of(lines) == 1e-6
    timings = [{**r, "bytes": 2.0e7} if "128x128x32x32" in r["key"] else r for r in gpu_record.rows(lines)]
    found = {line.split("|")[1].strip(): line.split("|")[3:6] for line in gpu_report.bars(timings, 1e-6)[2:]}
    above, to_compile = (found[name] for name in ("group_norm_silu above 8 MB, of the floor",
                                                  "group_norm_silu forward, to torch.compile"))  # fmt: skip
    assert [cell.strip() for cell in above[:2]] == ["0 of 4", "0.50"]  # forward and backward, two dtypes
    assert to_compile[1].strip() == "2.00"  # 6 us to the 3 us of Triton, where native takes 4
    assert all("not measured" in line for line in gpu_report.bars([], None)[2:])
    for bar in gpu_report.every_bar(1e-6):
        sizes = [(c, torch.Size(c.shape).numel() * (2 if c.dtype == "bfloat16" else 4)) for c in CASES]
        assert any(bar.applies(row(c.key, "native", 1e-6, bytes=size)) for c, size in sizes), bar.what


def test_the_table_of_nothing() -> None:
    text = gpu_report.markdown([], [part.name for part in PARTS])
    assert text.count("not run") == len(PARTS) + 1 and "not measured" in text and text.endswith("none\n")


def test_defaults_are_proposed_by_size() -> None:
    text = "\n".join(gpu_report.proposed(gpu_record.rows(full_record())))
    names = {"Range": _gpu_defaults.Range, "CUDA": _gpu_defaults.CUDA, "TRITON": _gpu_defaults.TRITON}
    scope: dict[str, Any] = names | {"math": __import__("math")}
    exec(text, scope)
    ranges = scope["RANGES"]["group_norm_silu"]
    assert [r.prefer[0] for r in ranges] == ["triton", "native"] and ranges[-1].up_to == float("inf")
    sizes = [case.elements for case in CASES if case.op == "group_norm_silu"]
    assert max(n for n in sizes if n <= 10**6) == ranges[0].up_to
    assert gpu_report.proposed([]) == ["# not measured"]


def test_cuts_are_proposed_where_they_are_faster() -> None:
    rows = gpu_record.rows(full_record())
    scope: dict[str, Any] = {"Cut": _gpu_defaults.Cut}
    exec("\n".join(gpu_report.proposed_cuts(rows)), scope)
    assert scope["CUTS"] == (_gpu_defaults.Cut("forward", (128, 128), (1024, 1024), 2, "cluster", 64, 4),)
    assert gpu_report.WAYS == _gpu_defaults.WAYS
    as_fast = [r | {"seconds": 4.95e-6} if r.get("slab") == 64 else r for r in rows]
    assert gpu_report.proposed_cuts(as_fast)[0].startswith("# CUTS")


def test_table_and_plot_are_written(tmp_path: Path) -> None:
    gpu_record.append(tmp_path / "record.jsonl", full_record())
    written = gpu_report.write(tmp_path / "record.jsonl", [part.name for part in PARTS])
    assert written[0].read_text(encoding="utf-8").startswith("# Timings on a GPU")
    pytest.importorskip("matplotlib")
    assert written[1].stat().st_size > 10_000
    assert not gpu_report.plot([], tmp_path / "none.png")


# the table in the code


def test_on_a_gpu_triton_is_tried_first_until_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _gpu_defaults.range_of("q_sample", 10).prefer[0] == "triton" or _gpu_defaults.RECORD is not None
    ranges = (_gpu_defaults.Range(100, _gpu_defaults.TRITON), _gpu_defaults.Range(1000, _gpu_defaults.CUDA))
    monkeypatch.setattr(_gpu_defaults, "RANGES", {"q_sample": ranges})
    monkeypatch.setattr(_gpu_defaults, "RECORD", None)
    assert [_gpu_defaults.range_of("q_sample", n).prefer[0] for n in (1, 100, 101, 10**9)] == [
        "triton", "triton", "native", "native",
    ]  # fmt: skip
    assert _gpu_defaults.source("q_sample") == "not measured"
    monkeypatch.setattr(_gpu_defaults, "RECORD", "some.jsonl")
    assert "some.jsonl" in _gpu_defaults.source("q_sample") and _gpu_defaults.source("normal") == "not measured"


def test_what_the_table_in_the_code_says_was_measured() -> None:
    """Its record is there, and every order names each backend."""
    results = Path(gpu_record.__file__).parent / "results"
    assert _gpu_defaults.RECORD is None or (results / _gpu_defaults.RECORD).exists()
    assert not _gpu_defaults.RANGES or _gpu_defaults.RECORD is not None
    for ranges in _gpu_defaults.RANGES.values():
        assert all(set(r.prefer) == {"native", "triton", "reference"} for r in ranges)
        assert ranges[-1].up_to == float("inf")
