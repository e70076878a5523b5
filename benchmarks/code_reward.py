"""Programs per second of the `code` reward: a short correct program with three assert statements, each in its own sandbox.

python benchmarks/code_reward.py"""

from __future__ import annotations

import time

from frpo_nemo.config.options import RewardConfig
from frpo_nemo.rewards.reward_set import build_rewards

PROGRAMS = 400
PROGRAM = "```python\ndef double(x):\n    return 2 * x\n```"
TESTS = ["assert double(2) == 4", "assert double(0) == 0", "assert double([1]) == [1, 1]"]


def programs_per_second(workers: int) -> float:
    rewards = build_rewards({"code": RewardConfig(target="code", timeout=60.0, workers=workers)})

    def score(count: int) -> None:
        scores = rewards.score([""] * count, [PROGRAM] * count, [None] * count, {"tests": [TESTS] * count})
        assert scores.total.tolist() == [1.0] * count

    score(4 * workers)  # starts the workers
    start = time.perf_counter()
    score(PROGRAMS)
    seconds = time.perf_counter() - start
    rewards.close()
    return PROGRAMS / seconds


def main() -> None:
    for workers in (1, 2, 4):
        print(f"{workers} workers: {programs_per_second(workers):.0f} programs/s")


if __name__ == "__main__":
    main()
