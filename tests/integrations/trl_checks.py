"""FRPOTrainer on given responses, and the gradients of its steps: for one process, and a program for several.

torchrun --nproc_per_node=2 trl_checks.py MODEL OUT    # gradients of `train` to OUT, as torch.save writes them
"""

from __future__ import annotations

import sys
import tempfile

import torch
from datasets import Dataset
from tiny_models import tiny_tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback

from frpo_nemo.integrations.trl import FRPOConfig, FRPOTrainer

GROUP_SIZE, NUM_GROUPS = 4, 3
NUM_SEQUENCES = GROUP_SIZE * NUM_GROUPS
LAMBDA, BETA, CLIP = 0.5, 0.1, 0.02
EOS = 1  # of tiny_tokenizer
PROMPTS = ["ab", "say cde", "12+3=", "a longer prompt"]


def settings(output_dir: str, world_size: int = 1, **options) -> FRPOConfig:
    """Microbatches of three sequences, so that groups of four straddle them (and the processes)."""
    given = dict(
        output_dir=output_dir,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=NUM_SEQUENCES // 3 // world_size,
        num_generations=GROUP_SIZE,
        max_completion_length=12,
        max_steps=1,
        learning_rate=0.05,
        optim="sgd",
        max_grad_norm=0.0,  # no clipping
        frpo_lambda=LAMBDA,
        beta=BETA,
        epsilon_high=CLIP,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    return FRPOConfig(**(given | options))


def given_responses(prompts: list[str], trainer) -> dict[str, list]:
    """Two to twelve tokens each, drawn by the sequence's place in the global batch; every fifth is cut off."""
    completions = []
    for place in range(len(prompts)):
        row = trainer.accelerator.process_index * len(prompts) + place
        generator = torch.Generator().manual_seed(100 * trainer.state.global_step + row)
        length = int(torch.randint(1, 12, (1,), generator=generator))
        response = torch.randint(3, 100, (length,), generator=generator).tolist()
        completions.append([*response, EOS] if row % 5 else response)
    prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}


def partial_reward(completion_ids: list[list[int]], **_) -> list[float | None]:
    """Return a number between 0 and 1 that the tokens decide; None for about one response in six."""
    return [None if sum(ids) % 6 == 1 else sum(ids) % 11 / 10 for ids in completion_ids]


class Steps(TrainerCallback):
    """Weights and gradient at each optimizer step."""

    def __init__(self):
        self.weights: list[dict] = []
        self.gradients: list[dict] = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        names = {name.removeprefix("module."): parameter for name, parameter in model.named_parameters()}
        self.weights.append({name: parameter.detach().clone() for name, parameter in names.items()})
        self.gradients.append({name: parameter.grad.clone() for name, parameter in names.items()})


def build(model: str, args: FRPOConfig, trainer_class=FRPOTrainer, **options) -> FRPOTrainer:
    given = dict(
        reward_funcs=partial_reward,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tiny_tokenizer(),
        rollout_func=given_responses,
    )
    return trainer_class(model=model, args=args, **(given | options))


def train(model: str, args: FRPOConfig, **options) -> tuple[FRPOTrainer, Steps]:
    """Return a run on given responses, with a reference policy that differs from the first policy."""
    steps = Steps()
    trainer = build(model, args, callbacks=[steps], **options)
    if trainer.ref_model is not None:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in trainer.ref_model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    trainer.train()
    return trainer, steps


def token_logprobs(weights: dict, path: str, sequences: list[tuple[list, list]]) -> tuple[list, torch.nn.Module]:
    """Return each response's log-probs given its prompt, one sequence at a time, and the model: transformers' in float64."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    model.load_state_dict({name: tensor.double() for name, tensor in weights.items()})
    logprobs = []
    for prompt, response in sequences:
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logprobs.append(torch.log_softmax(logits, -1)[torch.arange(len(response)), torch.tensor(response)])
    return logprobs, model


def group_loss_gradient(path, trainer, weights, old_weights, step_rows, mismatch=None) -> dict[str, torch.Tensor]:
    """Autograd of the paper's group loss over the whole generation batch (jackknife and baseline) plus the KL, in
    float64. Only the sequences `step_rows` carry gradient, scaled up to the batch. mismatch: per row, factors of its
    tokens' gradients."""
    sequences, rewards = sequences_in_order(trainer)
    logprobs, model = token_logprobs(weights, path, sequences)
    with torch.no_grad():
        old_logprobs, _ = token_logprobs(old_weights, path, sequences)
        reference_logprobs, _ = token_logprobs(trainer.ref_model.state_dict(), path, sequences)
    importance, kl = [], []
    for row, (own, old, reference) in enumerate(zip(logprobs, old_logprobs, reference_logprobs, strict=True)):
        own = own if row in step_rows else own.detach()
        ratio = torch.exp(own - old).clamp(max=1 + CLIP)
        if mismatch is not None:
            ratio = ratio.detach() + mismatch[row] * (ratio - ratio.detach())
        importance.append(ratio.mean())
        difference = reference - own
        weight = torch.exp(own - old) if trainer.args.use_bias_correction_kl else 1.0
        kl.append((weight * (torch.exp(difference) - difference - 1)).mean())
    loss = BETA * torch.stack([kl[row] for row in step_rows]).mean()
    for start in range(0, NUM_SEQUENCES, GROUP_SIZE):
        members = [row for row in range(start, start + GROUP_SIZE) if not rewards[row].isnan()]
        r, m, size = rewards[members], torch.stack([importance[row] for row in members]), len(members)
        terms = torch.exp(-(r - r.mean()) / LAMBDA) * m
        leave_one_out = (terms.sum() - terms) / (size - 1)
        risk = size * terms.mean().log() - (size - 1) * leave_one_out.log().mean()
        loss = loss + max(LAMBDA, 1.0) * (risk - m.mean()) / NUM_GROUPS * NUM_SEQUENCES / len(step_rows)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def sequences_in_order(trainer) -> tuple[list[tuple[list, list]], torch.Tensor]:
    """Return (prompt ids, response ids) and reward of each sequence of the last generation batch, as generated: read from
    what TRL buffered, so that its own padding and shuffling are part of what is compared."""
    sequences = {}
    for batch in trainer._buffered_inputs:
        for place, row in enumerate(batch["row"].tolist()):
            prompt = batch["prompt_ids"][place][batch["prompt_mask"][place].bool()].tolist()
            sequences[row] = prompt, batch["completion_ids"][place][batch["completion_mask"][place].bool()].tolist()
    ordered = [sequences[row] for row in range(NUM_SEQUENCES)]
    rewards = partial_reward([response for _, response in ordered])
    return ordered, torch.tensor([torch.nan if reward is None else reward for reward in rewards]).double()


def relative_error(gradient: dict, expected: dict) -> float:
    """Over all parameters together: |difference| / |expected|."""
    assert gradient.keys() == expected.keys()
    difference = sum((gradient[name].double() - expected[name].double()).square().sum() for name in expected)
    return torch.sqrt(difference / sum(tensor.double().square().sum() for tensor in expected.values())).item()


def main():
    model, out = sys.argv[1:]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        trainer, steps = train(model, settings(directory, world_size=2, num_iterations=2, max_steps=2))
    if imported := {"megatron", "nemo", "omegaconf", "hydra", "lightning"} & sys.modules.keys():
        raise SystemExit(f"TRL alone should do, but {imported} was imported")
    if trainer.accelerator.num_processes != 2:
        raise SystemExit(f"two processes are wanted, not {trainer.accelerator.num_processes}")
    if trainer.accelerator.is_main_process:
        torch.save(steps.gradients, out)


if __name__ == "__main__":
    main()
