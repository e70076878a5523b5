"""Run recipes/plan.py without its command line: its options, the search from a model and a cluster to a printed plan, and
the hours of a run."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from frpo_nemo.config.option import option
from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.planning.cluster import Cluster
from frpo_nemo.planning.layouts import default_base, find_layouts
from frpo_nemo.planning.memory import Layout, parameters, phases, readable
from frpo_nemo.planning.report import print_choice, print_layouts, print_rejected
from frpo_nemo.planning.timing import Workload, seconds


@dataclass
class PlanModel:
    path: str = option(
        "Directory with config.json, or hub name; from the hub, only config.json is downloaded.",
        example="Qwen/Qwen2.5-7B-Instruct",
    )
    precision: str = option("Precision of training.", "bf16", choices=("bf16", "fp32"))
    lora_rank: int = option("Rank of the adapters, if they are trained instead of the weights; 0: none.", 0, at_least=0)


@dataclass
class PlanRun:
    """recipes/plan.py"""

    model: PlanModel = option("The policy.", PlanModel)
    cluster: Cluster = option(
        "Machines, as in configs/cluster/; bandwidths are in GB/s (10^9 bytes) per GPU and direction.", Cluster
    )
    workload: Workload = option("One step.", Workload)
    gpu_memory_utilization: float = option(
        "Share of GPU memory that vLLM may use while it generates.", 0.6, above=0, at_most=1
    )
    max_num_seqs: int = option("Most sequences that one engine decodes together.", 256, at_least=1)
    head_room: float = option("Share of GPU memory that must stay free.", 0.1, at_least=0, below=1)
    show: int = option("Rows of the table.", 8, at_least=0)


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
        f"{cluster.gpus_per_node} {cluster.gpu}; {work.sequences} responses of {work.response_tokens} tokens per step",
        highlight=False,
    )
    if not found:
        reasons = "; ".join(f"{count} by {reason}" for reason, count in rejected.most_common(4))
        raise ConfigError(
            f"No layout fits {cluster.num_nodes} x {cluster.gpus_per_node} {cluster.gpu} (model.path={cfg.model.path}); "
            f"{sum(rejected.values())} were tried and rejected: {reasons}. Take more nodes (cluster.num_nodes), shorter "
            "sequences (workload.max_response_tokens) or another gpu_memory_utilization."
        )
    print_layouts(console, found, cfg.show)
    print_choice(console, found[0], cluster, work)
    print_rejected(console, rejected)


def print_hours(cfg: PlanRun, layout: Layout, work: Workload, steps: int) -> None:
    """Print the estimated time of `steps` steps of cfg's model on cfg's cluster. `layout` uses all of its GPUs."""
    _check(cfg)
    arch, cluster = Architecture.from_hf(cfg.model.path), cfg.cluster
    parts = phases(arch, layout, cluster.gpu_memory)
    cache = next((phase.parts["vLLM KV cache"] for phase in parts if phase.name == "generate"), None)
    spent = seconds(arch, layout, cluster, work, cache)
    step, peak = sum(spent.values()), max(phase.total for phase in parts)
    hours = steps * step / 3600
    print(
        f"{layout} on {cluster.num_nodes} x {cluster.gpus_per_node} {cluster.gpu}, {readable(peak)} of "
        f"{readable(cluster.gpu_memory)}; {work.sequences} sequences per step, of {work.prompt_tokens} + "
        f"{work.response_tokens} tokens on average\n"
        f"step: {step:.1f} s ({', '.join(f'{name} {value:.1f}' for name, value in spent.items())})\n"
        f"{steps} steps: {_rounded(hours)} hours, {_rounded(hours * cluster.world_size)} GPU hours, without rewards, "
        "validations, probes, loading and checkpoints"
    )


def _rounded(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def _check(cfg: PlanRun) -> None:
    work = cfg.workload
    if work.prompts_per_step % work.updates_per_rollout:
        raise ConfigError(
            f"workload.updates_per_rollout={work.updates_per_rollout} must divide workload.prompts_per_step="
            f"{work.prompts_per_step}."
        )
