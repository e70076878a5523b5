"""Milliseconds of effective advantages over a global batch, on one thread.

python benchmarks/effective_advantages.py"""

from __future__ import annotations

import statistics
import time

import torch

from frpo_nemo.objective import FRPO, GRPO, Objective

NUM_RESPONSES = 65_536
REPEATS = 30


def groups_of_16() -> torch.Tensor:
    """Ids in the order of a gather over ranks: groups are not contiguous."""
    return torch.arange(NUM_RESPONSES // 16).repeat_interleave(16)[torch.randperm(NUM_RESPONSES)]


def ragged_groups() -> torch.Tensor:
    """Sizes from 1 to about 40, ids far apart."""
    return torch.randint(NUM_RESPONSES // 16, (NUM_RESPONSES,)) * 7_919


def median_ms(
    objective: Objective, rewards: torch.Tensor, groups: torch.Tensor, importance: torch.Tensor | None
) -> float:
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        objective.effective_advantages(rewards, groups, importance)
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rewards = torch.rand(NUM_RESPONSES)
    missing = torch.where(torch.rand(NUM_RESPONSES) < 0.02, torch.nan, rewards)
    importance = 0.9 + 0.2 * torch.rand(NUM_RESPONSES)
    frpo, sharp, plain = FRPO(lambda_=1.0), FRPO(lambda_=0.01), FRPO(lambda_=1.0, jackknife=False)
    print(f"{NUM_RESPONSES} responses, median of {REPEATS} calls, one thread")
    for label, objective, m in [
        ("frpo on-policy", frpo, None),
        ("frpo off-policy", frpo, importance),
        ("frpo lambda 0.01", sharp, None),
        ("frpo no jackknife", plain, None),
        ("grpo", GRPO(), None),
    ]:
        even = median_ms(objective, rewards, groups_of_16(), m)
        ragged = median_ms(objective, missing, ragged_groups(), m)
        print(f"{label:18} groups of 16: {even:5.2f} ms   ragged, 2% unscored: {ragged:5.2f} ms")


if __name__ == "__main__":
    main()
