"""vLLM with mixtures of experts. In processes of their own: vLLM makes its groups for experts only if a process's first
model has some."""

import checks
import pytest


@pytest.mark.parametrize("name", ["experts", "experts and dense layers", "mixtral"])
def test_experts_compute_with_what_the_last_refit_sent(one, name):
    one(checks.check_refit_of_experts, name=name)


def test_every_fault_of_a_refit_is_caught_and_named(one):
    one(checks.check_faults_of_experts_are_named)


@pytest.mark.parametrize("name", ["experts", "mixtral"])
def test_tensor_parallel_engine(two, name):
    """Its responses are the same on both ranks."""
    first, second = two(checks.check_one_engine_of_two, name=name)
    assert first == second


@pytest.mark.parametrize("name", ["experts", "experts and dense layers", "mixtral"])
def test_responses_come_with_the_experts_that_were_chosen(one, name):
    assert one(checks.check_routes, name=name) == [0]


def test_the_experts_chosen_are_right_with_prompts_in_pieces_and_preempted_requests(one):
    assert one(checks.check_routes, name="experts", scarce=True)[0] > 0


def test_each_rank_of_a_tensor_parallel_engine_has_the_experts_chosen(two):
    assert two(checks.check_routes, name="experts", tp=2) == [0, 0]


def test_experts_that_compute_with_a_copy_are_found_before_the_first_rollout(one):
    [message] = one(checks.check_proof_by_computing, name="experts", layer="model.layers.1.mlp.experts")
    assert "The engine does not compute what the policy computes" in message
