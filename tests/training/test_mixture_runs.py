"""FRPO on a mixture of experts as a user starts it: experts shared by two ranks, choices replayed, killed and resumed."""

from __future__ import annotations

import pytest
from runs import HERE, Job, assert_same_bits, exported, random_model, steps, without_times

from frpo_nemo.records import read_jsonl

LAYERS, EXPERTS, STEPS = 2, 8, 6


@pytest.fixture(scope="module")
def overrides(tmp_path_factory) -> list[str]:
    model = random_model(tmp_path_factory.mktemp("model") / "base", family="qwen3_moe", ffn_hidden_size=64)
    return [
        "--config-name=experiment/demo",
        f"model.path={model}",
        "model.sequence_parallel=true",
        "model.expert_model_parallel_size=2",
        "model.expert_balance=0.01",
        "rollout.routing_replay=true",
        f"reward.variety.target={HERE / 'picky_reward.py'}:variety",
        "rollout.prompts_per_step=8",
        "rollout.group_size=4",
        "optim.lr=1e-3",
        "data.validation.0.limit=16",
        f"trainer.max_steps={STEPS}",
        f"trainer.val_interval={STEPS}",
        "trainer.save_interval=2",
    ]


@pytest.fixture(scope="module")
def undisturbed(overrides, tmp_path_factory):
    return Job("frpo.py", overrides, tmp_path_factory.mktemp("a") / "run", ranks=2).succeed().run_dir


def test_the_trainer_has_the_logprobs_that_vllm_sampled_with(undisturbed):
    rows = steps(undisturbed)
    assert len(rows) == STEPS
    for row in rows:
        assert row["rollout_mismatch/max_abs_logprob_gap"] < 1e-5
        assert row["gradient_norm"] > 0 and row["experts/imbalance"] >= 1 - 1e-6
    assert rows[-1]["kl/reference"] > 0


def test_the_share_of_every_expert_is_written_down(undisturbed):
    rows = read_jsonl(undisturbed / "experts.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, metrics in zip(rows, steps(undisturbed), strict=True):
        assert [len(layer) for layer in row["shares"]] == [EXPERTS] * LAYERS
        assert all(sum(layer) == pytest.approx(1, abs=1e-4) for layer in row["shares"])
        assert EXPERTS * max(map(max, row["shares"])) == pytest.approx(metrics["experts/most_loaded"], abs=1e-3)


def test_a_killed_run_goes_on_to_the_same_bits(undisturbed, overrides, tmp_path):
    job = Job("frpo.py", overrides, tmp_path / "run", ranks=2)
    job.wait_for_step(3)
    job.ranks()[1].kill()
    assert job.wait() != 0
    resumed = Job("frpo.py", overrides, tmp_path / "run", ranks=2).succeed()
    assert "resumed from" in resumed.output
    assert_same_bits(exported(resumed.run_dir), exported(undisturbed))
    for file in ("metrics.jsonl", "experts.jsonl"):
        ours, theirs = (read_jsonl(run_dir / file) for run_dir in (resumed.run_dir, undisturbed))
        assert [without_times(row) for row in ours] == [without_times(row) for row in theirs]
