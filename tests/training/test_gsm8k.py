"""The GSM8K example on the real data: its rewards, and two steps of FRPO with TP2 and PP2 on a model made here."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from frpo_nemo.config.cli import compose
from frpo_nemo.config.load import load
from frpo_nemo.config.options import FRPORun
from frpo_nemo.examples.new_model import new_model, train_tokenizer
from frpo_nemo.rewards.reward_set import build_rewards

ROOT = Path(__file__).parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
pytestmark = pytest.mark.skipif(not GSM8K.is_file(), reason=f"GSM8K is not here: {GSM8K}")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in GSM8K.open()]


def test_rewards_know_right_well_formed_and_other_answers(rows):
    cfg = load(FRPORun, compose("experiment/gsm8k_frpo"))
    rewards = build_rewards(cfg.reward)
    row = rows[0]  # ... = <<48+24=72>>72 clips altogether in April and May.\n#### 72
    completions = [row["answer"], row["answer"].replace("#### 72", "#### 71"), "#### 72.0", "I do not know"]
    scores = rewards.score([row["question"]] * 4, completions, [None] * 4, {"answer": [row["answer"]] * 4})
    assert scores.parts["math"].tolist() == [1, 0, 1, 0]
    assert scores.total.tolist() == pytest.approx([1.3, 0.1, 1.0, 0.0])

    answers = [row["answer"] for row in rows[:200]]
    scores = rewards.score([""] * 200, answers, [None] * 200, {"answer": answers})
    rewards.close()
    assert not scores.failures
    assert scores.parts["math"].eq(1).all() and scores.parts["format"].eq(1).all()
    assert scores.parts["result"].mean() > 0.85  # some answers end with a sentence of arithmetic in words


def test_two_steps_of_frpo_with_pipeline_parallelism(rows, tmp_path):
    texts = [text for row in rows[:1000] for text in row.values()]
    new_model(
        tmp_path / "base",
        tokenizer=train_tokenizer(texts, 1024),
        hidden_size=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        ffn_hidden_size=128,
    )
    run_dir = tmp_path / "run"
    overrides = [
        f"data.train.0.path={GSM8K}",
        "data.validation.0.limit=40",
        f"model.path={tmp_path / 'base'}",
        f"run_dir={run_dir}",
        "parallel=pp2",
        "model.sequence_parallel=false",
        "rollout={prompts_per_step: 4, group_size: 4, max_response_tokens: 24}",
        "reward.digit={target: regex, args: {pattern: '[0-9]'}}",  # a random model gets no other reward
        "trainer={max_steps: 2, val_interval: 2, microbatch_tokens: 512}",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "recipes/frpo.py"]
    command += ["--config-name", "experiment/gsm8k_frpo", *overrides]
    job = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    assert job.returncode == 0, job.stdout[-4000:]

    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    assert all(value is not None and math.isfinite(value) for record in records for value in record.values())
    merged = {step: {} for step in (0, 1, 2)}
    for record in records:
        merged[record["step"]] |= record
    for step in (1, 2):
        assert merged[step]["gradient_norm"] > 0 and merged[step]["tokens_per_second"] > 0
        assert merged[step]["reward/math/mean"] < 1 and merged[step]["share/unscored"] == 0
        assert merged[step]["rollout_mismatch/mean_abs_logprob_gap"] < 1e-5
    for step in (0, 2):
        assert merged[step]["validation/share/unscored"] == 0
    assert not [name for record in records for name in record if "reward_failures" in name]
    assert list((run_dir / "checkpoints").glob("*2"))
    assert (run_dir / "hf" / "config.json").is_file() and list((run_dir / "hf").glob("*.safetensors"))
