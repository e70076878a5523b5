"""FRPO in one file, to read before the rest: a tiny random model learns to answer in the words a0 to a15.

    python -W ignore recipes/minimal.py        # libraries warn about packages that only GPUs need

One process, no options, no checkpoints. recipes/frpo.py calls the same parts in the same order, and adds configuration,
parallel layouts, resuming, probes and metrics. A test checks that the first step here equals its first step.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from frpo_nemo.config.options import ModelConfig, OptimizerConfig, SourceConfig
from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.data.prompts import PromptSampler, load_prompts
from frpo_nemo.data.tokenizer import load_tokenizer
from frpo_nemo.examples.new_model import new_model
from frpo_nemo.examples.toy import ANSWERS, toy_tokenizer
from frpo_nemo.megatron.actor import PolicyActor
from frpo_nemo.megatron.groups import start_model_parallel
from frpo_nemo.objective import FRPO
from frpo_nemo.processes import world
from frpo_nemo.rollout.engine import RolloutEngine
from frpo_nemo.rollout.refit_check import GapLimit, check_logprob_gap
from frpo_nemo.rollout.worker import response_texts, sampling_seed
from frpo_nemo.training.loss import PolicyLoss

STEPS, PROMPTS_PER_STEP, GROUP_SIZE = 20, 8, 8
MAX_PROMPT_TOKENS, MAX_RESPONSE_TOKENS = 16, 8
SEED, LEARNING_RATE = 1, 3e-3
OBJECTIVE = FRPO(lambda_=0.5, beta=0.01)


def score(prompts: list, completions: list[str], **columns) -> list[float]:
    """Reward each response with the share of its words that are answers."""
    return [sum(word in ANSWERS for word in text.split()) / MAX_RESPONSE_TOKENS for text in completions]


def make_model(path: str) -> None:
    """Write a random model in Hugging Face format, with a tokenizer and a chat template."""
    sizes: dict[str, Any] = dict(hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=2, ffn_hidden_size=128)
    new_model(path, tokenizer=toy_tokenizer(), max_position_embeddings=64, seed=SEED, **sizes)


def train(model_path: str, steps: int = STEPS) -> list[dict[str, float]]:
    """Train the model at `model_path`; return what each step measured."""
    world.start_world()  # torch.distributed, in a world of one
    tokenizer = load_tokenizer(model_path)
    source = SourceConfig(path="python:frpo_nemo.examples.toy.rows?part=prompts")
    prompts = load_prompts([source], tokenizer, max_prompt_tokens=MAX_PROMPT_TOKENS)
    sampler = PromptSampler(len(prompts), PROMPTS_PER_STEP, SEED)

    # vLLM first, because it measures the free memory. Its weights are dummies until the first refit.
    engine = RolloutEngine(model_path, dtype="float32", max_model_len=MAX_PROMPT_TOKENS + MAX_RESPONSE_TOKENS)
    model = ModelConfig(path=model_path, precision="fp32")
    start_model_parallel(model, SEED)
    actor = PolicyActor(model, OptimizerConfig(lr=LEARNING_RATE), microbatch_tokens=4096, seed=SEED)
    actor.freeze_reference()  # the KL penalty is measured from the start of training

    engine.refit(actor.stream_hf_weights())  # compares fingerprints of what vLLM then holds
    history = []
    for step in range(1, steps + 1):
        # 1. vLLM samples a group of responses to each prompt.
        examples = [prompts.examples[i] for i in sampler.indices(step - 1)]
        groups = engine.generate(
            [example.prompt_ids for example in examples],
            samples=GROUP_SIZE,
            max_tokens=MAX_RESPONSE_TOKENS,
            seed=sampling_seed(SEED, step),
            stop_token_ids=[tokenizer.eos_token_id],
        )
        responses = [completion for group in groups for completion in group]
        engine.sleep()  # on a GPU, frees its memory for the trainer

        # 2. A reward for each response.
        asked = [example for example in examples for _ in range(GROUP_SIZE)]
        texts = response_texts([r.token_ids for r in responses], tokenizer, [tokenizer.eos_token_id])
        rewards = torch.tensor(score([example.messages for example in asked], texts), dtype=torch.float64)

        # 3. FRPO: an advantage for each response, such that a plain sum over responses has the gradient of the entropic
        #    risk of every group.
        batch = SequenceBatch.from_lists([e.prompt_ids for e in asked], [r.token_ids for r in responses])
        group = torch.arange(len(responses)) // GROUP_SIZE
        batch.columns["advantage"] = OBJECTIVE.effective_advantages(rewards, group)
        batch.columns["coefficient"] = OBJECTIVE.coefficients(rewards, group)

        # 4. The reference's log-probs, for the KL penalty.
        actor.prepare_for_training()
        batch.token_columns["reference_logprobs"] = actor.get_init_policy_logprobs(batch)

        # 5. The gradient, whose forward pass must find the log-probs with which vLLM sampled; then one update.
        loss = PolicyLoss(OBJECTIVE, batch.num_sequences)
        per_sequence, per_token = actor.accumulate_gradient(batch, loss)
        sampled = torch.tensor([logprob for response in responses for logprob in response.logprobs])
        limit = GapLimit.of("fp32", None)
        check_logprob_gap(sampled, per_token["logprobs"], batch.response_lengths, step=step, limit=limit)
        result = actor.optimizer_step(per_sequence, per_token, update=step - 1, total_updates=steps)

        # 6. The new weights go to vLLM.
        actor.finish_training()
        engine.refit(actor.stream_hf_weights())
        kl = result.per_sequence["kl"].mean().item()
        history.append({"reward": rewards.mean().item(), "kl": kl, "gradient_norm": result.grad_norm})
        print(
            f"step {step:2}: reward {history[-1]['reward']:.3f}, KL from the start {kl:.4f} nats per token", flush=True
        )
    engine.close()
    return history


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        make_model(directory)
        train(directory)
