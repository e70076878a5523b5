"""Checks a study before it spends hours: each training and evaluation by its recipe's own check, as --check does, and that
what ran before ran with the study's present settings. It takes seconds; no model is loaded.

Memory is checked where a GPU is visible, else when a part starts. A model that another part will make need not exist: a
later task is checked with the model that stage one begins with, and a model still to be prepared is not checked.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from pathlib import Path

from omegaconf import OmegaConf

from frpo_nemo.config.hub import is_hub_name, local_model
from frpo_nemo.data.sources import forget_files
from frpo_nemo.errors import ConfigError
from frpo_nemo.evaluation.evaluate import check_options
from frpo_nemo.study.parts import TRAINING_RECIPES, Part, compose_command, named
from frpo_nemo.training.checks.config import validate_frpo, validate_sft
from frpo_nemo.training.checks.resume import check_same_run, is_failed_start

VALIDATE: dict[str, Callable[..., object]] = {"frpo": validate_frpo, "sft": validate_sft}
MEASURED = {"train": "trainer.val_interval", "finetune": "probe.interval"}  # what the report is made from
LOGIN_NODE = "FRPO_LOGIN_NODE"  # read by resources.on_login_node
UNKNOWN = "to-be/prepared"  # reads as a hub model, of which a recipe's check knows nothing either


def check_parts(
    parts: Iterable[Part],
    out: Path,
    *,
    started: Callable[[Part], tuple[list[str], int | None]],
    finished: Callable[[Part], bool],
) -> None:
    """Raise ConfigError for what would end a part at its start, or leave it out of the report. out: the study's directory.
    started(part): the overrides that its job script adds, and the number of processes (None: as its configuration says).

    Of the unfinished parts, stage one of every arm is checked, and every other part once for all arms and seeds. A hub model
    is downloaded, as the first part would do."""
    checked = set()
    for part in parts:
        kinds = {"prepare": part.directory.name, "train": part.arm, "finetune": part.task, "evaluate": part.evaluation}
        kind = part.stage, kinds[part.stage]
        with named(part), _memory_unknown():
            check_same_configuration(part, finished(part))
            if kind not in checked and not finished(part):
                checked.add(kind)
                _check(part, out, *started(part))
    forget_files()  # the parts read theirs in their own processes


def check_same_configuration(part: Part, finished: bool) -> None:
    """Raise ConfigError if a training made steps with another configuration than is composed for it now, because the command
    or a configuration file changed. What a continued run may change is allowed, except the steps of a finished run."""
    saved = part.directory / "config.yaml"
    if part.recipe not in TRAINING_RECIPES or not saved.is_file() or is_failed_start(part.directory):
        return
    cfg = compose_command(part.recipe, part.arguments)
    try:
        check_same_run(cfg, saved)
        steps = OmegaConf.load(saved).trainer.max_steps
        if finished and steps != cfg.trainer.max_steps:
            raise ConfigError(
                f"It has finished with trainer.max_steps={steps}, and would have {cfg.trainer.max_steps} now."
            )
    except ConfigError as problem:
        anew = "choose another out" if finished else f"remove {part.directory}, so that it starts from the beginning"
        raise ConfigError(f"{problem} In a study: rename the arm or task, or {anew}.") from problem


def _check(part: Part, out: Path, added: list[str], processes: int | None) -> None:
    if part.evaluation:
        check_options(compose_command(part.recipe, part.arguments))
    if part.recipe not in TRAINING_RECIPES:
        return
    cfg = compose_command(part.recipe, part.arguments, added)
    option = MEASURED.get(part.stage)
    if option and attrgetter(option)(cfg) < 1:
        raise ConfigError(f"{option}={attrgetter(option)(cfg)} measures nothing for the report; set it above 0.")
    cfg.model.path = _model(part, cfg.model.path, out)
    VALIDATE[part.recipe](cfg, processes or cfg.trainer.num_nodes * cfg.trainer.devices)


def _model(part: Part, path: str, out: Path) -> str:
    """Return the model that a training begins with, or a stand-in where it doesn't exist yet."""
    if part.stage == "finetune" and not Path(path).exists():
        path = compose_command(part.after.recipe, part.after.arguments).model.path
    if is_hub_name(path):
        return local_model(path, download=True)
    return UNKNOWN if Path(path).is_relative_to(out) and not Path(path).exists() else path


@contextlib.contextmanager
def _memory_unknown() -> Iterator[None]:
    """Check as slurm/lib.sh does on a machine where the configuration will not run."""
    before = os.environ.get(LOGIN_NODE)
    os.environ[LOGIN_NODE] = "1"
    try:
        yield
    finally:
        os.environ.pop(LOGIN_NODE)
        if before is not None:
            os.environ[LOGIN_NODE] = before
