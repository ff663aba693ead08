"""The record of the CUDA part of `make test-all`: what it is made of, and that the committed one has no failure."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.cuda import emulated, record

JUNIT = """<testsuites><testsuite>
<testcase classname="a" name="good" time="1.04"><properties>
<property name="emulated tests" value="12"/></properties></testcase>
<testcase classname="a" name="bad" time="9.0"><failure message="no"/></testcase>
<testcase classname="a" name="worse" time="0.1"><error message="no"/></testcase>
<testcase classname="b" name="gone" time="0"><skipped message="needs a GPU"/></testcase>
</testsuite></testsuites>"""


def committed() -> Any:
    return json.loads(record.RECORD.read_text(encoding="utf-8"))


def test_outcomes(tmp_path: Path) -> None:
    (tmp_path / "junit.xml").write_text(JUNIT, encoding="utf-8")
    found = record.outcomes(tmp_path / "junit.xml")
    assert found["tests"] == {"passed": 1, "failed": 2, "skipped": 1} and found["failed"] == ["a.bad", "a.worse"]
    assert found["skipped because"] == {"needs a GPU": 1} and found["tests under the emulation"] == 12
    assert list(found["slowest, seconds"].items())[:2] == [("a.bad", 9.0), ("a.good", 1.0)]


def test_the_committed_record_is_of_every_architecture_and_without_a_failure() -> None:
    found = committed()
    shipped = re.search(r"^CUDA_ARCHS = (\[.*\])$", (emulated.ROOT / "setup.py").read_text(encoding="utf-8"), re.M)
    assert shipped is not None
    assert set(found["architectures"]) == {f"sm_{arch}" for arch in json.loads(shipped[1])}
    assert found["exit status"] == 0 and found["tests"]["failed"] == 0 < found["tests"]["passed"]
    assert found["changed"] is False and "--run-slow" in found["command"]
    for about in found["architectures"].values():
        assert about["with local memory"] == about["hot kernels not as planned"] == 0 < about["hot kernels"]


def test_the_committed_record_is_of_these_sources(request: pytest.FixtureRequest) -> None:
    """A change of a kernel does not fail `make test`, which warns; it does fail `make test-all`, whose record it is."""
    if request.config.pluginmanager.has_plugin(record.PLUGIN):
        pytest.skip("the record is being made")
    if committed().get("sources") == record.sources():
        return
    text = "tests/cuda/records/test-all.json is of other CUDA kernels or another emulation: make it again (record.py)"
    if request.config.getoption("--run-slow"):
        pytest.fail(text)
    warnings.warn(text, stacklevel=1)


def test_a_change_of_a_kernel_or_of_the_emulation_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    csrc, emulation = tmp_path / "csrc", tmp_path / "emulation"
    files = [csrc / "op" / "op_cuda.cu", csrc / "common" / "cuda" / "vec.cuh", emulation / "emulator.cpp"]
    other = csrc / "op" / "op_cpu.cpp"
    for file in (*files, other):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1")
    monkeypatch.setattr(emulated, "ROOT", tmp_path)
    monkeypatch.setattr(emulated, "EMULATION", emulation)
    seen = {record.sources()}
    for file in files:
        file.write_text("2")
        seen.add(record.sources())
    assert len(seen) == 4
    other.write_text("2")
    assert record.sources() in seen
