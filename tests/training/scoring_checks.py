"""Checks from reward functions to the reward that training compares, without engines: every rank calls these."""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist
from tiny_models import tiny_tokenizer

from frpo_nemo.config.options import EngineConfig, RewardConfig
from frpo_nemo.data.prompts import Prompt
from frpo_nemo.rewards.reward_set import build_rewards
from frpo_nemo.rollout.engine import Completion
from frpo_nemo.rollout.worker import Rollouts, RolloutWorker, ScoredPrompts
from frpo_nemo.training.statistics import rollout_statistics

TARGET = f"{Path(__file__).parent / 'partial_reward.py'}:part"


def scored_rollouts(groups: list[dict[str, list]], weights: dict[str, float], tasks: dict[str, list[str]]) -> Rollouts:
    """groups: what each reward gives to the group's responses; those of a rank are every world-size-th. tasks: of the
    rewards that have some; a group's task is its number."""
    configs = {
        name: RewardConfig(target=TARGET, weight=weight, args={"of": name}, tasks=tasks.get(name))
        for name, weight in weights.items()
    }
    rewards = build_rewards(configs)
    worker = object.__new__(RolloutWorker)
    worker._reported = set()
    size = len(next(iter(groups[0].values())))
    examples = [Prompt([3, 4 + number], "p", str(number), {}) for number in range(len(groups))]
    mine = list(range(dist.get_rank(), len(groups), dist.get_world_size()))
    texts = [json.dumps({name: given[i] for name, given in groups[g].items()}) for g in mine for i in range(size)]
    scores = rewards.score(["p"] * len(texts), texts, [str(g) for g in mine for _ in range(size)], {})
    completions = [[Completion([5], [-1.0], False) for _ in range(size)] for _ in mine]
    scored = ScoredPrompts(examples, rewards, [str(number) for number in range(len(groups))])
    return worker._gather(examples, size, mine, completions, scores, scored)


def rollouts_of_thoughts(texts: list[str], end: str) -> tuple[list[float], list[int], dict[str, float]]:
    """Return rewards, response lengths and what is logged for these responses to two prompts; the reward counts characters."""
    worker = object.__new__(RolloutWorker)
    worker.tokenizer, worker.stop_token_ids, worker.rollout = tiny_tokenizer(), [1], EngineConfig(think_end_token=end)
    worker._reported = set()
    rewards = build_rewards({"length": RewardConfig(target=TARGET.replace(":part", ":characters"))})
    completions = [[Completion([*worker.tokenizer.encode(text), 1], [-1.0] * (len(text) + 1), False) for text in texts]]
    examples, rank = [Prompt([3, 4 + number], "p", "only", {}) for number in range(2)], dist.get_rank()
    scores, more = worker._score(rewards, examples[rank : rank + 1], completions)
    scored = ScoredPrompts(examples, rewards, ["only"])
    rollouts = worker._gather(examples, len(texts), [rank], completions, scores, scored, more)
    return rollouts.rewards.tolist(), rollouts.batch.response_lengths.tolist(), rollout_statistics(rollouts)
