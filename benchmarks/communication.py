"""Communication of a training step, counted on real process groups and compared with the formulas.

    torchrun --nproc_per_node 8 -m benchmarks.communication        # also with 2 and 4

The model is tiny and nothing samples: what is counted are the actor's passes and updates, the gather of rollouts, the
stream of a refit and a checkpoint, as the training loop calls them. collectives.py counts; communication_at_scale.py
extends the formulas to hundreds of GPUs.
"""

from __future__ import annotations

import pickle
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.collectives import CollectiveCounter, backend_calls
from benchmarks.tiny_model import make_model
from frpo_nemo.config.options import LoRAConfig, ModelConfig, OptimizerConfig
from frpo_nemo.data.prompts import Prompt
from frpo_nemo.megatron import packing
from frpo_nemo.megatron.actor import PolicyActor
from frpo_nemo.megatron.checkpoint import save_load
from frpo_nemo.megatron.cpu import BF16_ROWS
from frpo_nemo.megatron.groups import start_model_parallel, stop_model_parallel
from frpo_nemo.objective import build_objective
from frpo_nemo.planning import communication as formulas
from frpo_nemo.planning.communication import Model, Pack, Parallel, Transfer
from frpo_nemo.planning.memory import WEIGHT_BYTES
from frpo_nemo.processes import world
from frpo_nemo.rewards.reward_set import Reward, RewardSet, Scores
from frpo_nemo.rollout.engine import Completion
from frpo_nemo.rollout.refit_check import raise_on_all_ranks
from frpo_nemo.rollout.worker import RolloutWorker, ScoredPrompts
from frpo_nemo.training.loss import PolicyLoss
from frpo_nemo.training.run import ignore_warnings_of_libraries

GROUPS, GROUP_SIZE = 6, 4
MICROBATCH_TOKENS, CHUNK_TOKENS, BUCKET_BYTES = 70, 16, 1 << 17
LAYOUTS = {  # by number of ranks
    2: {"DP2": {}, "TP2": dict(tp=2), "TP2 SP": dict(tp=2, sp=True), "PP2": dict(pp=2)},
    4: {
        "TP2 SP, PP2": dict(tp=2, pp=2, sp=True),
        "TP2 SP, PP2, bf16": dict(tp=2, pp=2, sp=True, precision="bf16"),
        "TP2 SP, DP2": dict(tp=2, sp=True),
        "PP2, DP2": dict(pp=2),
    },
    8: {"TP2 SP, PP2, DP2": dict(tp=2, pp=2, sp=True), "DP8": {}},
}
OBJECTIVE = {"name": "frpo", "lambda_": 0.5, "beta": 0.1}
TRAINED = (["clipped", "kl", "loss"], ["ratio", "masked", "entropy", "likeliest", "logprobs"])
MEASURED = (["loss"], ["entropy", "likeliest", "logprobs"])
COMPARED = (["loss"], ["entropy", "likeliest", "kl", "logprobs"])


@dataclass
class Phase:
    """One phase on one rank: calls, payload and received bytes, counted and by formula, and what of it is not equal."""

    calls: int
    payload: int
    formula_calls: int
    formula_payload: int
    received: float
    differences: list[str]


def model_config(
    path: str,
    *,
    tp: int = 1,
    pp: int = 1,
    sp: bool = False,
    recompute: str = "none",
    precision: str = "fp32",
    lora_rank: int = 0,
) -> ModelConfig:
    """Stream with small chunks, so that there are several."""
    return ModelConfig(
        path=path,
        precision=precision,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=sp,
        recompute=recompute,
        logprob_chunk_tokens=CHUNK_TOKENS,
        lora=LoRAConfig(rank=lora_rank),
    )


def compare(config: ModelConfig, directory: str) -> dict[str, Phase]:
    """Count a step's phases and compare them with the formulas. Collective; Megatron's groups exist. `directory`: the same
    on all ranks, for a checkpoint."""
    actor = PolicyActor(config, OptimizerConfig(lr=0.1), microbatch_tokens=MICROBATCH_TOKENS)
    actor.freeze_reference()
    before = backend_calls()
    with CollectiveCounter() as counter:
        batch, gathered = _step(counter, actor, directory)
    told = backend_calls() - before
    counted = sum(counter.calls.values())
    assert told == counted, f"the backends were called {told} times, of which {counted} were counted"
    model, largest = _model(actor), max(world.gather_objects(gathered))
    expected = _formulas(model, dist.get_rank(), batch, largest)
    return {phase: _phase(phase, counter, model.parallel, transfers) for phase, transfers in expected.items()}


def _step(counter: CollectiveCounter, actor: PolicyActor, directory: str):
    """What the loop of training/frpo.py calls, without vLLM. Returns the batch, and the bytes of this rank's pickle in the
    gather of rollouts."""
    with counter.of("generate"):
        world.wait_for_all()
    examples, mine, completions = _share()
    spy = mock.patch.object(world, "gather_objects", wraps=world.gather_objects)
    with counter.of("gather"), spy as gather:
        rollouts = _gather(examples, mine, completions)
    batch, objective = rollouts.batch, build_objective(OBJECTIVE)
    with counter.of("logprobs"):
        batch.token_columns["reference_logprobs"] = actor.get_init_policy_logprobs(batch)
    batch.columns["advantage"] = objective.effective_advantages(rollouts.rewards, rollouts.groups)
    batch.columns["coefficient"] = objective.coefficients(rollouts.rewards, rollouts.groups)
    with counter.of("train"):
        actor.train_step(batch, PolicyLoss(objective, batch.num_sequences), update=0, total_updates=1)
    with counter.of("refit"):
        for _ in actor.stream_hf_weights(bucket_bytes=BUCKET_BYTES):
            pass
        raise_on_all_ranks(None)
    with counter.of("validate"):
        actor.compare_with_reference(batch)
    with counter.of("checkpoint"):
        save_load.save(directory, actor, {}, step=1, seed=1)
    return batch, len(pickle.dumps(gather.call_args.args[0]))


def _share():
    """Prompts, and this rank's part of ragged responses to them."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(2, 30, (GROUPS, GROUP_SIZE), generator=generator).tolist()
    examples = [Prompt([3] * (2 + index % 5), [], None, {}) for index in range(GROUPS)]
    mine = list(range(dist.get_rank(), GROUPS, dist.get_world_size()))
    return examples, mine, [[Completion([5] * size, [-1.0] * size, False) for size in sizes[i]] for i in mine]


def _gather(examples, mine, completions):
    """Do what RolloutWorker does, without its engine."""
    worker = RolloutWorker.__new__(RolloutWorker)
    worker._reported = set()
    rewards = torch.tensor([float(c % 2) for group in completions for c in range(len(group))], dtype=torch.float64)
    scored = ScoredPrompts(examples, RewardSet([Reward("odd", 1.0, None, None)], []), [None])
    return worker._gather(examples, GROUP_SIZE, mine, completions, Scores(rewards, {"odd": rewards}), scored)


def _model(actor: PolicyActor) -> Model:
    config = actor.config
    inner = config.tensor_model_parallel_size * config.pipeline_model_parallel_size
    parallel = Parallel(
        tp=config.tensor_model_parallel_size,
        pp=config.pipeline_model_parallel_size,
        dp=dist.get_world_size() // inner,
        sequence_parallel=config.sequence_parallel,
    )
    element = WEIGHT_BYTES[config.precision]
    recompute, rank = config.recompute == "full", config.lora.rank
    return Model(actor.arch, parallel, element, config.logprob_chunk_tokens, recompute, rank)


def _formulas(model: Model, rank: int, batch, largest: int) -> dict[str, list[Transfer]]:
    parallel, stage = model.parallel, model.parallel.stage(rank)
    packs = packs_of(batch, parallel, parallel.replica(rank), MICROBATCH_TOKENS, BF16_ROWS if model.element == 2 else 1)
    sequences, responses = batch.num_sequences, int(batch.response_lengths.sum())

    reference = replace(model, lora_rank=0)  # adapters are switched off

    def one_pass(policy: Model, names: tuple[list[str], list[str]], backward: bool = False) -> list[Transfer]:
        results = [
            transfer
            for columns, length in zip(names, (sequences, responses), strict=True)
            for transfer in formulas.columns(parallel, stage, columns, length)
        ]
        return formulas.model_pass(policy, stage, packs, backward=backward) + results

    distance = formulas.distribution_distance(model, stage, packs)
    update = formulas.gradient_sync(model, stage) + formulas.optimizer_step(model, stage)

    return {
        "generate": [Transfer("slowest engine", "barrier", "world", 0)],
        "gather": formulas.object_gather("rollouts", parallel.world, largest),
        "logprobs": one_pass(reference, MEASURED),
        "train": one_pass(model, TRAINED, True) + update,
        "refit": formulas.refit(model, rank, BUCKET_BYTES),
        "validate": one_pass(reference, MEASURED) + one_pass(model, COMPARED) + distance,
        "checkpoint": formulas.optimizer_collection(model, stage) + formulas.checkpoint_agreements(parallel, rank),
    }


def packs_of(batch, parallel: Parallel, replica: int, microbatch_tokens: int, rows: int) -> list[Pack]:
    """Return the packed microbatches of a replica, as PolicyActor makes them. rows: see BF16_ROWS."""
    lengths, responses = batch.lengths.tolist(), batch.response_lengths.tolist()
    mine = packing.split_over_replicas(lengths, parallel.dp)[replica]
    packs = packing.split_into_microbatches([lengths[i] for i in mine], microbatch_tokens)
    multiple = rows * (parallel.tp if parallel.sequence_parallel else 1)
    return [
        Pack(
            -(-sum(lengths[mine[i]] for i in pack) // multiple) * multiple,
            -(-sum(responses[mine[i]] for i in pack) // rows) * rows,
        )
        for pack in packs
    ]


def _phase(phase: str, counter: CollectiveCounter, parallel: Parallel, transfers: list[Transfer]) -> Phase:
    """Compare count and formula for every kind of call in every set of ranks."""
    rank = dist.get_rank()
    calls, payload, unknown, received = Counter(), Counter(), set(), 0.0
    for transfer in transfers:
        ranks = parallel.ranks(rank, transfer.group)
        key = (transfer.kind, ranks, transfer.root)
        calls[key] += transfer.calls
        payload[key] += transfer.payload
        received += transfer.received(len(ranks))
        if transfer.payload == 0 and transfer.kind != "barrier":
            unknown.add(key)  # pickles of a checkpoint
    counted_calls = {key[1:]: n for key, n in counter.calls.items() if key[0] == phase}
    counted_bytes = {key[1:]: n for key, n in counter.bytes.items() if key[0] == phase and key[1:] not in unknown}
    differences = [
        f"rank {rank}, {phase}, {key[0]} in {key[1]}: {what} {counted.get(key, 0)}, by formula {expected.get(key, 0)}"
        for what, counted, expected in (("calls", counted_calls, calls), ("bytes", counted_bytes, payload))
        for key in counted.keys() | expected.keys()
        if counted.get(key, 0) != expected.get(key, 0)
    ]
    totals = [sum(numbers.values()) for numbers in (counted_calls, counted_bytes, calls, payload)]
    return Phase(totals[0], totals[1], totals[2], totals[3], received, differences)


def main() -> None:
    ignore_warnings_of_libraries()
    torch.set_num_threads(1)
    rank, world_size = world.start_world()
    box = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(box, src=0)
    directory = Path(box[0])
    if rank == 0:
        make_model().save_pretrained(directory / "model")
    dist.barrier()
    wrong = 0
    for name, layout in LAYOUTS[world_size].items():
        config = model_config(str(directory / "model"), **layout)
        start_model_parallel(config, seed=1)
        phases = world.gather_objects(compare(config, str(directory / name.replace(" ", ""))))
        stop_model_parallel()
        if rank == 0:
            Console(width=100).print(_table(name, phases))
        wrong += sum(len(phase.differences) for each in phases for phase in each.values())
    dist.destroy_process_group()
    if wrong:
        raise SystemExit(f"{wrong} counts are not what the formulas say")


def _table(name: str, ranks: list[dict[str, Phase]]) -> Table:
    """Return sums over all ranks."""
    table = Table(title=f"{name}: all ranks together, counted = formula")
    for column in ("phase", "calls counted", "formula", "payload bytes counted", "formula"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase in ranks[0]:
        totals = [
            sum(getattr(each[phase], field) for each in ranks)
            for field in ("calls", "formula_calls", "payload", "formula_payload")
        ]
        table.add_row(phase, *(f"{total:,}" for total in totals))
    return table


if __name__ == "__main__":
    main()
