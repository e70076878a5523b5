"""The mathematics of training: rewards in, per-sequence advantages and losses out. Pure torch, no processes.

One optimizer step of any objective:

    advantages = objective.effective_advantages(rewards, groups)  # over the global batch
    weights = objective.coefficients(rewards, groups)             # over the global batch
    loss, clipped = objective.sequence_loss(...)                  # any part of the batch, in any split
    (weights * loss).sum().backward()                             # summed over parts: the loss of the rewards

The KL to the frozen reference (`objective.beta`, kl.py) and the weights against a train-rollout mismatch
(mismatch.py) are the same for every objective and stand beside them; so is the one reward of a response that has
several, some of them missing (parts.py).
"""

from frpo_nemo.objective.base import Objective
from frpo_nemo.objective.frpo import FRPO
from frpo_nemo.objective.grpo import GRPO, DrGRPO
from frpo_nemo.objective.registry import build_objective, register_objective

__all__ = ["FRPO", "GRPO", "DrGRPO", "Objective", "build_objective", "register_objective"]
