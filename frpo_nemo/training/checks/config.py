"""Check everything about a configuration that can be checked before a model loads. Each mistake is one sentence: what is
wrong, at which key and value, and what would be right. Raises ConfigError; writes nothing, and imports neither
megatron-core nor vLLM.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from frpo_nemo import stack
from frpo_nemo.config.hub import is_hub_name
from frpo_nemo.config.option import shown
from frpo_nemo.config.options import FRPORun, ModelConfig, RolloutConfig, SFTRun, TrainingRun
from frpo_nemo.data.overlap import check_apart
from frpo_nemo.data.sources import keep_files
from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.weights.tensors import check_checkpoint
from frpo_nemo.objective import Objective, build_objective
from frpo_nemo.planning.compiling import can_compile
from frpo_nemo.rewards.reward_set import check_rewards, check_waits
from frpo_nemo.training.checks import resources
from frpo_nemo.training.checks.chat import check_conversations
from frpo_nemo.training.checks.data import (
    check_reward_tasks,
    check_source_list,
    check_sources,
    describe_data,
    named_sources,
)
from frpo_nemo.training.checks.logging import check_logging
from frpo_nemo.training.checks.resume import check_resume, describe_weight_decay

MIN_CPU_HEAD_DIM = 32  # smallest head that vLLM's CPU attention supports
CPU_EXPERT_MULTIPLE = 32


def validate_frpo(cfg: FRPORun, world_size: int) -> list[str]:
    """Check a typed run against the number of processes that were started. Returns sentences on its data and its weight
    decay. The rows that it reads are kept for the run."""
    keep_files()
    _check_common(cfg, world_size)
    _check_objective(cfg.objective, cfg.trainer.updates_per_rollout)
    if cfg.model.lora.dropout:
        raise ConfigError(
            f"model.lora.dropout={cfg.model.lora.dropout} must be 0 here: with dropped elements the policy in training would "
            "not be the one that sampled the responses."
        )
    _check_engine_options(cfg, world_size)
    _check_batch(cfg, world_size)
    _check_correction(cfg.rollout, build_objective(cfg.objective))
    _check_reference(cfg)
    longest = cfg.data.max_prompt_tokens + cfg.rollout.max_response_tokens
    _check_longest(cfg, longest, "data.max_prompt_tokens + rollout.max_response_tokens")
    arch = _check_model(cfg.model, longest, world_size)
    if arch:
        _check_engine(cfg, arch)
    columns = check_sources(cfg.data)
    check_rewards(cfg.reward, columns)
    check_waits(cfg.reward, cfg.trainer.phase_timeout, "reward")
    check_reward_tasks(cfg.reward, cfg.data.train)
    check_reward_tasks(cfg.reward, cfg.data.validation, all_rewards=False)
    _check_probe(cfg, arch)
    _check_run(cfg, arch, world_size)
    return [*describe_data(), describe_weight_decay(cfg), *check_conversations(cfg, arch)]


def validate_sft(cfg: SFTRun, world_size: int) -> list[str]:
    """Check a typed run against the number of processes that were started. Returns the same sentences as validate_frpo."""
    keep_files()
    _check_common(cfg, world_size)
    replicas = world_size // _model_parallel(cfg.model)
    if cfg.data.sequences_per_step < replicas:
        raise ConfigError(
            f"data.sequences_per_step={cfg.data.sequences_per_step} leaves some of the {replicas} data-parallel "
            f"replicas without a sequence; set it to at least {replicas}."
        )
    if cfg.data.max_tokens <= cfg.data.max_prompt_tokens:
        raise ConfigError(
            f"data.max_tokens={cfg.data.max_tokens} (prompt and completion) must exceed "
            f"data.max_prompt_tokens={cfg.data.max_prompt_tokens}."
        )
    _check_longest(cfg, cfg.data.max_tokens, "data.max_tokens")
    for key, source in named_sources(cfg.data):
        if source.completion is None:
            raise ConfigError(f"{key}.completion is not set; supervised training needs the column with the answers.")
    arch = _check_model(cfg.model, cfg.data.max_tokens, world_size)
    check_sources(cfg.data)
    if cfg.probe.interval:
        _check_engine_options(cfg, world_size)
        if cfg.rollout.temperature != 1:
            raise ConfigError(
                f"rollout.temperature={cfg.rollout.temperature} must be 1 in supervised training: a probe compares vLLM's "
                "log-probs with those of training, which are at temperature 1."
            )
        if arch:
            _check_engine(cfg, arch)
    _check_probe(cfg, arch)
    _check_run(cfg, arch, world_size)
    return [*describe_data(), describe_weight_decay(cfg), *check_conversations(cfg, arch)]


def _check_common(cfg: TrainingRun, world_size: int) -> None:
    if cfg.optim.min_lr > cfg.optim.lr:
        raise ConfigError(f"optim.min_lr={cfg.optim.min_lr} must not exceed optim.lr={cfg.optim.lr}.")
    _check_layout(cfg, world_size)


def _check_layout(cfg: TrainingRun, world_size: int) -> None:
    model, trainer = cfg.model, cfg.trainer
    if trainer.num_nodes * trainer.devices != world_size:
        nodes = f"--nnodes {trainer.num_nodes} " if trainer.num_nodes > 1 else ""
        raise ConfigError(
            f"trainer.num_nodes={trainer.num_nodes} x trainer.devices={trainer.devices} is not the number of processes "
            f"that started, {world_size}; start them with `torchrun {nodes}--nproc_per_node {trainer.devices} ...` or "
            "srun, or set trainer.devices to the number of processes on each node."
        )
    if world_size % _model_parallel(model):
        raise ConfigError(
            f"model.tensor_model_parallel_size={model.tensor_model_parallel_size} x pipeline_model_parallel_size="
            f"{model.pipeline_model_parallel_size} x context_parallel_size={model.context_parallel_size} = "
            f"{_model_parallel(model)} does not divide the number of processes, {world_size} "
            f"(trainer.num_nodes={trainer.num_nodes} x trainer.devices={trainer.devices})."
        )
    if model.sequence_parallel and model.tensor_model_parallel_size == 1:
        raise ConfigError("model.sequence_parallel=true needs model.tensor_model_parallel_size above 1.")
    for key, value, without in (("context_parallel_size", model.context_parallel_size, 1), ("fp8", model.fp8, None)):
        if value != without:
            _check_transformer_engine(model, f"model.{key}={value}", f"model.{key}={shown(without)}")
    if model.fp8:
        stack.check_fp8()


def _check_transformer_engine(model: ModelConfig, option: str, without: str) -> None:
    """Raise ConfigError unless Transformer Engine's layers, which `option` needs, can be used. `without`: the setting that
    avoids them."""
    if model.precision != "bf16":
        raise ConfigError(f"{option} needs model.precision=bf16, not {model.precision}; set that, or {without}.")
    if stack.version("transformer-engine") is None:
        raise ConfigError(
            f"{option} needs Transformer Engine, which is not installed; install "
            f"transformer-engine[pytorch] on a machine with GPUs, or set {without}."
        )
    if not resources.on_login_node() and not stack.uses_transformer_engine(model.precision):
        raise ConfigError(
            f"{option} needs Transformer Engine's layers, which need a CUDA device: Hopper or newer, or "
            f"flash-attn installed; set {without}."
        )


def _check_objective(objective: Any, updates: int) -> None:
    if not isinstance(objective, dict):
        raise ConfigError(f"objective={objective} must be a mapping, such as {{name: frpo, lambda_: 0.5}}.")
    built = build_objective(objective)
    if updates > 1 and built.uses_importance and getattr(built, "kl_radius", None) == 0:
        raise ConfigError(
            "objective.kl_radius=0 makes lambda so large that refreshed importances decide the advantages; with "
            f"trainer.updates_per_rollout={updates} set objective.refresh_importance=false (docs/theory.md, section 6)."
        )


def _check_engine_options(cfg: TrainingRun, world_size: int) -> None:
    rollout = cfg.rollout
    if world_size % rollout.tensor_model_parallel_size:
        raise ConfigError(
            f"rollout.tensor_model_parallel_size={rollout.tensor_model_parallel_size} does not divide the number of "
            f"processes, {world_size}."
        )
    truncated = rollout.top_p < 1 or rollout.top_k > 0
    if rollout.temperature != 1 and truncated and not rollout.mask_replay:
        raise ConfigError(
            f"rollout.temperature={rollout.temperature} cannot be combined with rollout.top_p={rollout.top_p} and "
            f"rollout.top_k={rollout.top_k}; set temperature=1, or top_p=1 and top_k=-1, or rollout.mask_replay=true."
        )
    if rollout.mask_replay and not truncated:
        raise ConfigError(
            "rollout.mask_replay=true has an effect only with top-p or top-k; set rollout.top_p below 1 or rollout.top_k, or "
            "mask_replay=false."
        )
    if rollout.mask_replay and not stack.returns_sampling_masks():
        raise ConfigError(
            "rollout.mask_replay=true: the installed vLLM cannot return the tokens that it kept; install 0.32 or newer, or set "
            "rollout.mask_replay=false."
        )
    if resources.gpu_memory() or resources.on_login_node():
        stack.check_allocator()


def _check_reference(cfg: FRPORun) -> None:
    interval, mix = cfg.trainer.reference_interval, cfg.trainer.reference_mix
    if interval is None and mix != 1:
        raise ConfigError(
            f"trainer.reference_mix={mix} has an effect only with trainer.reference_interval; set it, or leave that out."
        )
    if interval is not None and cfg.model.lora.rank:
        raise ConfigError(
            f"trainer.reference_interval={interval}: with adapters the reference is their base and cannot move; set "
            "model.lora.rank=0, or leave trainer.reference_interval out."
        )
    if interval is not None and build_objective(cfg.objective).beta == 0:
        raise ConfigError(
            f"trainer.reference_interval={interval} needs objective.beta above 0; set beta, or leave reference_interval out."
        )


def _check_correction(rollout: RolloutConfig, objective: Objective) -> None:
    by_token = rollout.importance_correction == "token" and rollout.importance_outside == "mask"
    if by_token and objective.ratio == "sequence":
        raise ConfigError(
            "rollout.importance_outside=mask leaves single tokens out with importance_correction=token, but objective.ratio="
            "sequence takes one ratio for all of them; set importance_correction=sequence or geometric."
        )
    if rollout.importance_floor > rollout.importance_limit:
        raise ConfigError(
            f"rollout.importance_floor={rollout.importance_floor} must not be above rollout.importance_limit="
            f"{rollout.importance_limit}."
        )
    if rollout.importance_correction == "none" and (rollout.importance_floor or rollout.importance_outside == "mask"):
        raise ConfigError(
            "rollout.importance_floor and rollout.importance_outside have an effect with rollout.importance_correction only; "
            "set it to token, sequence or geometric."
        )


def _check_batch(cfg: FRPORun, world_size: int) -> None:
    rollout, updates = cfg.rollout, cfg.trainer.updates_per_rollout
    prompts, engine_ranks = rollout.prompts_per_step, rollout.tensor_model_parallel_size
    engines, replicas = world_size // engine_ranks, world_size // _model_parallel(cfg.model)
    if prompts < engines:
        raise ConfigError(
            f"rollout.prompts_per_step={prompts} leaves some of the {engines} vLLM engines without a prompt; set it to "
            f"at least {engines}, or raise rollout.tensor_model_parallel_size."
        )
    if prompts % updates:
        raise ConfigError(f"trainer.updates_per_rollout={updates} must divide rollout.prompts_per_step={prompts}.")
    if prompts // updates * rollout.group_size < replicas:
        raise ConfigError(
            f"rollout.prompts_per_step={prompts} x rollout.group_size={rollout.group_size} / "
            f"trainer.updates_per_rollout={updates} is less than one sequence for each of the {replicas} data-parallel "
            "replicas; raise one of the first two."
        )


def _check_longest(cfg: TrainingRun, longest: int, keys: str) -> None:
    if cfg.trainer.microbatch_tokens < longest:
        raise ConfigError(
            f"trainer.microbatch_tokens={cfg.trainer.microbatch_tokens} cannot hold the longest sequence of {longest} "
            f"tokens ({keys}); set it to at least {longest}."
        )


def _check_model(model: ModelConfig, longest: int, world_size: int) -> Architecture | None:
    """Return the architecture of a model on disk; None for a hub name, because nothing is known of it offline."""
    path = Path(model.path)
    if not path.is_dir():
        if is_hub_name(model.path):
            return None
        raise ConfigError(
            f"model.path={model.path} does not exist (working directory: {Path.cwd()}); give a directory in Hugging "
            "Face format, or a hub name such as Qwen/Qwen2.5-7B-Instruct."
        )
    arch = Architecture.from_hf(path)
    arch.check_parallel(
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        model.num_layers_in_first_pipeline_stage,
        model.num_layers_in_last_pipeline_stage,
        model.expert_model_parallel_size,
    )
    _check_experts(model, arch, world_size)
    arch.check_sequence_length(longest)
    try:
        check_checkpoint(arch, path)
    except ConfigError as error:
        raise ConfigError(f"model.path={path}: {error}") from error
    _check_tokenizer_files(path)
    return arch


def _check_experts(model: ModelConfig, arch: Architecture, world_size: int) -> None:
    if arch.experts is None:
        if model.expert_balance:
            raise ConfigError(
                f"model.expert_balance={model.expert_balance:g} needs a mixture of experts; {model.path} is dense."
            )
        return
    ranks = world_size // model.pipeline_model_parallel_size
    if ranks % model.expert_model_parallel_size:
        raise ConfigError(
            f"model.expert_model_parallel_size={model.expert_model_parallel_size} does not divide the {ranks} ranks of a "
            f"pipeline stage (trainer.num_nodes x trainer.devices = {world_size})."
        )
    if model.tensor_model_parallel_size > 1 and not model.sequence_parallel:
        raise ConfigError(
            f"model.tensor_model_parallel_size={model.tensor_model_parallel_size} with a mixture of experts needs "
            "model.sequence_parallel=true: megatron-core does not train it otherwise."
        )
    for name, unsupported in (("context_parallel_size", model.context_parallel_size > 1), ("fp8", model.fp8 is not None)):
        if unsupported:
            raise ConfigError(f"model.{name}={getattr(model, name)} is not supported with a mixture of experts yet.")


def _check_tokenizer_files(path: Path) -> None:
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError(
            f"model.path={path} has no tokenizer (tokenizer.json); copy it there from the original model."
        )
    settings = path / "tokenizer_config.json"
    inside = settings.is_file() and json.loads(settings.read_text()).get("chat_template")
    if not inside and not (path / "chat_template.jinja").is_file() and not (path / "chat_template.json").is_file():
        raise ConfigError(
            f"model.path={path}: its tokenizer has no chat template; take an instruction-tuned checkpoint, or put a "
            "chat_template.jinja there."
        )


def _check_engine(cfg: TrainingRun, arch: Architecture) -> None:
    ranks, where = cfg.rollout.tensor_model_parallel_size, f"(model.path={cfg.model.path})"
    if arch.num_heads % ranks:
        raise ConfigError(
            f"rollout.tensor_model_parallel_size={ranks} does not divide num_attention_heads={arch.num_heads} {where}."
        )
    if arch.num_kv_heads % ranks and ranks % arch.num_kv_heads:
        raise ConfigError(
            f"rollout.tensor_model_parallel_size={ranks} is neither a divisor nor a multiple of "
            f"num_key_value_heads={arch.num_kv_heads} {where}."
        )
    if arch.experts and arch.experts.ffn_size % ranks:
        raise ConfigError(
            f"rollout.tensor_model_parallel_size={ranks} does not divide the {arch.experts.ffn_size} inner units of an expert "
            f"{where}."
        )
    on_cpu = not resources.gpu_memory() and not resources.on_login_node()
    inner = arch.experts.ffn_size // ranks if arch.experts else 0
    if on_cpu and arch.experts and (arch.hidden_size % CPU_EXPERT_MULTIPLE or inner % CPU_EXPERT_MULTIPLE):
        raise ConfigError(
            f"vLLM's experts on a CPU need sizes that {CPU_EXPERT_MULTIPLE} divides; hidden_size is {arch.hidden_size}, and an "
            f"expert has {inner} inner units on a rank {where}."
        )
    if on_cpu and cfg.rollout.enforce_eager is False and not can_compile():
        raise ConfigError(
            "rollout.enforce_eager=false compiles vLLM's model on a CPU, which needs a C++ compiler (g++, or that of CXX) and "
            "Python's headers (python3-dev)."
        )
    if cfg.rollout.routing_replay and arch.experts is None:
        raise ConfigError(f"rollout.routing_replay=true needs a mixture of experts; {cfg.model.path} is dense.")
    arch.check_engine_windows()
    if arch.head_dim < MIN_CPU_HEAD_DIM and not resources.gpu_memory() and not resources.on_login_node():
        raise ConfigError(
            f"The heads have size {arch.head_dim} {where}; vLLM on a CPU needs at least {MIN_CPU_HEAD_DIM}."
        )


def _check_probe(cfg: TrainingRun, arch: Architecture | None) -> None:
    """Check the options of the probe, if there is one."""
    probe = cfg.probe
    if not probe.interval:
        if probe.prompts:
            raise ConfigError("probe.prompts is given, but probe.interval=0 turns probes off; set probe.interval.")
        return
    for key, value in (("prompts", probe.prompts), ("reward", probe.reward)):
        if not value:
            raise ConfigError(f"probe.interval={probe.interval} needs probe.{key}, which is empty.")
    longest = cfg.data.max_prompt_tokens + probe.max_response_tokens
    _check_longest(cfg, longest, "data.max_prompt_tokens + probe.max_response_tokens")
    if arch:
        arch.check_sequence_length(longest)
    named = [(f"probe.prompts.{i}", source) for i, source in enumerate(probe.prompts)]
    check_rewards(probe.reward, check_source_list(named))
    check_waits(probe.reward, cfg.trainer.phase_timeout, "probe.reward")
    check_apart(probe.prompts, cfg.data.train)
    check_reward_tasks(probe.reward, probe.prompts, all_rewards=False)


def _check_run(cfg: TrainingRun, arch: Architecture | None, world_size: int) -> None:
    if cfg.trainer.val_interval > 0 and not cfg.data.validation:
        raise ConfigError(
            f"trainer.val_interval={cfg.trainer.val_interval} needs data.validation, which is empty; give a source, or "
            "set trainer.val_interval=0."
        )
    existing = _nearest_existing(Path(cfg.run_dir).absolute())
    if not existing.is_dir():
        raise ConfigError(f"run_dir={cfg.run_dir} cannot be made: {existing} is a file.")
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"run_dir={cfg.run_dir} cannot be written: no permission in {existing}.")
    check_logging(cfg.logging)
    check_resume(cfg, arch)
    if arch is None:
        return
    resources.check_disk(cfg, arch, existing)
    resources.check_memory(cfg, arch, world_size)


def _model_parallel(model: ModelConfig) -> int:
    return model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size


def _nearest_existing(path: Path) -> Path:
    return path if path.exists() else _nearest_existing(path.parent)
