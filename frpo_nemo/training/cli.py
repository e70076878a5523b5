"""From the command line to a run: Hydra composes plain YAML, schema.py types it, the recipe's checks look at it, and
only then NeMo (whose import takes seconds) and everything heavier is imported. A mistake is one sentence, exit code 2.
"""

from __future__ import annotations

import atexit
import contextlib
import difflib
import gc
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra._internal.utils import get_args_parser  # as NeMo's runner does: there is no public one
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from frpo_nemo import redact
from frpo_nemo.errors import ConfigError
from frpo_nemo.training.hub import is_hub_name, local_model
from frpo_nemo.training.schema import load, one_line

EXIT_STOPPED = 75  # EX_TEMPFAIL, as for a rank that was lost (watchdog.py)
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def main(run: Callable[[Any], bool], schema: type, config_name: str, check: Callable[[Any, int], None]) -> None:
    """The body of a recipe: compose `config_name` (or --config-name) with the overrides, `check` it against the size of
    the world that was started, let NeMo's hydra_runner compose it as NeMo's recipes do, and call `run` with it, typed.

    A ConfigError, whether from composing, `check` or `run`, is one line on stderr, under the watchdog's own if a run has
    begun, and exit code 2. A run that a signal ended before its last step (`run` returns False) has exit code 75: start it
    again to continue. With --check the configuration is checked for the world that it names, in this one process, and
    nothing runs.
    """
    gc.disable()  # until everything is loaded (Run.attach): to search what imports make for garbage takes a fifth of a start
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, where it would print a part of the traceback
    _hide_secrets_in_tracebacks()
    composed: list[DictConfig] = []
    try:
        only_check = "--check" in sys.argv
        arguments = _parse_command_line([argument for argument in sys.argv[1:] if argument != "--check"])
        name, directory = arguments.config_name or config_name, arguments.config_path or arguments.config_dir
        local_rank, world_size = (0, None) if only_check else started_world()
        # One process per node checks. If it ends, the launcher ends the others, which are still importing.
        if local_rank == 0 and not _printing_flags(arguments):
            with _quiet():
                cfg = _load(schema, compose(name, arguments.overrides, directory))
                if is_hub_name(cfg.model.path):
                    cfg.model.path = local_model(cfg.model.path, download=True)
                check(cfg, world_size or cfg.trainer.num_nodes * cfg.trainer.devices)
        if only_check:
            print(f"the configuration is right for {cfg.trainer.num_nodes} x {cfg.trainer.devices} processes")
            return
        first, overrides = _for_hydra(arguments.overrides, directory)
        sys.argv[1:] = [f"--config-name={name}", *_printing_flags(arguments), *overrides, "hydra.job.chdir=false"]
        with _quiet():
            hydra_runner = _import_hydra_runner()
        hydra_runner(config_path=first, config_name=name)(composed.append)()
        warnings.filterwarnings("ignore", message="Apex is not installed")  # megatron-core's, at import, in every rank
        if composed:  # not after --help and its like
            finished = run(_load(schema, composed[0]))
            _leave(0 if finished else EXIT_STOPPED)
    except ConfigError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def from_command_line(schema: type | Callable[[DictConfig], type], config_name: str) -> Any:
    """The typed configuration of a recipe that starts no training itself; `schema`: a dataclass, or a function that finds
    it for what was composed. --help prints its options. Raises ConfigError."""
    arguments = _parse_command_line(sys.argv[1:])
    if arguments.help:
        print((CONFIGS / f"{config_name}.yaml").read_text(), end="")
        raise SystemExit(0)
    name, directory = arguments.config_name or config_name, arguments.config_path or arguments.config_dir
    _hide_secrets_in_tracebacks()
    with _quiet():
        composed = compose(name, arguments.overrides, directory)
        return _load(schema if isinstance(schema, type) else schema(composed), composed)


def compose(config_name: str, overrides: Sequence[str] = (), config_dir: str | None = None) -> DictConfig:
    """What the YAML files and the overrides say, without the schema's defaults. Files in `config_dir` come before
    those in configs/. Raises ConfigError."""
    first, hydra_overrides = _for_hydra(overrides, config_dir)
    try:
        with hydra.initialize_config_dir(first, version_base=None):
            return hydra.compose(config_name, overrides=hydra_overrides)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, TypeError) as error:  # TypeError: data.train.first
        raise ConfigError(_sentence(error, config_name, config_dir)) from error


def _leave(code: int) -> NoReturn:
    """End this process as the interpreter does, but for its last search of all that is loaded for garbage, which takes
    three seconds."""
    atexit._run_exitfuncs()  # temporary directories, processes that were started, logs
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def started_world() -> tuple[int, int]:
    """(rank on this node, world size) that torchrun or srun started, or (0, 1)."""
    env = os.environ
    if "RANK" in env:
        return int(env["LOCAL_RANK"]), int(env["WORLD_SIZE"])
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        return int(env["SLURM_LOCALID"]), int(env["SLURM_NTASKS"])
    return 0, 1


def _load(schema: type, composed: DictConfig) -> Any:
    cfg = load(schema, composed)
    redact.remember(OmegaConf.to_container(OmegaConf.structured(cfg)))
    return cfg


def _hide_secrets_in_tracebacks() -> None:
    """Of exceptions that nobody caught, in any thread."""
    sys.excepthook = _print_without_secrets
    threading.excepthook = _print_without_secrets_of_thread


def _print_without_secrets_of_thread(uncaught: threading.ExceptHookArgs) -> None:
    if uncaught.exc_type is SystemExit:  # ends the thread, as everywhere in Python
        return
    print(f"Exception in thread {uncaught.thread.name if uncaught.thread else '?'}:", file=sys.stderr)
    _print_without_secrets(uncaught.exc_type, uncaught.exc_value, uncaught.exc_traceback)


def _print_without_secrets(kind, error, where) -> None:
    """An exception that nobody caught, as Python prints it."""
    lines = "".join(traceback.format_exception(kind, error, where))
    print(redact.text(lines, assignments=False), end="", file=sys.stderr, flush=True)


def _import_hydra_runner() -> Callable:
    from nemo.core.config import hydra_runner
    from nemo.lightning.callback_group import CallbackGroup

    CallbackGroup.get_instance()  # the runner makes it at the end, not quietly
    return hydra_runner


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Libraries warn, in many lines per process, of packages that we do not use, and log what a ConfigError says."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _parse_command_line(argv: list[str]):
    arguments, unknown = get_args_parser().parse_known_intermixed_args(argv)
    if unknown:
        bare = unknown[0].lstrip("-")
        hint = f"overrides are written without dashes: {bare}" if "=" in bare else "--help lists the options"
        raise ConfigError(f"{unknown[0]} is not an option of this command; {hint}.")
    if arguments.multirun:
        raise ConfigError("--multirun would train several times in one process; start one command per run instead.")
    return arguments


def _printing_flags(arguments) -> list[str]:
    """Hydra's options that print something instead of running."""
    switches = [name for name in ("help", "hydra_help", "resolve", "shell_completion") if getattr(arguments, name)]
    values = [name for name in ("cfg", "info", "package") if getattr(arguments, name)]
    return [f"--{n.replace('_', '-')}" for n in switches] + [f"--{n}={getattr(arguments, n)}" for n in values]


def _for_hydra(overrides: Sequence[str], config_dir: str | None) -> tuple[str, list[str]]:
    """(the directory that Hydra searches first, overrides as Hydra needs them).

    Value overrides get Hydra's `++` (set, whether or not a YAML file has the key), because the defaults are not in
    the YAML. Choices of a group (parallel=tp2) and what the user prefixed stay as they are.
    """
    if config_dir is None:
        return str(CONFIGS), [_set_or_choose(override, [CONFIGS]) for override in overrides]
    if not Path(config_dir).is_dir():
        raise ConfigError(
            f"The directory of configurations {config_dir} does not exist (working directory: {Path.cwd()})."
        )
    first = Path(config_dir).resolve()
    ours = f"hydra.searchpath=['file://{CONFIGS}']"
    return str(first), [*(_set_or_choose(override, [first, CONFIGS]) for override in overrides), ours]


def _set_or_choose(override: str, directories: list[Path]) -> str:
    key, equals, _ = override.partition("=")
    if not equals and not key.startswith("~"):
        raise ConfigError(f"The override {override!r} has no value; write {override}=VALUE.")
    is_group = any((directory / key).is_dir() for directory in directories) or set(key) & set("/@")
    return override if is_group or key[:1] in ("+", "~") or key.startswith("hydra") else f"++{override}"


def _sentence(error: Exception, config_name: str, config_dir: str | None) -> str:
    """An error of Hydra, OmegaConf or the YAML parser in one sentence."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file == config_name:
        directories = [Path(directory) for directory in (config_dir, CONFIGS) if directory]
        names = [str(file.relative_to(d).with_suffix("")) for d in directories for file in sorted(d.rglob("*.yaml"))]
        near = difflib.get_close_matches(config_name, names, n=1) or [n for n in names if n.endswith(f"/{config_name}")]
        hint = f"the nearest is {near[0]}" if near else f"there are {', '.join(names)}"
        return f"There is no configuration {config_name} in {' or '.join(map(str, directories))}; {hint}."
    if isinstance(error, MissingConfigException):
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        choices = f"; the choices of {group} are {', '.join(error.options)}" if error.options else ""
        return f"{group}={choice}: there is no configuration {error.missing_cfg_file}{choices}."
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.lstrip("+").partition("=")
        return f"Cannot read the override {key}={value}; quote what has special characters: \"{key}='{value}'\"."
    text = ": ".join(one_line(str(e)) for e in (error, error.__cause__) if e)
    if isinstance(error, yaml.YAMLError):
        return f"Not valid YAML: {text}."
    if isinstance(error, TypeError):
        return f"{text}; the entries of a list are numbered from 0, as in data.train.0.limit=3."
    if text.startswith("Ambiguous"):
        text = text.split(" 1. ")[0] + "; write a list as key=[a,b] and text as key='a,b'"
    for theirs, plain in (("++", ""), ("DictConfig", "a mapping"), ("ListConfig", "a list")):
        text = text.replace(theirs, plain)
    return text + "."
