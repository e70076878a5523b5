"""Runs that sample from a part of the vocabulary and train on the distribution that was sampled from."""

from __future__ import annotations

import math

import pytest
from runs import HERE, Job, probes, random_model, steps, validations

COMMON = [
    "--config-name=experiment/demo",
    f"reward.variety.target={HERE / 'picky_reward.py'}:variety",
    "rollout.prompts_per_step=8",
    "rollout.group_size=4",
    "rollout.mask_replay=true",
    "data.validation.0.limit=16",
    "trainer.max_steps=3",
    "trainer.val_interval=3",
    "probe=toy",
    "probe.interval=3",
    "probe.prompts.0.limit=8",
    'probe.prompts.0.path="python:frpo_nemo.examples.toy.rows?part=prompts&seed=0&heldout=1"',
    "objective.beta=0.05",
    "optim.lr=1e-3",
]
RUNS = {
    "TP2, top-p, two updates": (2, ["rollout.top_p=0.9", "trainer.updates_per_rollout=2", "parallel=tp2"]),
    "PP2, top-k at a temperature, adapters": (
        2,
        ["rollout.top_k=20", "rollout.temperature=0.7", "model.lora.rank=4", "parallel=pp2"],
    ),
    "DP2, both, with a reference that moves": (
        2,
        [
            "rollout.top_p=0.8",
            "rollout.top_k=30",
            "parallel=dp2",
            "trainer.reference_interval=2",
            "trainer.reference_mix=0.5",
        ],
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return random_model(tmp_path_factory.mktemp("model") / "base")


@pytest.mark.parametrize("ranks, overrides", RUNS.values(), ids=RUNS.keys())
def test_the_trainer_has_the_logprobs_that_vllm_sampled_with(model, tmp_path, ranks, overrides):
    """Within 1e-5 in every step, in validation and probes: over all tokens they would be .1 nats higher at top-p .9."""
    job = Job("frpo.py", [*COMMON, f"model.path={model}", *overrides], tmp_path / "run", ranks=ranks).succeed()
    rows = steps(job.run_dir)
    assert len(rows) == 3
    for row in rows:
        assert row["rollout_mismatch/max_abs_logprob_gap"] < 1e-5
        assert row["gradient_norm"] > 0 and row["kl/reference"] >= 0
    assert rows[-1]["kl/reference"] > 0
    for row in [*validations(job.run_dir), *probes(job.run_dir)]:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
