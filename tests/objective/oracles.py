"""Independent oracles: the definitions of docs/theory.md written down one group at a time, solved by other means than
frpo_nemo/objective (autograd, root finding, SciPy on the primal problem, mpmath), and random batches to compare on.
Nothing here imports what it checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mpmath
import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from scipy import optimize, special
from torch import Tensor

DIVERGENCES = ("kl", "chi_squared")


def repeatable(max_examples: int) -> settings:
    return settings(deadline=None, max_examples=max_examples, derandomize=True)


def ragged_batch(seed: int, sizes: Sequence[int], missing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return float64 rewards in [-1, 1], some of them tied (NaN where missing), and interleaved group ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(10 * len(sizes), generator=generator)[: len(sizes)] - 5
    groups = ids.repeat_interleave(torch.tensor(sizes))
    groups = groups[torch.randperm(groups.numel(), generator=generator)]
    rewards = 2 * torch.rand(groups.numel(), generator=generator, dtype=torch.float64) - 1
    coarse = torch.rand(groups.numel(), generator=generator) < 0.3
    rewards[coarse] = (2 * rewards[coarse]).round() / 2
    rewards[torch.rand(groups.numel(), generator=generator) < missing] = torch.nan
    return rewards, groups


def drifted_importance(seed: int, like: Tensor) -> Tensor:
    """Return off-policy m, uniform from 0.3 to 1.3."""
    return 0.3 + torch.rand(like.shape, dtype=like.dtype, generator=torch.Generator().manual_seed(seed))


def far_drifted_importance(seed: int, like: Tensor) -> Tensor:
    """Return off-policy m, log-uniform from 1e-9 to 1: some responses all but dropped."""
    return 10 ** (-9 * torch.rand(like.shape, dtype=like.dtype, generator=torch.Generator().manual_seed(seed)))


seeds = st.integers(0, 10_000)
group_sizes = st.lists(st.integers(1, 7), min_size=1, max_size=5)
batches = st.builds(ragged_batch, seeds, group_sizes, st.sampled_from([0.0, 0.3]))


# The loss of sections 4 and 5 of docs/theory.md, for autograd: float64 [G], [G] -> scalar.


def plain_loss(rewards: Tensor, m: Tensor, lambda_: float, f_divergence: str) -> Tensor:
    """log u with rewards not centred, a constant away from (10); or -V / lambda, (8), where nu is a constant because
    the derivative in it is 0."""
    if f_divergence == "kl":
        return torch.log((torch.exp(-rewards / lambda_) * m).mean())
    nu = chi_squared_nu(rewards, m.detach(), lambda_)
    return -nu / lambda_ + (m * ((nu - rewards) / lambda_).clamp(min=0).square() / 2).mean()


def chi_squared_nu(rewards: Tensor, m: Tensor, lambda_: float) -> float:
    """Return the root of mean_i m_i max(nu - r_i, 0) / lambda = 1, by Brent's method."""

    def excess(nu: float) -> float:
        return (m * (nu - rewards).clamp(min=0) / lambda_).mean().item() - 1

    return optimize.brentq(
        excess, rewards.min().item(), rewards.max().item() + 2 * lambda_ / m.mean().item(), xtol=1e-15
    )


def jackknifed(loss: Callable[[Tensor, Tensor], Tensor], rewards: Tensor, m: Tensor) -> Tensor:
    """Return (14): G L - (G-1) mean_i L_{-i}."""
    others = ~torch.eye(rewards.numel(), dtype=torch.bool)
    left_out = torch.stack([loss(rewards[mask], m[mask]) for mask in others])
    return rewards.numel() * loss(rewards, m) - (rewards.numel() - 1) * left_out.mean()


def group_loss(rewards: Tensor, m: Tensor, objective: Any) -> Tensor:
    """Return the group loss with the jackknife and the baseline of an FRPO objective. m requires a gradient."""
    plain = partial(plain_loss, lambda_=objective.lambda_, f_divergence=objective.f_divergence)
    loss = jackknifed(plain, rewards, m) if objective.jackknife else plain(rewards, m)
    if not objective.baseline:
        return loss
    (gradient,) = torch.autograd.grad(loss, m, retain_graph=True)
    level = 1.0 if objective.f_divergence == "kl" else (m * gradient).sum().item()
    return loss - level * m.mean()


def batch_loss(rewards: Tensor, groups: Tensor, m: Tensor, objective: Any) -> Tensor:
    """Return the reward part of the total loss, scalar; 0 if no group has two scored responses."""
    values = []
    for group in groups.unique():
        chosen = (groups == group) & ~rewards.isnan()
        if chosen.sum() >= 2:
            values.append(group_loss(rewards[chosen], m[chosen], objective))
    scale = max(objective.lambda_, 1) if objective.scale == "paper" else objective.lambda_
    return scale * torch.stack(values).mean() if values else 0 * m.sum()


# The same with 40 digits, through the conjugate f*.

CONJUGATE: dict[str, Callable] = {
    "kl": lambda y: mpmath.exp(y - 1),
    "chi_squared": lambda y: max(y, mpmath.mpf(0)) ** 2 / 2,
}


def precise_level(values: Sequence, m: Sequence, f_divergence: str):
    """nu / lambda of rewards / lambda: root of mean_i m_i (f*)'(nu / lambda - values_i) = 1, for the KL in
    closed form, for chi-squared by bisection."""
    size, lowest = len(values), min(range(len(values)), key=values.__getitem__)
    if f_divergence == "kl":
        return 1 - mpmath.log(mpmath.fsum(b * mpmath.exp(-v) for v, b in zip(values, m, strict=True)) / size)
    low, high = values[lowest], values[lowest] + size / m[lowest] + 1
    for _ in range(150):
        middle = (low + high) / 2
        total = mpmath.fsum(b * max(middle - v, 0) for v, b in zip(values, m, strict=True))
        low, high = (low, middle) if total > size else (middle, high)
    return low


def precise_loss(rewards: Sequence, m: Sequence, lambda_: float, f_divergence: str, jackknife: bool):
    """Return (8) over -lambda, with jackknife (14)."""

    def loss(values: Sequence, m: Sequence):
        level = precise_level(values, m, f_divergence)
        terms = [b * CONJUGATE[f_divergence](level - v) for v, b in zip(values, m, strict=True)]
        return mpmath.fsum(terms) / len(values) - level

    values, size = [mpmath.mpf(r) / mpmath.mpf(lambda_) for r in rewards], len(rewards)
    if not jackknife:
        return loss(values, m)
    left_out = [loss(values[:i] + values[i + 1 :], m[:i] + m[i + 1 :]) for i in range(size)]
    return size * loss(values, m) - (size - 1) * mpmath.fsum(left_out) / size


def differences_of_loss(rewards: list, m: list, lambda_: float, f_divergence: str, jackknife: bool) -> Tensor:
    """G dL / d m_i by central differences of precise_loss: no envelope theorem, no autograd."""
    with mpmath.workdps(40):
        step, out = mpmath.mpf(10) ** -10, []
        for i in range(len(m)):
            sides = [
                precise_loss(
                    rewards, [b + sign * step * (i == j) for j, b in enumerate(m)], lambda_, f_divergence, jackknife
                )
                for sign in (1, -1)
            ]
            out.append(float(len(m) * (sides[0] - sides[1]) / (2 * step)))
        return torch.tensor(out, dtype=torch.float64)


def precise_gradients(rewards: list, m: list, lambda_: float, f_divergence: str, jackknife: bool) -> Tensor:
    """Return g_i of section 5 with 40 digits, of (14) with jackknife."""
    with mpmath.workdps(40):
        values, m = [mpmath.mpf(r) / mpmath.mpf(lambda_) for r in rewards], [mpmath.mpf(b) for b in m]
        size, conjugate = len(values), CONJUGATE[f_divergence]
        level = precise_level(values, m, f_divergence)
        g = [conjugate(level - v) for v in values]
        if jackknife:
            levels = [
                precise_level(values[:j] + values[j + 1 :], m[:j] + m[j + 1 :], f_divergence) for j in range(size)
            ]
            g = [
                size * g[i] - mpmath.fsum(conjugate(levels[j] - values[i]) for j in range(size) if j != i)
                for i in range(size)
            ]
        return torch.tensor([float(value) for value in g], dtype=torch.float64)


# The primal problems, by sequential quadratic programming over the worst distribution.

GENERATOR: dict[str, tuple[Callable, Callable]] = {  # f(t) and f'(t)
    "kl": (lambda t: t * np.log(t), lambda t: np.log(t) + 1),
    "chi_squared": (lambda t: (t**2 - 1) / 2, lambda t: t),
}
SMALLEST_DENSITY = 1e-12


def worst_penalised_mean(rewards: np.ndarray, lambda_: float, f_divergence: str) -> float:
    """min over q on the simplex of E_q[r] + lambda D_f(q || uniform)."""
    f, slope = GENERATOR[f_divergence]
    result = optimize.minimize(
        lambda t: np.mean(t * rewards + lambda_ * f(t)),
        np.ones_like(rewards),
        jac=lambda t: (rewards + lambda_ * slope(t)) / len(t),
        bounds=[(SMALLEST_DENSITY, None)] * len(rewards),
        constraints={"type": "eq", "fun": lambda t: t.mean() - 1, "jac": lambda t: np.full_like(t, 1 / len(t))},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return result.fun


def worst_mean_in_the_ball(groups: list[np.ndarray], radius: float) -> float:
    """min over a q per group of mean_x E_q[r], subject to mean_x KL(q || uniform) <= radius. In logits: with densities as
    variables the solver stalls where some of them are 0."""
    edges = np.cumsum([0, *map(len, groups)])

    def mean_and_kl(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the two numbers, [2], and their gradients, [2, M]."""
        totals, slopes = np.zeros(2), np.zeros((2, len(logits)))
        for rewards, start, end in zip(groups, edges, edges[1:], strict=False):
            log_p = logits[start:end] - special.logsumexp(logits[start:end])
            p, terms = np.exp(log_p), np.stack([rewards, log_p + math.log(end - start)])
            totals += terms @ p
            slopes[:, start:end] = p * (terms - (terms @ p)[:, None])
        return totals / len(groups), slopes / len(groups)

    rewards = np.concatenate(groups)
    result = optimize.minimize(
        lambda z: mean_and_kl(z)[0][0],
        -0.1 * (rewards - rewards.mean()),
        jac=lambda z: mean_and_kl(z)[1][0],
        constraints={
            "type": "ineq",
            "fun": lambda z: radius - mean_and_kl(z)[0][1],
            "jac": lambda z: -mean_and_kl(z)[1][1],
        },
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    assert mean_and_kl(result.x)[0][1] <= radius + 1e-9
    return result.fun


def precise_lambda(groups: list[np.ndarray], radius: float) -> float:
    """Return the root of mean_x KL(q_lambda || uniform) = radius with 40 digits, by bisection of log lambda."""
    with mpmath.workdps(40):

        def excess(log_lambda):
            total = mpmath.mpf(0)
            for group in groups:
                w = [mpmath.exp(-mpmath.mpf(float(r)) * mpmath.exp(-log_lambda)) for r in group - group.min()]
                q = [a / mpmath.fsum(w) for a in w]
                total += mpmath.fsum(a * mpmath.log(a * len(q)) for a in q if a > 0)
            return total / len(groups) - radius

        low, high = mpmath.mpf(-12), mpmath.mpf(12)
        while high - low > 1e-12:
            middle = (low + high) / 2
            low, high = (middle, high) if excess(middle) > 0 else (low, middle)
        return math.exp((low + high) / 2)
