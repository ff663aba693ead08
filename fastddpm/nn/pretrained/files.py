"""From a path or the name of a repository to a configuration and tensors."""

from __future__ import annotations

import difflib
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

OWN_FORMAT = "fastddpm.UNet"
OWN_FILE = "model.safetensors"
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
# Of our own format there is one file. Of diffusers there may be several: the first of these is read. An index names the
# files that the tensors are spread over. The patterns are what is fetched from a repository, one after the other.
OWN_WEIGHTS = (OWN_FILE,)
DIFFUSERS_WEIGHTS = (
    DIFFUSERS_FILE,
    f"{DIFFUSERS_FILE}.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
)
DIFFUSERS_PATTERNS = (
    ("diffusion_pytorch_model.safetensors*", "diffusion_pytorch_model-*-of-*.safetensors"),
    ("diffusion_pytorch_model.bin*", "diffusion_pytorch_model-*-of-*.bin"),
)
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


class Source(NamedTuple):
    """A network that was found: its name for messages, config.json (None: there is none) and how to read tensors."""

    name: str
    config: dict[str, Any] | None
    read: Callable[[], dict[str, Tensor]]


def find(path: str | Path, subfolder: str | None, revision: str | None, who: str) -> Source:
    """Find a network; see `UNet.from_pretrained`.

    Raises:
        ValueError: nothing that could be read. ImportError: a repository without the package huggingface_hub.
    """
    if Path(path).is_file():
        file = Path(path)
        beside = file.parent / "config.json"
        return Source(str(file), read_json(beside, who) if beside.exists() else None, lambda: read_tensors(file, who))
    places = ("", "unet") if subfolder is None else (subfolder,)
    root = local_copy(path, [str(Path(place) / "config.json") for place in places], revision, who)
    folder = next((root / place for place in places if (root / place / "config.json").is_file()), None)
    if folder is None:
        there = sorted(entry.name for entry in root.iterdir())
        remedy = "pass the folder of the network, or subfolder="
        if any(name.startswith("checkpoint-") for name in there):
            remedy = "for a training run of this library use fastddpm.load_diffusion(path).model"
        raise ValueError(
            f"{who}: expected config.json in {' or '.join(str(root / place) for place in places)}, "
            f"got {', '.join(there[:8]) or 'an empty folder'}; {remedy}"
        )
    config = read_json(folder / "config.json", who)
    if (folder / "state.json").exists():
        raise ValueError(
            f"{who}: expected a network, got the checkpoint of a training run, {folder}; "
            "use fastddpm.load_diffusion(path).model, and its save_pretrained for the network alone"
        )
    below, own = folder.relative_to(root), config.get("format") == OWN_FORMAT
    return Source(str(path), config, lambda: _read_folder(path, below, revision, own, who))


def local_copy(path: str | Path, patterns: list[str], revision: str | None, who: str) -> Path:
    """The folder itself, or a copy of a repository on the hub that has at least the files of these patterns.

    Raises:
        ValueError: neither a folder, nor a repository that can be had; the name of a repository where a folder has the
            name of its owner, which is taken for a mistyped path. ImportError: no huggingface_hub.
    """
    if Path(path).is_dir():
        return Path(path)
    if not is_repository(path):
        raise ValueError(
            f"{who}: expected a folder, a file or a repository on the Hugging Face hub such as "
            f"'google/ddpm-cifar10-32', got {str(path)!r}, where nothing is; check the path"
        )
    parent = Path(path).parent
    if parent.is_dir():  # a path, mistyped: nobody is asked about it
        there = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
        near = difflib.get_close_matches(Path(path).name, there, n=1)
        listed = f"{', '.join(there[:8])}{', ...' if there[8:] else ''}"
        found = f"did you mean {parent / near[0]}?" if near else f"{parent} holds {listed or 'nothing'}."
        raise ValueError(
            f"{who}: expected a folder that is there, got {str(path)!r}: no such folder in {parent}; {found} For a "
            f"repository of that name on the Hugging Face hub, call from where no folder {parent} is"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"{who}: expected the package huggingface_hub to get {path} (there is no folder of that name), got none; "
            "pip install 'fastddpm[hub]', or pass a folder"
        ) from error
    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # whatever the hub answers, and no network
        raise ValueError(
            f"{who}: expected a folder or a repository on the Hugging Face hub, got {str(path)!r}: "
            f"no folder, and the hub says: {_first_line(error)}; check the name, the network and your access"
        ) from error


def is_repository(path: str | Path) -> bool:
    """Whether this may be the name of a repository, owner/name, and is no file or folder here."""
    return isinstance(path, str) and REPOSITORY.fullmatch(path) is not None and not Path(path).exists()


def read_json(file: Path, who: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: something else.
    """
    try:
        contents = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{who}: expected {file} to be JSON, got {_first_line(error)}; get the file again") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{who}: expected {file} to be a JSON object, got {type(contents).__name__}; get it again")
    return contents


def read_tensors(file: Path, who: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a pickle that holds nothing else.

    Raises:
        ValueError: a damaged file; a pickle with anything but tensors, none of which is run.
    """
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{who}: expected {file} to be safetensors, got {_first_line(error)}; get the file again"
            ) from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{who}: expected {file} to hold tensors alone, got a pickle with other objects, which could run any code, "
            f"or a damaged one ({_first_line(error)}); nothing in it was run, ask its maker for safetensors"
        ) from error
    except Exception as error:  # damage turns into errors of any kind
        raise ValueError(
            f"{who}: expected {file} to be a file of torch.save, got {_first_line(error)}; get the file again"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        found = f"a dictionary of {', '.join(map(str, list(state)[:8]))}" if isinstance(state, dict) else type(state)
        raise ValueError(
            f"{who}: expected {file} to hold a state dict alone, got {found}; "
            "take the state dict out of it, and save that with torch.save"
        )
    return state


def _read_folder(path: str | Path, below: Path, revision: str | None, own: bool, who: str) -> dict[str, Tensor]:
    """The tensors of a folder, or of one in a repository: safetensors where there are any, else pickles.

    Args:
        below: folder of the network, in the folder or repository. own: whether it is of our own format.
    """
    names = OWN_WEIGHTS if own else DIFFUSERS_WEIGHTS
    for patterns in (OWN_WEIGHTS,) if own else DIFFUSERS_PATTERNS:
        root = local_copy(path, [str(below / pattern) for pattern in patterns], revision, who)
        folder = root / below
        file = next((folder / name for name in names if (folder / name).is_file()), None)
        if file is not None:
            break
    else:
        raise ValueError(
            f"{who}: expected weights in {path}, got no {' or '.join(names)}; "
            "pass the file itself if it has another name"
        )
    if file.suffix != ".json":
        return read_tensors(file, who)
    index = read_json(file, who).get("weight_map")
    parts = sorted(set(index.values())) if isinstance(index, dict) else []
    absent = [name for name in parts if Path(name).name != name or not (folder / name).is_file()]
    if absent or not parts:
        raise ValueError(
            f"{who}: expected the files that {file} names, got no {', '.join(absent) or 'names'}; get them again"
        )
    state: dict[str, Tensor] = {}
    for name in parts:
        state |= read_tensors(folder / name, who)
    return state


def _first_line(error: Exception) -> str:
    """What an error of another library says, briefly."""
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)
