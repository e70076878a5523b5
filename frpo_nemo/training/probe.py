"""Probe whether the policy keeps what it learned earlier while it is trained on something else.

A probe samples responses to prompts of an earlier stage, scores them with that stage's rewards, and measures how far
the policy has moved from the one with which this run began. It only reads weights, and draws from its own generators: the
run's trajectory is the same, bit for bit, with and without probes.
"""

from __future__ import annotations

from frpo_nemo.config.options import TrainingRun
from frpo_nemo.data.batch import segment_sum
from frpo_nemo.megatron.actor import PolicyActor
from frpo_nemo.objective.kl import k3, k3_penalty
from frpo_nemo.rewards.reward_set import build_rewards
from frpo_nemo.rollout.worker import Rollouts, RolloutWorker, ScoredPrompts
from frpo_nemo.training.run import Run
from frpo_nemo.training.statistics import rollout_statistics, scored_counts

VALIDATION, PROBE = 1 << 31, 1 << 31 | 1  # replace the step in sampling seeds: training has others


class Probe:
    """Run the `probe` part of a configuration."""

    def __init__(self, cfg: TrainingRun, worker: RolloutWorker):
        self.cfg, self.worker = cfg, worker
        rewards = build_rewards(cfg.probe.reward)
        self.scored = ScoredPrompts.load(cfg.probe.prompts, rewards, worker.chat, cfg.data.max_prompt_tokens)
        self._proven = False  # the engine of this start, where only the probe refits it

    def run_if_due(self, run: Run, actor: PolicyActor, step: int, *, refit: bool) -> None:
        """Probe before the first step (0), every `interval` steps, and after the last. refit: the engine does not have the
        policy's current weights yet."""
        if step % self.cfg.probe.interval and step != self.cfg.trainer.max_steps:
            return
        with run.phases("probe"):
            if refit:
                self.worker.refit(actor)
                if not self._proven:
                    self.worker.prove(actor, self.scored.prompts, step, self.cfg.probe.max_response_tokens)
                    self._proven = True
            rollouts = self.worker.roll_out(
                self.scored,
                range(len(self.scored.prompts)),
                samples=self.cfg.probe.samples,
                max_tokens=self.cfg.probe.max_response_tokens,
                seed_step=PROBE,
            )
            values = rollout_statistics(rollouts) | scored_counts(rollouts)
            values |= distance_from_reference(self.worker, actor, rollouts, step)
            if run.rank == 0:
                self.worker.write_samples(run.dir / "probe" / f"step_{step:08d}.jsonl", rollouts)
        run.record_probe(step, values)

    def close(self) -> None:
        self.scored.rewards.close()


def distance_from_reference(
    worker: RolloutWorker, actor: PolicyActor, rollouts: Rollouts, step: int
) -> dict[str, float]:
    """Return the KL of the policy from the reference on responses that the policy sampled, in nats: per token (k3 with
    the objective's bound), and of whole responses by three estimates: the mean log-ratio, k3 of every token, and the exact
    KL of every next-token distribution, which varies least."""
    batch = rollouts.batch
    lengths = batch.response_lengths
    columns = actor.compare_with_reference(batch)
    worker.check_logprobs(step, batch, columns["logprobs"])
    actor.finish_inference()
    tokens_k3 = k3(columns["logprobs"], columns["reference_logprobs"])
    penalties = k3_penalty(columns["logprobs"], columns["reference_logprobs"])
    return {
        "kl/reference": (segment_sum(penalties, lengths) / lengths).mean().item(),
        "kl/per_response": segment_sum(columns["logprobs"] - columns["reference_logprobs"], lengths).mean().item(),
        "kl/k3": segment_sum(tokens_k3, lengths).mean().item(),
        "kl/exact": segment_sum(columns["kl"], lengths).mean().item(),
    }
