"""FP8 products by recipe, against the same weights in bf16."""

from __future__ import annotations

import functools

from acceptance.checks import parity
from acceptance.context import Context
from acceptance.reference import Numbers


def delayed(context: Context) -> dict:
    return against_bf16(context, fp8="hybrid", fp8_recipe="delayed")


def tensorwise(context: Context) -> dict:
    return against_bf16(context, fp8="hybrid", fp8_recipe="tensorwise")


def blockwise(context: Context) -> dict:
    return against_bf16(context, fp8="hybrid", fp8_recipe="blockwise")


def against_bf16(context: Context, **model) -> dict:
    """Compare the log-probs of the first forward pass, which delayed scaling enters without a history, those of a later
    pass, and the gradient. model: fields of ModelConfig."""
    expected, actor = _bf16(context), parity.actor(context, **model)
    first = actor.get_inference_log_probs(parity.batch(context))
    found = parity.own_numbers(context, actor)
    return {
        "first_logprobs_error": parity.mean_error(first, expected.logprobs),
        "logprobs_error": parity.mean_error(found.logprobs, expected.logprobs),
        "gradient_cosine": parity.cosine(found.gradient, expected.gradient),
        "gradient_error": parity.distance(found.gradient, expected.gradient),
    }


@functools.cache
def _bf16(context: Context) -> Numbers:
    return parity.own_numbers(context, parity.actor(context))
