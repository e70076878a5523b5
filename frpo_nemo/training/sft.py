"""Supervised fine-tuning on prompt/completion data, through the same actor. Loss on completions only."""

from __future__ import annotations

from transformers import AutoTokenizer

from frpo_nemo.data.prompts import PromptSampler
from frpo_nemo.data.sft import SFTSet, load_examples
from frpo_nemo.megatron import distributed
from frpo_nemo.megatron.actor import NonFiniteLoss, PolicyActor
from frpo_nemo.training.loss import CompletionLoss
from frpo_nemo.training.run import Run


def train(cfg) -> None:
    """Run the job that `cfg` (SFTRun, validated) describes, in every process of the world."""
    with Run(cfg) as run:
        with run.phases("load"):
            examples, held_out = load_data(cfg)
            distributed.start_model_parallel(cfg.model, cfg.trainer.seed)
            actor = PolicyActor(cfg.model, cfg.optim, microbatch_tokens=cfg.trainer.microbatch_tokens)
        data = {"train": examples.fingerprint} | ({"validation": held_out.fingerprint} if held_out else {})
        run.attach(actor, data)
        sampler = PromptSampler(len(examples), cfg.data.sequences_per_step, cfg.trainer.seed, cfg.data.shuffle)
        if run.validation_due(run.step) and run.step == 0:
            validate(run, actor, held_out, 0)

        for step in run.steps():
            batch = examples.batch.select(sampler.indices(step - 1))
            tokens = int(batch.response_lengths.sum())
            with run.phases("train"):
                try:
                    result = actor.train_step(
                        batch, CompletionLoss(tokens), update=step - 1, total_updates=cfg.trainer.max_steps
                    )
                except NonFiniteLoss as error:
                    path = run.save_offenders(step, batch, error)
                    raise RuntimeError(f"step {step}: {error}; weights unchanged, sequences saved in {path}") from error
            values = {
                "loss": result.per_sequence["loss"].sum().item(),
                "entropy": result.per_token["entropy"].mean().item(),
                "gradient_norm": result.grad_norm,
                "learning_rate": result.learning_rate,
            }
            if run.validation_due(step):
                validate(run, actor, held_out, step)
            run.record(step, values, int(batch.lengths.sum()))
        if run.finished:
            run.export()


def load_data(cfg) -> tuple[SFTSet, SFTSet | None]:
    """(training examples, held-out examples or None)."""
    tokenizer = AutoTokenizer.from_pretrained(cfg.model.path)
    limits = dict(max_prompt_tokens=cfg.data.max_prompt_tokens, max_tokens=cfg.data.max_tokens)
    examples = load_examples(cfg.data.train, tokenizer, **limits)
    held_out = load_examples(cfg.data.validation, tokenizer, **limits) if cfg.data.validation else None
    return examples, held_out


def validate(run: Run, actor: PolicyActor, held_out: SFTSet, step: int) -> None:
    """Mean cross-entropy per completion token on held-out examples."""
    with run.phases("validate"):
        loss = -actor.get_inference_log_probs(held_out.batch).mean().item()
    run.record_validation(step, {"loss": loss}, score=-loss)
