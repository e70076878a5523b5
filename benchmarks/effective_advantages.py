"""Milliseconds of effective advantages over a global batch, on one thread.

python benchmarks/effective_advantages.py"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from frpo_nemo.objective import FRPO, GRPO

NUM_RESPONSES = 65_536
REPEATS = 30


def groups_of_16() -> torch.Tensor:
    """Return ids in the order of a gather over ranks: groups are not contiguous."""
    return torch.arange(NUM_RESPONSES // 16).repeat_interleave(16)[torch.randperm(NUM_RESPONSES)]


def ragged_groups() -> torch.Tensor:
    """Return sizes from 4 to 33, 16 on average, ids far apart."""
    return torch.randint(NUM_RESPONSES // 16, (NUM_RESPONSES,)) * 7_919


def median_ms(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rewards = torch.rand(NUM_RESPONSES)
    batches = [
        (rewards, groups_of_16()),
        (torch.where(torch.rand(NUM_RESPONSES) < 0.02, torch.nan, rewards), ragged_groups()),
    ]
    importance = 0.9 + 0.2 * torch.rand(NUM_RESPONSES)
    chi_squared = FRPO(lambda_=1.0, f_divergence="chi_squared")
    rows: list[tuple[str, Callable]] = [
        ("frpo", FRPO(lambda_=1.0).effective_advantages),
        ("frpo, off-policy", lambda *batch: FRPO(lambda_=1.0).effective_advantages(*batch, importance)),
        ("frpo, lambda 0.01", FRPO(lambda_=0.01).effective_advantages),
        ("frpo, no jackknife", FRPO(lambda_=1.0, jackknife=False).effective_advantages),
        ("frpo, chi_squared", chi_squared.effective_advantages),
        (
            "frpo, chi_squared, no jackknife",
            FRPO(lambda_=1.0, f_divergence="chi_squared", jackknife=False).effective_advantages,
        ),
        ("frpo, for_batch, kl_radius 0.1", lambda *batch: FRPO(kl_radius=0.1).for_batch(*batch, {})),
        ("grpo", GRPO().effective_advantages),
    ]
    print(f"Milliseconds for {NUM_RESPONSES} responses, median of {REPEATS} calls, one thread\n")
    print("| | groups of 16 | ragged, 2% unscored |\n| --- | ---: | ---: |")
    for label, method in rows:
        even, ragged = (median_ms(partial(method, *batch)) for batch in batches)
        print(f"| {label} | {even:.1f} | {ragged:.1f} |")


if __name__ == "__main__":
    main()
