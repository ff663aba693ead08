"""Files that are whole or not there. That of directories is in test_checkpoint.py and test_kill.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastddpm.training.atomic import unfinished_directory, whole_file


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    for contents in (b"first", b"second"):
        with whole_file(target) as path:
            path.write_bytes(contents)
            assert not target.exists() or target.read_bytes() == b"first"
        assert target.read_bytes() == contents
        if contents == b"first":
            os.link(target, tmp_path / "reader")  # as one that has the file open
    assert (tmp_path / "reader").read_bytes() == b"first"
    assert names(tmp_path) == ["a.bin", "reader"]


def test_where_writing_fails_the_file_is_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"first")
    with pytest.raises(OSError, match="full"), whole_file(target) as path:
        path.write_bytes(b"sec")
        raise OSError(28, "the disk is full")
    assert target.read_bytes() == b"first"
    assert names(tmp_path) == ["a.bin"]


def test_what_a_dead_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    (tmp_path / ".unfinished-dead").write_bytes(b"half")
    (tmp_path / ".unfinished-folder").mkdir()
    with whole_file(tmp_path / "a.bin") as first, unfinished_directory(tmp_path) as folder:
        first.write_bytes(b"first")
        with whole_file(tmp_path / "b.bin") as second:
            second.write_bytes(b"second")
            assert names(tmp_path) == sorted([first.name, folder.name, second.name])
    assert names(tmp_path) == ["a.bin", "b.bin"]


def test_a_process_killed_while_it_writes_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"first")
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom fastddpm.training.atomic import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as path:\n    path.write_bytes(b'half')\n    os._exit(9)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code, str(target)], cwd=root, check=False).returncode == 9
    assert len(names(tmp_path)) == 2
    assert target.read_bytes() == b"first"
    with whole_file(target) as path:
        path.write_bytes(b"second")
    assert names(tmp_path) == ["a.bin"]
