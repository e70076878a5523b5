"""Chunked, vocabulary-parallel log-probs: equal to log_softmax, and never more fp32 logits than a chunk."""

import logprob_checks
import pytest
import torch
from gradient_checks import example_batch
from tiny_models import make_tiny
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
@pytest.mark.parametrize("world", [1, 2])
def test_values_and_gradients_equal_log_softmax(workers, world, chunk_tokens):
    """fp32; vocabulary of 50 padded to 64; temperature 0.7; gradients of hidden states and weight; also the KL from a
    reference and whether the target is the likeliest token."""
    errors = workers.run(world, logprob_checks.compare_with_log_softmax, chunk_tokens=chunk_tokens)
    assert max(max(rank.values()) for rank in errors) < 2e-5, errors


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
@pytest.mark.parametrize("world", [1, 2])
def test_over_kept_tokens_values_and_gradients_equal_log_softmax_over_these(workers, world, chunk_tokens):
    errors = workers.run(world, logprob_checks.compare_with_kept_tokens, chunk_tokens=chunk_tokens)
    assert max(max(rank.values()) for rank in errors) < 2e-5, errors


def test_over_kept_tokens_the_gradient_is_that_of_truncated_sampling(workers):
    [(found, expected)] = workers.run(1, logprob_checks.gradient_of_truncated_sampling)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("world", [1, 2])
def test_fp32_logits_of_a_bf16_model_are_those_of_its_hidden_states(workers, world):
    """The output layer's rows are taken in chunks. Products rounded to bf16 have a thousand times the error."""
    rounded = workers.run(world, logprob_checks.errors_of_bf16, in_fp32=False)
    exact = workers.run(world, logprob_checks.errors_of_bf16, in_fp32=True)
    for column in ("logprobs", "entropy", "kl"):
        assert max(rank[column] for rank in exact) < 2e-4, exact
        assert min(rank[column] for rank in rounded) > 0.02, rounded


def test_no_more_logits_than_one_chunk_exist_at_a_time(workers):
    """The largest tensor made in forward and backward is a chunk of logits, or the weight's gradient."""
    [largest] = workers.run(1, logprob_checks.largest_tensor, tokens=4096, vocabulary=512, chunk_tokens=32)
    assert largest <= max(32 * 512, 512 * logprob_checks.HIDDEN, 4096 * logprob_checks.HIDDEN)


def test_entropy_of_a_uniform_distribution_is_the_logarithm_of_the_vocabulary(workers):
    [entropy] = workers.run(1, logprob_checks.uniform_entropy, vocabulary=50)
    assert entropy == pytest.approx(torch.tensor(50.0).log().item(), abs=1e-6)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model") / "qwen2", "qwen2", layers=2)


@pytest.mark.parametrize(
    "layout", [{}, dict(tp=2, sp=True), dict(pp=2), dict(dp=2)], ids=["one", "TP2 with SP", "PP2", "DP2"]
)
def test_distance_from_the_reference_is_that_of_next_token_distributions_in_every_layout(workers, model, layout):
    """Compare every response token after one training step with transformers in float64 on both sets of weights."""
    world = max(layout.values(), default=1)
    arguments = {key: value for key, value in layout.items() if key != "dp"}
    columns, weights = workers.run(world, logprob_checks.distance_after_a_step, path=model, **arguments)[0]
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    policy.load_state_dict({name: tensor.double() for name, tensor in weights.items()})
    expected = {"kl": [], "logprobs": [], "reference_logprobs": []}
    for prompt, response in example_batch().unpack():
        with torch.no_grad():
            ids, predictors = torch.tensor([prompt + response]), slice(len(prompt) - 1, -1)
            own, old = (torch.log_softmax(m(ids).logits[0, predictors], -1) for m in (policy, reference))
        places = torch.arange(len(response)), torch.tensor(response)
        expected["kl"].append((own.exp() * (own - old)).sum(-1))
        expected["logprobs"].append(own[places])
        expected["reference_logprobs"].append(old[places])
    assert columns["kl"].mean() > 0.1, "the step moved the policy"
    for name, parts in expected.items():
        torch.testing.assert_close(columns[name].double(), torch.cat(parts), rtol=1e-4, atol=1e-5)


def test_a_set_smaller_than_the_replicas_is_measured_as_by_one(workers, model):
    """Held-out sets of 30 problems meet 64 replicas."""
    [expected] = workers.run(1, logprob_checks.columns_of_a_small_batch, path=model)
    for columns in workers.run(2, logprob_checks.columns_of_a_small_batch, path=model):
        assert columns.keys() == expected.keys()
        assert all(torch.equal(columns[name], expected[name]) for name in expected)
