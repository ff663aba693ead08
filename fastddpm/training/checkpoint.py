"""Checkpoints: a directory of safetensors and JSON files that is there whole or not at all, and is checked when it is
read.

``checkpoint-<images>/`` holds one ``<group>.safetensors`` for each group of tensors (model, ema, optimizer, ...),
``config.json`` (the full configuration) and ``state.json`` (everything else, with the size and SHA-256 of each file and
of itself). A file ``pinned`` in it keeps it for good.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import _native
from .atomic import is_disk_full, megabytes, publish, remove, unfinished_directory

FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d{10,})(?:\.(\d+))?")  # the second number: saved again at the same count of images
_GROUP = re.compile(r"[A-Za-z0-9_-]+")
_PIN = "pinned"


class CheckpointError(ValueError):
    """A checkpoint that is damaged, is none, or does not fit."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds; tensors are read when asked for.

    Attributes:
        path: its directory.
        images: how many training images it has seen.
        state: what the writer put there besides tensors.
        config: the full configuration of the run.
        environment: versions, device, threads and build it was written with.
        groups: names of the groups of tensors.
    """

    path: Path
    images: int
    state: dict[str, Any]
    config: dict[str, Any]
    environment: dict[str, Any]
    groups: tuple[str, ...]

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Read one group into memory of the CPU, every tensor contiguous.

        Raises:
            CheckpointError: the checkpoint has no such group, or its file has been damaged since.
        """
        if group not in self.groups:
            raise CheckpointError(
                f"Checkpoint.tensors: expected group to be one of {', '.join(self.groups)}, got {group!r}; "
                "it was saved without, choose another checkpoint"
            )
        file = self.path / f"{group}.safetensors"
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"Checkpoint.tensors: expected {file} to be as it was written, got {error}; delete {self.path}"
            ) from error

    @torch.no_grad()
    def copy_into(self, group: str, targets: Mapping[str, Tensor], optional: Collection[str] = ()) -> None:
        """Copy one group into existing tensors, which keep their device and their strides (such as channels_last).

        Args:
            targets: a tensor for each name in the group, of the saved shape and dtype.
            optional: names that either side may lack; what is not saved stays as it is.

        Raises:
            CheckpointError: names, shapes or dtypes differ; nothing has been copied then.
        """
        saved = self.tensors(group)
        problems = [f"{name}: not in the checkpoint" for name in targets if name not in {*saved, *optional}]
        problems += [f"{name}: in the checkpoint alone" for name in saved if name not in {*targets, *optional}]
        for name, target in targets.items():
            if name in saved and (saved[name].shape, saved[name].dtype) != (target.shape, target.dtype):
                problems.append(f"{name}: saved {_describe(saved[name])}, wanted {_describe(target)}")
        if problems:
            raise CheckpointError(
                f"Checkpoint.copy_into: expected group {group!r} of {self.path} to fit, got {_listing(problems)}; "
                f"build the model from the configuration in {self.path / 'config.json'}"
            )
        for name, target in targets.items():
            if name in saved:
                target.copy_(saved[name])


def save_checkpoint(
    directory: str | Path,
    images: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    keep: int = 2,
    pinned: bool = False,
) -> Path:
    """Write ``directory/checkpoint-<images>``, durably and in one step.

    A process killed at any moment leaves the previous checkpoints as they were.

    Args:
        directory: where checkpoints of this run are; made if need be.
        images: training images seen, >= 0. Saved a second time at the same count, the name gets a suffix (.1, .2, ...)
            and wins over the first.
        tensors: groups of named tensors; each group becomes a file. Tensors may lie on any device, in any layout, and
            share memory.
        state: anything else, as JSON (finite numbers).
        config: the full configuration, as JSON.
        keep: how many checkpoints to keep, this one included, >= 1. Older ones go once this one is on the disk; pinned
            and damaged ones stay.
        pinned: never remove this one (the best so far, say); see `pin_checkpoint`.

    Returns:
        The path of the checkpoint.

    Raises:
        ValueError: a number or a name out of range, or state or config not JSON.
        TypeError: something in ``tensors`` is not a tensor.
        OSError: the disk is full (what is needed is named), or not writable; earlier checkpoints are as they were.

    Numerics: bits are stored as they are.
    """
    if images < 0:
        raise ValueError(
            f"save_checkpoint: expected images >= 0, got {images}; pass the number of training images seen"
        )
    if keep < 1:
        raise ValueError(
            f"save_checkpoint: expected keep >= 1, got {keep}; the checkpoint being written is kept in any case"
        )
    for group, members in tensors.items():
        if not _GROUP.fullmatch(group):
            raise ValueError(
                f"save_checkpoint: expected names of groups in letters, digits, _ and -, got {group!r}; "
                "it becomes the name of a file"
            )
        for name, value in members.items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"save_checkpoint: expected a tensor as {group}.{name}, got {type(value).__name__}; "
                    "put other values into state"
                )
    config_text = _json("config", config)
    _json("state", state)

    directory = Path(directory)
    everything = [value for members in tensors.values() for value in members.values()]
    size = sum(value.numel() * value.element_size() for value in everything)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with unfinished_directory(directory) as path:
            free = shutil.disk_usage(directory).free
            if free < size:
                raise OSError(errno.ENOSPC, "too little space")
            (path / "config.json").write_text(config_text)
            for group, members in tensors.items():
                file = path / f"{group}.safetensors"
                save_file(_separate(members), file)
                # safetensors makes files that only their owner can read
                os.chmod(file, (path / "config.json").stat().st_mode)
            contents: dict[str, Any] = {
                "format": FORMAT,
                "images": images,
                "environment": environment(
                    next((value.device for value in everything if value.device.type != "cpu"), "cpu")
                ),
                "state": state,
                "files": _digests(path, [file.name for file in path.iterdir()]),
            }
            contents = json.loads(_json("state", contents))  # what a reader will see
            contents["sha256"] = _digest_of_json(contents)
            (path / "state.json").write_text(_json("state", contents))
            if pinned:
                (path / _PIN).touch()
            generations = [generation for count, generation, _ in _checkpoints(directory) if count == images]
            suffix = f".{max(generations) + 1}" if generations else ""
            target = directory / f"checkpoint-{images:010d}{suffix}"
            publish(path, target)
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        raise OSError(
            errno.ENOSPC,
            f"save_checkpoint: expected {megabytes(size)} of free space in {directory}, "
            f"got {megabytes(shutil.disk_usage(directory).free)}; "
            "free some space or choose another output directory, the earlier checkpoints are intact",
        ) from error
    _prune(directory, target, keep)
    return target


def pin_checkpoint(path: str | Path, pinned: bool = True) -> None:
    """Mark a checkpoint as one that is never removed, or take the mark away."""
    if pinned:
        (Path(path) / _PIN).touch()
    else:
        (Path(path) / _PIN).unlink(missing_ok=True)


def load_checkpoint(path: str | Path, *, verify: bool = True) -> Checkpoint:
    """Open a checkpoint.

    Args:
        path: the directory of one checkpoint.
        verify: compare the SHA-256 of every file (reads all of it once); without, sizes alone.

    Raises:
        CheckpointError: the path is not a checkpoint, or a file of it is missing, truncated or changed. The message
            names the file, and the newest intact checkpoint beside it.
    """
    path = Path(path)
    if not (path / "state.json").exists() and not (path.is_dir() and _NAME.fullmatch(path.name)):
        there = [str(other) for _, _, other in _checkpoints(path) or _checkpoints(path.parent)]
        several = "one of " if len(there) > 1 else ""
        remedy = f"pass {several}{_listing(there)}" if there else "pass one named checkpoint-<images>"
        found = "a directory without state.json" if path.is_dir() else "a file" if path.exists() else "nothing"
        raise CheckpointError(
            f"load_checkpoint: expected path to be the directory of a checkpoint, got {path} ({found}); {remedy}"
        )
    try:
        return _open(path, verify)
    except CheckpointError as error:
        intact = next(
            (
                other
                for _, _, other in _checkpoints(path.parent)
                if other != path and isinstance(_open_or_reason(other), Checkpoint)
            ),
            None,
        )
        remedy = f"delete it, {intact} is intact" if intact else "delete it; no other checkpoint beside it is intact"
        raise CheckpointError(f"load_checkpoint: expected an intact checkpoint, got {error}; {remedy}") from error


def latest_checkpoint(directory: str | Path) -> Checkpoint | None:
    """The newest intact checkpoint in a directory, verified; None where there is none at all.

    Damaged ones are named in a warning and passed over.

    Raises:
        CheckpointError: there are checkpoints, and not one is intact.
    """
    damaged: list[str] = []
    for _, _, path in _checkpoints(Path(directory)):
        found = _open_or_reason(path)
        if isinstance(found, str):
            damaged.append(found)
            continue
        if damaged:
            warnings.warn(
                f"latest_checkpoint: using {path}, which is intact; damaged: {_listing(damaged)}; delete them",
                stacklevel=2,
            )
        return found
    if damaged:
        raise CheckpointError(
            f"latest_checkpoint: expected an intact checkpoint in {directory}, got {_listing(damaged)}; "
            "delete them to start from the beginning"
        )
    return None


def check_config(
    saved: Mapping[str, Any],
    wanted: Mapping[str, Any],
    allowed_to_differ: Iterable[str] = (),
    remedy: str = "take the saved values, or start a new run in another directory",
) -> None:
    """Expect two configurations to be the same, as JSON sees them; a missing key is the same as null.

    Args:
        saved, wanted: nested mappings; keys are joined by dots in messages and in ``allowed_to_differ``.
        allowed_to_differ: keys that may differ, each with all that is below it.
        remedy: what the message says to do.

    Raises:
        CheckpointError: with every key that differs and both its values.
    """
    allowed = tuple(allowed_to_differ)
    old, new = _flatten(json.loads(json.dumps(saved))), _flatten(json.loads(json.dumps(wanted)))
    differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    differences = [
        f"{key}: saved {old[key]!r}, wanted {new[key]!r}"
        if key in old and key in new
        else f"{key}: {'saved' if key in old else 'wanted'} alone, {(old | new)[key]!r}"
        for key in differing
        if not any(key == name or key.startswith(f"{name}.") for name in allowed)
    ]
    if differences:
        raise CheckpointError(
            "check_config: expected the configuration that the checkpoint was written with, "
            f"got {'; '.join(differences)}; {remedy}"
        )


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What the bits of a run depend on besides its configuration: versions, device, threads and build."""
    from .. import __version__

    device = torch.device(device)
    built = _native.build_info()
    return {
        "fastddpm": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": f"{built['cpu']} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": torch.get_num_threads(),
        "build": _digest_of_json({"torch": torch.__config__.show(), "native": built["native"]})[:16],
    }


def environment_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """In words, each thing that differs: a run resumed then does not give the bits of an uninterrupted one."""
    return [
        f"{key}: {saved.get(key)} when saved, {current.get(key)} now"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    ]


def _open(path: Path, verify: bool) -> Checkpoint:
    """Read the JSON files and check all files.

    Raises:
        CheckpointError: names the path and what is wrong with it, and no remedy.
    """
    try:
        contents = _read_json(path / "state.json")
        if contents["format"] > FORMAT:
            raise CheckpointError(f"{path} of format {contents['format']}, and this version reads up to {FORMAT}")
        if contents.pop("sha256") != _digest_of_json(contents):
            raise CheckpointError(f"{path / 'state.json'} changed since it was written (SHA-256)")
        files: dict[str, dict[str, Any]] = contents["files"]
        for name, file in files.items():
            size = (path / name).stat().st_size
            if size != file["bytes"]:
                raise CheckpointError(f"{path / name} of {size} bytes where {file['bytes']} were written")
        if verify:
            for name, file in _digests(path, files).items():
                if file != files[name]:
                    raise CheckpointError(f"{path / name} changed since it was written (SHA-256)")
        return Checkpoint(
            path=path,
            images=contents["images"],
            state=contents["state"],
            config=_read_json(path / "config.json"),
            environment=contents["environment"],
            groups=tuple(name.removesuffix(".safetensors") for name in files if name.endswith(".safetensors")),
        )
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} without the file {Path(error.filename).name}") from error
    except OSError as error:
        raise CheckpointError(f"{path} unreadable ({error})") from error
    except (KeyError, TypeError) as error:  # what damage to state.json may turn into
        raise CheckpointError(f"{path / 'state.json'} unreadable ({error!r})") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        contents = json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file} unreadable ({error})") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{file} unreadable (no JSON object)")
    return contents


def _open_or_reason(path: Path, verify: bool = True) -> Checkpoint | str:
    try:
        return _open(path, verify)
    except CheckpointError as error:
        return str(error)


def _checkpoints(directory: Path) -> list[tuple[int, int, Path]]:
    """(images, generation, path) of all that are named as checkpoints, newest first."""
    found = []
    if directory.is_dir():
        for path in directory.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir():
                found.append((int(match[1]), int(match[2] or 0), path))
    return sorted(found, reverse=True)


def _prune(directory: Path, newest: Path, keep: int) -> None:
    """Remove what is older than ``newest`` beyond ``keep``; what has seen more images belongs to another branch of the
    run and stays."""
    paths = [path for _, _, path in _checkpoints(directory)]
    candidates = [
        path
        for path in paths[paths.index(newest) + 1 :]
        if not (path / _PIN).exists() and isinstance(_open_or_reason(path, verify=False), Checkpoint)
    ]
    for path in candidates[keep - 1 :]:
        remove(path)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, no two of which share memory, as safetensors wants them."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        if storage in seen:
            value = value.clone()
        seen.add(storage)
        separate[name] = value
    return separate


def _digests(path: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file, several files at a time."""
    names = sorted(names)
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = pool.map(lambda name: _digest(path / name), names)
        return {
            name: {"bytes": (path / name).stat().st_size, "sha256": digest}
            for name, digest in zip(names, digests, strict=True)
        }


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest_of_json(contents: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _json(what: str, value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"save_checkpoint: expected {what} to be JSON with finite numbers, got something else ({error}); "
            "convert it to plain numbers, strings and lists"
        ) from error


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat.update(_flatten(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _listing(items: list[str], limit: int = 8) -> str:
    more = f"; and {len(items) - limit} more" if len(items) > limit else ""
    return "; ".join(items[:limit]) + more
