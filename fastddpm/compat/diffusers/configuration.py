"""The configuration of a scheduler as diffusers keeps it: a mapping with attributes, and a JSON file.

A file of diffusers makes a scheduler here, and one written here makes one there. Keys that a scheduler does not know
are kept, since another that is made of the same configuration may: those of any scheduler that diffusers lets take
another's place in silence, others with a warning.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import numpy as np
import torch

P = ParamSpec("P")
C = TypeVar("C", bound="Configured")

FORMAT = "0.42.1"
"""The version of diffusers whose files these are."""
NOT_GIVEN = "_use_default_values"
"""Where a configuration names the arguments that were left at their defaults: another class takes its own for them."""

# of the schedulers that can take another's place, by what their constructors take
KEYS_OF_SCHEDULERS = """
    algorithm_type beta_end beta_schedule beta_start clip_sample clip_sample_range disable_corrector
    dynamic_thresholding_ratio euler_at_final final_sigmas_type flow_shift interpolation_type lambda_min_clipped
    lower_order_final noise_sampler_seed num_train_timesteps predict_x0 prediction_type rescale_betas_zero_snr
    rho sample_max_value set_alpha_to_one shift_terminal sigma_data sigma_max sigma_min sigma_schedule
    skip_prk_steps solver_order solver_p solver_type steps_offset thresholding time_shift_type timestep_spacing
    timestep_type trained_betas use_beta_sigmas use_dynamic_shifting use_exponential_sigmas use_flow_sigmas
    use_karras_sigmas use_lu_lambdas variance_type
"""
OF_THE_HUB = ("cache_dir", "force_download", "local_dir", "local_files_only", "revision", "token")
WITHOUT_EFFECT = ("local_dir_use_symlinks", "mirror", "proxies", "user_agent")  # known to older versions of the hub


class Config(dict[str, Any]):
    """A configuration: config["key"] and config.key are the same. It does not change; dict(config) is a copy that may.

    Raises:
        AttributeError: a key that is not there, and any attempt to change one. TypeError: the same, by index.
    """

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"Config: expected one of the keys {', '.join(self)}, got {name}; read one of these")

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(_unchanging(name))

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(_unchanging(args[0] if args else "a change"))

    __setitem__ = __delitem__ = pop = popitem = update = setdefault = clear = __ior__ = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return Config, (dict(self),)


def _unchanging(what: Any) -> str:
    return (
        f"Config: expected a configuration to stay as it is, got {what}; make another scheduler with "
        "from_config(scheduler.config, key=value)"
    )


def configured(init: Callable[Concatenate[C, P], None]) -> Callable[Concatenate[C, P], None]:
    """Decorates a constructor: its arguments become the configuration, but for ``corrected`` where that is False.

    Arguments whose names begin with an underscore, which stand in files, are kept there and not passed on.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def recorded(self: C, /, *args: P.args, **kwargs: P.kwargs) -> None:
        private = {name: value for name, value in kwargs.items() if name.startswith("_")}
        public: Any = {name: value for name, value in kwargs.items() if name not in private}
        if all(p.kind is not p.VAR_KEYWORD for p in signature.parameters.values()):
            _refuse_unknown(type(self).__name__, public, list(signature.parameters)[1:])
        bound = signature.bind(self, *args, **public)
        given = set(bound.arguments)
        bound.apply_defaults()
        values = dict(list(bound.arguments.items())[1:])
        if not values["corrected"]:
            del values["corrected"]
        private[NOT_GIVEN] = [name for name in values if name not in given]
        self.register_to_config(**private, **values)
        init(self, *args, **public)

    return recorded


def _refuse_unknown(who: str, given: Iterable[str], known: list[str]) -> None:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"choose among {', '.join(known)}"
            raise TypeError(f"{who}: expected arguments of its constructor, got {name!r}; {remedy}")


class Configured:
    """What a scheduler does with its configuration, and with the file of it."""

    config_name = "scheduler_config.json"
    _internal_dict: Config

    @property
    def config(self) -> Config:
        """The arguments of the constructor, and what else its file said."""
        return self._internal_dict

    def register_to_config(self, **values: Any) -> None:
        """Add to the configuration, or replace."""
        self._internal_dict = Config({**getattr(self, "_internal_dict", {}), **values})

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler of a configuration: of one of these schedulers, or of diffusers', or a dictionary.

        Args:
            config: a mapping, or where its file is, see `load_config`.
            return_unused_kwargs: return the pair of the scheduler and of what it made no use of.
            **kwargs: arguments of the constructor, in place of what the configuration says; ``corrected`` among them.

        Raises:
            TypeError: config is neither a mapping nor a path.
        """
        if isinstance(config, str | os.PathLike):
            config, kwargs = cls.load_config(config, return_unused_kwargs=True, **kwargs)
        if not isinstance(config, dict):
            raise TypeError(
                f"{cls.__name__}.from_config: expected config to be a mapping, got {type(config).__name__}; "
                "pass scheduler.config, or use from_pretrained with a folder or the name of a repository"
            )
        left_out = {NOT_GIVEN, *config.get(NOT_GIVEN, ())}
        said = {key: value for key, value in config.items() if key not in left_out}
        arguments = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        strange = {
            key: value
            for key, value in said.items()
            if key not in arguments and key not in KEYS_OF_SCHEDULERS.split() and not key.startswith("_")
        }
        if strange:
            warnings.warn(
                f"{cls.__name__} has no argument {', '.join(strange)}, which its configuration names: kept, "
                f"without effect; see {cls.config_name}",
                stacklevel=2,
            )
        known = {key: value for key, value in said.items() if key in arguments}
        known.update((key, kwargs.pop(key)) for key in arguments if key in kwargs)
        scheduler = cls(**known)
        hidden = {key: value for key, value in said.items() if key not in known}
        if "_class_name" in hidden:
            hidden["_class_name"] = cls.__name__
        scheduler.register_to_config(**hidden)
        return (scheduler, {**strange, **kwargs, **hidden}) if return_unused_kwargs else scheduler

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """A scheduler of the file in a folder, or in a repository of the Hugging Face hub.

        Args:
            pretrained_model_name_or_path: a folder, the file itself, or the name of a repository.
            subfolder: where in it the file is, "scheduler" in that of a pipeline.
            return_unused_kwargs: see `from_config`.
            **kwargs: of the hub (cache_dir, force_download, local_dir, local_files_only, revision, token), and
                arguments of the constructor in place of what the file says.

        Raises:
            OSError: no such file, or none that is JSON. ImportError: a repository, without huggingface_hub.
        """
        config, kwargs = cls.load_config(
            pretrained_model_name_or_path, return_unused_kwargs=True, subfolder=subfolder, **kwargs
        )
        return cls.from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def load_config(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        return_unused_kwargs: bool = False,
        *,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """The content of a configuration file. Arguments and errors are those of `from_pretrained`."""
        hub = {key: kwargs.pop(key) for key in OF_THE_HUB if key in kwargs}
        for key in WITHOUT_EFFECT:
            kwargs.pop(key, None)
        file = _find(os.fspath(pretrained_model_name_or_path), subfolder, cls.config_name, hub)
        try:
            config = json.loads(Path(file).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise OSError(
                f"{cls.__name__}.load_config: expected a JSON file, got {file} ({error}); load another"
            ) from error
        return (config, kwargs) if return_unused_kwargs else config

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False) -> None:
        """Write the configuration into a folder, which is made where it is missing; diffusers reads it, too.

        Raises:
            NotADirectoryError: save_directory is a file.
            NotImplementedError: push_to_hub.
        """
        if push_to_hub:
            raise NotImplementedError(
                f"{type(self).__name__}.save_pretrained: expected push_to_hub=False, got True; save to a folder and "
                "upload it with huggingface_hub.upload_folder"
            )
        folder = Path(save_directory)
        if folder.is_file():
            raise NotADirectoryError(
                f"{type(self).__name__}.save_pretrained: expected save_directory to be a folder, got the file {folder};"
                " choose another name"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self.to_json_file(folder / self.config_name)

    save_config = save_pretrained

    def to_json_string(self) -> str:
        """The configuration as the text of its file."""
        values = {key: _plain(value) for key, value in self.config.items() if key not in (NOT_GIVEN, "_ignore_files")}
        values.update(_class_name=type(self).__name__, _diffusers_version=FORMAT)
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write that text."""
        Path(json_file_path).write_text(self.to_json_string(), encoding="utf-8")

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    def __getattr__(self, name: str) -> Any:
        config = self.__dict__.get("_internal_dict", {})
        if name in config:  # scheduler.beta_start, which diffusers takes with the same words of warning
            warnings.warn(
                f"{type(self).__name__}.{name} is read from the configuration: write scheduler.config.{name}",
                FutureWarning,
                stacklevel=2,
            )
            return config[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _plain(value: Any) -> Any:
    """What JSON can write."""
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return value.tolist()
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _find(name: str, subfolder: str | None, file: str, hub: dict[str, Any]) -> str:
    """The path of a configuration file: ``name`` itself, in that folder, or downloaded from that repository."""
    if os.path.isfile(name):
        return name
    if os.path.isdir(name):
        found = [os.path.join(name, subfolder or "", file), os.path.join(name, file)]
        for path in found:
            if os.path.isfile(path):
                return path
        raise OSError(
            f"from_pretrained: expected {file} in {os.path.dirname(found[0])}, got a folder without it; "
            "pass the subfolder that has it, such as subfolder='scheduler'"
        )
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise ImportError(
            f"from_pretrained: expected a folder or the package huggingface_hub, got the name {name!r} without it; "
            "pip install huggingface_hub"
        ) from error
    try:
        return str(hf_hub_download(name, file, subfolder=subfolder, **hub))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise OSError(
            f"from_pretrained: expected {name!r} to be a folder, or a repository of the Hugging Face hub with {file}, "
            f"got {type(error).__name__}: {error}; check the name, the subfolder and the connection"
        ) from error
