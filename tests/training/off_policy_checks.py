"""Several updates per rollout through `learn` (every rank calls recorded_step), and what their gradients should be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from gradient_checks import (
    clipped_importance,
    example_batch,
    group_loss,
    hugging_face_gradients,
    hugging_face_model,
    kl_of_reference,
    response_logprobs,
)
from learn_checks import Learner

from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.megatron.actor import PolicyActor
from frpo_nemo.training.statistics import step_statistics

UPDATES, BETA, CLIP_HIGH = 3, 0.1, 0.05


@dataclass
class Update:
    """One minibatch: its groups, the weights before its update and its gradient (by Hugging Face names), and what the
    loss said of its ratios."""

    groups: list[int]
    weights: dict[str, torch.Tensor]
    gradient: dict[str, torch.Tensor]
    mean_ratio_gap: float
    clipped_share: float


class RecordingActor(PolicyActor):
    """The policy, which keeps an Update of every gradient and counts its forward passes without gradient."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.updates, self.passes = [], 0

    def accumulate_gradient(self, batch, loss):
        weights = {name: tensor.clone() for name, tensor in self.stream_hf_weights()}
        per_sequence, per_token = super().accumulate_gradient(batch, loss)
        gap = (per_token["ratio"] - 1).abs().mean().item()
        clipped = per_sequence["clipped"].mean().item()
        groups = batch.columns["group"].unique().tolist()
        self.updates.append(Update(groups, weights, hugging_face_gradients(self), gap, clipped))
        return per_sequence, per_token

    def get_inference_log_probs(self, batch):
        self.passes += 1
        return super().get_inference_log_probs(batch)


class RecordingLearner(Learner):
    actor_class = RecordingActor


def off_policy_batch() -> SequenceBatch:
    """6 interleaved groups for 3 minibatches: one of 3 responses in the second, one with an unscored response in the
    third."""
    batch = example_batch(groups=6)
    left_out = 9  # of group 3; the unscored one is of group 5
    return batch.select([index for index in range(batch.num_sequences) if index != left_out])


def recorded_step(path: str, *, tp: int = 1, pp: int = 1, **settings) -> tuple[list[Update], dict[str, float]]:
    """Return the updates of one rollout batch (on rank 0; empty elsewhere), and of every rank what the step logs, the
    objective's memory and the number of forward passes. settings: of the objective."""
    options = {f"objective.{name}": value for name, value in settings.items()}
    options |= {"objective.clip_high": CLIP_HIGH, "trainer.updates_per_rollout": UPDATES, "optim.lr": 1e-3}
    learner = RecordingLearner(path, beta=BETA, tp=tp, pp=pp, **options)
    rollouts = learner.rollouts(off_policy_batch())
    learner.actor.passes = 0
    results = learner.learn(rollouts)
    logged = step_statistics(learner.batch_objective, rollouts.batch, results)
    logged |= {"passes": learner.actor.passes} | {f"memory/{k}": v for k, v in learner.run.objective_state.items()}
    return (learner.actor.updates if learner.run.rank == 0 else []), logged


class Expected:
    """Gradients by autograd through transformers' model in float64, at given weights of the present policy."""

    def __init__(self, path: str):
        """path: of the rollout's policy, which is the reference as well."""
        self.batch, self.model = off_policy_batch(), hugging_face_model(path)
        with torch.no_grad():
            self.old = response_logprobs(self.model, self.batch)

    def gradient(
        self, update: Update, lambda_: float, *, frozen: bool = False, reverse: bool = False
    ) -> dict[str, torch.Tensor]:
        """Of the group loss over the update's groups at its weights. frozen: the group loss is replaced by its tangent
        at m = 1, which is a sum of -A_i m_i with the on-policy advantages. reverse: see objective.kl_gradient."""
        chosen = torch.isin(self.batch.columns["group"], torch.tensor(update.groups)).nonzero().flatten().tolist()
        minibatch, old = self.batch.select(chosen), [self.old[index] for index in chosen]
        self.model.load_state_dict({name: tensor.double() for name, tensor in update.weights.items()})
        self.model.zero_grad()
        logprobs = response_logprobs(self.model, minibatch)
        importance = clipped_importance(logprobs, old, CLIP_HIGH)
        if frozen:
            on_policy = torch.ones_like(importance, requires_grad=True)
            [slope] = torch.autograd.grad(group_loss(on_policy, minibatch, lambda_), on_policy)
            loss = (slope * importance).sum()
        else:
            loss = group_loss(importance, minibatch, lambda_)
        (loss + BETA * kl_of_reference(logprobs, old, old if reverse else None)).backward()
        return {name: parameter.grad.clone() for name, parameter in self.model.named_parameters()}

    def lambda_of_radius(self, radius: float) -> float:
        """Return the zero of the derivative of the dual, mean_x[-lambda log mean_i exp(-r_i / lambda)] - lambda radius."""
        rewards, groups = self.batch.columns["reward"], self.batch.columns["group"]
        scored = [rewards[(groups == group) & ~rewards.isnan()] for group in groups.unique()]

        def slope(lambda_: float) -> float:
            point = torch.tensor(lambda_, dtype=torch.float64, requires_grad=True)
            values = [-point * torch.exp(-r / point).mean().log() for r in scored]
            return torch.autograd.grad(torch.stack(values).mean() - point * radius, point)[0].item()

        low, high = 1e-2, 1e2
        while high > low * (1 + 1e-12):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if slope(middle) > 0 else (low, middle)
        return middle
