"""All rewards of a run: which reward scores which response, and what happens to responses that were not scored.

A response's total is the weighted sum of the rewards that scored it. The total is NaN when no reward scored the
response, or when one that should have scored it failed: a failure is never 0, which would count against the
response. Totals are logged; where some rewards scored only a part of a group, training compares the single rewards
(objective/parts.py).
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from frpo_nemo.config.option import check_values
from frpo_nemo.config.options import RewardConfig
from frpo_nemo.errors import ConfigError
from frpo_nemo.rewards.isolation import WorkerPool
from frpo_nemo.rewards.models.local import LocalWeights
from frpo_nemo.rewards.models.remote import longest_wait
from frpo_nemo.rewards.registry import BUILT_IN, Bound, Failure, Outcome, bind, call_batch, load_target, options

ALWAYS_ISOLATED = ("math", "code")  # math may hang on ordinary input; code waits for programs, several at a time
ARGUMENTS = ("prompts", "completions")  # every reward takes these
PROVIDED_COLUMNS = ("task", "response_tokens")  # provided by training, in addition to the columns of the data


@dataclass(frozen=True)
class Scores:
    """total: float64 [N], NaN where unscored. parts: reward name -> float64 [N], unweighted, NaN where it did
    not score. failures: reward name -> kind (error, timeout, died) -> count. said: reward name -> kind -> the message
    of the first failure of that kind."""

    total: Tensor
    parts: dict[str, Tensor]
    failures: dict[str, dict[str, int]] = field(default_factory=dict)
    said: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def messages(self) -> dict[str, str]:
        """Return reward name -> the message of its first failure."""
        return {name: next(iter(kinds.values())) for name, kinds in self.said.items()}


@dataclass(frozen=True)
class Reward:
    """One configured reward. call: (prompts, completions, columns) -> one Outcome per response."""

    name: str
    weight: float
    tasks: frozenset[str] | None
    call: Callable[[list, list[str], dict[str, list]], list[Outcome]]

    def applies(self, task: str | None) -> bool:
        return self.tasks is None or task in self.tasks


@dataclass(frozen=True)
class RewardSet:
    """Made by `build_rewards`."""

    rewards: list[Reward]
    pools: list[WorkerPool]

    def score(
        self, prompts: list, completions: list[str], tasks: list[str | None], columns: Mapping[str, list]
    ) -> Scores:
        """Score N responses. prompts: strings or lists of chat messages. completions: text without special tokens.
        tasks: the task of each response's prompt. columns: name -> N values, passed to every reward. `task` is added
        to them (where a prompt has none, a data column of this name stays); columns named prompts or completions are
        left out, because two arguments have those names. A reward's errors never raise; RuntimeError when an
        isolated reward cannot be started."""
        named = zip(tasks, columns.get("task", tasks), strict=True)
        shown = {"task": [own if task is None else task for task, own in named]}
        columns = {k: v for k, v in columns.items() if k not in ARGUMENTS} | shown
        total = torch.zeros(len(completions), dtype=torch.float64)
        scored, failed = torch.zeros_like(total, dtype=torch.bool), torch.zeros_like(total, dtype=torch.bool)
        scores = Scores(total, {})
        for reward in self.rewards:
            mine = [i for i, task in enumerate(tasks) if reward.applies(task)]
            outcomes = reward.call(
                [prompts[i] for i in mine],
                [completions[i] for i in mine],
                {name: [values[i] for i in mine] for name, values in columns.items()},
            )
            part = torch.full_like(total, math.nan)
            part[mine] = torch.tensor([o if isinstance(o, float) else math.nan for o in outcomes], dtype=torch.float64)
            scores.parts[reward.name] = part
            scored |= ~part.isnan()
            total += reward.weight * part.nan_to_num()
            failures = {i: o for i, o in zip(mine, outcomes, strict=True) if isinstance(o, Failure)}
            failed[list(failures)] = True
            _record(scores, reward.name, list(failures.values()))
        total[~scored | failed] = math.nan
        return scores

    def check_tasks(self, tasks: set[str | None], *, all_rewards: bool) -> None:
        """Raise ConfigError unless every task of the data has a reward and, with `all_rewards`, every reward finds its
        tasks in the data."""
        for task in sorted(tasks, key=str):
            if not any(reward.applies(task) for reward in self.rewards):
                raise ConfigError(f"no reward applies to the examples of task {task!r}: see the `tasks` of each reward")
        for reward in self.rewards if all_rewards else ():
            absent = sorted((reward.tasks or frozenset()) - tasks)
            if absent:
                found = ", ".join(sorted(map(str, tasks)))
                raise ConfigError(
                    f"reward.{reward.name}.tasks: no example has task '{absent[0]}'; the data has {found}"
                )

    def describe_overlap(self, tasks: set[str | None]) -> list[str]:
        """Return a sentence naming the rewards that share some tasks of the data but not others; an empty list if none."""
        own = {reward.name: {task for task in tasks if reward.applies(task)} for reward in self.rewards}
        named = [name for name in own if any(own[name] & own[o] and own[name] != own[o] for o in own)]
        if not named:
            return []
        tasks_of: dict[str, list[str]] = {}
        for task in sorted(tasks, key=str):
            total = " + ".join(name for name in own if task in own[name])
            tasks_of.setdefault(total, []).append("no task" if task is None else task)
        some = {total: ", ".join(of[:3]) + ", ..." * (len(of) > 3) for total, of in tasks_of.items()}
        totals = "; ".join(f"{total} for {of}" for total, of in some.items())
        return [f"reward: the tasks of {', '.join(named)} overlap in part, so totals are different sums: {totals}"]

    def close(self) -> None:
        """End the worker processes."""
        for pool in self.pools:
            pool.close()


def build_rewards(configs: Mapping[str, Any]) -> RewardSet:
    """Return the rewards of a run from its name -> RewardConfig mapping (target, weight, tasks, args, timeout,
    isolate, workers). `timeout` applies to isolated rewards: a call inside this process cannot be stopped, so
    a function that may hang must be isolated. Raises ConfigError like `check_rewards`."""
    checked = check_rewards(configs)
    rewards, pools = [], []
    for name, config in configs.items():
        if _is_isolated(config):
            pool = WorkerPool(name, config.target, _args(config), config.workers, config.timeout)
            pools.append(pool)
            call = pool.call
        else:
            call = _in_process(name, checked.get(name) or bind(config.target, _args(config)))
        rewards.append(Reward(name, config.weight, None if config.tasks is None else frozenset(config.tasks), call))
    return RewardSet(rewards, pools)


def check_rewards(configs: Mapping[str, Any], columns: list[str] | None = None) -> dict[str, Bound]:
    """Return the built-in rewards, constructed. Raise ConfigError for a reward that cannot work: not importable, unknown or
    missing arguments, numbers out of range, or, when the data's `columns` are given, a required column that is missing.
    """
    if not configs:
        raise ConfigError("no reward is configured: name at least one under `reward`")
    built_in: dict[str, Bound] = {}
    for name, config in configs.items():
        try:
            check_values(config)
            if bound := _check_arguments(config, columns):
                built_in[name] = bound
        except ConfigError as problem:
            raise ConfigError(f"reward.{name}: {problem}") from problem
    return built_in


def local_weights(configs: Mapping[str, Any]) -> list[LocalWeights]:
    """Return the models that the rewards load in each process of a run, including its reward workers. Only built-in
    rewards report them; others are not even constructed. Raises ConfigError like `check_rewards`."""
    found: list[LocalWeights] = []
    for config in configs.values():
        if config.target not in BUILT_IN or not hasattr(load_target(config.target), "local_weights"):
            continue
        copies = config.workers if _is_isolated(config) else 1
        found += copies * bind(config.target, _args(config)).local_weights()
    return found


def check_waits(configs: Mapping[str, Any], phase_timeout: float, where: str) -> None:
    """Raise ConfigError if the watchdog could end a run while its rewards wait for their servers, one server after
    another. where: the key of the configs, such as probe.reward. Call after `check_rewards`."""
    waits = [wait for name, config in configs.items() for wait in _waits(config, f"{where}.{name}.args")]
    total = sum(seconds for _, seconds in waits)
    if waits and total >= phase_timeout:
        raise ConfigError(
            f"trainer.phase_timeout={phase_timeout:g} must be above {total:g}, the seconds (patience + timeout) after "
            f"which unreachable servers are given up, one after another: {', '.join(key for key, _ in waits)}."
        )


def _waits(config: RewardConfig, at: str) -> Iterator[tuple[str, float]]:
    """Yield (key, seconds) for each server that a built-in reward may wait for. at: the key of its arguments."""
    if config.target in BUILT_IN:
        yield from _servers(_args(config), at)


def _servers(args: dict[str, Any], at: str) -> Iterator[tuple[str, float]]:
    for name, value in args.items():
        if name == "remote" and value and value.get("url"):
            yield f"{at}.remote", longest_wait(value)
        elif isinstance(value, dict):
            yield from _servers(value, f"{at}.{name}")


def _is_isolated(config: RewardConfig) -> bool:
    return config.isolate or config.target in ALWAYS_ISOLATED


def _check_arguments(config: RewardConfig, columns: list[str] | None) -> Bound | None:
    target, args = load_target(config.target), _args(config)
    parameters = _named_parameters(target)
    unknown = [name for name in args if name not in parameters]
    if unknown:
        raise ConfigError(
            f"{config.target} has no argument '{unknown[0]}' (args); it has {', '.join(parameters) or 'none'}"
        )
    needed = [name for name, p in parameters.items() if p.default is p.empty and name not in args]
    own = parameters if inspect.isclass(target) else options(config.target, target)
    if missing := [name for name in needed if name in own]:
        raise ConfigError(f"{config.target} needs the argument '{missing[0]}' (args)")
    if inspect.isclass(target):
        target = target.__call__
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(target).parameters.values()):
        raise ConfigError(f"{config.target} must take (prompts, completions, **columns): it has no **columns")
    if config.target in BUILT_IN:
        named = [args.get(name, p.default) for name, p in parameters.items() if name.endswith("column")]
        named += (args.get("columns") or {}).values()
        needed += [column for column in named if column is not None]
    if columns is not None:
        _check_columns(config.target, needed, sorted({*columns, *PROVIDED_COLUMNS}))
    _check_names(config.target, needed, {*ARGUMENTS, *options(config.target, load_target(config.target))})
    bound = _try_empty(config.target, args, needed) if config.target in BUILT_IN else None
    if config.target == "code":
        _check_clock(config.timeout, args.get("seconds", parameters["seconds"].default))
    elif _is_isolated(config):
        _check_worker_waits(config)
    return bound


def _check_clock(timeout: float, seconds: float) -> None:
    """Check that the pool's timeout leaves time for a reward that itself scores 0 after `seconds`."""
    if timeout < seconds + 5:
        raise ConfigError(
            f"timeout={timeout} must be at least 5 s above args.seconds={seconds}; otherwise what hangs is unscored"
        )


def _check_worker_waits(config: RewardConfig) -> None:
    """Check that the timeout covers the wait for a server that is away for a while, also in a worker."""
    waits = list(_waits(config, "args"))
    total = sum(seconds for _, seconds in waits)
    if config.timeout < total:
        raise ConfigError(
            f"timeout={config.timeout} must be at least {total:g}, patience + timeout of "
            f"{', '.join(key for key, _ in waits)}; or leave out isolate, which a served model doesn't need"
        )


def _named_parameters(target: Callable) -> dict[str, inspect.Parameter]:
    return {
        name: p
        for name, p in inspect.signature(target).parameters.items()
        if name not in ARGUMENTS and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    }


def _check_columns(target: str, needed: list[str], available: list[str]) -> None:
    for name in needed:
        if name not in available:
            raise ConfigError(
                f"{target} needs '{name}', which is neither in args nor a column of the data; "
                f"the columns are {', '.join(available)}"
            )


def _check_names(target: str, needed: list[str], taken: set[str]) -> None:
    for name in needed:
        if name in taken:
            raise ConfigError(
                f"{target} cannot be given the column '{name}' of the data, because one of its arguments has that name; "
                "rename the column"
            )


def _try_empty(target: str, args: dict[str, Any], needed: list[str]) -> Bound:
    """Call the reward without responses, so that a built-in reward checks its own arguments."""
    try:
        bound = bind(target, args)
        bound([], [], {name: [] for name in (*needed, *PROVIDED_COLUMNS)})
        return bound
    except ConfigError:
        raise
    except Exception as problem:
        raise ConfigError(f"{target} rejects its args {args}: {problem}") from problem


def _in_process(name: str, function: Bound) -> Callable:
    try:
        function.load()
    except ConfigError as problem:
        raise ConfigError(f"reward.{name}: {problem}") from problem
    return lambda prompts, completions, columns: call_batch(function, prompts, completions, columns)


def _args(config: RewardConfig) -> dict[str, Any]:
    """Return plain containers: OmegaConf's would follow the arguments into workers and users' functions."""
    from omegaconf import OmegaConf

    args = config.args
    return OmegaConf.to_container(args, resolve=True) if OmegaConf.is_config(args) else dict(args)


def _record(scores: Scores, name: str, failures: list[Failure]) -> None:
    if failures:
        scores.failures[name] = dict(Counter(f.kind for f in failures))
        scores.said[name] = {}
        for failure in failures:
            scores.said[name].setdefault(failure.kind, failure.message)
