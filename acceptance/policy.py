"""The product's policy for the checks: actors in any layout, and readings of their weights and gradients."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from unittest import mock

import torch
from megatron.core import parallel_state
from torch import Tensor

from acceptance.reference import LOGITS, Numbers, flat
from frpo_nemo.config.options import ModelConfig, OptimizerConfig
from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.megatron.actor import Loss, PolicyActor
from frpo_nemo.megatron.checkpoint import optimizer_state
from frpo_nemo.megatron.groups import start_model_parallel, stop_model_parallel
from frpo_nemo.megatron.logprobs import vocab_parallel_logits
from frpo_nemo.megatron.model import output_weight
from frpo_nemo.megatron.weights.binding import bind
from frpo_nemo.megatron.weights.export import assemble


def make_actor(model: ModelConfig, optim: OptimizerConfig | None, *, microbatch_tokens: int) -> PolicyActor:
    """Make an actor in the layout of `model`, which becomes the world's."""
    _use_layout(model)
    return PolicyActor(model, optim, microbatch_tokens=microbatch_tokens)


def _use_layout(model: ModelConfig) -> None:
    """Keep Megatron's groups where they fit, because NCCL needs memory for every new one."""
    wanted = (
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        model.context_parallel_size,
    )
    if parallel_state.model_parallel_is_initialized():
        present = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_context_parallel_world_size(),
        )
        if present == wanted:
            return
        stop_model_parallel()
    start_model_parallel(model, seed=1)


def free() -> None:
    """Free the GPU memory of actors that are no longer referenced, which contain reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def local_layers() -> Iterator[None]:
    """Build models of local layers inside, although Transformer Engine is there. The product has no such option, so its
    decision is replaced in both modules that ask for it."""
    with (
        mock.patch("frpo_nemo.megatron.model.uses_transformer_engine", lambda precision: False),
        mock.patch("frpo_nemo.megatron.actor.uses_transformer_engine", lambda precision: False),
    ):
        yield


def has_transformer_engine_layers(actor: PolicyActor) -> bool:
    """Return whether the built model really has Transformer Engine layers."""
    return type(actor.gpt.decoder.layers[0].mlp.linear_fc2).__module__ == "megatron.core.extensions.transformer_engine"


def numbers(actor: PolicyActor, batch: SequenceBatch, loss: Loss) -> Numbers:
    """Compute what transformers is compared with, in a world of one."""
    with torch.no_grad():
        columns = actor._infer(batch, lambda hidden: _logit_columns(actor, hidden))
    per_sequence, _ = actor.accumulate_gradient(batch, loss)
    return Numbers(
        logits=torch.stack([columns[str(index)] for index in range(LOGITS)], 1),
        logprobs=columns["logprobs"],
        entropy=columns["entropy"],
        losses=per_sequence["loss"],
        gradient=gradient(actor),
    )


def _logit_columns(actor: PolicyActor, hidden: Tensor) -> dict[str, Tensor]:
    weight, vocabulary = output_weight(actor.gpt), actor.arch.vocab_size
    logits = vocab_parallel_logits(hidden, weight, vocab_size=vocabulary, tp_rank=0, temperature=1.0)
    chosen = logits[:, torch.linspace(0, vocabulary - 1, LOGITS).long().to(logits.device)]
    return {str(index): column for index, column in enumerate(chosen.unbind(1))}


def gradient(actor: PolicyActor) -> Tensor:
    """Return the last accumulated gradient as reference.flat orders it. In a world of one, where a shard is all."""
    named: dict[str, Tensor] = {}
    for binding in bind(actor.gpt, actor.arch):
        if binding.weight.exported:
            named |= assemble(binding.weight, binding.parameter.main_grad.reshape(1, -1))
    return flat(named)


def main_weights(actor: PolicyActor) -> Tensor:
    """Copy the fp32 weights that this rank's optimizer updates to the CPU."""
    parts = optimizer_state._parts(actor.optimizer)
    groups = [group for part in parts for group in part.optimizer.param_groups]
    return torch.cat([t.detach().float().cpu().flatten() for group in groups for t in group["params"]])


def optimizer_tensors(actor: PolicyActor) -> list[Tensor]:
    """Return this rank's fp32 weights and Adam's moments, where they are."""
    parts = [part.optimizer for part in optimizer_state._parts(actor.optimizer)]
    weights = [t for part in parts for group in part.param_groups for t in group["params"]]
    moments = [state[key] for part in parts for state in part.state.values() for key in ("exp_avg", "exp_avg_sq")]
    return weights + moments
