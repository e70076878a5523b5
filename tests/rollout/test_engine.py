"""The engine in a world of one and of two processes; what is checked is in checks.py."""

from pathlib import Path

import checks
import pytest

from frpo_nemo.data.chat import Chat
from frpo_nemo.data.tokenizer import load_tokenizer
from frpo_nemo.rollout import RolloutEngine


def test_sampling_needs_a_refit_first(one):
    one(checks.check_generate_before_refit)


def test_refit_makes_logprobs_those_of_the_new_model(one):
    one(checks.check_refit_changes_the_model)


def test_a_compiled_model_is_not_compiled_again_by_refits(one):
    one(checks.check_compiled_model)


@pytest.mark.parametrize("name, temperature", [("qwen3", 0.7), ("tied", 1.0), ("mistral", 1.0)])
def test_logprobs_are_those_of_transformers(one, name, temperature):
    one(checks.check_family, name=name, temperature=temperature)


def test_a_checkpoint_can_be_loaded_instead(one):
    one(checks.check_family, name="qwen2", load_format="auto")


def test_bfloat16_differs_by_rounding_alone(one):
    one(checks.check_bfloat16)


def test_vllm_multiplies_by_the_output_layer_in_fp32_where_the_trainer_does(one):
    [differences] = one(checks.check_fp32_logits)
    assert differences[True] < 1e-5 < 1e-3 < differences[False], differences


def test_with_top_p_tokens_are_of_the_nucleus_and_logprobs_of_the_full_distribution(one):
    one(checks.check_top_p)


def test_kept_tokens_are_those_of_top_p_and_top_k_and_logprobs_are_among_them(one):
    one(checks.check_sampling_masks)


def test_other_sampling_settings(one):
    one(checks.check_other_sampling)


def test_bad_requests_are_refused(one):
    one(checks.check_bad_requests)


def test_every_fault_of_a_refit_is_caught_and_named(one):
    one(checks.check_faults_are_named)


def test_the_weight_stream_is_always_exhausted(one):
    one(checks.check_stream_is_exhausted)


def test_a_stale_engine_shows_in_the_logprob_gap(one):
    [message] = one(checks.check_stale_engine_shows_in_the_gap)
    assert "step 4" in message and "the worst is sequence" in message


def test_a_lost_weight_of_any_layer_shows_in_the_logprob_gap_of_bf16(one):
    [found] = one(checks.check_a_lost_weight_shows_in_the_gap)
    assert len(found) == 1 + 5 * len(checks.LOST)
    assert found.pop("healthy") < 0.8 and min(found.values()) > 1, found


def test_a_lost_weight_shows_in_the_logprob_gap_of_a_pretrained_model(one, smol_model):
    """Its rounding is four times that of random weights: the limit is a multiple of what its first rollout measured."""
    chat, layers = Chat(load_tokenizer(str(smol_model))), (0, 7, 15, 22, 29)
    questions = ["What is a lighthouse for?", "How is bread made?"]
    asked = chat.prompt_ids([[{"role": "user", "content": question}] for question in questions], "here")
    [found] = one(
        checks.check_a_lost_weight_shows_in_the_gap,
        path=str(smol_model),
        asked=asked,
        layers=layers,
        max_tokens=10,
    )
    assert len(found) == 1 + len(layers) * len(checks.LOST)
    assert found.pop("healthy") < 1 and min(found.values()) > 1, found


def test_responses_are_the_same_in_another_process_and_differ_between_engines(one, two):
    [alone] = one(checks.check_responses)
    first, second = two(checks.check_two_engines)
    assert first == alone
    assert second != alone


@pytest.mark.parametrize("name", ["qwen2", "one kv head", "tied"])
def test_tensor_parallel_engine(two, name):
    first, second = two(checks.check_one_engine_of_two, name=name)
    assert first == second


def test_a_tensor_parallel_engine_returns_kept_tokens_too(two):
    two(checks.check_sampling_masks, tp=2)


def test_a_fault_on_one_rank_stops_both(two):
    first, second = two(checks.check_fault_on_one_rank)
    assert first == second
    assert all(message.startswith("rank 1:") for message in first[1:])


def test_layout_that_does_not_fit(two):
    assert "tensor_model_parallel_size=3 does not divide the 2" in two(checks.check_layout_that_does_not_fit)[0]


def test_a_tensor_parallel_engine_leaves_no_shared_memory_behind(two, tiny):
    """It also starts where a killed run left shared memory, because its names are unique."""
    two(checks.check_one_engine_of_two, name="qwen2")
    assert not list(Path("/dev/shm").glob("*cpushm*"))


def test_sleep_gives_back_everything_and_wakes_what_is_needed():
    """Without a GPU, only the calls to vLLM are checked."""

    class Calls(list):
        def sleep(self, level):
            self.append(("sleep", level))

        def wake_up(self, tags):
            self.append(("wake", *tags))

    engine = object.__new__(RolloutEngine)
    engine._llm, engine._on_gpu, engine._asleep = Calls(), True, set()
    engine.sleep()
    engine.sleep()
    engine._wake("weights")  # refit
    engine.wake()
    engine.wake()
    assert engine._llm == [("sleep", 1), ("wake", "weights"), ("wake", "kv_cache")]
    engine._on_gpu = False
    engine.sleep()
    assert len(engine._llm) == 3
