"""Find the layouts of a model that fit a cluster, estimate their speed, and count why others do not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.planning.cluster import Cluster
from frpo_nemo.planning.memory import GIB, Engine, Layout, PhaseMemory, cache_room, host_bytes, kv_bytes, phases
from frpo_nemo.planning.timing import Workload, seconds

ALIKE = 1.03  # estimates can't distinguish steps that differ by less
MICROBATCH_TOKENS = (2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class Candidate:
    """A layout that fits: its phases' memory and seconds."""

    layout: Layout
    phases: list[PhaseMemory]
    seconds: dict[str, float]

    @property
    def peak(self) -> int:
        return max(phase.total for phase in self.phases)

    @property
    def step(self) -> float:
        return sum(self.seconds.values())


def find_layouts(
    arch: Architecture, cluster: Cluster, work: Workload, base: Layout, head_room: float
) -> tuple[list[Candidate], Counter[str]]:
    """Return (the layouts that fit, best first; the number rejected for each reason). Of those that are as good as the
    fastest, fewer pipeline stages come first, then less memory; the others follow by time. `base` has the settings that
    aren't searched: precision, reference, the engine's others. head_room: share of GPU memory that must stay free."""
    arch.check_sequence_length(work.longest)
    found, rejected = [], Counter[str]()
    for layout in enumerate_layouts(arch, cluster, work, base, rejected):
        fits = phases(arch, layout, cluster.gpu_memory)
        reason = _too_large(arch, cluster, layout, fits, head_room)
        if reason:
            rejected[reason] += 1
            continue
        cache = next(phase.parts["vLLM KV cache"] for phase in fits if phase.name == "generate")
        found.append(Candidate(layout, fits, seconds(arch, layout, cluster, work, cache)))
    found.sort(key=lambda candidate: (candidate.step, candidate.peak))
    alike = [candidate for candidate in found if candidate.step <= ALIKE * found[0].step]
    alike.sort(key=lambda candidate: (candidate.layout.pp, candidate.peak, candidate.step))
    return alike + found[len(alike) :], rejected


def enumerate_layouts(
    arch: Architecture, cluster: Cluster, work: Workload, base: Layout, rejected: Counter[str]
) -> Iterator[Layout]:
    """Return every layout that divides model, GPUs and batch. TP and vLLM's TP stay inside a node: their collectives wait
    for the slowest link in every layer."""
    world = cluster.world_size
    sizes = [size for size in range(1, cluster.gpus_per_node + 1) if cluster.gpus_per_node % size == 0]
    splits = [(tp, pp) for tp in sizes for pp in range(1, arch.num_layers + 1) if world % (tp * pp) == 0]
    for tp, pp in splits:
        dp = world // (tp * pp)
        reason = _indivisible(arch, tp, pp) or _too_few(work, dp)
        if reason:
            rejected[reason] += 1
            continue
        for engine_tp in sizes:
            if reason := _indivisible(arch, engine_tp, 1):
                rejected[f"vLLM: {reason}"] += 1
                continue
            if world // engine_tp > work.prompts_per_step:
                rejected[f"vLLM TP={engine_tp}: more engines than the {work.prompts_per_step} prompts"] += 1
                continue
            engine = replace(base.engine, tp=engine_tp, longest=work.longest)
            for ep in _expert_parallel(arch, world // pp):
                layout = replace(base, tp=tp, pp=pp, dp=dp, ep=ep, engine=engine, sequence_parallel=tp > 1)
                yield from _choices(layout, work)


def _expert_parallel(arch: Architecture, ranks: int) -> list[int]:
    """Return the sizes that divide the experts and the ranks of a stage: 1 for a dense model."""
    number = arch.experts.number if arch.experts else 1
    return [size for size in range(1, number + 1) if number % size == 0 and ranks % size == 0]


def _choices(layout: Layout, work: Workload) -> Iterator[Layout]:
    """Yield microbatch sizes and recomputation. No size is below the longest sequence or above a replica's share."""
    share = -(-work.sequences // work.updates_per_rollout // layout.dp) * work.longest
    tokens = [size for size in MICROBATCH_TOKENS if work.longest <= size <= share] or [work.longest]
    for size in tokens:
        for recompute in ("none", "full"):
            yield replace(layout, microbatch_tokens=size, update_tokens=share, recompute=recompute)


def _indivisible(arch: Architecture, tp: int, pp: int) -> str | None:
    try:
        arch.check_parallel(tp, pp)
    except ConfigError:
        if arch.num_layers % pp:
            return f"PP={pp} does not divide the {arch.num_layers} layers"
        return f"TP={tp} does not divide heads, key-value heads or feed-forward size"
    return None


def _too_few(work: Workload, dp: int) -> str | None:
    sequences = work.prompts_per_step // work.updates_per_rollout * work.group_size
    return f"DP={dp} replicas for {sequences} sequences of an update" if sequences < dp else None


def _too_large(arch: Architecture, cluster: Cluster, layout: Layout, fits: list[PhaseMemory], head_room: float) -> str | None:
    if cache_room(arch, layout, cluster.gpu_memory) < layout.engine.longest * kv_bytes(arch, layout):
        return f"vLLM TP={layout.engine.tp}: weights leave no room for the KV cache in gpu_memory_utilization"
    allowed = cluster.gpu_memory * (1 - head_room)
    worst = max(fits, key=lambda phase: phase.total)
    if worst.total > allowed:
        part = max(worst.parts, key=worst.parts.get)
        return f"memory of {worst.name}, most of it {part}"
    if cluster.gpus_per_node * host_bytes(arch, layout) > cluster.host_memory_gib * GIB:
        return "host memory"
    return None


def overrides(layout: Layout, cluster: Cluster, work: Workload) -> str:
    """Return the options of recipes/frpo.py that choose `layout`, and those for which it was chosen."""
    values = {
        "trainer.num_nodes": cluster.num_nodes,
        "trainer.devices": cluster.gpus_per_node,
        "model.tensor_model_parallel_size": layout.tp,
        "model.pipeline_model_parallel_size": layout.pp,
        **({"model.expert_model_parallel_size": layout.ep} if layout.ep > 1 else {}),
        "model.sequence_parallel": str(layout.sequence_parallel).lower(),
        "model.recompute": layout.recompute,
        "trainer.microbatch_tokens": layout.microbatch_tokens,
        "rollout.tensor_model_parallel_size": layout.engine.tp,
        "model.precision": layout.precision,
        "model.lora.rank": layout.lora_rank,
        "data.max_prompt_tokens": work.max_prompt_tokens,
        "rollout.max_response_tokens": work.max_response_tokens,
        "rollout.prompts_per_step": work.prompts_per_step,
        "rollout.group_size": work.group_size,
        "rollout.gpu_memory_utilization": layout.engine.utilization,
        "rollout.max_num_seqs": layout.engine.max_num_seqs,
        "trainer.updates_per_rollout": work.updates_per_rollout,
    }
    return " ".join(f"{key}={value}" for key, value in values.items())


def default_base(precision: str, reference: bool, utilization: float, max_num_seqs: int, lora_rank: int) -> Layout:
    """Return the settings that find_layouts does not search, on GPUs with Transformer Engine. reference: there is one,
    which without adapters is a copy."""
    return Layout(
        precision=precision,
        reference=reference and not lora_rank,
        lora_rank=lora_rank,
        engine=Engine(utilization=utilization, max_num_seqs=max_num_seqs),
    )
