"""A user's mistake is reported in one sentence before any model loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny

from frpo_nemo import stack
from frpo_nemo.config.cli import compose
from frpo_nemo.config.load import load
from frpo_nemo.config.options import FRPORun, SFTRun
from frpo_nemo.config.overrides import CONFIGS
from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.checkpoint import files as checkpoint_files
from frpo_nemo.planning.memory import checkpoint_bytes, host_bytes, parameters
from frpo_nemo.rewards.models.local import LocalWeights
from frpo_nemo.rewards.reward_set import local_weights
from frpo_nemo.training.checks import resources
from frpo_nemo.training.checks.config import validate_frpo, validate_sft

REPOSITORY = CONFIGS.parent

FRPO_YAML = """
defaults: [frpo, override model: tiny_fp32, _self_]
run_dir: run
model: {path: tiny}
objective: {lambda_: 0.5}
optim: {lr: 1e-3}
data: {train: [{path: prompts.jsonl}], max_prompt_tokens: 64}
rollout: {prompts_per_step: 8, max_response_tokens: 32}
reward: {right: {target: exact}}
trainer: {max_steps: 3}
"""
SFT_YAML = """
defaults: [sft, override model: tiny_fp32, _self_]
run_dir: run
model: {path: tiny}
optim: {lr: 1e-3}
data:
  train: [{path: prompts.jsonl, completion: answer}]
  max_prompt_tokens: 64
  sequences_per_step: 4
  max_tokens: 128
trainer: {max_steps: 3}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Return a directory with a good model, data and configurations, and with broken ones."""
    root = tmp_path_factory.mktemp("files")
    make_tiny(root / "tiny", "llama")
    for name in ("no_weights", "missing_shard", "no_template", "no_tokenizer", "broken_json"):
        shutil.copytree(root / "tiny", root / name)
    (root / "no_weights/model.safetensors").unlink()
    weight_map = dict.fromkeys(load_file(root / "tiny/model.safetensors"), "model.safetensors")
    index = {"weight_map": weight_map | {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (root / "missing_shard/model.safetensors.index.json").write_text(json.dumps(index))
    (root / "no_template/chat_template.jinja").unlink()
    (root / "no_tokenizer/tokenizer.json").unlink()
    make_tiny(root / "experts", "qwen3_moe", layers=2)
    make_tiny(root / "narrow", "mixtral", layers=2, hidden_size=80)
    shutil.copytree(root / "experts", root / "lost_expert")
    weights = load_file(root / "lost_expert/model.safetensors")
    del weights["model.layers.1.mlp.experts.5.up_proj.weight"]
    save_file(weights, root / "lost_expert/model.safetensors", {"format": "pt"})
    shutil.copytree(root / "experts", root / "wide_experts")
    _change_json(root / "wide_experts/config.json", moe_intermediate_size=96)
    make_tiny(root / "small_heads", "llama", head_dim=16, num_attention_heads=8)
    (root / "broken_json/config.json").write_text("{")
    make_tiny(root / "other", "llama", layers=2)
    make_tiny(root / "untied", "llama", tied=True)
    weights = load_file(root / "untied/model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, root / "untied/model.safetensors", {"format": "pt"})
    (root / "empty").mkdir()
    rows = [{"prompt": "1+1?", "answer": "2", "kind": "sum"}, {"prompt": "2*3?", "answer": "6", "kind": "product"}]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "no_rows.jsonl").write_text("")
    (root / "not_json.jsonl").write_text("prompt: hello\n")
    (root / "rewards.py").write_text(
        "def right(prompts, completions, *, key, **columns): return [1.0] * len(completions)\n"
    )
    _write_configs(root)
    _write_earlier_run(root)
    return root


def _change_json(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _write_configs(root: Path) -> None:
    (root / "good.yaml").write_text(FRPO_YAML)
    (root / "good_sft.yaml").write_text(SFT_YAML)
    (root / "key_typo.yaml").write_text("defaults: [good, _self_]\noptim: {warmup_ration: 0.1}\n")
    (root / "list_typo.yaml").write_text("defaults: [good, _self_]\ndata: {train: [{path: a.jsonl, colum: text}]}\n")
    (root / "reward_typo.yaml").write_text("defaults: [good, _self_]\nreward: {right: {wieght: 2}}\n")
    (root / "reward_list.yaml").write_text("defaults: [good, _self_]\nreward: [right]\n")
    (root / "objective_text.yaml").write_text("defaults: [good, _self_]\nobjective: frpo\n")
    (root / "not_yaml.yaml").write_text("optim: {lr: 1e-3\n")
    (root / "no_such_group.yaml").write_text("defaults: [good, override parallel: tp3, _self_]\n")
    (root / "missing_parent.yaml").write_text("defaults: [gone, _self_]\n")


def _write_earlier_run(root: Path) -> None:
    _write_checkpoint(root / "earlier", 2, root / "other")
    earlier = load(FRPORun, compose("good", ["run_dir=earlier", f"model.path={root}/other"], str(root)))
    OmegaConf.save(OmegaConf.structured(earlier), root / "earlier/config.yaml")


def _write_checkpoint(run_dir: Path, step: int, model: Path) -> None:
    """What the checks read of a checkpoint."""
    checkpoint = checkpoint_files.directory(run_dir, step)
    checkpoint.mkdir(parents=True)
    record = {
        "format": checkpoint_files.FORMAT,
        "step": step,
        "adam_step": step,
        "architecture": checkpoint_files.identity(Architecture.from_hf(model)),
    }
    (checkpoint / checkpoint_files.RECORD).write_text(json.dumps(record))


def check(files: Path, overrides: list[str], config: str = "good", world: int = 1) -> None:
    schema, validator = (SFTRun, validate_sft) if "sft" in config else (FRPORun, validate_frpo)
    validator(load(schema, compose(config, overrides, str(files))), world)


# overrides, what the message must contain[, configuration[, number of processes]]
BAD_INPUT = [
    (["model.lora.rank=8", "model.lora.dropout=0.1"], ["model.lora.dropout=0.1", "must be 0 here"]),
    (["model.lora.dropout=1.0"], ["model.lora.dropout=1.0", "at least 0 and below 1"], "good_sft"),
    (["model.lora.rank=-1"], ["model.lora.rank=-1", "at least 0"]),
    (["model.lora.rank=8", "model.lora.alpha=0"], ["model.lora.alpha=0", "above 0"]),
    (["model.lora.r=8"], ["model.lora.r=8", "valid keys here are rank, alpha, dropout"]),
    # the command line
    (["optim.lrr=1"], ["optim.lrr=1", "nearest valid key is optim.lr"]),
    (["tensor_model_parallel_size=2"], ["tensor_model_parallel_size=2", "model.tensor_model_parallel_size"]),
    (["+trainer.zzz=1"], ["trainer.zzz=1", "valid keys here are num_nodes"]),
    (["data.train.0.lmit=3"], ["data.train.0.lmit=3", "data.train.0.limit"]),
    (["data.train.3.limit=3"], ["data.train.3.limit"]),
    (["data.train.first.limit=3"], ["'first'", "numbered from 0"]),
    (["objectiv=grpo"], ["objectiv=grpo", "objective"]),
    (["objective=grpoo"], ["objective=grpoo", "dr_grpo, frpo, grpo"]),
    (["parallel=tp3"], ["parallel=tp3", "tp2"]),
    (["optim.lr"], ["optim.lr", "optim.lr=VALUE"]),
    (["reward.right.args={a: (b}"], ["reward.right.args={a: (b}", "{key: 'a|b'}"]),
    (["data.train.0.prompt='What is ${question}?'"], ["data.train[0].prompt", "${question}", "{question}", "\\${question}"]),
    (["probe=null"], ["probe=null", "configs/probe (math, safety, ", "'~probe'"]),
    (["reward=null"], ["reward=null", "boxed, ", "'~reward'"]),
    (["parallel=null"], ["parallel=null", "tp2"]),
    (["reward=5"], ["reward=5", "boxed, ", "'~reward'"]),
    (["+probe=[null]"], ["probe=[null]", "math, safety, "]),
    (["=5"], ["'=5'", "NAME=5"]),
    (["reward={r: {target: length}}"], ["configs/reward", "'~reward' '+reward={r: {target: length}}'"]),
    (["probe={interval: 2}"], ["configs/probe", "'+probe={interval: 2}'"]),
    (["run_dir=~nobody_here/run"], ["run_dir=~nobody_here/run", "./~nobody_here/run"]),
    (["optim.lr=1e-3,1e-4"], ["optim.lr=1e-3,1e-4", "key=[a,b]"]),
    # files
    ([], ["optim.warmup_ration=0.1", "optim.warmup_ratio"], "key_typo"),
    ([], ["data.train.0.colum=text", "data.train.0.task_column"], "list_typo"),
    ([], ["reward.right.wieght=2", "reward.right.weight"], "reward_typo"),
    ([], ["Not valid YAML", "not_yaml.yaml", "line 2"], "not_yaml"),
    ([], ["parallel=tp3", "single"], "no_such_group"),
    ([], ["gone"], "missing_parent"),
    ([], ["no configuration goood", "nearest is good"], "goood"),
    # types and missing values
    (["model.tensor_model_parallel_size=two"], ["model.tensor_model_parallel_size=two", "a whole number"]),
    (["model.fp8=[1]"], ["model.fp8=[1]", "null, hybrid, e4m3"]),
    (["optim.lr=fast"], ["optim.lr=fast", "a number"]),
    (["data.shuffle=maybe"], ["data.shuffle=maybe", "true or false"]),
    (["data.train=prompts.jsonl"], ["data.train=prompts.jsonl", "must be a list"]),
    (["data.train.0.limit=x"], ["data.train.0.limit=x", "a whole number at least 1, or null"]),
    (["reward=exact"], ["reward=exact", "gsm8k, ", "toy"]),
    ([], ["reward_list", "a mapping", "a list"], "reward_list"),
    (["optim=1e-3"], ["optim=0.001", "must be a mapping", "lr"]),
    (["model.path=${nowhere}"], ["model.path", "nowhere"]),
    (["model.path=???"], ["model.path", "for example model.path=Qwen/"]),
    (["data.train=[{limit: 3}]"], ["data.train[0].path", "data.train[0].path=prompts.jsonl"]),
    (["reward.second.weight=2"], ["reward.second.target", "=math"]),
    # single values
    (["model.precision=fp16"], ["model.precision=fp16", "bf16, fp32"]),
    (["model.recompute=fulll"], ["model.recompute=fulll", "did you mean full"]),
    (["model.fp8=e5m2"], ["model.fp8=e5m2", "null, hybrid, e4m3"]),
    (["model.fp8_recipe=mxfp8"], ["model.fp8_recipe=mxfp8", "blockwise"]),
    (["rollout.importance_correction=tokens"], ["rollout.importance_correction=tokens", "did you mean token"]),
    (["rollout.importance_limit=0"], ["rollout.importance_limit=0", "above 0"]),
    (["rollout.importance_correction=token", "rollout.importance_floor=3"], ["importance_floor=3", "importance_limit=2"]),
    (
        ["objective.ratio=sequence", "rollout.importance_correction=token", "rollout.importance_outside=mask"],
        ["objective.ratio=", "importance_correction=sequence or geometric"],
    ),
    (["rollout.mask_replay=true"], ["rollout.mask_replay=true", "rollout.top_p below 1 or rollout.top_k"]),
    (["trainer.reference_mix=0.5"], ["trainer.reference_mix=0.5", "trainer.reference_interval"]),
    (["trainer.reference_interval=9", "objective.beta=0"], ["trainer.reference_interval=9", "objective.beta above 0"]),
    (["trainer.reference_interval=9", "model.lora.rank=8"], ["trainer.reference_interval=9", "with adapters the reference"]),
    (["rollout.importance_outside=mask"], ["rollout.importance_correction", "token, sequence or geometric"]),
    (["rollout.token_gap_limit=0"], ["rollout.token_gap_limit=0", "above 0, or null"]),
    (["optim.schedule=cosin"], ["optim.schedule=cosin", "did you mean cosine"]),
    (["optim.lr=0"], ["optim.lr=0", "above 0"]),
    (["optim.min_lr=1"], ["optim.min_lr=1", "optim.lr=0.001"]),
    (["optim.warmup_ratio=1.5"], ["optim.warmup_ratio=1.5", "below 1"]),
    (["optim.clip_grad=-1"], ["optim.clip_grad=-1", "at least 0"]),
    (["trainer.max_steps=0"], ["trainer.max_steps=0", "at least 1"]),
    (["checkpoint.keep_last=0"], ["checkpoint.keep_last=0", "at least 1"]),
    # objective
    (["objective.lambda_=0"], ["objective.lambda_=0", "above 0"]),
    (["objective.lamda_=1"], ["objective.lamda_", "lambda_"]),
    (["~objective.lambda_"], ["objective.lambda_", "must be set"]),
    (["objective.name=ppo"], ["objective.name='ppo'", "grpo"]),
    ([], ["objective=frpo", "{name: frpo, lambda_: 0.5}"], "objective_text"),
    # layout
    ([], ["trainer.devices=1", "4", "torchrun --nproc_per_node 1"], "good", 4),
    (["parallel=tp2_pp2"], ["trainer.devices=4", "torchrun --nproc_per_node 4"], "good", 2),
    (["trainer.devices=3", "model.tensor_model_parallel_size=2"], ["parallel_size=2", "processes, 3"], "good", 3),
    (["trainer.devices=3", "model.tensor_model_parallel_size=3"], ["size=3", "num_attention_heads=4"], "good", 3),
    (["trainer.devices=3", "model.pipeline_model_parallel_size=3"], ["size=3", "num_hidden_layers=4"], "good", 3),
    (["model.sequence_parallel=true"], ["model.sequence_parallel=true", "tensor_model_parallel_size above 1"]),
    (["model.num_layers_in_first_pipeline_stage=1"], ["in_first_pipeline_stage", "parallel_size above 1"]),
    # rollout and batch
    (["rollout.group_size=1"], ["rollout.group_size=1", "at least 2"]),
    (["rollout.temperature=0"], ["rollout.temperature=0", "at least 0.01"]),
    (["rollout.temperature=0.005"], ["rollout.temperature=0.005", "at least 0.01", "vLLM samples at 0.01"]),
    (["rollout.temperature=inf"], ["rollout.temperature=inf", "must be a finite number"]),
    (["rollout.top_p=1.5"], ["rollout.top_p=1.5", "at most 1"]),
    (["rollout.top_k=0"], ["rollout.top_k=0", "-1"]),
    (["rollout.temperature=0.7", "rollout.top_p=0.9"], ["rollout.temperature=0.7", "rollout.top_p=0.9"]),
    (["rollout.tensor_model_parallel_size=2"], ["rollout.tensor_model_parallel_size=2", "processes, 1"]),
    (["trainer.devices=4", "rollout.prompts_per_step=2"], ["rollout.prompts_per_step=2", "4 vLLM engines"], "good", 4),
    (["trainer.devices=3", "rollout.tensor_model_parallel_size=3"], ["size=3", "num_attention_heads=4"], "good", 3),
    (["trainer.updates_per_rollout=3"], ["trainer.updates_per_rollout=3", "rollout.prompts_per_step=8"]),
    (["trainer.microbatch_tokens=80"], ["trainer.microbatch_tokens=80", "at least 96"]),
    (["rollout.max_response_tokens=500"], ["564", "max_position_embeddings=512"]),
    # model
    (["model.path=/nowhere/model"], ["model.path=/nowhere/model", "does not exist"]),
    (["model.path=empty"], ["empty/config.json", "does not exist"]),
    (["model.path=broken_json"], ["broken_json/config.json", "not valid JSON"]),
    (["model.path=lost_expert"], ["lost_expert", "lacks model.layers.1.mlp.experts.5.up_proj.weight"]),
    (["model.path=wide_experts"], ["experts.0.gate_proj.weight has shape [64, 96]; config.json gives [96, 96]"]),
    (["model.path=experts", "model.expert_model_parallel_size=3"], ["expert_model_parallel_size=3", "the 8 experts"]),
    (
        ["model.path=experts", "model.expert_model_parallel_size=2"],
        ["model.expert_model_parallel_size=2", "does not divide the 1 ranks of a pipeline stage"],
    ),
    (["model.expert_model_parallel_size=2"], ["expert_model_parallel_size=2 needs a mixture of experts", "is dense"]),
    (["model.expert_balance=0.1"], ["model.expert_balance=0.1 needs a mixture of experts", "is dense"]),
    (["model.path=narrow"], ["vLLM's experts on a CPU need sizes that 32 divides", "hidden_size is 80"]),
    (["rollout.routing_replay=true"], ["rollout.routing_replay=true needs a mixture of experts"]),
    (["model.path=no_weights"], ["model.path=no_weights", ".safetensors"]),
    (["model.path=missing_shard"], ["model.path=missing_shard", "model-00002-of-00002.safetensors"]),
    (["model.path=untied"], ["untied/model.safetensors", "lm_head.weight, that differs", "tie_word_embeddings"]),
    (["model.path=no_tokenizer"], ["model.path=no_tokenizer", "tokenizer.json"]),
    (["model.path=no_template"], ["model.path=no_template", "chat template"]),
    # data
    (["data.train=[]"], ["data.train", "at least one source"]),
    (["data.train.0.path=gone.jsonl"], ["data.train.0", "gone.jsonl", "does not exist"]),
    (["data.train.0.path=no_rows.jsonl"], ["data.train.0", "no_rows.jsonl"]),
    (["data.train.0.path=not_json.jsonl"], ["data.train.0", "not_json.jsonl"]),
    (["data.train.0.path='python:frpo_nemo.examples.toy.rows?part=prompt'"], ["data.train.0", "part=prompt ", "prompts"]),
    (["data.train.0.prompt=question"], ["data.train.0", "question", "prompt, answer, kind"]),
    (["data.train.0.task=sum", "data.train.0.task_column=kind"], ["task=sum", "task_column=kind"]),
    (["data.train.0.limit=0"], ["data.train.0.limit=0", "at least 1"]),
    (["data.train.0.start=-1"], ["data.train.0.start=-1", "at least 0"]),
    (["data.train.0.holdout=1"], ["data.train.0.holdout=1", "at least 0 and below 1"]),
    (["data.train.0.holdout_seed=-1"], ["data.train.0.holdout_seed=-1", "at least 0"]),
    (["data.train.0.held_out=true"], ["data.train.0.held_out", "data.train.0.holdout above 0"]),
    (["trainer.val_interval=5"], ["trainer.val_interval=5", "data.validation"]),
    # rewards
    (["reward.right.target=exactt"], ["reward.right", "exactt", "exact"]),
    (["reward.right.target=no_module.f"], ["reward.right", "no_module.f", "imported"]),
    (["reward.right.target=rewards.py:wrong"], ["reward.right", "wrong"]),
    (["reward.right.target=rewards.py:right"], ["reward.right", "'key'", "columns are"]),
    (["reward.right.args.column=gold"], ["reward.right", "gold", "answer"]),
    (["reward.right.args.strict=true"], ["reward.right", "strict"]),
    (["reward.right.timeout=0"], ["reward.right", "timeout=0"]),
    (["data.train.0.task_column=kind", "reward.right.tasks=[sum, quotient]"], ["task 'product'"]),
    (["data.train.0.task=sum", "reward.right.tasks=[sum, quotient]"], ["reward.right.tasks", "quotient", "sum"]),
    # where it is written and continued
    (["run_dir=prompts.jsonl/run"], ["run_dir=prompts.jsonl/run", "is a file"]),
    (["run_dir=earlier"], ["run_dir=earlier", "model.path=tiny", "another run_dir"]),
    (["run_dir=earlier", "checkpoint.resume=never"], ["checkpoint.resume=never", "step_00000002", "another run_dir"]),
    (["trainer.seed=-1"], ["trainer.seed=-1"]),
    (["run_dir=earlier", "model.path=other", "optim.lr=1"], ["optim.lr=1.0 (was 0.001)"]),
    (["checkpoint.resume=gone/step_2"], ["checkpoint.resume=gone/step_2", "does not exist"]),
    (["checkpoint.resume=tiny"], ["checkpoint.resume=tiny", "not a checkpoint"]),
    (["checkpoint.resume=earlier/checkpoints/step_00000002"], ["another model", "num_layers=2", "model.path=tiny"]),
    (["objective.lambda_=null", "objective.kl_radius=0", "trainer.updates_per_rollout=2"],
     ["objective.kl_radius=0", "objective.refresh_importance=false"]),
    # probes
    (["probe.interval=-1"], ["probe.interval=-1", "at least 0"]),
    (["probe.interval=2"], ["probe.interval=2", "probe.prompts", "empty"]),
    (["probe=toy", "probe.interval=2", "probe.reward=null"], ["probe.reward"]),
    (["probe=toy", "probe.interval=2", "probe.samples=0"], ["probe.samples=0", "at least 1"]),
    (["probe=toy"], ["probe.prompts", "probe.interval=0"]),
    (["probe=toy", "probe.interval=2", "probe.prompts.0.path=gone.jsonl"], ["probe.prompts.0", "gone.jsonl"]),
    (["probe=toy", "probe.interval=2", "probe.reward.toy.tasks=[math]"], ["harm"]),
    (["probe.interval=2", "probe.prompts=[{path: prompts.jsonl}]", "probe.reward={r: {target: exact}}",
      "probe.max_response_tokens=9"],
     ["probe.prompts", "also in data.train"]),
    (["probe=toy", "probe.interval=2", "probe.max_response_tokens=9999"], ["probe.max_response_tokens", "10063"]),
    (["probe=toy", "probe.interval=2", "rollout.temperature=0.7"], ["rollout.temperature=0.7 must be 1"], "good_sft"),
    (["probe=toy", "probe.interval=2", "model.path=small_heads"], ["size 16", "at least 32"], "good_sft"),
    # supervised fine-tuning
    (["data.train.0.completion=null"], ["data.train.0.completion"], "good_sft"),
    (["data.train.0.completion=reply"], ["data.train.0", "reply"], "good_sft"),
    (["data.max_tokens=32"], ["data.max_tokens=32", "data.max_prompt_tokens=64"], "good_sft"),
    (["trainer.devices=8"], ["data.sequences_per_step=4", "at least 8"], "good_sft", 8),
    (["rollout.group_size=8"], ["rollout", "valid keys here are"], "good_sft"),
    (["trainer.updates_per_rollout=2"], ["Unknown key trainer.updates_per_rollout=2"], "good_sft"),
    (["trainer.microbatch_tokens=100"], ["trainer.microbatch_tokens=100", "at least 128"], "good_sft"),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_INPUT, ids=lambda bad: " ".join([*bad[0], *bad[2:3]]))
def test_bad_input_gives_one_clear_sentence(bad, files, monkeypatch):
    overrides, fragments, *rest = bad
    monkeypatch.chdir(files)
    with pytest.raises(ConfigError) as error:
        check(files, overrides, *rest)
    message = str(error.value)
    assert [fragment for fragment in fragments if fragment not in message] == [], message
    assert "\n" not in message and "full_key" not in message and "++" not in message, message


def test_a_run_does_not_end_before_the_checkpoint_that_it_would_go_on_from(files, monkeypatch):
    monkeypatch.chdir(files)
    with pytest.raises(ConfigError, match="trainer.max_steps=1 is before step 2 of .*set it to at least 2"):
        check(files, ["run_dir=earlier", f"model.path={files}/other", "trainer.max_steps=1"])


def test_good_input_passes(files, monkeypatch):
    monkeypatch.chdir(files)
    check(files, [])
    check(files, [], "good_sft")
    check(files, ["parallel=tp2_pp2", "objective=grpo", "~objective.lambda_"], world=4)
    check(files, ["run_dir=earlier", f"model.path={files}/other", "trainer.max_steps=9"])
    check(files, ["model.path=some-org/some-model"])  # a hub name: nothing to see offline
    assert not (files / "run").exists()


def test_without_transformer_engine_fp8_and_context_parallelism_are_refused(files, monkeypatch):
    monkeypatch.chdir(files)
    fp8 = ["model.fp8=hybrid", "model.precision=bf16"]
    cp2 = ["model.context_parallel_size=2", "trainer.devices=2", "model.precision=bf16"]
    monkeypatch.setattr(stack, "version", lambda package: None)
    with pytest.raises(ConfigError, match="model.fp8=hybrid needs Transformer Engine, which is not installed"):
        check(files, fp8)
    with pytest.raises(
        ConfigError, match="model.context_parallel_size=2 needs Transformer Engine.*context_parallel_size=1"
    ):
        check(files, cp2, world=2)
    with pytest.raises(ConfigError, match="model.context_parallel_size=2 needs model.precision=bf16, not fp32"):
        check(files, [*cp2, "model.precision=fp32"], world=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Transformer Engine can be used here")
def test_without_a_gpu_transformer_engine_is_of_no_use_but_to_a_login_node(files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr(stack, "version", lambda package: "2.20.2")
    cp2 = ["model.context_parallel_size=2", "trainer.devices=2", "model.precision=bf16"]
    with pytest.raises(ConfigError, match="model.fp8=hybrid needs Transformer Engine's layers.*a CUDA device"):
        check(files, ["model.fp8=hybrid", "model.precision=bf16"])
    monkeypatch.setenv("FRPO_LOGIN_NODE", "1")  # the job runs elsewhere
    check(files, cp2, world=2)


def test_expandable_segments_are_refused_where_vllm_would_sleep(files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if not torch.cuda.is_available():
        check(files, [])
    monkeypatch.setattr(resources, "gpu_memory", lambda: 2**40)
    with pytest.raises(ConfigError, match="PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"):
        check(files, [])


def test_small_heads_are_refused_on_a_cpu_only(files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr(resources, "gpu_memory", lambda: None)
    with pytest.raises(ConfigError, match="size 16.*small_heads.*at least 32"):
        check(files, ["model.path=small_heads"])
    monkeypatch.setattr(resources, "gpu_memory", lambda: 2**40)
    check(files, ["model.path=small_heads"])


def test_full_disk_is_told_before_training(files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(
        ConfigError, match="run_dir=run has 1 MiB of free disk, but checkpoints need .* MiB.*keep_last=2"
    ):
        check(files, ["trainer.save_interval=1"])


def test_a_requeued_run_needs_no_disk_for_the_checkpoints_that_it_has(files, tmp_path, monkeypatch):
    monkeypatch.chdir(files)
    one, given = (
        checkpoint_bytes(Architecture.from_hf("tiny"), "fp32"),
        ["trainer.save_interval=1", f"run_dir={tmp_path}"],
    )
    asked = []
    monkeypatch.setattr(
        resources.shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=2 * one)
    )
    with pytest.raises(ConfigError, match="checkpoints need .*: 4 of"):  # keep_last=2, the best, the one being written
        check(files, given)
    for step in (1, 2):
        _write_checkpoint(tmp_path, step, files / "tiny")
    check(files, given)
    assert asked == [tmp_path, tmp_path / "checkpoints"]


def test_a_login_node_does_not_judge_the_memory_of_the_cluster(files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr(resources, "gpu_memory", lambda: None)
    monkeypatch.setattr(resources, "host_memory", lambda: 2**30)
    with pytest.raises(ConfigError, match="on this host"):
        check(files, [])
    monkeypatch.setenv("FRPO_LOGIN_NODE", "1")
    check(files, [])
    check(files, ["model.path=small_heads"])
    monkeypatch.setattr(resources, "gpu_memory", lambda: 3 * 2**30)  # with a GPU it isn't a login node
    with pytest.raises(ConfigError, match="on each GPU"):
        check(files, [])


def test_host_memory_that_gpus_need_is_told_before_training(files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr(resources, "gpu_memory", lambda: 2**36)
    cfg = load(FRPORun, compose("good", ["parallel=tp2"], str(files)))
    needed = 2 * host_bytes(Architecture.from_hf("tiny"), resources.layout_of(cfg, 2, gpu=True))
    monkeypatch.setattr(resources, "host_memory", lambda: needed)
    check(files, ["parallel=tp2"], world=2)
    monkeypatch.setattr(resources, "host_memory", lambda: needed - 1)
    with pytest.raises(
        ConfigError, match="host memory.* each of trainer.devices=2 .*sbatch --mem.*trainer.num_nodes=1"
    ):
        check(files, ["parallel=tp2"], world=2)


JUDGE = "reward.judge={target: judge, args: {model: tiny, template: '{response}', local: {dtype: float32}}}"


def test_local_reward_models_count_in_host_memory(files, monkeypatch):
    """They count in each process, and in each worker of an isolated reward; a served model takes no memory here."""
    monkeypatch.chdir(files)
    monkeypatch.setattr(resources, "gpu_memory", lambda: 2**36)
    arch = Architecture.from_hf("tiny")
    isolated = ["reward.judge.isolate=true", "reward.judge.workers=3"]
    served = ["reward.judge.args.remote.url=http://127.0.0.1:1"]
    for given, copies in (([], 1), (isolated, 3), (served, 0)):
        cfg = load(FRPORun, compose("good", ["parallel=tp2", JUDGE, *given], str(files)))
        models = sum(weights.bytes for weights in local_weights(cfg.reward))
        assert models // (4 * parameters(arch)) == copies  # and some buffers
        needed = 2 * (host_bytes(arch, resources.layout_of(cfg, 2, gpu=True)) + models)
        monkeypatch.setattr(resources, "host_memory", lambda needed=needed: needed)
        check(files, ["parallel=tp2", JUDGE, *given], world=2)
        monkeypatch.setattr(resources, "host_memory", lambda needed=needed: needed - 1)
        with pytest.raises(ConfigError, match="reward models, which may have servers" if copies else "processes, but"):
            check(files, ["parallel=tp2", JUDGE, *given], world=2)


def test_a_local_reward_model_must_fit_the_memory_that_it_scores_in(files, monkeypatch):
    monkeypatch.chdir(files)
    weights = LocalWeights(2**35, on_gpu=True)
    monkeypatch.setattr(resources, "local_weights", lambda configs: [weights])
    monkeypatch.setattr(resources, "host_memory", lambda: 2**38)
    for memory, fits in ((2**35, False), (2**36, True)):
        monkeypatch.setattr(resources, "gpu_memory", lambda memory=memory: memory)
        if fits:
            check(files, [])
        else:
            with pytest.raises(ConfigError, match="phase reward needs .* on each GPU.* set its local.device=cpu"):
                check(files, [])
    monkeypatch.setattr(resources, "gpu_memory", lambda: None)
    monkeypatch.setattr(resources, "host_memory", lambda: 2**35)
    with pytest.raises(
        ConfigError, match="on this host.*local reward models 32 GiB.*give the models of rewards a server"
    ):
        check(files, [])


@pytest.mark.parametrize(
    "membership, limits, allowed",
    [
        ("0::/job_1/step_0/task_0", {"job_1/memory.max": "4000", "job_1/step_0/task_0/memory.max": "max"}, 4000),
        ("0::/job_1/step_0", {"job_1/memory.max": "4000", "job_1/step_0/memory.max": "3000"}, 3000),
        ("4:memory:/job_1/step_0\n0::/", {"memory/job_1/memory.limit_in_bytes": "2000"}, 2000),
        ("3:cpuset:/job_1", {"memory/job_1/memory.limit_in_bytes": "2000"}, 1024 * 1024),  # not its group of memory
        ("0::/not/seen/in/the/container", {"memory.max": "1000"}, 1000),
    ],
)
def test_the_smallest_limit_of_the_nested_control_groups_counts(membership, limits, allowed, tmp_path):
    files = {"proc/meminfo": "MemTotal: 1024 kB", "proc/self/cgroup": f"{membership}\n"}
    for name, text in (files | {f"cgroup/{name}": limit for name, limit in limits.items()}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert resources.host_memory(tmp_path / "proc", tmp_path / "cgroup") == allowed


def test_a_replica_with_one_pack_holds_one_microbatch_in_flight(files, monkeypatch):
    monkeypatch.chdir(files)
    given = ["trainer.devices=8", "model.pipeline_model_parallel_size=4", "trainer.microbatch_tokens=4096"]
    for sequences, update_tokens, pack in ((4, 2 * 128, 2 * 128), (129, 65 * 128, 4096)):  # on two replicas
        cfg = load(SFTRun, compose("good_sft", [*given, f"data.sequences_per_step={sequences}"], str(files)))
        layout = resources.layout_of(cfg, 8, gpu=True)
        assert (layout.update_tokens, layout.microbatch_tokens) == (update_tokens, pack)


def test_too_little_gpu_memory_is_told_before_training(files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr(resources, "gpu_memory", lambda: 3 * 2**30)
    with pytest.raises(ConfigError, match="phase train needs 3.* GiB on each GPU, which has 3 GiB: .*optimizer .* MiB"):
        check(files, [], "good_sft")
    monkeypatch.setattr(resources, "gpu_memory", lambda: 2**34)
    with pytest.raises(ConfigError, match="vLLM's weights .* rollout.gpu_memory_utilization=0.01"):
        check(files, ["rollout.gpu_memory_utilization=0.01"])
    check(files, [])


def test_too_little_host_memory_is_told_before_training(files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr(resources, "gpu_memory", lambda: None)
    monkeypatch.setattr(resources, "host_memory", lambda: 3 * 2**30)
    check(files, ["parallel=tp2"], world=2)
    long = ["data.max_prompt_tokens=480", "rollout.prompts_per_step=1024", "rollout.max_response_tokens=32"]
    with pytest.raises(ConfigError, match="each of trainer.devices=2 .*lower trainer.microbatch_tokens=200000.*full"):
        check(files, ["parallel=tp2", *long, "trainer.microbatch_tokens=200000"], world=2)
    check(files, ["parallel=tp2", *long, "trainer.microbatch_tokens=4096"], world=2)


def test_a_run_prints_layout_memory_and_peak(files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr(resources, "gpu_memory", lambda: None)
    cfg = load(FRPORun, compose("good", ["parallel=tp2_pp2"], str(files)))
    text = resources.describe_plan(cfg, 4)
    assert text.startswith("plan: TP2 PP2 DP1, vLLM TP1, fp32")
    for part in ("weights", "gradients", "optimizer", "activations", "vLLM KV cache", "expected peak of each process"):
        assert part in text, text


def test_parameters_are_counted_exactly(tmp_path):
    from transformers import AutoModelForCausalLM

    for family, tied in (("llama", False), ("mistral", True), ("qwen2", False), ("qwen3", True)):
        make_tiny(tmp_path / family, family, tied=tied)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / family)
        assert parameters(Architecture.from_hf(tmp_path / family)) == model.num_parameters()


# The real command.


def test_a_finished_run_leaves_nothing_behind(tmp_path):
    """It does not wait for the interpreter's last search for garbage; what is registered to be done at exit is."""
    code = f"""
import multiprocessing, tempfile, time
from frpo_nemo.config.cli import _leave
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,), daemon=True)
child.start()
directory = tempfile.TemporaryDirectory(dir={str(tmp_path)!r})
print(child.pid)
_leave(75)
"""
    ended = start(tmp_path, code=code)
    assert ended.returncode == 75 and ended.stderr == "", ended
    assert list(tmp_path.iterdir()) == [] and not Path("/proc", ended.stdout.strip()).exists()


def start(files: Path, *arguments: str, code: str | None = None) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = ["-c", code] if code else [str(REPOSITORY / "recipes/frpo.py")]
    return subprocess.run([sys.executable, *command, *arguments], cwd=files, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    "arguments, fragments",
    [
        (["--config-dir=.", "--config-name=good", "optim.lrr=1"], ["optim.lrr=1", "optim.lr"]),
        (["-cd", ".", "-cn", "good", "data.train.0.path=not_json.jsonl"], ["not_json.jsonl"]),
        (["--trainer.max_steps=3"], ["--trainer.max_steps=3", "without dashes: trainer.max_steps=3"]),
    ],
)
def test_command_ends_with_one_line_and_code_2(arguments, fragments, files):
    ended = start(files, *arguments)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("frpo.py: ") and ended.stderr.count("\n") == 1, ended.stderr
    assert [fragment for fragment in fragments if fragment not in ended.stderr] == [], ended.stderr


def test_checks_import_neither_megatron_nor_nemo_nor_vllm(files):
    code = f"""
import runpy, sys
try:
    runpy.run_path({str(REPOSITORY / "recipes/frpo.py")!r}, run_name="__main__")
except SystemExit as end:
    print(end.code, [name for name in ("megatron.core", "nemo", "vllm") if name in sys.modules])
"""
    # run_dir is checked last, except for what is on the disk
    ended = start(files, "--config-path=.", "--config-name", "good", "run_dir=prompts.jsonl/run", code=code)
    assert ended.stdout == "2 []\n", ended


def test_good_command_reaches_run_through_nemo(files):
    """Once with everything from files, overrides and groups; a ConfigError of the run itself is one line as well."""
    code = """
from frpo_nemo.errors import ConfigError
from frpo_nemo.config.cli import main
from frpo_nemo.config.options import FRPORun
from frpo_nemo.training.checks.config import validate_frpo

def run(cfg):
    print(cfg.optim.lr, cfg.objective, cfg.data.train[0].limit, cfg.reward["right"].weight)
    raise ConfigError("found late")

main(run, FRPORun, "frpo", validate_frpo)
"""
    overrides = [
        "optim.lr=2e-3",
        "objective=dr_grpo",
        "~objective.lambda_",
        "data.train.0.limit=1",
        "reward.right.weight=3",
    ]
    ended = start(files, *overrides, "--config-dir", ".", "--config-name", "good", code=code)
    assert (ended.returncode, ended.stdout) == (2, "0.002 {'name': 'dr_grpo'} 1 3.0\n"), ended
    assert ended.stderr == "-c: found late\n"


def test_compiling_without_a_compiler_is_refused(files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setenv("CXX", "no-such-compiler")
    check(files, [])
    with pytest.raises(ConfigError, match=r"rollout.enforce_eager=false compiles .* needs a C\+\+ compiler"):
        check(files, ["rollout.enforce_eager=false"])
