"""The parts of a forgetting study: which recipe runs with which options, where, and after which other part.

This module runs and records nothing: run.py does so on this machine, slurm_chain.py as a chain of jobs. Every part
comes after at most one other part.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frpo_nemo import redact
from frpo_nemo.config.cli import compose, from_command_line
from frpo_nemo.config.load import load
from frpo_nemo.config.option import check_values, option
from frpo_nemo.config.options import FRPORun, SFTRun
from frpo_nemo.errors import ConfigError
from frpo_nemo.evaluation.options import EvaluateRun
from frpo_nemo.objective import build_objective
from frpo_nemo.study.recipe import RECIPES

TRAINING_RECIPES = ("frpo", "sft")
SCHEMAS = {"frpo": FRPORun, "sft": SFTRun, "evaluate": EvaluateRun}
CONFIG_DIR, CONFIG_NAME = "--config-dir", "--config-name"


@dataclass
class PartConfig:
    """A recipe with its configuration. {seed}, {out} (of the study) and {dir} (of the seed) are filled in in its texts."""

    recipe: str = option("Name of a script in recipes/, without .py.", "frpo")
    config: str | None = option("Its --config-name.", None)
    overrides: list[str] = option("List of overrides of its configuration.", list)
    script: str | None = option(
        "Its job script; null: slurm/frpo_7b.sh or sft_7b.sh, slurm/recipe.sh for recipes that train nothing.", None
    )
    sbatch: list[str] = option("List of options of sbatch, such as --nodes=2.", list)


@dataclass
class EvaluationConfig(PartConfig):
    recipe: str = option("Always evaluate.", "evaluate")


@dataclass
class ServerConfig:
    model: str = option("Hugging Face directory or hub name.", example="models/judge")
    options: list[str] = option("List of options of vllm serve, such as --runner, pooling.", list)
    script: str = option("Its job script.", "slurm/serve.sh")
    sbatch: list[str] = option("List of options of sbatch.", list)


@dataclass
class StudyConfig:
    """recipes/forgetting.py and slurm/forgetting.sh. The study sets run_dir, model.path and trainer.seed of a training, and
    model.path and out of an evaluation."""

    out: str = option("Directory of the study; continued if it exists.", example="runs/forgetting")
    seeds: list[int] = option("List of seeds; statistics compare arms within a seed.", lambda: [1])
    num_seeds: int | None = option("How many of seeds to take, from the first; null: all.", None, at_least=1)
    prepare: list[PartConfig] = option(
        "List of recipes to run first, once per seed, such as the training of a reference policy.", list
    )
    model: str = option(
        "Hugging Face directory or hub name of the policy that stage one begins with.",
        example="Qwen/Qwen2.5-7B-Instruct",
    )
    train: PartConfig = option("Stage one, which must validate (trainer.val_interval).", PartConfig)
    arms: dict[str, list[str]] = option("Mapping from a name to the list of overrides that make this arm.", dict)
    tasks: dict[str, PartConfig] = option(
        "Mapping from a name to a later fine-tuning, with probes (probe.interval).", dict
    )
    evaluations: dict[str, EvaluationConfig] = option(
        "Mapping from a name to a measurement of every model by recipes/evaluate.py.", dict
    )
    processes: int = option("Processes of each training, on this machine.", 1, at_least=1)
    jobs: int = option("Trainings that run at the same time, on this machine.", 1, at_least=1)
    launcher: str | None = option(
        "Command before python instead of torchrun, on this machine, such as srun with its options.", None
    )
    sbatch: list[str] = option(
        "On a cluster: list of options of sbatch for every job; those of a part come after them.", list
    )
    servers: dict[str, ServerConfig] = option(
        "On a cluster: mapping from a name to a model server for the parts whose overrides name {out}/servers/NAME.url.",
        dict,
    )


@dataclass(frozen=True)
class Part:
    """One run of the study: its kind, its command, the directory that it writes, and the part that must have finished
    before it starts."""

    seed: int
    arm: str | None  # None: preparation of the seed
    task: str | None  # None: stage one
    evaluation: str | None  # measures the arm's model: after the task, or after stage one
    config: PartConfig
    arguments: list[str]
    directory: Path
    after: Part | None

    @property
    def recipe(self) -> str:
        return self.config.recipe

    @property
    def stage(self) -> str:
        if self.evaluation:
            return "evaluate"
        return "prepare" if self.arm is None else "train" if self.task is None else "finetune"

    @property
    def title(self) -> str:
        own = (self.arm, self.task or "train") if self.arm else (self.directory.name,)
        return " ".join((f"seed {self.seed}", *own, *filter(None, [self.evaluation])))

    @property
    def log(self) -> Path:
        """Return the path of its command's output, next to its directory. Names may have dots."""
        return self.directory.with_name(f"{self.directory.name}.log")

    @property
    def key(self) -> tuple:
        """Return the key of its row in results.jsonl."""
        return self.arm, self.seed, self.task, self.evaluation

    @property
    def recorded(self) -> list[str]:
        """Return the arguments as they are recorded and compared: without secrets, and without the directory of
        configurations, which may have moved."""
        return redact.arguments(self.arguments[2 * (self.arguments[:1] == [CONFIG_DIR]) :])


def study_of_command_line(arguments: Sequence[str]) -> tuple[StudyConfig, str | None]:
    """Return the study of sys.argv, of which `arguments` are a copy, and the directory in which it was found, where
    configurations of its parts may be too. Raises ConfigError."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(CONFIG_DIR, "-cd", "--config-path", "-cp", dest="config_dir")
    config_dir = parser.parse_known_args(arguments)[0].config_dir
    return from_command_line(StudyConfig, "forgetting"), config_dir


def compose_command(recipe: str, arguments: Sequence[str], before: Sequence[str] = ()) -> Any:
    """Return the typed configuration that a recipe of SCHEMAS would run with. before: overrides that a job script puts
    before those of the arguments. Raises ConfigError."""
    options, own = {}, list(arguments)
    while own[:1] in ([CONFIG_DIR], [CONFIG_NAME]):
        options[own[0]], own = own[1], own[2:]
    name = options.get(CONFIG_NAME, recipe)
    return load(SCHEMAS[recipe], compose(name, [*before, *own], options.get(CONFIG_DIR)))


def check_command(recipe: str, arguments: list[str]) -> None:
    """Compose what a recipe of SCHEMAS would run with; raises ConfigError. check.py checks more."""
    cfg = compose_command(recipe, arguments)
    if recipe == "frpo":
        build_objective(cfg.objective)


@contextlib.contextmanager
def named(part: Part) -> Iterator[None]:
    """Name the part in a ConfigError."""
    try:
        yield
    except ConfigError as problem:
        raise ConfigError(f"{part.title}: {problem}") from problem


class StudyParts:
    """The parts of a study. config_dir: where their configurations may be besides configs/. Raises ConfigError for options
    that contradict each other."""

    def __init__(self, config: StudyConfig, config_dir: str | None = None):
        _check(config)
        self.config, self.out, self._config_dir = config, Path(config.out), config_dir

    def all(self, seeds: Iterable[int]) -> Iterator[Part]:
        """Yield all parts, each after the one that it needs."""
        for seed in seeds:
            yield from self.preparation(seed)
            for arm in self.config.arms:
                yield from self.chain(seed, arm)

    def preparation(self, seed: int) -> list[Part]:
        parts: list[Part] = []
        for number, config in enumerate(self.config.prepare):
            directory, before = self._seed_dir(seed) / f"prepare_{number}", parts[-1] if parts else None
            parts.append(Part(seed, None, None, None, config, self._arguments(config, seed), directory, before))
        return parts

    def chain(self, seed: int, arm: str) -> list[Part]:
        """Return stage one of an arm, then every task; after each the evaluations of its model."""
        directory, prepared = self._seed_dir(seed) / arm, self.preparation(seed)
        own = [self._fill(text, seed) for text in self.config.arms[arm]]
        model = self._fill(self.config.model, seed)
        before = prepared[-1] if prepared else None
        train = self._training(self.config.train, seed, arm, None, directory / "train", model, own, before)
        parts = [train, *self._evaluations(train)]
        for task, config in self.config.tasks.items():
            trained = str(train.directory / "hf")
            part = self._training(config, seed, arm, task, directory / task, trained, [], train)
            parts += [part, *self._evaluations(part)]
        return parts

    def _training(
        self,
        config: PartConfig,
        seed: int,
        arm: str,
        task: str | None,
        directory: Path,
        model: str,
        more: list[str],
        after: Part | None,
    ) -> Part:
        own = [f"run_dir={directory}", f"model.path={model}", f"trainer.seed={seed}"]
        arguments = [*self._arguments(config, seed), *more, *own]
        return Part(seed, arm, task, None, config, arguments, directory, after)

    def _evaluations(self, part: Part) -> list[Part]:
        parts = []
        for name, config in self.config.evaluations.items():
            directory = part.directory / "eval" / name
            own = [f"model.path={part.directory / 'hf'}", f"out={directory}"]
            arguments = [*self._arguments(config, part.seed), *own]
            parts.append(Part(part.seed, part.arm, part.task, name, config, arguments, directory, part))
        return parts

    def _arguments(self, config: PartConfig, seed: int) -> list[str]:
        named = [CONFIG_NAME, config.config] if config.config else []
        theirs = named and self._config_dir and Path(self._config_dir, f"{config.config}.yaml").is_file()
        directory = [CONFIG_DIR, self._config_dir] if theirs else []
        return [*directory, *named, *(self._fill(text, seed) for text in config.overrides)]

    def _fill(self, text: str, seed: int) -> str:
        for name, value in (("seed", seed), ("dir", self._seed_dir(seed)), ("out", self.out)):
            text = text.replace(f"{{{name}}}", str(value))
        return text

    def _seed_dir(self, seed: int) -> Path:
        return self.out / f"seed_{seed}"


def _check(config: StudyConfig) -> None:
    check_values(config)
    for name, value in (("seeds", config.seeds), ("arms", config.arms), ("tasks", config.tasks)):
        if not value:
            raise ConfigError(f"{name} is empty; a study needs at least one.")
    if len(set(config.seeds)) < len(config.seeds):
        raise ConfigError(f"seeds={config.seeds} names a seed twice; every seed runs once.")
    if (config.num_seeds or 1) > len(config.seeds):
        raise ConfigError(f"num_seeds={config.num_seeds} must be at most {len(config.seeds)}, the number of seeds.")
    if "train" in config.tasks or any("/" in name for name in (*config.arms, *config.tasks, *config.evaluations)):
        raise ConfigError(
            "arms, tasks and evaluations name directories: no '/', and no task called train (that is stage one)."
        )
    for name, part in {"train": config.train, **{f"tasks.{k}": v for k, v in config.tasks.items()}}.items():
        if part.recipe not in TRAINING_RECIPES:
            raise ConfigError(f"{name}.recipe={part.recipe} must be one of {', '.join(TRAINING_RECIPES)}.")
    for name, part in config.evaluations.items():
        if part.recipe != "evaluate":
            raise ConfigError(f"evaluations.{name}.recipe={part.recipe} must be evaluate.")
    for part in config.prepare:
        if not (RECIPES / f"{part.recipe}.py").is_file():
            raise ConfigError(f"prepare: there is no recipe {part.recipe}; name a file in recipes/ without .py.")
