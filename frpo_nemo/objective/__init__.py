"""Compute per-sequence advantages and losses from rewards: the mathematics of training. Pure torch, no processes.

One optimizer step of any objective:

    advantages = objective.effective_advantages(rewards, groups)  # over the global batch
    weights = objective.coefficients(rewards, groups)             # over the global batch
    loss, clipped = objective.sequence_loss(...)                  # any part of the batch, in any split
    (weights * loss).sum().backward()                             # summed over parts: the loss of the rewards

The KL to the reference (`objective.beta`, kl.py) and the weights against a train-rollout mismatch
(mismatch.py) are the same for every objective and have their own modules here; so has the one reward of a response
with several rewards, some of them missing (parts.py).
"""

from frpo_nemo.objective.base import Objective
from frpo_nemo.objective.frpo import FRPO
from frpo_nemo.objective.grpo import GRPO, DrGRPO
from frpo_nemo.objective.registry import build_objective, register_objective

__all__ = ["FRPO", "GRPO", "DrGRPO", "Objective", "build_objective", "register_objective"]
