"""Fine-tune on prompt/completion data with the same actor. Only completions have a loss."""

from __future__ import annotations

from frpo_nemo.config.options import SFTRun
from frpo_nemo.data.batch import SequenceBatch, segment_sum
from frpo_nemo.data.chat import Chat
from frpo_nemo.data.prompts import PromptSampler
from frpo_nemo.data.sft import SFTSet, load_examples
from frpo_nemo.megatron.actor import NonFiniteLoss, PolicyActor, StepResult
from frpo_nemo.megatron.groups import start_model_parallel
from frpo_nemo.rollout.chat import load_chat
from frpo_nemo.rollout.worker import RolloutWorker
from frpo_nemo.training.loss import CompletionLoss
from frpo_nemo.training.probe import Probe
from frpo_nemo.training.run import Run


def train(cfg: SFTRun) -> bool:
    """Run the job that `cfg` (SFTRun, validated) describes, in every process of the world. Returns False if a
    signal ended it early."""
    with Run(cfg) as run:
        with run.phases("load"):
            examples, held_out = load_data(cfg, load_chat(cfg.model, run.moment))
            worker = probe = None
            if cfg.probe.interval:
                longest = cfg.data.max_prompt_tokens + cfg.probe.max_response_tokens
                worker = RolloutWorker(
                    cfg.model,
                    cfg.rollout,
                    run.phases,
                    seed=cfg.trainer.seed,
                    max_model_len=longest,
                    moment=run.moment,
                    measured=run.measured,
                )
                probe = Probe(cfg, worker)
            start_model_parallel(cfg.model, cfg.trainer.seed)
            actor = PolicyActor(
                cfg.model, cfg.optim, microbatch_tokens=cfg.trainer.microbatch_tokens, seed=cfg.trainer.seed
            )
            if probe:
                actor.freeze_reference()  # before a checkpoint is loaded: the model with which fine-tuning began
        run.attach(actor, train=examples, validation=held_out, probe=probe.scored.prompts if probe else None)
        sampler = PromptSampler(len(examples), cfg.data.sequences_per_step, cfg.trainer.seed, cfg.data.shuffle)
        if run.step == 0:
            measure(run, actor, held_out, probe, 0)

        for step in run.steps():
            batch = examples.batch.select(sampler.indices(step - 1))
            result = learn(run, actor, batch, step)
            measure(run, actor, held_out, probe, step)
            values = {
                "loss": result.per_sequence["loss"].sum().item(),
                "entropy": result.per_token["entropy"].mean().item(),
                "gradient_norm": result.grad_norm,
                "learning_rate": result.learning_rate,
            }
            run.record(step, values, int(batch.lengths.sum()))
        if run.finished:
            run.export()
        if probe:
            probe.close()
            worker.close()
    return run.finished


def learn(run: Run[SFTRun], actor: PolicyActor, batch: SequenceBatch, step: int) -> StepResult:
    """Do one gradient and optimizer step on the completions of `batch`."""
    tokens, total = int(batch.response_lengths.sum()), run.cfg.trainer.max_steps
    actor.prepare_for_training()
    with run.phases("train"):
        try:
            return actor.train_step(batch, CompletionLoss(tokens), update=step - 1, total_updates=total)
        except NonFiniteLoss as error:
            path = run.save_offenders(step, batch, error)
            raise RuntimeError(f"step {step}: {error}; weights unchanged, sequences saved in {path}") from error


def measure(run: Run[SFTRun], actor: PolicyActor, held_out: SFTSet | None, probe: Probe | None, step: int) -> None:
    """Run what is due after `step`: validation of what is learned, and the probe of what was learned before."""
    if run.validation_due(step):
        validate(run, actor, held_out, step)
    if probe:
        probe.run_if_due(run, actor, step, refit=True)


def load_data(cfg: SFTRun, chat: Chat) -> tuple[SFTSet, SFTSet | None]:
    """Return (training examples, held-out examples or None)."""
    limits = dict(max_prompt_tokens=cfg.data.max_prompt_tokens, max_tokens=cfg.data.max_tokens)
    examples = load_examples(cfg.data.train, chat, **limits)
    held_out = load_examples(cfg.data.validation, chat, **limits) if cfg.data.validation else None
    return examples, held_out


def validate(run: Run[SFTRun], actor: PolicyActor, held_out: SFTSet, step: int) -> None:
    """Measure on held-out completions: mean cross-entropy per token, the share of tokens that are the policy's likeliest,
    and the share of completions made of such tokens only, which greedy decoding would get exactly right."""
    with run.phases("validate"):
        columns, lengths = actor.get_inference_columns(held_out.batch), held_out.batch.response_lengths
        loss = -columns["logprobs"].mean().item()
        right = segment_sum(columns["likeliest"], lengths) == lengths
    values = {
        "loss": loss,
        "token_accuracy": columns["likeliest"].mean().item(),
        "accuracy": right.double().mean().item(),
    }
    run.record_validation(step, values, score=-loss)
