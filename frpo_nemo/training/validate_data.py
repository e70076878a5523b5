"""What validate.py checks of data sources, and of the rewards that their rows call for. Raises ConfigError."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from frpo_nemo.data.prompts import row_task
from frpo_nemo.data.sources import check_source, load_rows
from frpo_nemo.errors import ConfigError
from frpo_nemo.rewards.reward_set import Reward, RewardSet


def named_sources(data) -> list[tuple[str, Any]]:
    """(key, source) of all of `data`, a DataConfig."""
    named = [(f"data.train.{i}", source) for i, source in enumerate(data.train)]
    return named + [(f"data.validation.{i}", source) for i, source in enumerate(data.validation)]


def check_sources(data) -> list[str]:
    """The columns of all sources of `data` together, but for the prompt."""
    if not data.train:
        raise ConfigError("data.train is empty; give at least one source, such as [{path: prompts.jsonl}].")
    return check_source_list(named_sources(data))


def check_source_list(named: list[tuple[str, Any]]) -> list[str]:
    """The same of (key, source) pairs."""
    columns: dict[str, None] = {}
    for key, source in named:
        if source.start < 0:
            raise ConfigError(f"{key}.start={source.start} must be at least 0.")
        if source.limit is not None and source.limit < 1:
            raise ConfigError(f"{key}.limit={source.limit} must be at least 1, or null for all rows.")
        if source.streaming and source.limit is None:
            raise ConfigError(f"{key}.streaming=true needs {key}.limit, the number of rows to read.")
        _check_holdout(key, source)
        try:
            columns |= dict.fromkeys(name for name in check_source(source) if name != source.prompt)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from error
    return list(columns)


def _check_holdout(key: str, source: Any) -> None:
    if not 0 <= source.holdout < 1:
        raise ConfigError(f"{key}.holdout={source.holdout} must be at least 0 and below 1.")
    if source.holdout_seed < 0:
        raise ConfigError(f"{key}.holdout_seed={source.holdout_seed} must be at least 0.")
    if not source.holdout and (source.held_out or source.holdout_by is not None):
        raise ConfigError(f"{key}.held_out and {key}.holdout_by need {key}.holdout above 0, the share to hold out.")


def check_reward_tasks(rewards: dict[str, Any], sources: Iterable[Any], *, all_rewards: bool = True) -> None:
    """Every task has a reward and, with `all_rewards`, every reward finds its tasks. Reads the rows, where tasks decide
    which reward scores them."""
    if all(reward.tasks is None for reward in rewards.values()):
        return
    tasks = set()
    for source in sources:
        tasks |= {source.task} if source.task_column is None else {row_task(row, source) for row in load_rows(source)}
    named = [
        Reward(name, r.weight, None if r.tasks is None else frozenset(r.tasks), None) for name, r in rewards.items()
    ]
    RewardSet(named, []).check_tasks(tasks, all_rewards=all_rewards)
