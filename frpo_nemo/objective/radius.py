"""Find lambda from the radius of the KL ball: solve the dual of the max-min problem over the rewards of a whole batch."""

from __future__ import annotations

import math

from torch import Tensor

from frpo_nemo.objective.divergence import DIVERGENCES
from frpo_nemo.objective.ragged import Groups

RANGE = 1e6  # lambda is searched within this factor of the largest |r - mean r|, both ways, and at least up to it
TOLERANCE = 1e-10  # of log lambda


def solve_lambda(groups: Groups, rewards_M: Tensor, radius: float) -> float | None:
    """Return the argmax over lambda of mean_x[-lambda log mean_i exp(-r_i / lambda)] - lambda * radius, theory.md (16).

    The dual is concave, and its derivative (17) is the mean over prompts of the worst policy's KL, minus the radius: a
    Newton iteration on log KL against log lambda (a line of slope -2 for large lambda), kept inside a bracket.
    rewards_M: float64 [M]; radius: in nats, >= 0. None if no group has differing rewards: any lambda will do.

    At the ends of the range there is no such lambda. A radius of 0 gives the largest, where on-policy lambda * A_eff is
    Dr. GRPO's r_i - mean(r) (with the jackknife G / (G-1) times that). A radius that all the mass on the lowest reward attains,
    mean_x log(G / number of lowest), gives the smallest, where the dual's value is the mean of the lowest rewards.
    """
    rewards_M = groups.centred(rewards_M)  # differences may be tiny compared with the rewards
    spread = rewards_M.abs().max().item() if groups.count else 0.0
    if spread == 0:
        return None
    low, high = math.log(spread / RANGE), math.log(max(spread, 1.0) * RANGE)
    if _log_kl_and_slope(groups, rewards_M, low)[0] <= _log(radius):
        return math.exp(low)
    if _log_kl_and_slope(groups, rewards_M, high)[0] >= _log(radius):
        return math.exp(high)
    point, steps = math.log(spread), [math.inf, math.inf]
    while high - low > TOLERANCE:
        log_kl, slope = _log_kl_and_slope(groups, rewards_M, point)
        excess = log_kl - math.log(radius)
        low, high = (point, high) if excess > 0 else (low, point)
        step = -excess / slope if slope < 0 else math.inf
        if abs(step) < TOLERANCE:
            break
        # Take a Newton step inside the bracket and at most half the last but one; otherwise halve the bracket, so it ends.
        if not low < point + step < high or abs(step) > steps[-2] / 2:
            step = (low + high) / 2 - point
        point += step
        steps.append(abs(step))
    return math.exp(point)


def _log_kl_and_slope(groups: Groups, rewards_M: Tensor, log_lambda: float) -> tuple[float, float]:
    """Return the log of the worst policies' mean KL, and its derivative in log lambda: -mean Var_q(r) / lambda^2 / KL."""
    lambda_ = math.exp(log_lambda)
    worst = DIVERGENCES["kl"].worst_case(groups, rewards_M, lambda_)
    kl = worst.divergence_K.mean().item()
    below_mean_M = rewards_M - groups.mean(worst.density_M * rewards_M)[groups.ids]
    variance = groups.mean(worst.density_M * below_mean_M.square()).mean().item()
    return _log(kl), -variance / lambda_**2 / kl if kl > 0 else 0.0


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
