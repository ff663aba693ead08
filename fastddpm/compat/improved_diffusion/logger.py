"""Lines and tables of numbers, to the terminal and into files: log.txt, progress.csv, progress.json.

Which, OPENAI_LOG_FORMAT says (stdout,log,csv; json and tensorboard, too), and where, OPENAI_LOGDIR; without it, a new
folder of the system's for temporary files.
"""

from __future__ import annotations

import csv
import datetime
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

from .dist_util import rank_and_size

DEBUG, INFO, WARN, ERROR, DISABLED = 10, 20, 30, 40, 50
FORMATS = ("stdout", "log", "csv", "json", "tensorboard")
WIDEST = 30
Function = TypeVar("Function", bound=Callable[..., Any])


class Text:
    """Lines, and each table with a frame around it."""

    def __init__(self, file: TextIO, own: bool) -> None:
        self.file, self.own = file, own

    def line(self, text: str) -> None:
        """A line."""
        self.file.write(text + "\n")
        self.file.flush()

    def table(self, values: Mapping[str, Any]) -> None:
        """A row for each value."""
        rows = sorted((_cut(name), _cut(_shown(value))) for name, value in values.items())
        left, right = (max((len(row[i]) for row in rows), default=0) for i in (0, 1))
        frame = "-" * (left + right + 7)
        lines = [f"| {name:<{left}} | {value:<{right}} |" for name, value in rows]
        self.line("\n".join([frame, *lines, frame]))

    def close(self) -> None:
        """Close the file, if it is not the terminal's."""
        if self.own:
            self.file.close()


class Json:
    """An object a table."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8")

    def table(self, values: Mapping[str, Any]) -> None:
        """A line."""
        self.file.write(json.dumps({name: _number(value) for name, value in sorted(values.items())}) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class Csv:
    """A row a table; a name that is new makes a column more, empty in the rows before."""

    def __init__(self, path: Path) -> None:
        self.path, self.names = path, list[str]()
        path.write_text("")

    def table(self, values: Mapping[str, Any]) -> None:
        """A row."""
        row = {name: _number(value) for name, value in values.items()}
        new = sorted(row.keys() - set(self.names))
        if new:
            with self.path.open(newline="", encoding="utf-8") as file:
                before = list(csv.DictReader(file))
            self.names += new
            with self.path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.names, lineterminator="\n")
                writer.writeheader()
                writer.writerows(before)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.names, lineterminator="\n").writerow(row)

    def close(self) -> None:
        """Nothing stays open."""


class TensorBoard:
    """Scalars for TensorBoard, numbered by table."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer, self.step = SummaryWriter(str(directory)), 0

    def table(self, values: Mapping[str, Any]) -> None:
        """Each number as a scalar."""
        self.step += 1
        for name, value in values.items():
            self.writer.add_scalar(name, float(value), self.step)

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


class Logger:
    """Values since the last table, and where lines and tables go.

    Args:
        dir: of the files, or None. output_formats: `Text`, `Json`, `Csv`, `TensorBoard`.
    """

    CURRENT: Logger | None = None

    def __init__(self, dir: str | None, output_formats: Sequence[Any]) -> None:
        self.dir, self.output_formats, self.level = dir, list(output_formats), INFO
        self.name2val: dict[str, Any] = {}
        self.name2cnt: dict[str, int] = {}

    def logkv(self, key: str, val: Any) -> None:
        """Set a value of the next table."""
        self.name2val[key] = val

    def logkv_mean(self, key: str, val: float) -> None:
        """Add a value to a mean in the next table."""
        count = self.name2cnt.get(key, 0)
        self.name2val[key] = (self.name2val.get(key, 0.0) * count + val) / (count + 1)
        self.name2cnt[key] = count + 1

    def dumpkvs(self) -> dict[str, Any]:
        """Write the table, and start the next; returns its values."""
        values = dict(self.name2val)
        if values:
            for output in self.output_formats:
                output.table(values)
        self.name2val.clear()
        self.name2cnt.clear()
        return values

    def log(self, *args: Any, level: int = INFO) -> None:
        """Write a line, if its level is high enough."""
        if self.level <= level:
            for output in self.output_formats:
                if isinstance(output, Text):
                    output.line(" ".join(map(str, args)))

    def close(self) -> None:
        """Close all files."""
        for output in self.output_formats:
            output.close()


def configure(
    dir: str | None = None, format_strs: Sequence[str] | None = None, comm: None = None, log_suffix: str = ""
) -> None:
    """Start a logger, the one of all functions here.

    Args:
        dir: where its files go; None: see the module. format_strs: of `FORMATS`; None: see the module; processes but
            the first write log.txt alone, under a name of their own.
        comm: must be None. log_suffix: of the files' names.

    Raises:
        ValueError: an unknown format. NotImplementedError: comm is given.
    """
    if comm is not None:
        raise NotImplementedError(
            "logger.configure: expected comm=None, got one; numbers are those of each process, reduce them before"
        )
    if dir is None:
        dir = os.environ.get("OPENAI_LOGDIR")
    if dir is None:
        now = datetime.datetime.now().strftime("%Y-%m-%d-%H-%M-%S-%f")
        dir = os.path.join(tempfile.gettempdir(), f"openai-{now}")
    folder = Path(dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    rank, _ = rank_and_size()
    if rank > 0:
        log_suffix = f"{log_suffix}-rank{rank:03d}"
    if format_strs is None:
        given = os.environ.get("OPENAI_LOG_FORMAT", "stdout,log,csv") if rank == 0 else "log"
        format_strs = [name for name in given.split(",") if name]
    Logger.CURRENT = Logger(str(folder), [_output(name, folder, log_suffix) for name in format_strs])
    if format_strs:
        log(f"Logging to {folder}")


def get_current() -> Logger:
    """The logger; the first call starts one."""
    if Logger.CURRENT is None:
        configure()
    assert Logger.CURRENT is not None
    return Logger.CURRENT


def reset() -> None:
    """Close the logger; the next call starts another."""
    if Logger.CURRENT is not None:
        Logger.CURRENT.close()
        Logger.CURRENT = None


@contextmanager
def scoped_configure(
    dir: str | None = None, format_strs: Sequence[str] | None = None, comm: None = None
) -> Iterator[None]:
    """Another logger in a ``with`` block. Args are those of `configure`."""
    before = Logger.CURRENT
    configure(dir, format_strs, comm)
    try:
        yield
    finally:
        get_current().close()
        Logger.CURRENT = before


def log(*args: Any, level: int = INFO) -> None:
    """Write a line."""
    get_current().log(*args, level=level)


def debug(*args: Any) -> None:
    """Write a line of level DEBUG."""
    log(*args, level=DEBUG)


def info(*args: Any) -> None:
    """Write a line of level INFO."""
    log(*args, level=INFO)


def warn(*args: Any) -> None:
    """Write a line of level WARN."""
    log(*args, level=WARN)


def error(*args: Any) -> None:
    """Write a line of level ERROR."""
    log(*args, level=ERROR)


def set_level(level: int) -> None:
    """Write lines of this level and above."""
    get_current().level = level


def logkv(key: str, val: Any) -> None:
    """Set a value of the next table."""
    get_current().logkv(key, val)


def logkv_mean(key: str, val: float) -> None:
    """Add a value to a mean in the next table."""
    get_current().logkv_mean(key, val)


def logkvs(d: Mapping[str, Any]) -> None:
    """Set values of the next table."""
    for key, val in d.items():
        logkv(key, val)


def getkvs() -> dict[str, Any]:
    """The values of the next table."""
    return get_current().name2val


def dumpkvs() -> dict[str, Any]:
    """Write the table, and start the next; returns its values."""
    return get_current().dumpkvs()


record_tabular, dump_tabular = logkv, dumpkvs


def get_dir() -> str | None:
    """Where the files are."""
    return get_current().dir


@contextmanager
def profile_kv(scopename: str) -> Iterator[None]:
    """Add the seconds of a ``with`` block to the value wait_<scopename>."""
    start = time.perf_counter()
    try:
        yield
    finally:
        values, key = getkvs(), f"wait_{scopename}"
        values[key] = values.get(key, 0.0) + time.perf_counter() - start


def profile(n: str) -> Callable[[Function], Function]:
    """A decorator: `profile_kv` around each call."""

    def decorated(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with profile_kv(n):
                return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorated


def _output(name: str, folder: Path, suffix: str) -> Any:
    if name == "stdout":
        return Text(sys.stdout, own=False)
    if name == "log":
        return Text((folder / f"log{suffix}.txt").open("w", encoding="utf-8"), own=True)
    if name == "csv":
        return Csv(folder / f"progress{suffix}.csv")
    if name == "json":
        return Json(folder / f"progress{suffix}.json")
    if name == "tensorboard":
        return TensorBoard(folder / f"tb{suffix}")
    raise ValueError(
        f"logger.configure: expected formats among {', '.join(FORMATS)}, got {name!r}; choose some of these"
    )


def _number(value: Any) -> Any:
    """Numbers of NumPy and torch as Python's."""
    return float(value) if hasattr(value, "dtype") else value


def _shown(value: Any) -> str:
    return f"{float(value):<8.3g}" if hasattr(value, "__float__") else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= WIDEST else text[: WIDEST - 3] + "..."
