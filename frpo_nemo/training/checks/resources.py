"""Check that the disk, the GPUs and the host's memory are large enough, before anything loads. Uses the arithmetic of
planning/memory.py; does not import megatron-core."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path, PurePosixPath

from frpo_nemo import stack
from frpo_nemo.config.options import FRPORun, ModelConfig, TrainingRun
from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.checkpoint import files as checkpoint_files
from frpo_nemo.planning.compiling import compiles_on_cpu
from frpo_nemo.planning.memory import (
    Engine,
    Layout,
    PhaseMemory,
    cache_room,
    checkpoint_bytes,
    host_bytes,
    kv_bytes,
    phases,
    readable,
)
from frpo_nemo.planning.report import summary
from frpo_nemo.planning.timing import Workload
from frpo_nemo.rewards.models.local import LocalWeights
from frpo_nemo.rewards.reward_set import local_weights

# Part that takes most of a phase's memory -> the setting to change.
_REMEDIES = {
    "activations": "lower trainer.microbatch_tokens={tokens}, or set model.recompute=full",
    "logits": "lower model.logprob_chunk_tokens={chunk}",
    "FP8 weights": "set model.fp8=null",
    "vLLM weights": "raise rollout.tensor_model_parallel_size={engine_tp}",
    "vLLM KV cache": "lower rollout.gpu_memory_utilization={utilization}",
    "refit buckets": "lower rollout.refit_bucket_mb={bucket_mb}",
    "local reward models": "give the models of rewards a server (remote.url, docs/reward_models.md)",
    "a local reward model": "give it a server (remote.url), or set its local.device=cpu (docs/reward_models.md)",
}
_SPREAD = (
    "raise model.tensor_model_parallel_size={tp} or model.pipeline_model_parallel_size={pp}, or start more processes"
)


def check_disk(cfg: TrainingRun, arch: Architecture, directory: Path) -> None:
    """Raise ConfigError when the checkpoints to keep, and one being written, do not fit on the disk of run_dir.
    `directory`: its nearest parent that exists. Checkpoints of an earlier part of the run are on that disk already."""
    keep, checkpoints = cfg.checkpoint, Path(cfg.run_dir, "checkpoints")
    kept = 1 if cfg.trainer.save_interval == 0 else keep.keep_last + keep.keep_best
    missing = kept + 1 - min(len(checkpoint_files.complete(cfg.run_dir)), kept)
    mix = None
    if isinstance(cfg, FRPORun) and cfg.trainer.reference_interval is not None:
        mix = cfg.trainer.reference_mix
    one = checkpoint_bytes(arch, cfg.model.precision, cfg.model.lora.rank, mix)
    leftovers = sum(
        file.stat().st_size for file in checkpoints.glob("*.tmp-*/**/*") if file.is_file()
    )  # the next save's
    needed, free = missing * one, shutil.disk_usage(checkpoints if checkpoints.is_dir() else directory).free + leftovers
    if needed > free:
        raise ConfigError(
            f"run_dir={cfg.run_dir} has {readable(free)} of free disk, but checkpoints need {readable(needed)}: "
            f"{missing} of {readable(one)} with checkpoint.keep_last={keep.keep_last} and "
            f"keep_best={str(keep.keep_best).lower()}, counting the one being written; free some, keep fewer, or take "
            "another run_dir."
        )


def check_memory(cfg: TrainingRun, arch: Architecture, world_size: int) -> None:
    """Raise ConfigError when a phase of a step cannot fit a GPU (on CPUs: a process's share of the host's memory), or when
    what moves from GPUs to the host between phases exceeds the host's memory. On a login node neither can be known."""
    if on_login_node():
        return
    layout = layout_of(cfg, world_size, gpu=gpu_memory() is not None)
    limit = memory_limit(cfg)
    if layout.engine and layout.gpu:
        _check_engine_share(arch, layout, limit)
    models = _local_reward_models(cfg)
    worst = max(_phases(arch, layout, limit, models), key=lambda phase: phase.total)
    if worst.total > limit:
        raise ConfigError(_too_large(cfg, layout, worst, limit))
    scoring = sum(model.bytes for model in models)
    devices, each, host = cfg.trainer.devices, host_bytes(arch, layout) + scoring, host_memory()
    if layout.gpu and devices * each > host:
        raise ConfigError(
            "The weights of the sleeping vLLM, the offloaded optimizer, the reference and local reward models need "
            f"{readable(devices * each)} of each node's host memory, {readable(each)} for each of trainer.devices={devices} "
            f"processes{_of_it_for(scoring)}, but it has {readable(host)}; give the job more (sbatch --mem), or raise "
            f"trainer.num_nodes={cfg.trainer.num_nodes}."
        )


def describe_plan(cfg: TrainingRun, world_size: int) -> str:
    """Return the plan that a run prints before it loads anything: layout, memory by part, expected peak."""
    gpu = gpu_memory() is not None
    arch, layout, limit = Architecture.from_hf(cfg.model.path), layout_of(cfg, world_size, gpu=gpu), memory_limit(cfg)
    found = _phases(arch, layout, limit, _local_reward_models(cfg))
    compiled = not gpu and isinstance(cfg, FRPORun) and compiles_on_cpu(cfg, arch, world_size)
    plan = summary(layout, found, limit, "GPU" if gpu else "process on the CPU")
    return plan + ("\nvLLM compiles its model, which takes about half a minute" if compiled else "")


def layout_of(cfg: TrainingRun, world_size: int, *, gpu: bool) -> Layout:
    """Return what decides the memory of a run that is started in `world_size` processes."""
    model = cfg.model
    ranks = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    replicas, rest = divmod(world_size, ranks)
    if rest:
        raise ConfigError(
            f"model.tensor_model_parallel_size x pipeline_model_parallel_size x context_parallel_size = {ranks} does "
            f"not divide trainer.num_nodes x trainer.devices = {world_size}."
        )
    probe = cfg.data.max_prompt_tokens + cfg.probe.max_response_tokens if cfg.probe.interval else 0
    if isinstance(cfg, FRPORun):
        longest = cfg.data.max_prompt_tokens + cfg.rollout.max_response_tokens
        sequences = cfg.rollout.prompts_per_step * cfg.rollout.group_size // cfg.trainer.updates_per_rollout
        sampled, compared = max(longest, probe), _beta(cfg) > 0 or cfg.trainer.val_interval > 0
    else:
        longest, sequences = cfg.data.max_tokens, cfg.data.sequences_per_step
        sampled, compared = probe, False
    update_tokens = -(-sequences // replicas) * longest
    engine = None
    if sampled:
        rollout = cfg.rollout
        engine = Engine(
            tp=rollout.tensor_model_parallel_size,
            utilization=rollout.gpu_memory_utilization,
            max_num_seqs=rollout.max_num_seqs,
            longest=sampled,
            bucket_bytes=rollout.refit_bucket_mb << 20,
        )
    return Layout(
        tp=model.tensor_model_parallel_size,
        pp=model.pipeline_model_parallel_size,
        cp=model.context_parallel_size,
        dp=replicas,
        ep=model.expert_model_parallel_size,
        first=model.num_layers_in_first_pipeline_stage,
        last=model.num_layers_in_last_pipeline_stage,
        sequence_parallel=model.sequence_parallel,
        precision=model.precision,
        recompute=model.recompute,
        microbatch_tokens=min(cfg.trainer.microbatch_tokens, update_tokens),
        update_tokens=update_tokens,
        logprob_chunk_tokens=model.logprob_chunk_tokens,
        engine=engine,
        reference=not model.lora.rank and (bool(probe) or compared),
        reference_average=isinstance(cfg, FRPORun) and cfg.trainer.reference_mix < 1,
        lora_rank=model.lora.rank,
        lora_dropout=model.lora.dropout > 0,
        gpu=gpu,
        transformer_engine=_has_transformer_engine(model, gpu),
        fp8=model.fp8 is not None,
    )


def step_of(cfg: TrainingRun, means: Workload) -> tuple[Layout, Workload]:
    """Return layout and work of one step of a run on GPUs, to estimate its seconds. `means`: supplies prompt_tokens and
    response_tokens (of a completion, in supervised training), which no configuration states."""
    layout = layout_of(cfg, cfg.trainer.num_nodes * cfg.trainer.devices, gpu=True)
    if isinstance(cfg, FRPORun):
        batch = dict(prompts_per_step=cfg.rollout.prompts_per_step, group_size=cfg.rollout.group_size)
        longest, updates = cfg.rollout.max_response_tokens, cfg.trainer.updates_per_rollout
        passes = (_beta(cfg) > 0) + (updates > 1)
    else:
        layout = replace(layout, engine=None)  # only probes use it
        batch = dict(prompts_per_step=cfg.data.sequences_per_step, group_size=1)
        longest, updates, passes = cfg.data.max_tokens, 1, 0
    lengths = dict(
        prompt_tokens=min(means.prompt_tokens, cfg.data.max_prompt_tokens),
        response_tokens=min(means.response_tokens, longest),
        max_prompt_tokens=cfg.data.max_prompt_tokens,
        max_response_tokens=longest,
    )
    return layout, Workload(**batch, **lengths, updates_per_rollout=updates, logprob_passes=passes)


def memory_limit(cfg: TrainingRun) -> int:
    """Return the bytes of a GPU, or of a process's share of the host's memory."""
    return gpu_memory() or host_memory() // cfg.trainer.devices


def gpu_memory() -> int | None:
    """Return the bytes of this process's GPU; None without one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def on_login_node() -> bool:
    """Return whether slurm/lib.sh checks a configuration where it will not run, on a machine with other memory."""
    return os.environ.get("FRPO_LOGIN_NODE") == "1" and gpu_memory() is None


def host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes of this machine's memory, or the lowest limit that a control group of this process (a container, a
    Slurm job and its step, nested) sets on it."""
    total = int((proc / "meminfo").read_text().split()[1]) * 1024
    groups = [("", "/"), ("memory", "/")]  # (controllers, path); a container may not see its own path
    if (proc / "self/cgroup").is_file():
        lines = (proc / "self/cgroup").read_text().splitlines()
        groups += [(controllers, path) for _, controllers, path in (line.split(":", 2) for line in lines)]
    limits = [total]
    for controllers, path in groups:
        if controllers and "memory" not in controllers.split(","):
            continue
        # Version 1 of control groups has a tree for each controller, version 2 one for all.
        base, name = (cgroups / "memory", "memory.limit_in_bytes") if controllers else (cgroups, "memory.max")
        group = PurePosixPath(path).relative_to("/")
        files = [base / each / name for each in (group, *group.parents)]
        texts = [file.read_text().strip() for file in files if file.is_file()]
        limits += [int(text) for text in texts if text.isdigit()]  # else "max"
    return min(limits)


def _has_transformer_engine(model: ModelConfig, gpu: bool) -> bool:
    """Return whether its layers will be used: on this machine's GPU, or on one like those that docs/gpu.md names."""
    if not gpu:
        return False
    installed = stack.version("transformer-engine") is not None
    return stack.uses_transformer_engine(model.precision) if gpu_memory() else installed and model.precision == "bf16"


def _local_reward_models(cfg: TrainingRun) -> list[LocalWeights]:
    """Return the local reward models of a run, including its probe's."""
    return local_weights(getattr(cfg, "reward", {})) + (local_weights(cfg.probe.reward) if cfg.probe.interval else [])


def _of_it_for(scoring: int) -> str:
    """Return a clause on the host memory of reward models, which is the easiest to free."""
    return f" ({readable(scoring)} of it for reward models, which may have servers instead)" if scoring else ""


def _phases(arch: Architecture, layout: Layout, limit: int, models: list[LocalWeights]) -> list[PhaseMemory]:
    """Return the phases of a step with local reward models. On a CPU these take memory in every phase; on a GPU, while
    one of them scores."""
    found = phases(arch, layout, limit)
    if models and not layout.gpu:
        part = {"local reward models": sum(model.bytes for model in models)}
        return [replace(phase, parts=phase.parts | part) for phase in found]
    largest = max((model.bytes for model in models if model.on_gpu), default=0)
    if not largest:
        return found
    refit = next(phase for phase in found if phase.name == "refit")  # vLLM sleeps while a reward model scores
    kept = {n: size for n, size in refit.parts.items() if n not in ("vLLM weights", "refit buckets")}
    return [*found, PhaseMemory("reward", refit.stage, kept | {"a local reward model": largest})]


def _beta(cfg: FRPORun) -> float:
    from frpo_nemo.objective import build_objective

    return build_objective(cfg.objective).beta


def _check_engine_share(arch: Architecture, layout: Layout, limit: int) -> None:
    engine, one = layout.engine, layout.engine.longest * kv_bytes(arch, layout)
    allowed, room = int(limit * engine.utilization), cache_room(arch, layout, limit)
    if room < one:
        raise ConfigError(
            f"vLLM's weights and activations need {readable(allowed - room)} on each GPU, and keys and values of one "
            f"sequence {readable(one)}, more than the {readable(allowed)} of rollout.gpu_memory_utilization="
            f"{engine.utilization}; raise it, or rollout.tensor_model_parallel_size={engine.tp}."
        )


def _too_large(cfg: TrainingRun, layout: Layout, phase: PhaseMemory, limit: int) -> str:
    where = "each GPU, which has" if layout.gpu else "this host for each process, which has"
    if not layout.gpu and cfg.trainer.devices > 1:
        where = f"this host for each of trainer.devices={cfg.trainer.devices} processes, whose share is"
    changeable = {name: size for name, size in phase.parts.items() if name != "reserve"}
    largest = max(changeable, key=changeable.get)
    remedy = _REMEDIES.get(largest, _SPREAD).format(
        tokens=cfg.trainer.microbatch_tokens,
        chunk=layout.logprob_chunk_tokens,
        tp=layout.tp,
        pp=layout.pp,
        engine_tp=layout.engine and layout.engine.tp,
        utilization=layout.engine and layout.engine.utilization,
        bucket_mb=layout.engine and layout.engine.bucket_bytes >> 20,
    )
    parts = ", ".join(f"{name} {readable(size)}" for name, size in phase.parts.items())
    stage = f" (pipeline stage {phase.stage})" if layout.pp > 1 else ""
    return (
        f"The phase {phase.name}{stage} needs {readable(phase.total)} on {where} {readable(limit)}: {parts}; {remedy}."
    )
