"""Bytes that reach a rank in a training step on 64 to 512 GPUs, and the seconds that they need, by formula alone.

    python -m benchmarks.communication_at_scale

The formulas are those that communication.py compares with counts, the links those of configs/cluster/h100.yaml, and the
seconds are added up as in frpo_nemo/planning/timing.py. Nothing here was measured on GPUs.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.planning import communication as formulas
from frpo_nemo.planning.cluster import CLUSTERS, Cluster
from frpo_nemo.planning.communication import Model, Pack, Parallel, Transfer
from frpo_nemo.planning.timing import transfer_seconds

CLUSTER = Cluster(**OmegaConf.to_container(OmegaConf.load(CLUSTERS / "h100.yaml")))
# Bytes/s per rank for CPU tensors (gloo), which cluster files don't have: 100 Gb/s of Ethernet for a node's ranks.
HOST = 12.5e9 / CLUSTER.gpus_per_node
ROLLOUT_TOKEN_BYTES = 8  # of a response in the gather of rollouts: an id and a log-prob
PROMPTS, SAMPLES, PROMPT_TOKENS, RESPONSE_TOKENS = 128, 16, 256, 1024
MICROBATCH_TOKENS, REFIT_BUCKET = 8192, 512 << 20

# The shapes of their public config.json.
LLAMA = dict(model_type="llama", vocab_size=128256, num_key_value_heads=8, max_position_embeddings=131072)
MODELS = {
    "Llama-3.1-70B, TP8 PP4": (
        dict(LLAMA, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
        Parallel(tp=8, pp=4, sequence_parallel=True),
    ),
    "Llama-3.1-8B, TP4": (
        dict(LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
        Parallel(tp=4, sequence_parallel=True),
    ),
}


@dataclass
class Cost:
    """The cost of one phase on one rank. gpu, host: bytes received by GPU and by CPU tensors."""

    calls: int
    gpu: float
    host: float
    seconds: float


def step(model: Model, rank: int) -> dict[str, list[Transfer]]:
    """Return a step of FRPO with one update and a reference."""
    parallel, stage = model.parallel, model.parallel.stage(rank)
    sequence, sequences = PROMPT_TOKENS + RESPONSE_TOKENS, PROMPTS * SAMPLES
    per_pack = MICROBATCH_TOKENS // sequence
    packs = [Pack(-(-per_pack * sequence // parallel.tp) * parallel.tp, per_pack * RESPONSE_TOKENS)]
    packs *= math.ceil(sequences / parallel.dp / per_pack)
    responses = sequences * RESPONSE_TOKENS

    def one_pass(names: int, backward: bool) -> list[Transfer]:
        results = formulas.columns(parallel, stage, ["x"] * names, responses)
        return formulas.model_pass(model, stage, packs, backward=backward) + results

    share = math.ceil(responses / parallel.world * ROLLOUT_TOKEN_BYTES)
    learning = one_pass(4, True)
    return {
        "gather of rollouts": formulas.object_gather("rollouts", parallel.world, share),
        "reference log-probs": one_pass(3, False),
        "forward, backward": [t for t in learning if t.kind not in ("send", "recv")],
        "between stages": [t for t in learning if t.kind in ("send", "recv")],
        "gradients": formulas.gradient_sync(model, stage),
        "norm, weights": formulas.optimizer_step(model, stage),
        "refit": formulas.refit(model, rank, REFIT_BUCKET),
        "checkpoint (when due)": formulas.optimizer_collection(model, stage),
    }


def cost(parallel: Parallel, rank: int, transfers: list[Transfer]) -> Cost:
    """Return sums over the transfers."""
    on_host = [transfer for transfer in transfers if transfer.part in ("rollouts", "agreement")]
    on_gpu = [transfer for transfer in transfers if transfer not in on_host]
    gpu, host = (
        sum(transfer.received(len(parallel.ranks(rank, transfer.group))) for transfer in part)
        for part in (on_gpu, on_host)
    )
    seconds = transfer_seconds(parallel, CLUSTER, rank, on_gpu) + host / HOST
    return Cost(sum(transfer.calls for transfer in transfers), gpu, host, seconds)


def slowest_ranks(model: Model) -> dict[str, Cost]:
    """Phase -> its cost on the rank that needs longest: one of the first two of a stage, which differ in refits alone."""
    parallel = model.parallel
    stage_ranks = parallel.world // parallel.pp
    ranks = [stage * stage_ranks + place for stage in range(parallel.pp) for place in (0, 1)]
    steps = {rank: step(model, rank) for rank in ranks}
    return {
        phase: max((cost(parallel, r, steps[r][phase]) for r in ranks), key=lambda c: c.seconds) for phase in steps[0]
    }


def architecture(config: dict) -> Architecture:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config))
        return Architecture.from_hf(directory)


def main() -> None:
    console = Console(width=150)
    for name, (config, base) in MODELS.items():
        arch = architecture(config)
        worlds = (64, 128, 256, 512)
        models = {w: Model(arch, replace(base, dp=w // (base.tp * base.pp)), element=2) for w in worlds}
        table = Table(title=f"{name}, bf16: GB to GPU + host of a rank, and seconds, on the rank that needs longest")
        table.add_column("phase")
        for world in worlds:
            table.add_column(f"{world} GPUs, DP{models[world].parallel.dp}", justify="right")
        costs = [slowest_ranks(models[world]) for world in worlds]
        for phase in costs[0]:
            row = (each[phase] for each in costs)
            table.add_row(phase, *(f"{c.gpu / 1e9:,.2f} + {c.host / 1e9:.2f} GB {c.seconds:6.2f} s" for c in row))
        console.print(table)
        calls = [sum(c.calls for phase, c in each.items() if "due" not in phase) for each in costs]
        console.print(f"calls a step: {', '.join(f'{c:,}' for c in calls)}")


if __name__ == "__main__":
    main()
