"""Seconds and memory of log-probs over the tokens that sampling kept, against all tokens, at a vocabulary of 151,936.

python benchmarks/mask_replay.py"""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from frpo_nemo.data.batch import KeptTokens
from frpo_nemo.megatron.logprobs import token_logprobs
from frpo_nemo.processes import world

TOKENS, HIDDEN, VOCABULARY, CHUNK = 512, 896, 151_936, 256  # Qwen2.5-0.5B's output layer
KEPT = {"all tokens": None, "1 kept": 1, "30 kept": 30, "3,000 kept": 3_000}
REPEATS = 5


def passes(kept: KeptTokens | None) -> tuple[float, float]:
    """Return seconds of a forward and a backward pass."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).requires_grad_()
    targets = torch.arange(TOKENS) if kept is None else kept.ids[kept.counts.cumsum(0) - kept.counts].long()
    started = time.perf_counter()
    logprobs, _, _ = token_logprobs(
        hidden, weight, targets, vocab_size=VOCABULARY, tp_group=dist.group.WORLD, chunk_tokens=CHUNK, kept=kept
    )
    middle = time.perf_counter()
    logprobs.sum().backward()
    return middle - started, time.perf_counter() - middle


def peak(kept: KeptTokens | None) -> float:
    """Return the most MB of tensors in both passes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        passes(kept)
    now = most = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / 1e6


def main() -> None:
    for name, count in KEPT.items():
        kept = None
        if count:
            ids = torch.stack([torch.randperm(VOCABULARY)[:count] for _ in range(TOKENS)]).flatten()
            kept = KeptTokens(torch.full((TOKENS,), count), ids.to(torch.int32))
        passes(kept)
        forward, backward = (
            statistics.median(times) for times in zip(*(passes(kept) for _ in range(REPEATS)), strict=True)
        )
        sets = 4 * (kept.ids.numel() if kept else 0) / 1e6
        print(
            f"{name}: forward {forward:.2f} s, backward {backward:.2f} s, peak {peak(kept):.0f} MB, sets {sets:.2f} MB"
        )


if __name__ == "__main__":
    world.start_world()
    weight = torch.randn(VOCABULARY, HIDDEN) / HIDDEN**0.5
    main()
