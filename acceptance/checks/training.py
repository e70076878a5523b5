"""The actor from step to step: how its memory is freed and used again, and what a checkpoint, adapters and objectives do."""

from __future__ import annotations

import itertools
import time

import psutil
import torch
from torch import Tensor

from acceptance import batches, models, policy, reference
from acceptance.checks import parity
from acceptance.context import Context
from frpo_nemo.config.options import LoRAConfig
from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.megatron.actor import PolicyActor
from frpo_nemo.megatron.checkpoint import save_load
from frpo_nemo.objective import build_objective
from frpo_nemo.training.loss import CompletionLoss

CYCLE = 10  # batches after which memory must be what it was


def offload(context: Context) -> dict:
    """Move the optimizer out and back between two steps. freed_share: GPU memory freed, over the size of fp32 weights and
    moments; the gradients come on top. loss_drop: by the first step."""
    actor = parity.actor(context)
    losses = [step(actor, parity.batch(context))]
    before, held = _copies(policy.optimizer_tensors(actor)), _memory(context)
    actor.finish_training()
    freed = held - _memory(context)
    actor.prepare_for_training()
    changed = _changed(before, policy.optimizer_tensors(actor))
    losses.append(step(actor, parity.batch(context)))
    size = sum(tensor.nbytes for tensor in before)
    return {"changed_tensors": changed, "freed_share": freed / size, "loss_drop": losses[0] - losses[1]}


def memory_flat(context: Context) -> dict:
    """Train repeatedly on the same cycle of batches. Growth: from the first cycle to the last, in MiB."""
    vocabulary, cycles = context.on(cuda=(32003, 5), cpu=(131, 3))
    longest = context.on(cuda=600, cpu=40)
    cycle = [batches.ragged(seed, groups=4, longest=longest, vocabulary=vocabulary) for seed in range(CYCLE)]
    actor, after = parity.actor(context), []
    for _ in range(cycles):
        if context.cuda:
            torch.cuda.reset_peak_memory_stats()
        for batch in cycle:
            step(actor, batch)
        peak = (torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()) if context.cuda else (0, 0)
        after.append((_memory(context), *peak))
    held, peak, reserved = ((last - first) / 2**20 for first, last in zip(after[0], after[-1], strict=True))
    return {
        "steps": cycles * CYCLE,
        "held_growth_mib": held,
        "peak_growth_mib": peak,
        "reserved_growth_mib": reserved,
        "peak_gib": after[-1][1] / 2**30,
    }


def resume(context: Context) -> dict:
    """Take a third step after a save, and again after a load. Differences are of the fp32 weights, as a share of what the
    step changes. noise: between two third steps from the same checkpoint, by kernels that add in any order. excess: what
    twice the noise does not explain."""
    actor, batch = parity.actor(context), parity.batch(context)
    for _ in range(2):
        step(actor, batch)
    saved = save_load.save(context.work / "resume", actor, {}, step=2, seed=1)
    before = policy.main_weights(actor)
    uninterrupted = _after_a_step(actor, batch)
    del actor
    actor = parity.actor(context)
    resumed = []
    for _ in range(2):
        save_load.load(saved, actor)
        resumed.append(_after_a_step(actor, batch))
    change = parity.mean_error(uninterrupted, before)
    difference, noise = (parity.mean_error(resumed[0], other) / change for other in (uninterrupted, resumed[1]))
    return {"difference": difference, "noise": noise, "excess": max(difference - 2 * noise, 0.0), "change": change}


def lora(context: Context) -> dict:
    """Train adapters for four steps. initial_gap: log-probs with untrained adapters against the base's. merged_gap: with
    trained ones against transformers with the weights that an export merges. base_changed: frozen parameters with other
    values."""
    batch = parity.batch(context)
    base = parity.actor(context).get_inference_log_probs(batch)
    actor = parity.actor(context, lr=1e-3, lora=LoRAConfig(rank=8, alpha=16))
    initial = actor.get_inference_log_probs(batch)
    frozen = [p for p in actor.gpt.parameters() if not p.requires_grad]
    before = _copies(frozen)
    losses = [step(actor, batch) for _ in range(4)]
    trained = actor.get_inference_log_probs(batch)
    merged = reference.load(models.small(context), torch.bfloat16)
    merged.load_state_dict(dict(actor.stream_hf_weights()))
    return {
        "initial_gap": parity.mean_error(initial, base),
        "base_changed": _changed(before, frozen),
        "loss_drop": losses[0] - losses[-1],
        "change": parity.mean_error(trained, base),
        "merged_gap": parity.mean_error(trained, reference.logprobs(merged, batch)),
    }


def objectives(context: Context) -> dict:
    """Compare the gradient of FRPO without jackknife at a large lambda with that of Dr. GRPO, which it tends to, and the
    seconds of FRPO's step, as it is used, with GRPO's."""
    actor, batch = parity.actor(context), parity.batch(context)
    gradients = []
    for settings in ({"name": "frpo", "lambda_": 1e4, "jackknife": False}, {"name": "dr_grpo"}):
        actor.accumulate_gradient(batch, batches.policy_loss(batch, build_objective(settings)))
        gradients.append(policy.gradient(actor))
    seconds: dict[str, list[float]] = {"grpo": [], "frpo": []}
    rounds = context.on(cuda=6, cpu=3)
    for _, name in itertools.product(range(rounds), seconds):
        objective = build_objective({"name": name} | ({"lambda_": 0.5} if name == "frpo" else {}))
        started = time.monotonic()
        actor.train_step(batch, batches.policy_loss(batch, objective), update=0, total_updates=1)
        seconds[name].append(time.monotonic() - started)
    frpo, grpo = (min(seconds[name]) for name in ("frpo", "grpo"))
    return {
        "limit_error": parity.distance(*gradients),
        "seconds_ratio": frpo / grpo,
        "frpo_seconds": frpo,
        "grpo_seconds": grpo,
    }


def step(actor: PolicyActor, batch: SequenceBatch) -> float:
    """Make one supervised update; return the loss before it."""
    loss = CompletionLoss(int(batch.response_lengths.sum()))
    return actor.train_step(batch, loss, update=0, total_updates=1).per_sequence["loss"].sum().item()


def _after_a_step(actor: PolicyActor, batch: SequenceBatch) -> Tensor:
    step(actor, batch)
    return policy.main_weights(actor)


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().to("cpu", copy=True) for tensor in tensors]


def _changed(before: list[Tensor], after: list[Tensor]) -> int:
    """Count the tensors with other values."""
    return sum(not old.equal(new.detach().cpu()) for old, new in zip(before, after, strict=True))


def _memory(context: Context) -> int:
    """Return the bytes that this process holds: of GPU tensors, or resident."""
    policy.free()
    return torch.cuda.memory_allocated() if context.cuda else psutil.Process().memory_info().rss
