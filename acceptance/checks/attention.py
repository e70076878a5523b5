"""Packed sequences: what a sequence's log-probs depend on."""

from __future__ import annotations

import torch

from acceptance import policy
from acceptance.checks import parity
from acceptance.context import Context
from frpo_nemo.data.batch import segment_ids


def local(context: Context) -> dict:
    """Check local layers, also where the product takes Transformer Engine's."""
    with policy.local_layers():
        return default(context)


def default(context: Context) -> dict:
    """Check the layers that the product takes. leak: the largest change of log-probs when other sequences of the pack have
    other tokens. alone: their mean change when every sequence is its own pack, where other shapes may round
    differently."""
    batch, actor = parity.batch(context), parity.actor(context)
    packed = actor.get_inference_log_probs(batch)
    odd = torch.arange(batch.num_sequences) % 2 == 1
    changed = batch.select(range(batch.num_sequences))
    changed.tokens = torch.where(odd[segment_ids(batch.lengths)], batch.tokens.flip(0), batch.tokens)
    beside_others = actor.get_inference_log_probs(changed)
    actor.microbatch_tokens = 1
    alone = actor.get_inference_log_probs(batch)
    difference, others = (packed - beside_others).abs(), odd[segment_ids(batch.response_lengths)]
    return {
        "transformer_engine": int(policy.has_transformer_engine_layers(actor)),
        "leak": difference[~others].max().item(),
        "others_change": difference[others].mean().item(),
        "alone": parity.mean_error(alone, packed),
    }
