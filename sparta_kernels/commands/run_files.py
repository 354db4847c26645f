"""The files of a training run: the configuration it begins with, and what it keeps beside its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import typer

from .. import training
from ..data.files import write_atomically
from . import options

# Options of one call, not of the run.
_NOT_CONFIGURED = {"config", "resume", "overwrite", "json", "help"}

# What an entry may be, in words and types, by its option's type. Text is then checked as it is on the command line.
_TEXT = ("a string", (str,))
_KINDS: dict[Any, tuple[str, tuple[type, ...]]] = {
    bool: ("true or false", (bool, str)),
    int: ("an integer", (int, str)),
    int | None: ("an integer", (int, str)),
    float: ("a number", (int, float, str)),
    Any: ("a number, a string or a list", (int, float, str, list)),
}


def configure(context: typer.Context, path: Path | None) -> Path | None:
    """Make the entries of --config the defaults of the other options, which are then parsed and checked as ever."""
    if path is not None:
        parameters = {
            parameter.opts[0].removeprefix("--").replace("-", "_"): parameter.name
            for parameter in context.command.params
            if parameter.param_type_name == "option"
        }
        known = [name for name in parameters if name not in _NOT_CONFIGURED]
        try:
            entries = training.read_config(path, known)
        except training.ConfigError as error:
            raise typer.BadParameter(str(error)) from error
        except OSError as error:
            raise typer.BadParameter(f"cannot read {path}: {error.strerror}") from error
        types = get_type_hints(context.command.callback)
        for name, value in entries.items():
            words, kinds = _KINDS.get(types[str(parameters[name])], _TEXT)
            if type(value) not in kinds:
                raise typer.BadParameter(f"{path}: {name} must be {words}, got {value!r}")
        context.default_map = {str(parameters[name]): _as_typed(value) for name, value in entries.items()}
    return path


def _as_typed(value: Any) -> str:
    """An entry as somebody would type it."""
    return ",".join(map(_as_typed, value)) if isinstance(value, list) else str(value)


class RunFiles:
    """What a run keeps: NAME.toml and NAME.csv beside its checkpoint NAME.safetensors, and metrics.csv in --log-dir.

    Args:
        checkpoint: the file with the network.
        log_dir: folder for TensorBoard's events too; None for none.
        entries: of the configuration to keep; those that are None are left out.
    """

    def __init__(self, checkpoint: Path, log_dir: Path | None, entries: Mapping[str, Any]) -> None:
        name = checkpoint.name.removesuffix(".safetensors")
        self._checkpoint, self._log_dir = checkpoint, log_dir
        self._toml, table = checkpoint.with_name(f"{name}.toml"), checkpoint.with_name(f"{name}.csv")
        self.tables = [table] if log_dir is None else [table, log_dir / "metrics.csv"]
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in entries.items()}
        self._entries = {key: value for key, value in plain.items() if value is not None}
        self._writes_toml = True

    def check(
        self, config: Path | None, sparta_from: Path | None, json_file: Path | None, resume: bool, overwrite: bool
    ) -> None:
        """Refuse files, by option, that cannot be written, or would take the place of what is not to be lost."""
        given = config is not None and options.same_file(config, self._toml)
        self._writes_toml = not given and not self._is_kept()
        written = [("CHECKPOINT", path) for path in (self._checkpoint, self.tables[0])]
        written += [("CHECKPOINT", self._toml)] if self._writes_toml else []
        written += [("--log-dir", path) for path in self.tables[1:]]
        checked = written
        if self._log_dir is not None and not self._log_dir.is_dir():
            if self._log_dir.exists():
                raise typer.BadParameter(f"must be a folder, got {self._log_dir}", param_hint="--log-dir")
            checked = [*written[:-1], ("--log-dir", self._log_dir)]  # yet to be made
        inputs = [("--sparta-from", sparta_from), ("--config", config)]
        options.check_outputs(
            [*checked, ("--json", json_file)], [(option, path) for option, path in inputs if path is not None]
        )
        for option, path in written:
            if path.exists() and not resume and not overwrite:
                raise typer.BadParameter(
                    f"{path} exists; add --resume or --overwrite, or name another", param_hint=option
                )
        if given and not resume and not self._is_kept():
            raise typer.BadParameter(
                f"the run's whole configuration would go into {config}; name the checkpoint otherwise",
                param_hint="--config",
            )

    def _is_kept(self) -> bool:
        """Whether NAME.toml has this very configuration, in whatever words."""
        try:
            return self._toml.exists() and training.read_config(self._toml, self._entries) == self._entries
        except (training.ConfigError, OSError):
            return False

    def write_configuration(self) -> None:
        """Keep the configuration, for --config, once: that of the checkpoint that is there."""
        if self._writes_toml:
            write_atomically(self._toml, training.as_toml(self._entries).encode())
            self._writes_toml = False
