"""Go from the command line to a run: Hydra composes plain YAML, load.py types it, the recipe's checks examine it, and
only then NeMo (whose import takes seconds) and everything heavier is imported. A mistake ends in one sentence and exit
code 2.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra._internal.utils import get_args_parser  # as NeMo's runner does: there is no public one
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from frpo_nemo import redact, stack
from frpo_nemo.config.hub import is_hub_name, local_model
from frpo_nemo.config.hydra_errors import sentence
from frpo_nemo.config.load import load
from frpo_nemo.config.overrides import for_hydra
from frpo_nemo.config.reference import help_text
from frpo_nemo.errors import ConfigError
from frpo_nemo.processes.launcher import started_world

EXIT_STOPPED = 75  # EX_TEMPFAIL, as for a rank that was lost (watchdog.py)
# Set by a job script (slurm/lib.sh): the run_dir of a configuration that names none, and a file that a ConfigError creates,
# because srun's own exit code is that of the other ranks, which it ends then.
DEFAULT_RUN_DIR, REFUSED = "FRPO_DEFAULT_RUN_DIR", "FRPO_REFUSED"
CHECK, PRINT_RUN_DIR = "--check", "--print-run-dir"


def main(run: Callable[[Any], bool], schema: type, config_name: str, check: Callable[[Any, int], list[str]]) -> None:
    """Run a recipe: compose `config_name` (or --config-name) with the overrides, `check` it against the number of processes
    that were started, and let NeMo's hydra_runner call `run` with it, typed.

    A ConfigError from composing, `check` or `run` prints one line on stderr (after the watchdog's line, if a run has begun)
    and gives exit code 2. A run that a signal ended before its last step (`run` returns False) has exit code 75: start it
    again to continue. --check checks the configuration for the number of processes that it names, in this one process,
    prints the sentences that `check` returns, and runs nothing; --print-run-dir composes it and prints its run_dir.
    """
    gc.disable()  # until everything is loaded (Run.attach): collecting garbage during imports takes a fifth of a start
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, instead of printing a part of the traceback
    _hide_secrets_in_tracebacks()
    try:
        only_check, only_print = CHECK in sys.argv, PRINT_RUN_DIR in sys.argv
        arguments = _parse_command_line([a for a in sys.argv[1:] if a not in (CHECK, PRINT_RUN_DIR)])
        name, directory = arguments.config_name or config_name, arguments.config_path or arguments.config_dir
        if arguments.help:
            print(help_text(schema, config_name))
            return
        if _printing_flags(arguments):
            _print_with_hydra(arguments, name, directory)
            return
        with _quiet():
            composed = compose(name, arguments.overrides, directory)
        if only_print:
            print(f"run_dir={_load(schema, composed).run_dir}")
            return
        # Tensor-parallel communication and computation must start in the order in which megatron-core queues them.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        local_rank, world_size = (0, None) if only_check else started_world()
        # One process per node checks. If it ends, the launcher ends the others, which are still importing.
        if local_rank == 0:
            with _quiet():
                cfg = _load(schema, composed)
                if is_hub_name(cfg.model.path):
                    cfg.model.path = local_model(cfg.model.path, download=True)
                found = check(cfg, world_size or cfg.trainer.num_nodes * cfg.trainer.devices)
            if not only_check:
                stack.check_gpus(cfg.trainer.devices)
        if only_check:
            right = f"configuration OK for {cfg.trainer.num_nodes} x {cfg.trainer.devices} processes"
            print(*stack.untested_versions(), right, *found, sep="\n")
            print(f"run_dir={cfg.run_dir}")
            return
        with _quiet():
            from nemo.core.config import hydra_runner
        warnings.filterwarnings("ignore", message="Apex is not installed")  # on every rank
        finished = hydra_runner(config_name=name)(lambda composed: run(_load(schema, composed)))(composed)
        _leave(0 if finished else EXIT_STOPPED)
    except ConfigError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
        if os.environ.get(REFUSED):
            with contextlib.suppress(OSError):
                Path(os.environ[REFUSED]).touch()
        raise SystemExit(2) from None


def from_command_line(schema: type | Callable[[DictConfig], type], config_name: str) -> Any:
    """Return the typed configuration of a recipe that starts no training itself. `schema`: a dataclass, or a function that
    chooses one by the composed values. --help prints its options. Raises ConfigError."""
    arguments = _parse_command_line(sys.argv[1:])
    if arguments.help:
        print(help_text(schema if isinstance(schema, type) else schema(compose(config_name)), config_name))
        raise SystemExit(0)
    name, directory = arguments.config_name or config_name, arguments.config_path or arguments.config_dir
    _hide_secrets_in_tracebacks()
    with _quiet():
        composed = compose(name, arguments.overrides, directory)
        return _load(schema if isinstance(schema, type) else schema(composed), composed)


def compose(config_name: str, overrides: Sequence[str] = (), config_dir: str | None = None) -> DictConfig:
    """Compose the YAML files and the overrides, without the schema's defaults. Files in `config_dir` come before those in
    configs/. Raises ConfigError."""
    first, hydra_overrides = for_hydra(overrides, config_dir)
    try:
        with hydra.initialize_config_dir(first, version_base=None):
            return hydra.compose(config_name, overrides=hydra_overrides)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError(sentence(error, config_name, config_dir)) from error


def _leave(code: int) -> NoReturn:
    """End this process as the interpreter does, skipping the final garbage collection, which takes three seconds."""
    atexit._run_exitfuncs()  # removes temporary directories, ends child processes, flushes logs
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _load(schema: type, composed: DictConfig) -> Any:
    values, default = OmegaConf.to_container(composed), os.environ.get(DEFAULT_RUN_DIR)
    if default and "run_dir" in {field.name for field in fields(schema)} and values.get("run_dir", "???") == "???":
        values["run_dir"] = default.replace("${", r"\${")  # no interpolation
    cfg = load(schema, values)
    redact.remember(OmegaConf.to_container(OmegaConf.structured(cfg)))
    return cfg


def _hide_secrets_in_tracebacks() -> None:
    """Redact secrets in tracebacks of uncaught exceptions, in every thread."""
    sys.excepthook = _print_without_secrets
    threading.excepthook = _print_without_secrets_of_thread


def _print_without_secrets_of_thread(uncaught: threading.ExceptHookArgs) -> None:
    if uncaught.exc_type is SystemExit:  # ends the thread, as everywhere in Python
        return
    print(f"Exception in thread {uncaught.thread.name if uncaught.thread else '?'}:", file=sys.stderr)
    _print_without_secrets(uncaught.exc_type, uncaught.exc_value, uncaught.exc_traceback)


def _print_without_secrets(kind, error, where) -> None:
    """Print an uncaught exception as Python does, without secrets."""
    lines = "".join(traceback.format_exception(kind, error, where))
    print(redact.text(lines, assignments=False), end="", file=sys.stderr, flush=True)


def _print_with_hydra(arguments, name: str, directory: str | None) -> None:
    """Answer --cfg and Hydra's other options that print something instead of running."""
    first, overrides = for_hydra(arguments.overrides, directory)
    sys.argv[1:] = [f"--config-name={name}", *_printing_flags(arguments), *overrides]
    with _quiet():
        from nemo.core.config import hydra_runner
        from nemo.lightning.callback_group import CallbackGroup

        CallbackGroup.get_instance()  # the runner would create it at the end, not quietly
    hydra_runner(config_path=first, config_name=name)(lambda composed: None)()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence libraries, which warn in many lines per process about packages that aren't used, and log what a ConfigError
    reports."""
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
    """Return those of Hydra's options that print something instead of running."""
    switches = [name for name in ("hydra_help", "resolve", "shell_completion") if getattr(arguments, name)]
    values = [name for name in ("cfg", "info", "package") if getattr(arguments, name)]
    return [f"--{n.replace('_', '-')}" for n in switches] + [f"--{n}={getattr(arguments, n)}" for n in values]
