"""Measured steps of others, to see how far off the estimates of timing.py are: NeMo-RL 0.3 on H100, GRPO on
OpenMathInstruct-2, 64 prompts x 32 responses, 4 updates, at most 4,096 tokens, one sequence per microbatch, log-probs of
the old policy and of the reference (github.com/NVIDIA-NeMo/RL/issues/959; layout from grpo_math_70B_megatron.yaml).

    python tests/planning/published.py
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from known_models import write_config
from omegaconf import OmegaConf

from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.planning.cluster import CLUSTERS, Cluster
from frpo_nemo.planning.memory import Engine, Layout
from frpo_nemo.planning.timing import Workload, logprobs, seconds

PROMPT_TOKENS = 200  # sequences of 1,060 tokens on average (their 8B figures), of which about 860 were generated


@dataclass(frozen=True)
class Published:
    model: str
    nodes: int
    response_tokens: int
    layout: Layout
    seconds: dict[str, float]

    def estimate(self, arch: Architecture) -> dict[str, float]:
        work = Workload(64, 32, PROMPT_TOKENS, self.response_tokens, 256, 3840, 4, 2)
        cluster = Cluster(**OmegaConf.to_container(OmegaConf.load(CLUSTERS / "h100.yaml")), num_nodes=self.nodes)
        found = seconds(arch, self.layout, cluster, work)
        four = replace(self.layout, microbatch_tokens=4 * self.layout.microbatch_tokens)  # logprob_batch_size
        return found | {"log-probs": logprobs(arch, four, cluster, work)}


RUNS = [
    Published(
        "Llama-3.1-8B-Instruct",
        1,
        795,
        Layout(tp=1, pp=2, dp=4, microbatch_tokens=PROMPT_TOKENS + 795, engine=Engine(tp=1), reference=True),
        {"generation": 58, "log-probs": 18, "training": 28, "refit": 5},
    ),
    Published(
        "Llama-3.1-70B-Instruct",
        8,
        398,
        Layout(
            tp=4,
            pp=4,
            dp=4,
            sequence_parallel=True,
            microbatch_tokens=PROMPT_TOKENS + 398,
            engine=Engine(tp=4),
            reference=True,
        ),
        {"generation": 84, "log-probs": 18, "training": 28, "refit": 14},
    ),
]


def main() -> None:
    for run in RUNS:
        with tempfile.TemporaryDirectory() as directory:
            arch = Architecture.from_hf(write_config(run.model, Path(directory)))
            estimate = run.estimate(arch)
        for phase, measured in run.seconds.items():
            off = estimate[phase] / measured - 1
            print(f"{run.model:24}{phase:12}measured {measured:4.0f} s  estimated {estimate[phase]:6.1f} s  {off:+.0%}")


if __name__ == "__main__":
    main()
