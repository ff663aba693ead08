"""Checkpoints: what goes in comes out, and no death, damage or full disk loses the previous one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import warnings
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from fastddpm.training import atomic, checkpoint
from fastddpm.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_config,
    environment,
    environment_differences,
    latest_checkpoint,
    load_checkpoint,
    pin_checkpoint,
    save_checkpoint,
)

CONFIG = {"model": {"base_channels": 8, "channel_mult": [1, 2]}, "lr": 2e-4}
Usage = namedtuple("Usage", "total used free")


def groups(value: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"conv.weight": torch.full((4, 3, 3, 3), value), "conv.bias": torch.arange(4.0)},
        "optimizer": {"step": torch.tensor(7), "exp_avg": torch.randn(4, 3, 3, 3)},
    }


def save(directory: Path, images: int, **options: Any) -> Path:
    return save_checkpoint(directory, images, groups(float(images)), {"seed": 3, "losses": [0.1]}, CONFIG, **options)


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def newest(directory: Path) -> Checkpoint:
    found = latest_checkpoint(directory)
    assert found is not None
    return found


def test_round_trip(tmp_path: Path) -> None:
    tensors = groups()
    tensors["model"]["half"] = torch.randn(5).bfloat16()
    tensors["model"]["nan"] = torch.tensor([float("nan"), -0.0, float("inf")])
    tensors["sampler"] = {}
    state = {"images": 12, "best": 0.1 + 0.2, "names": ("a", "b"), "by_step": {10: 1.0, 9: 2.0}, "none": None}
    path = save_checkpoint(tmp_path / "new" / "run", 12, tensors, state, CONFIG)
    assert path == tmp_path / "new" / "run" / "checkpoint-0000000012"
    assert names(path) == [
        "config.json",
        "model.safetensors",
        "optimizer.safetensors",
        "sampler.safetensors",
        "state.json",
    ]
    loaded = load_checkpoint(path)
    assert loaded.images == 12
    assert loaded.state == json.loads(json.dumps(state))
    assert loaded.state["best"] == 0.1 + 0.2
    assert loaded.config == CONFIG
    assert set(loaded.groups) == set(tensors)
    for group, members in tensors.items():
        read = loaded.tensors(group)
        assert read.keys() == members.keys()
        for name, value in members.items():
            assert (read[name].dtype, read[name].shape) == (value.dtype, value.shape)
            assert torch.equal(read[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))


def test_channels_last_weights_keep_their_strides(tmp_path: Path) -> None:
    source = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    target = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    strides = target.weight.stride()
    pointer = target.weight.data_ptr()
    path = save_checkpoint(tmp_path, 0, {"model": dict(source.named_parameters())}, {}, {})
    load_checkpoint(path).copy_into("model", dict(target.named_parameters()))
    assert torch.equal(target.weight, source.weight)
    assert target.weight.stride() == strides != torch.empty(4, 3, 3, 3).stride()
    assert target.weight.data_ptr() == pointer


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    members = {"tail": base[3:], "head": base[:3], "overlap": base[1:4], "tied": base[3:], "every_other": base[::2]}
    read = load_checkpoint(save_checkpoint(tmp_path, 0, {"model": members}, {}, {})).tensors("model")
    assert all(torch.equal(read[name], value) for name, value in members.items())


def test_state_says_what_wrote_it(tmp_path: Path) -> None:
    contents = json.loads((save(tmp_path, 5) / "state.json").read_text())
    assert contents["format"] == checkpoint.FORMAT
    assert contents["images"] == 5
    assert set(contents["environment"]) == {"fastddpm", "torch", "device", "cpu", "threads", "build"}
    assert contents["environment"]["threads"] == torch.get_num_threads()
    assert set(contents["files"]) == {"config.json", "model.safetensors", "optimizer.safetensors"}


def test_environment_differences() -> None:
    now = environment()
    assert environment_differences(now, environment()) == []
    before = now | {"threads": 99}
    assert environment_differences(before, now) == [f"threads: 99 when saved, {torch.get_num_threads()} now"]


def test_files_are_as_readable_as_the_umask_allows(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1


# which one ------------------------------------------------------------------------------------------------------------


def test_latest(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "missing") is None
    for images in (9, 100, 20):
        save(tmp_path, images, keep=9)
    assert newest(tmp_path).images == 100


def test_older_ones_are_pruned(tmp_path: Path) -> None:
    for images in range(1, 6):
        save(tmp_path, images, keep=2)
    assert names(tmp_path) == ["checkpoint-0000000004", "checkpoint-0000000005"]


def test_pinned_ones_stay(tmp_path: Path) -> None:
    save(tmp_path, 1, pinned=True)
    pin_checkpoint(save(tmp_path, 2))
    for images in (3, 4):
        save(tmp_path, images, keep=1)
    assert names(tmp_path) == [f"checkpoint-000000000{n}" for n in (1, 2, 4)]
    pin_checkpoint(tmp_path / "checkpoint-0000000002", pinned=False)
    save(tmp_path, 5, keep=1)
    assert names(tmp_path) == [f"checkpoint-000000000{n}" for n in (1, 5)]
    assert load_checkpoint(tmp_path / "checkpoint-0000000001").images == 1


def test_a_second_save_at_the_same_count_wins(tmp_path: Path) -> None:
    save(tmp_path, 7)
    again = save_checkpoint(tmp_path, 7, groups(2.0), {"again": True}, CONFIG, keep=1)
    assert newest(tmp_path).path == again
    assert newest(tmp_path).state == {"again": True}
    assert names(tmp_path) == ["checkpoint-0000000007.1"]


def test_checkpoints_ahead_of_the_saved_one_stay(tmp_path: Path) -> None:
    for images in (10, 20, 30):
        save(tmp_path, images, keep=3)
    save(tmp_path, 15, keep=1)
    assert names(tmp_path) == ["checkpoint-0000000015", "checkpoint-0000000020", "checkpoint-0000000030"]


# damage ---------------------------------------------------------------------------------------------------------------


def flip_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


@pytest.mark.parametrize("damage", [flip_bit, truncate, os.unlink])
@pytest.mark.parametrize("name", ["state.json", "config.json", "model.safetensors", "optimizer.safetensors"])
def test_damage_is_named_and_the_older_one_used(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    older, damaged = save(tmp_path, 1), save(tmp_path, 2)
    damage(damaged / name)
    with pytest.raises(
        CheckpointError, match=r"load_checkpoint: expected an intact checkpoint, got .*delete it, .*0001 is intact"
    ) as caught:
        load_checkpoint(damaged)
    assert name in str(caught.value)
    assert str(damaged) in str(caught.value)
    with pytest.warns(UserWarning, match=f"latest_checkpoint: using {older}.*damaged: .*{name}"):
        assert newest(tmp_path).path == older
    shutil.rmtree(older)
    with pytest.raises(CheckpointError, match=f"latest_checkpoint: expected an intact checkpoint in .*{name}"):
        latest_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no other checkpoint beside it is intact"):
        load_checkpoint(damaged)


def test_damage_does_not_cost_the_intact_one(tmp_path: Path) -> None:
    """A truncated checkpoint does not count among those to keep."""
    save(tmp_path, 1)
    truncate(save(tmp_path, 2) / "model.safetensors")
    save(tmp_path, 3, keep=2)
    assert names(tmp_path) == [f"checkpoint-000000000{n}" for n in (1, 2, 3)]


def test_damage_after_opening(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    loaded = load_checkpoint(path, verify=False)
    truncate(path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"Checkpoint.tensors: expected .*model.safetensors to be as it was written"
    ):
        loaded.tensors("model")


def test_without_verification_sizes_alone_are_checked(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    flip_bit(path / "optimizer.safetensors")
    assert load_checkpoint(path, verify=False).images == 1


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    path = save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=f"of format {checkpoint.FORMAT + 1}, and this version reads up to"):
        load_checkpoint(path)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"expected path to be the directory of a checkpoint, got .*missing \(nothing\)"
    ):
        load_checkpoint(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"\(a file\); pass one named checkpoint-<images>"):
        load_checkpoint(tmp_path / "file")
    path = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=rf"\(a directory without state.json\); pass {path}"):
        load_checkpoint(tmp_path)


# writing --------------------------------------------------------------------------------------------------------------


def run_in_child(work: Callable[[], object]) -> int:
    """The exit status of a process that does this and nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of fork with threads
        child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to kill a process that writes")
def test_killed_at_any_moment_the_previous_checkpoint_is_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL before each call that reaches the disk, in turn, until a save gets through."""
    calls = [
        (os, "fsync"),
        (os, "rename"),
        (os, "chmod"),
        (shutil, "rmtree"),
        (Path, "write_text"),
        (Path, "mkdir"),
        (checkpoint, "save_file"),
    ]

    def save_and_die(directory: Path, survive: int) -> None:
        left = survive

        def deadly(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return original(*args, **kwargs)

            return call

        for owner, name in calls:
            monkeypatch.setattr(owner, name, deadly(getattr(owner, name)))
        save(directory, 3, keep=1)

    original = tmp_path / "original"
    save(original, 1)
    save(original, 2)
    for survive in range(100):
        directory = tmp_path / str(survive)
        shutil.copytree(original, directory)
        status = run_in_child(lambda directory=directory, survive=survive: save_and_die(directory, survive))
        checkpoints = [name for name in names(directory) if not name.startswith(".")]
        assert all(load_checkpoint(directory / name) for name in checkpoints)
        assert newest(directory).images in (2, 3)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        save(directory, 4, keep=9)
        assert not [name for name in names(directory) if name.startswith(".")], (
            "the next writer removes what the dead one left"
        )
    assert survive > 12
    assert names(directory) == ["checkpoint-0000000003"]


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    with atomic.unfinished_directory(tmp_path) as mine:
        (mine / "file").touch()
        save(tmp_path, 1)
        assert (mine / "file").exists()
    assert names(tmp_path) == ["checkpoint-0000000001"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    save(tmp_path, 1)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(
        OSError, match=r"save_checkpoint: expected 0\.0 MB of free space in .*; free some space or choose another"
    ) as caught:
        save(tmp_path, 2)
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["checkpoint-0000000001"]
    assert newest(tmp_path).images == 1


def test_too_little_space_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 2_000_000))
    with pytest.raises(OSError, match=r"expected 4\.0 MB of free space in .*, got 2\.0 MB"):
        save_checkpoint(tmp_path, 1, {"model": {"w": torch.zeros(1_000_000)}}, {}, {})
    assert names(tmp_path) == []


def test_other_errors_of_the_disk_pass_through(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        save(tmp_path / "file", 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": -1}, ValueError, "expected images >= 0, got -1"),
        ({"keep": 0}, ValueError, "expected keep >= 1, got 0"),
        ({"tensors": {"../x": {}}}, ValueError, r"expected names of groups in letters, digits, _ and -, got '../x'"),
        ({"tensors": {"model": {"lr": 0.1}}}, TypeError, "expected a tensor as model.lr, got float"),
        ({"state": {"x": {1, 2}}}, ValueError, "expected state to be JSON"),
        ({"config": {"x": float("nan")}}, ValueError, "expected config to be JSON with finite numbers"),
    ],
)
def test_bad_arguments(tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"directory": tmp_path / "run", "images": 1, "tensors": {}, "state": {}, "config": {}} | change
    with pytest.raises(error, match=f"save_checkpoint: {message}"):
        save_checkpoint(**arguments)
    assert not (tmp_path / "run").exists()


# fitting --------------------------------------------------------------------------------------------------------------


def test_copy_into_refuses_what_does_not_fit(tmp_path: Path) -> None:
    loaded = load_checkpoint(save(tmp_path, 1))
    targets = {"conv.weight": torch.zeros(8, 3, 3, 3), "conv.bias": torch.zeros(4).double(), "extra": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        loaded.copy_into("model", targets)
    for part in (
        "extra: not in the checkpoint",
        "saved [4, 3, 3, 3] float32, wanted [8, 3, 3, 3] float32",
        "wanted [4] float64",
    ):
        assert part in str(caught.value)
    del targets["conv.bias"], targets["extra"]
    with pytest.raises(CheckpointError, match=r"conv.bias: in the checkpoint alone; .*build the model from"):
        loaded.copy_into("model", targets)
    assert not targets["conv.weight"].any()


def test_an_unknown_group(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected group to be one of model, optimizer, got 'ema'"):
        load_checkpoint(save(tmp_path, 1)).tensors("ema")


def test_check_config() -> None:
    check_config(CONFIG, {"model": {"base_channels": 8, "channel_mult": (1, 2)}, "lr": 2e-4})
    wanted = {"model": {"base_channels": 16, "channel_mult": (1, 2)}, "lr": 1e-4, "ema": True}
    with pytest.raises(CheckpointError) as caught:
        check_config(CONFIG, wanted)
    for part in (
        "ema: wanted alone, True",
        "lr: saved 0.0002, wanted 0.0001",
        "model.base_channels: saved 8, wanted 16",
    ):
        assert part in str(caught.value)
    check_config(CONFIG, wanted, allowed_to_differ=("model", "lr", "ema"))
    with pytest.raises(CheckpointError, match=r"got model.base_channels: saved 8, wanted 16; take"):
        check_config(CONFIG, wanted, allowed_to_differ=("lr", "ema", "mod"))


def test_errors_are_value_errors() -> None:
    assert issubclass(CheckpointError, ValueError)
