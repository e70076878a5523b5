"""recipes/evaluate.py on what a run left: its checkpoint, and its export."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file

from frpo_nemo.config.options import RewardConfig, SourceConfig
from frpo_nemo.config.overrides import CONFIGS
from frpo_nemo.errors import ConfigError
from frpo_nemo.evaluation import reward_probe
from frpo_nemo.evaluation.evaluate import evaluate
from frpo_nemo.evaluation.options import EvaluatedModel, EvaluateRun, RewardProbeConfig
from frpo_nemo.evaluation.reward_probe import check_host_memory, check_reward_probe
from frpo_nemo.examples.new_model import new_model
from frpo_nemo.examples.toy import rows, toy_reward, toy_tokenizer

PROMPTS, SAMPLES, SOURCE = 20, 2, "python:frpo_nemo.examples.toy.rows?part=prompts&seed=5&heldout=1"
TOY_REWARD = RewardConfig(target="frpo_nemo.examples.toy.toy_reward")
OPTIONS = [
    "dtype=float32",
    f'probe.prompts=[{{path: "{SOURCE}", task_column: task, limit: {PROMPTS}}}]',
    "probe.reward={toy: {target: frpo_nemo.examples.toy.toy_reward}}",
    f"probe.samples={SAMPLES}",
    "probe.max_prompt_tokens=8",
    "probe.max_response_tokens=6",
]


def start(model: Path, out: Path) -> str:
    command = [
        sys.executable,
        str(CONFIGS.parent / "recipes/evaluate.py"),
        f"model.path={model}",
        f"out={out}",
        *OPTIONS,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def measured(study, tmp_path_factory):
    """Return (the run directory of a stage one, what measuring its checkpoint left, what was printed)"""
    run_dir, out = Path(study[0].out) / "seed_5/frpo/train", tmp_path_factory.mktemp("evaluate") / "out"
    return run_dir, out, start(run_dir / "checkpoints/step_00000002", out)


def test_a_checkpoint_is_measured_as_the_model_that_the_run_exported(measured):
    run_dir, out, _ = measured
    expected, found = (load_file(path / "hf/model.safetensors") for path in (run_dir, out))
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_probe_has_the_reward_of_every_response_that_it_keeps(measured):
    _, out, printed = measured
    samples = [json.loads(line) for line in (out / "probe/samples.jsonl").read_text().splitlines()]
    answers = {f"<bos> {row['prompt']} <sep>": row for row in rows("prompts", seed="5", heldout="1")[:PROMPTS]}
    columns = [answers[sample["prompt"].strip()] for sample in samples]
    named = {key: [row[key] for row in columns] for key in ("task", "answer", "refusal")}
    scores = toy_reward(None, [sample["response"].removesuffix("<eos>") for sample in samples], **named)
    assert len(samples) == PROMPTS * SAMPLES
    assert [sample["reward"] for sample in samples] == pytest.approx(scores)
    results = json.loads((out / "results.json").read_text())
    assert results["probe/reward/mean"] == pytest.approx(fmean(scores))
    assert {"probe/reward/task/harmful/mean", "probe/response_length/mean"} <= set(results)
    assert f"reward/mean {fmean(scores):.4f}" in printed


def test_started_again_it_reads_the_result(measured):
    run_dir, out, printed = measured
    before = (out / "probe/result.json").stat().st_mtime_ns
    assert start(run_dir / "checkpoints/step_00000002", out).splitlines()[-1] == printed.splitlines()[-1]
    assert (out / "probe/result.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"probe": RewardProbeConfig()}, r"Nothing to measure: give benchmarks="),
        ({"probe": RewardProbeConfig(prompts=[SourceConfig(path=SOURCE)])}, r"probe\.reward is empty"),
        ({"dtype": "float16"}, "dtype=float16 must be bfloat16 or float32"),
        ({"model": EvaluatedModel(path="{run}/checkpoints/step_00000002")}, "export of another checkpoint"),
        ({"benchmarks": ["math5000"]}, "the nearest is math500"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(measured, tmp_path, changes, sentence):
    run_dir, _, _ = measured
    config = EvaluateRun(
        model=EvaluatedModel(path=str(run_dir)),
        out=str(tmp_path),
        dtype="float32",
        probe=RewardProbeConfig(prompts=[SourceConfig(path=SOURCE)], reward={"toy": TOY_REWARD}),
    )
    for name, value in changes.items():
        setattr(config, name, value)
    if "another checkpoint" in sentence:
        config.model.path = config.model.path.format(run=run_dir)
        (tmp_path / "hf").mkdir()
        (tmp_path / "hf/exported_from.json").write_text('"elsewhere"')
    with pytest.raises(ConfigError, match=sentence):
        evaluate(config)
    assert not (tmp_path / "probe").exists()


def test_local_reward_models_that_exceed_the_hosts_memory_are_refused_before_a_model_loads(tmp_path, monkeypatch):
    """Every process loads its own."""
    sizes = dict(hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=2, ffn_hidden_size=64)
    new_model(tmp_path / "rm", tokenizer=toy_tokenizer(), head="reward", max_position_embeddings=64, seed=1, **sizes)
    scorer = RewardConfig(target="reward_model", args={"model": str(tmp_path / "rm"), "local": {"dtype": "float32"}})
    probe = RewardProbeConfig(prompts=[SourceConfig(path=SOURCE)], reward={"help": scorer})
    weights = (tmp_path / "rm/model.safetensors").stat().st_size
    monkeypatch.setattr(reward_probe, "host_memory", lambda: 3 * weights)
    check_host_memory(probe, processes=2)
    with pytest.raises(ConfigError, match=r"in each of 4 processes, but .*sbatch --mem.*servers \(remote.url"):
        check_host_memory(probe, processes=4)
    monkeypatch.setattr(reward_probe, "host_memory", lambda: weights // 2)
    config = EvaluateRun(model=EvaluatedModel(path="no/model"), out=str(tmp_path / "out"), probe=probe)
    with pytest.raises(ConfigError, match="Local reward models need"):
        evaluate(config)


def test_results_of_other_settings_are_not_taken_for_these(measured):
    run_dir, out, _ = measured
    probe = RewardProbeConfig(prompts=[SourceConfig(path=SOURCE)], reward={"toy": TOY_REWARD})
    config = EvaluateRun(model=EvaluatedModel(path=str(run_dir)), out=str(out), dtype="float32", probe=probe)
    with pytest.raises(ConfigError, match="a result with other settings or weights"):
        evaluate(config)


@pytest.mark.parametrize("temperature", [0.005, float("inf"), float("nan"), -1.0])
def test_a_temperature_at_which_vllm_would_not_sample_is_refused(temperature):
    reward = {"short": RewardConfig(target="length", args={"max": 9})}
    probe = RewardProbeConfig(reward=reward, temperature=temperature)
    with pytest.raises(ConfigError, match=f"^probe.temperature={temperature} must be "):
        check_reward_probe(probe, "float32")
    probe.temperature = 0.01
    check_reward_probe(probe, "float32")
