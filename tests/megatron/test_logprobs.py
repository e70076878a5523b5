"""Chunked, vocabulary-parallel log-probs: equal to log_softmax, and never more fp32 logits than a chunk."""

import logprob_checks
import pytest
import torch


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
@pytest.mark.parametrize("world", [1, 2])
def test_values_and_gradients_equal_log_softmax(workers, world, chunk_tokens):
    """fp32; vocabulary of 50 padded to 64; temperature 0.7; gradients of hidden states and weight; also the KL from a
    reference and whether the target is the likeliest token."""
    errors = workers.run(world, logprob_checks.compare_with_log_softmax, chunk_tokens=chunk_tokens)
    assert max(max(rank.values()) for rank in errors) < 2e-5, errors


def test_no_more_logits_than_one_chunk_exist_at_a_time(workers):
    """The largest tensor made in forward and backward is a chunk of logits, or the weight's gradient."""
    [largest] = workers.run(1, logprob_checks.largest_tensor, tokens=4096, vocabulary=512, chunk_tokens=32)
    assert largest <= max(32 * 512, 512 * logprob_checks.HIDDEN, 4096 * logprob_checks.HIDDEN)


def test_entropy_of_a_uniform_distribution_is_the_logarithm_of_the_vocabulary(workers):
    [entropy] = workers.run(1, logprob_checks.uniform_entropy, vocabulary=50)
    assert entropy == pytest.approx(torch.tensor(50.0).log().item(), abs=1e-6)
