"""Check data sources, and the rewards that their rows call for. Raises ConfigError."""

from __future__ import annotations

from collections.abc import Iterable

from frpo_nemo.config.options import DataConfig, RewardConfig, SourceConfig
from frpo_nemo.data.prompts import row_task
from frpo_nemo.data.sources import load_rows, read_to_check
from frpo_nemo.data.templates import columns_of
from frpo_nemo.errors import ConfigError
from frpo_nemo.rewards.reward_set import Reward, RewardSet

_read: dict[str, str] = {}  # key -> sentence on what this process's check read of the source
_overlaps: list[str] = []  # sentences on rewards whose tasks overlap in part


def describe_data() -> list[str]:
    """Return a sentence on each source that was checked: its files, their rows, and what was left out; and one on rewards
    whose tasks overlap in part."""
    return [*_read.values(), *_overlaps]


def named_sources(data: DataConfig) -> list[tuple[str, SourceConfig]]:
    """Return (key, source) of every source in `data`."""
    named = [(f"data.train.{i}", source) for i, source in enumerate(data.train)]
    return named + [(f"data.validation.{i}", source) for i, source in enumerate(data.validation)]


def check_sources(data: DataConfig) -> list[str]:
    """Check all sources of `data`. Returns the columns of all of them together, except the prompt."""
    if not data.train:
        raise ConfigError("data.train is empty; give at least one source, such as [{path: prompts.jsonl}].")
    return check_source_list(named_sources(data))


def check_source_list(named: list[tuple[str, SourceConfig]]) -> list[str]:
    """Do the same for (key, source) pairs."""
    columns: dict[str, None] = {}
    for key, source in named:
        if source.streaming and source.limit is None:
            raise ConfigError(f"{key}.streaming=true needs {key}.limit, the number of rows to read.")
        if not source.holdout and (source.held_out or source.holdout_by is not None):
            raise ConfigError(f"{key}.held_out and {key}.holdout_by need {key}.holdout above 0, the share to hold out.")
        try:
            rows = read_to_check(source)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from error
        columns |= dict.fromkeys(name for name in rows.columns if name != source.prompt)
        _read[key] = f"{key} ({source.path}): {rows.describe()}"
    return list(columns)


def check_reward_tasks(
    rewards: dict[str, RewardConfig], sources: Iterable[SourceConfig], *, all_rewards: bool = True
) -> None:
    """Check that every task has a reward, that every reward finds its tasks (with `all_rewards`), and that no prompt shows
    an answer. Reads the rows where tasks decide which reward scores them."""
    sources = list(sources)
    if all_rewards:
        _overlaps.clear()
    _check_answers_are_hidden(rewards, sources)
    if all(reward.tasks is None for reward in rewards.values()):
        return
    tasks = set()
    for source in sources:
        rows = load_rows(source, whole=False) if source.task_column is not None else [{}]
        tasks |= {row_task(row, source) for row in rows}
    named = [
        Reward(name, r.weight, None if r.tasks is None else frozenset(r.tasks), None) for name, r in rewards.items()
    ]
    reward_set = RewardSet(named, [])
    reward_set.check_tasks(tasks, all_rewards=all_rewards)
    if all_rewards:
        _overlaps.extend(reward_set.describe_overlap(tasks))


def _check_answers_are_hidden(rewards: dict[str, RewardConfig], sources: Iterable[SourceConfig]) -> None:
    """Raise ConfigError when a prompt has a place for the column with the right answer, as \\boxed{answer} does."""
    golds = {r.args.get("column", "answer"): name for name, r in rewards.items() if r.target in ("math", "exact")}
    for source in sources:
        for column in columns_of(source.prompt):
            if column in golds:
                raise ConfigError(
                    f"data source '{source.path}': prompt={' '.join(source.prompt.split())} shows the column '{column}', the "
                    f"right answer for reward.{golds[column]}; write {{{{{column}}}}} where braces are meant"
                )
