"""recipes/plan.py without its command line: the options, the search from a model and a cluster to a printed plan, and the
hours of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING
from rich.console import Console

from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.planning.cluster import Cluster
from frpo_nemo.planning.layouts import default_base, find_layouts
from frpo_nemo.planning.memory import Layout, parameters, phases, readable
from frpo_nemo.planning.report import print_choice, print_layouts, print_rejected
from frpo_nemo.planning.timing import Workload, seconds


@dataclass
class PlanModel:
    path: str = field(default=MISSING, metadata={"example": "Qwen/Qwen2.5-7B-Instruct"})
    precision: str = "bf16"
    lora_rank: int = 0


@dataclass
class PlanRun:
    """recipes/plan.py"""

    model: PlanModel = field(default_factory=PlanModel)
    cluster: Cluster = field(default_factory=Cluster)
    workload: Workload = field(default_factory=Workload)
    gpu_memory_utilization: float = 0.6
    max_num_seqs: int = 256
    head_room: float = 0.1
    show: int = 8


def plan(cfg: PlanRun, console: Console) -> None:
    """Print the layouts of cfg's model on cfg's cluster. Raises ConfigError when none fits."""
    _check(cfg)
    arch = Architecture.from_hf(cfg.model.path)
    base = default_base(
        cfg.model.precision,
        cfg.workload.logprob_passes > 0,
        cfg.gpu_memory_utilization,
        cfg.max_num_seqs,
        cfg.model.lora_rank,
    )
    found, rejected = find_layouts(arch, cfg.cluster, cfg.workload, base, cfg.head_room)
    size, cluster, work = parameters(arch) / 1e9, cfg.cluster, cfg.workload
    trained = f", adapters of rank {cfg.model.lora_rank}" if cfg.model.lora_rank else ""
    console.print(
        f"{arch.family}, {size:.1f}B parameters, {cfg.model.precision}{trained}, on {cluster.num_nodes} x "
        f"{cluster.gpus_per_node} {cluster.gpu}; {work.sequences} responses of {work.response_tokens} tokens a step",
        highlight=False,
    )
    if not found:
        reasons = "; ".join(f"{count} by {reason}" for reason, count in rejected.most_common(4))
        raise ConfigError(
            f"No layout fits {cluster.num_nodes} x {cluster.gpus_per_node} {cluster.gpu} (model.path={cfg.model.path}); "
            f"{sum(rejected.values())} were tried and fail: {reasons}. Take more nodes (cluster.num_nodes), shorter "
            "sequences (workload.max_response_tokens) or another gpu_memory_utilization."
        )
    print_layouts(console, found, cfg.show)
    print_choice(console, found[0], cluster, work)
    print_rejected(console, rejected)


def print_hours(cfg: PlanRun, layout: Layout, work: Workload, steps: int) -> None:
    """Print the estimated time of `steps` steps of cfg's model on cfg's cluster, whose GPUs `layout` takes all."""
    _check(cfg)
    arch, cluster = Architecture.from_hf(cfg.model.path), cfg.cluster
    parts = phases(arch, layout, cluster.gpu_memory)
    cache = next((phase.parts["vLLM KV cache"] for phase in parts if phase.name == "generate"), None)
    spent = seconds(arch, layout, cluster, work, cache)
    step, peak = sum(spent.values()), max(phase.total for phase in parts)
    hours = steps * step / 3600
    print(
        f"{layout} on {cluster.num_nodes} x {cluster.gpus_per_node} {cluster.gpu}, {readable(peak)} of "
        f"{readable(cluster.gpu_memory)}; {work.sequences} sequences a step, of {work.prompt_tokens} + "
        f"{work.response_tokens} tokens on average\n"
        f"step: {step:.1f} s ({', '.join(f'{name} {value:.1f}' for name, value in spent.items())})\n"
        f"{steps} steps: {_rounded(hours)} hours, {_rounded(hours * cluster.world_size)} GPU hours, without rewards, "
        "validations, probes, loading and checkpoints"
    )


def _rounded(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def _check(cfg: PlanRun) -> None:
    if cfg.model.precision not in ("bf16", "fp32"):
        raise ConfigError(f"model.precision={cfg.model.precision} must be bf16 or fp32.")
    if cfg.model.lora_rank < 0:
        raise ConfigError(f"model.lora_rank={cfg.model.lora_rank} must be at least 0.")
    for group in ("cluster", "workload"):
        for name, value in vars(getattr(cfg, group)).items():
            if name not in ("gpu", "logprob_passes") and value <= 0:
                raise ConfigError(f"{group}.{name}={value} must be above 0.")
    work = cfg.workload
    if work.prompts_per_step % work.updates_per_rollout:
        raise ConfigError(
            f"workload.updates_per_rollout={work.updates_per_rollout} must divide workload.prompts_per_step="
            f"{work.prompts_per_step}."
        )
    if not 0 <= cfg.head_room < 1:
        raise ConfigError(f"head_room={cfg.head_room} must be at least 0 and below 1.")
    if not 0 < cfg.gpu_memory_utilization <= 1:
        raise ConfigError(f"gpu_memory_utilization={cfg.gpu_memory_utilization} must be above 0 and at most 1.")
