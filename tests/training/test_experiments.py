"""The paper's experiments: their settings are the authors', they fit the hardware that they name, and their tiny
counterparts run on the real data (of ../shared/data, which the product does not need) with judge, guard and reward model."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from known_models import MODELS, write_config
from runs import Job, exported, probes, steps, validations
from safetensors.torch import load_file, save_file

from frpo_nemo.config.cli import compose
from frpo_nemo.config.load import load
from frpo_nemo.config.options import FRPORun, SFTRun
from frpo_nemo.config.overrides import CONFIGS
from frpo_nemo.data.sources import load_rows
from frpo_nemo.examples.new_model import new_model, train_tokenizer
from frpo_nemo.training.checks import config as config_checks
from frpo_nemo.training.checks import resources
from frpo_nemo.training.checks.config import validate_frpo, validate_sft

DATA = CONFIGS.parents[1] / "shared" / "data"
GIB = 2**30
FILES = (
    "frpo_paper/safety_train.parquet",
    "frpo_paper/kl_safety_prompts.jsonl",
    "alpaca/alpaca_1k.json",
    "math500/test.jsonl",
)
needs_data = pytest.mark.skipif(
    not all((DATA / file).is_file() for file in FILES), reason=f"the paper's data are not in {DATA}"
)
QWEN_MATH = {"max_position_embeddings": 4096, "rope_theta": 10000.0}

# Experiment -> the model whose config.json it is checked with, and what that has of its own.
LARGE = {
    "safety_mistral_7b": ("Mistral-7B-Instruct-v0.1", {}),
    "safety_qwen_7b": ("Qwen2.5-7B-Instruct", {}),
    "safety_llama_70b": ("Llama-3.1-70B-Instruct", {}),
    "math_qwen_7b": ("Qwen2.5-7B-Instruct", QWEN_MATH),
    "math_qwen_72b": ("Qwen2.5-72B-Instruct", QWEN_MATH),
    "sft_alpaca": ("Mistral-7B-Instruct-v0.1", {}),
    "sft_alpaca_70b": ("Llama-3.1-70B-Instruct", {}),
    "sft_gsm8k": ("Qwen2.5-7B-Instruct", {}),
    "sft_gsm8k_70b": ("Llama-3.1-70B-Instruct", {}),
    "sft_code": ("Qwen2.5-7B-Instruct", QWEN_MATH),
    "sft_code_70b": ("Qwen2.5-72B-Instruct", QWEN_MATH),
    "rl_ultrafeedback": ("Mistral-7B-Instruct-v0.1", {}),
    "rl_ultrafeedback_70b": ("Llama-3.1-70B-Instruct", {}),
}
TINY = sorted(file.stem for file in (CONFIGS / "experiment").glob("*_tiny.yaml"))


def experiment(name: str, *overrides: str):
    model = ["model.path=runs/trained/hf"] if name.startswith("rl_") else []  # no model of its own
    composed = compose(f"experiment/{name}", [f"run_dir=runs/{name}", *model, *overrides])
    return load(FRPORun if "objective" in composed else SFTRun, composed)


ADAPTERS = attrgetter("model.lora.rank", "model.lora.alpha", "model.lora.dropout")
OPTIMIZER = attrgetter("optim.lr", "optim.schedule", "optim.warmup_ratio", "optim.weight_decay", "optim.clip_grad")
SAMPLING = attrgetter("rollout.prompts_per_step", "rollout.group_size", "data.max_prompt_tokens",
                      "rollout.max_response_tokens", "rollout.temperature", "rollout.top_p")  # fmt: skip
BATCH = attrgetter("data.sequences_per_step", "data.max_tokens", "data.max_prompt_tokens")


@pytest.mark.parametrize(
    "name, adapters, optimizer, batch, steps",
    [
        ("safety_mistral_7b", (64, 64, 0), (1e-5, "cosine", 0.1, 0.1, 1.0), (16, 8, 1024, 2048, 1.0, 0.9), 500),
        ("safety_qwen_7b", (64, 64, 0), (1e-5, "cosine", 0.1, 1e-4, 1.0), (16, 8, 1024, 2048, 1.0, 0.9), 500),
        ("safety_llama_70b", (64, 64, 0), (1e-5, "cosine", 0.1, 0.1, 1.0), (16, 8, 1024, 2048, 1.0, 0.9), 500),
        ("math_qwen_7b", (64, 128, 0), (6e-6, "cosine", 0.1, 0, 0.5), (64, 8, 512, 2048, 1.0, 1.0), 412),
        ("math_qwen_72b", (64, 128, 0), (6e-6, "cosine", 0.1, 0, 0.5), (64, 8, 512, 2048, 1.0, 1.0), 412),
        ("sft_alpaca", (0, 64, 0), (1e-6, "constant", 0.05, 0, 1.0), (32, 2048, 2047), 1250),
        ("sft_alpaca_70b", (0, 64, 0), (1e-6, "constant", 0.05, 0, 1.0), (32, 2048, 2047), 1250),
        ("sft_gsm8k", (0, 64, 0), (6e-6, "cosine", 0.25, 0, 1.0), (32, 2048, 2047), 218),
        ("sft_gsm8k_70b", (0, 64, 0), (6e-6, "cosine", 0.25, 0, 1.0), (32, 2048, 2047), 218),
        ("sft_code", (16, 32, 0.05), (5e-5, "cosine", 0.03, 0.04, 0.3), (64, 4096, 2048), 781),
        ("sft_code_70b", (16, 32, 0.05), (5e-5, "cosine", 0.03, 0.04, 0.3), (64, 4096, 2048), 781),
        # Not the authors', but those of their safety training except top-p (experiment/rl_ultrafeedback says why).
        ("rl_ultrafeedback", (64, 64, 0), (1e-5, "cosine", 0.1, 0.1, 1.0), (16, 8, 1024, 2048, 1.0, 1.0), 500),
        ("rl_ultrafeedback_70b", (64, 64, 0), (1e-5, "cosine", 0.1, 0.1, 1.0), (16, 8, 1024, 2048, 1.0, 1.0), 500),
    ],
)
def test_the_settings_are_the_papers(name, adapters, optimizer, batch, steps):
    cfg = experiment(name)
    assert ADAPTERS(cfg) == adapters and OPTIMIZER(cfg) == optimizer and cfg.trainer.max_steps == steps
    assert cfg.optim.adam_beta2 == 0.999  # of transformers' Trainer, with which the paper's models were trained
    assert (SAMPLING if hasattr(cfg, "objective") else BATCH)(cfg) == batch


def test_every_lambda_goes_with_the_beta_and_the_learning_rate_of_the_paper():
    arms = compose("study/safety_7b")["arms"]
    pairs = {}
    for name, overrides in arms.items():
        objective = experiment("safety_mistral_7b", *overrides).objective
        pairs[name] = objective["name"], objective.get("lambda_"), objective["beta"]
    assert pairs.pop("grpo") == ("dr_grpo", None, 0.1) and pairs.pop("grpo_std") == ("grpo", None, 0.1)
    at_frpos_weight = pairs.pop("grpo_beta_0.001"), pairs.pop("grpo_std_beta_0.001")
    assert at_frpos_weight == (("dr_grpo", None, 0.001), ("grpo", None, 0.001))
    assert [pair[1:] for pair in pairs.values()] == [
        (5, 0.0002), (2, 0.0005), (1, 0.001), (0.5, 0.002), (0.2, 0.005), (0.1, 0.1), (0.1, 0.01),
    ]  # fmt: skip
    rates = {}
    for overrides in compose("study/math_7b")["arms"].values():
        cfg = experiment("math_qwen_7b", *overrides)
        assert cfg.objective["beta"] == 1e-4
        rates[cfg.objective.get("lambda_")] = cfg.optim.lr
    assert rates == {None: 6e-6, 10: 6e-6, 4: 6e-6, 2: 6e-6, 1: 6e-6, 0.5: 5e-6, 0.2: 5e-6, 0.1: 5e-6}


@pytest.mark.parametrize(
    "name, chosen, rows",
    [
        ("sft_alpaca", (None, None), (0, 40_000)),
        ("sft_alpaca_70b", (None, None), (0, 40_000)),
        ("sft_code", ({"average_test_score": 1}, None), (0, 50_000)),
        ("sft_code_70b", ({"average_test_score": 1}, None), (0, 50_000)),
        ("math_qwen_7b", ({"level": 3}, None), (0, None)),  # of 5
        ("math_qwen_72b", ({"level": 3}, None), (0, None)),
        ("sft_gsm8k", (None, None), (512, None)),
    ],
)
def test_the_rows_are_the_papers(name, chosen, rows):
    """Those that are held out come from the same ones, or right after them."""
    (train,), (held_out,) = (experiment(name).data.train, experiment(name).data.validation)
    assert ((train.at_least, train.where), (train.start, train.limit)) == (chosen, rows)
    assert (held_out.path, held_out.at_least) == (train.path, train.at_least)
    if train.holdout:
        assert (held_out.holdout, held_out.held_out, train.held_out) == (train.holdout, True, False)
    elif train.limit:
        assert held_out.start == train.limit
    else:
        assert held_out.limit == train.start


@pytest.mark.parametrize("name", ["rl_ultrafeedback", "rl_ultrafeedback_70b"])
def test_later_reinforcement_learning_is_grpo_with_the_papers_reward_model(name):
    cfg = experiment(name)
    assert (cfg.objective["name"], cfg.objective["beta"]) == ("grpo", 0.001)
    (reward,) = cfg.reward.values()
    assert (reward.args["model"], reward.args["revision"]) == ("allenai/Llama-3.1-8B-Instruct-RM-RB2", "2")
    assert cfg.data.train[0].limit == cfg.data.validation[0].start == 60_635


def test_a_later_training_keeps_no_checkpoint_but_the_last_which_is_what_is_measured():
    """At 70B each checkpoint is a terabyte, in every arm."""
    tasks = {
        study: compose(f"study/{study}")["tasks"]
        for study in ("safety_7b", "safety_qwen_7b", "safety_70b", "math_7b", "math_72b")
    }
    for task in (task for of_study in tasks.values() for task in of_study.values()):
        cfg = experiment(task["config"].removeprefix("experiment/"), *task.get("overrides", []))
        assert (cfg.checkpoint.keep_last, cfg.checkpoint.keep_best) == (1, False), task["config"]
    qwen = tasks["safety_qwen_7b"]["ultrafeedback"]
    assert experiment("rl_ultrafeedback", *qwen["overrides"]).optim.weight_decay == 1e-4  # as its safety training


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Return a working directory with runs/tiny: the models of the tiny experiments, as docs/reproduce.md makes them."""
    root = tmp_path_factory.mktemp("tiny")
    words = "Which harmful words are in this answer? 1 2 3 4 5 safe unsafe, and a box \\boxed{7}."
    rows = json.loads((DATA / FILES[2]).read_text())[:200] if (DATA / FILES[2]).is_file() else []
    tokenizer = train_tokenizer([words, *(row["output"] for row in rows)], 512)
    sizes = dict(hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=2, ffn_hidden_size=128)
    for seed, (name, head) in enumerate({"base": "lm", "judge": "lm", "reward": "reward"}.items()):
        path = root / "runs" / "tiny" / name
        new_model(path, tokenizer=tokenizer, head=head, max_position_embeddings=2048, seed=seed, **sizes)
    return root


@pytest.fixture(scope="module")
def large(tiny) -> Path:
    """Beside them what the checks read of a large model, and a few rows of every data set of the hub."""
    for name in MODELS:
        path = write_config(name, tiny)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(tiny / "runs" / "tiny" / "base" / file, path)
        save_file({}, path / "model.safetensors")
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3", "question": "1 + 2?", "answer": "3 #### 3",
           "problem": "1 + 2?", "level": 3, "prompt": "1 + 2?", "ability": "refusal", "average_test_score": "1"}  # fmt: skip
    rows = [row | {"ability": a} for a in ("wildjailbreak", "rainbow", "aegis", "refusal") for _ in range(512)]
    (tiny / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tiny / "others.jsonl").write_text(
        "".join(json.dumps(row | {"prompt": "2?", "problem": "2?"}) + "\n" for row in rows)
    )
    return tiny


@pytest.mark.parametrize("name", LARGE)
def test_large_experiments_are_right_for_the_gpus_that_they_name(name, large, monkeypatch):
    """Layout, batch arithmetic, lengths, memory of a GPU and of a node, rewards and probes by their columns and tasks. The
    rows are few, judge and reward model small, the sizes of the policy real."""
    monkeypatch.chdir(large)
    monkeypatch.setattr(resources, "gpu_memory", lambda: 79 * GIB)
    monkeypatch.setattr(resources, "host_memory", lambda *_: 2000 * GIB)
    monkeypatch.setattr(resources, "check_disk", lambda *_: None)  # the disk of this machine
    monkeypatch.setattr(config_checks, "check_checkpoint", lambda *_: None)  # the files hold no weights
    model, changes = LARGE[name]
    (large / model / "config.json").write_text(json.dumps(MODELS[model] | changes))
    cfg = experiment(name, f"model.path={large / model}", *small_inputs(name))
    check = validate_frpo if hasattr(cfg, "objective") else validate_sft
    check(cfg, cfg.trainer.num_nodes * cfg.trainer.devices)
    assert cfg.trainer.num_nodes * cfg.trainer.devices == (64 if "70b" in name or "72b" in name else 8)


def small_inputs(name: str) -> list[str]:
    """Local files and small models in place of the hub's."""
    given = ["data.train.0.path=rows.jsonl"]
    if name.startswith(("sft_alpaca", "rl_", "sft_code")):
        given += ["data.train.0.limit=1000"]
    if name.startswith(("safety", "math")):
        given += ["objective.lambda_=0.5"]
    if name.startswith("safety"):
        given += tiny_rewards("reward")
    if name.startswith("rl_"):
        given += ["reward.helpfulness.args={model: runs/tiny/reward}"]
    if name.startswith(("sft_alpaca", "sft_gsm8k", "rl_")):
        given += [*tiny_rewards("probe.reward"), *(f"probe.prompts.{i}.path=others.jsonl" for i in (0, 1))]
    if name.startswith("sft_code"):
        given += ["probe.prompts.0.path=others.jsonl", "probe.prompts.0.split=train"]
        given += ["data.train.0.prompt=question", "data.train.0.completion=answer"]
    return given


def tiny_rewards(key: str) -> list[str]:
    """Return the small models of reward/safety_tiny as the rewards of the run or of its probe."""
    choice = key if key == "reward" else f"reward@{key}"
    return [f"{choice}=safety_tiny", f"{key}.safety.args.judge.template_file=null"]


@needs_data
def test_the_papers_prompts_are_split_by_ability(monkeypatch):
    monkeypatch.setenv("FRPO_DATA", str(DATA))
    data = experiment("safety_tiny").data
    train, held_out = (
        Counter(row["ability"] for row in load_rows(source[0])) for source in (data.train, data.validation)
    )
    assert sum(held_out.values()) == 50 and sum(train.values()) == 1950
    assert held_out == {"refusal": 25, "wildjailbreak": 10, "rainbow": 10, "aegis": 5}


@pytest.fixture(scope="module")
def trained(tiny) -> dict[str, Path]:
    """Run directories of the tiny experiments: safety and math side by side, then Alpaca from what safety training left."""
    short = ["rollout.prompts_per_step=8", "trainer.max_steps=2", "trainer.val_interval=2"]
    environment = {"FRPO_DATA": str(DATA)}

    def job(recipe: str, name: str, *overrides: str) -> Job:
        given = ["--config-name", f"experiment/{name}", *short[recipe == "sft.py" :], *overrides]
        return Job(recipe, given, tiny / "runs" / name, environment=environment)

    with contextlib.chdir(tiny):
        # A random model finds no box: what it could get besides makes gradients.
        digit = "reward.digit={target: regex, args: {pattern: '[0-9]'}}"
        jobs = [job("frpo.py", "safety_tiny", "objective.lambda_=0.5"),
                job("frpo.py", "math_tiny", "objective.lambda_=2", digit)]  # fmt: skip
        for each in jobs:
            each.succeed()
        job("sft.py", "sft_alpaca_tiny", f"model.path={jobs[0].run_dir / 'hf'}", "probe.interval=2").succeed()
    return {name: tiny / "runs" / name for name in ("safety_tiny", "math_tiny", "sft_alpaca_tiny")}


def responses(run_dir: Path, step: int) -> list[dict]:
    """Return the responses of a validation or probe."""
    (path,) = run_dir.glob(f"*/step_{step:08d}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@needs_data
def test_judge_and_guard_score_harmful_prompts_and_the_reward_model_harmless_ones(trained):
    run_dir = trained["safety_tiny"]
    for row in responses(run_dir, 0) + responses(run_dir, 2):
        scored = [name for name in ("reward/safety", "reward/helpfulness") if row[name] is not None]
        assert scored == ["reward/helpfulness" if row["task"] == "refusal" else "reward/safety"], row["task"]
        assert row["reward"] == row[scored[0]] and 0 < row["reward"] < 1
    assert {row["task"] for row in responses(run_dir, 2)} == {"wildjailbreak", "rainbow", "aegis", "refusal"}
    for step in steps(run_dir):
        assert step["share/unscored"] == 0 and step["gradient_norm"] > 0
        assert not [name for name in step if name.startswith("reward_failures")]
        assert step["rollout_mismatch/mean_abs_logprob_gap"] < 1e-5  # at top_p=0.9: both of the full distribution


@needs_data
def test_adapters_alone_were_trained_and_the_export_has_them_merged(trained, tiny):
    adapter = load_file(trained["safety_tiny"] / "adapter" / "adapter_model.safetensors")
    before, after = load_file(tiny / "runs" / "tiny" / "base" / "model.safetensors"), exported(trained["safety_tiny"])
    assert len(adapter) == 2 * 7 * 2  # A and B of seven matrices in two layers
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in after if name.endswith("_proj.weight")}


@needs_data
def test_fine_tuning_on_alpaca_measures_what_is_left_of_the_safety_training(trained):
    first, last = probes(trained["sft_alpaca_tiny"])
    for row in (first, last):
        assert {"probe/reward/safety/mean", "probe/reward/helpfulness/mean"} <= row.keys()
        assert row["probe/share/unscored"] == 0
    assert first["probe/kl/exact"] == 0 < last["probe/kl/exact"]
    losses = [row["validation/loss"] for row in validations(trained["sft_alpaca_tiny"])]
    assert losses[-1] < losses[0]


@needs_data
def test_math_training_asks_for_a_box_and_rewards_it(trained):
    rows = responses(trained["math_tiny"], 2)
    assert all("put your final answer within \\boxed{}" in row["prompt"] for row in rows)
    assert all({"reward/math", "reward/format"} <= row.keys() for row in rows)
    assert [row["share/unscored"] for row in steps(trained["math_tiny"])] == [0, 0]
    assert all(row["gradient_norm"] > 0 for row in steps(trained["math_tiny"]))
