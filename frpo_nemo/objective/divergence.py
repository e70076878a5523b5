"""Define "close to the trained policy" for the adversary: f-divergences, as gradients of the group loss.

With f*, the convex conjugate of the generator f, the robust value of a prompt is

    V = max_nu  nu - lambda mean_i m_i f*((nu - r_i) / lambda)                       theory.md (8)

and -V / lambda is the group loss; its derivative in m_i is f* at the optimal nu, divided by G.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from frpo_nemo.objective.ragged import Groups


@dataclass(frozen=True)
class WorstCase:
    """The worst distribution over the sampled responses to each prompt, on-policy."""

    density_M: Tensor  # its ratio to the uniform distribution, q_i: 1 on average over a group
    divergence_K: Tensor  # D_f from the uniform distribution
    value_K: Tensor  # its mean reward + lambda * divergence: V


class Divergence(ABC):
    """One f-divergence. M responses in K groups of G; everything is float64."""

    @abstractmethod
    def gradients(
        self, groups: Groups, rewards_M: Tensor, importance_M: Tensor, lambda_: float, jackknife: bool
    ) -> Tensor:
        """Return g_i = G d (group loss without baseline) / d m_i, with jackknife of G L - (G-1) mean_j L_{-j}. [M]

        importance_M: above 0.
        """

    @abstractmethod
    def worst_case(self, groups: Groups, rewards_M: Tensor, lambda_: float) -> WorstCase:
        """Return the minimiser of E_q[r] + lambda_ D_f(q) for each group."""


class KL(Divergence):
    """f = t log t: a group loss of log u with u = mean_i w_i m_i, w_i = exp(-(r_i - mean r) / lambda), theory.md (10)."""

    def gradients(
        self, groups: Groups, rewards_M: Tensor, importance_M: Tensor, lambda_: float, jackknife: bool
    ) -> Tensor:
        """Return, with h_i = w_i m_i / u (1 on average) and c_j = u / u_{-j} - 1 = (h_j - 1) / (G - h_j):

        g_i = h_i / m_i                                  no jackknife
        g_i = h_i / m_i * (1 - sum_{j != i} c_j)         jackknife
        """
        logits_M = -groups.centred(rewards_M) / lambda_ + torch.log(importance_M)
        h_M = groups.relative_exp(logits_M)
        if jackknife:
            h_M = h_M * (1 - _jackknife_others(groups, h_M)) - _jackknife_dominant(groups, h_M, logits_M)
        return h_M / importance_M

    def worst_case(self, groups: Groups, rewards_M: Tensor, lambda_: float) -> WorstCase:
        """Return q_i = w_i / mean w. The divergence is a mean of q log q - q + 1 >= 0, which keeps its precision near 0."""
        logits_M = -groups.centred(rewards_M) / lambda_
        log_mean_K = groups.log_mean_exp(logits_M)
        log_q_M = logits_M - log_mean_K[groups.ids]
        q_M = torch.exp(log_q_M)
        divergence_K = groups.mean(q_M * log_q_M - torch.expm1(log_q_M))
        return WorstCase(q_M, divergence_K, groups.mean(rewards_M) - lambda_ * log_mean_K)


class ChiSquared(Divergence):
    """f = (t^2 - 1) / 2 on t >= 0, half of Pearson's chi-squared: q_i = max(nu - r_i, 0) / lambda, where nu makes
    mean_i m_i q_i = 1; the responses above nu do not count at all. theory.md (13)."""

    def gradients(
        self, groups: Groups, rewards_M: Tensor, importance_M: Tensor, lambda_: float, jackknife: bool
    ) -> Tensor:
        """Return g_i = q_i^2 / 2; with jackknife G q_i^2 / 2 - sum_{j != i} (q_i of the group without j)^2 / 2."""
        sorted_groups = _SortedGroups.of(groups, groups.centred(rewards_M) / lambda_, importance_M)
        half_squares_KG = sorted_groups.density().square() / 2
        if jackknife:
            half_squares_KG *= groups.sizes[:, None]
            for j in range(half_squares_KG.shape[1]):  # one array of all groups at a time: it stays in the cache
                half_squares_KG -= sorted_groups.density_without(j).square() / 2
        return sorted_groups.restore(half_squares_KG)

    def worst_case(self, groups: Groups, rewards_M: Tensor, lambda_: float) -> WorstCase:
        sorted_groups = _SortedGroups.of(groups, groups.centred(rewards_M) / lambda_, torch.ones_like(rewards_M))
        q_M = sorted_groups.restore(sorted_groups.density())
        divergence_K = groups.mean((q_M - 1).square()) / 2
        return WorstCase(q_M, divergence_K, groups.mean(q_M * rewards_M) + lambda_ * divergence_K)


DIVERGENCES: dict[str, Divergence] = {"kl": KL(), "chi_squared": ChiSquared()}


@dataclass(frozen=True)
class _SortedGroups:
    """Groups as rows, lowest reward first, padded at the end with reward inf and importance 0."""

    values_KG: Tensor  # rewards / lambda
    importance_KG: Tensor
    sizes_K: Tensor
    rows_M: Tensor  # where each response went
    columns_M: Tensor

    @classmethod
    def of(cls, groups: Groups, values_M: Tensor, importance_M: Tensor) -> _SortedGroups:
        by_value = torch.argsort(values_M)
        order = by_value[torch.argsort(groups.ids[by_value], stable=True)]  # by group, then by value
        starts_K = torch.cumsum(groups.sizes, 0) - groups.sizes
        columns_M = torch.empty_like(groups.ids)
        columns_M[order] = torch.arange(order.numel(), device=order.device) - starts_K[groups.ids[order]]
        shape = (groups.count, int(groups.sizes.max()) if groups.count else 1)
        values_KG = values_M.new_full(shape, torch.inf)
        importance_KG = values_M.new_zeros(shape)
        values_KG[groups.ids, columns_M] = values_M
        importance_KG[groups.ids, columns_M] = importance_M
        return cls(values_KG, importance_KG, groups.sizes, groups.ids, columns_M)

    def density(self) -> Tensor:
        """Return q of every member, [K, G]."""
        return self._density(self.importance_KG, self.sizes_K[:, None])

    def density_without(self, j: int) -> Tensor:
        """Return q of every member in its group without the j-th, [K, G]; 0 for the j-th, and where there is no j-th. Sums
        are computed again: subtracting a response from the whole group's sum would cancel if it is most of that sum."""
        importance_KG = self.importance_KG.clone()
        importance_KG[:, j] = 0
        q_KG = self._density(importance_KG, self.sizes_K[:, None] - 1)
        q_KG[:, j] = 0
        return q_KG.masked_fill_(self.sizes_K[:, None] <= j, 0)

    def restore(self, values_KG: Tensor) -> Tensor:
        """Put values back into the order of the batch, [M]."""
        return values_KG[self.rows_M, self.columns_M]

    def _density(self, importance_KG: Tensor, sizes_K1: Tensor) -> Tensor:
        """Return max(nu - r_i, 0) / lambda where mean_i m_i max(nu - r_i, 0) / lambda = 1. If only the k lowest are below the
        level nu / lambda, it is (G + sum m r) / sum m over them, in units of lambda. The level is the lowest of these
        candidates (inf for no weight), because max(nu - r, 0) >= nu - r makes each an upper bound."""
        values_KG = self.values_KG.masked_fill(self.values_KG.isinf(), 0)
        weighted_KG = torch.cumsum(importance_KG * values_KG, 1)
        levels_K1 = ((sizes_K1 + weighted_KG) / torch.cumsum(importance_KG, 1)).amin(1, keepdim=True)
        return (levels_K1 - self.values_KG).clamp(min=0)


def _dominant(groups: Groups, h_M: Tensor) -> Tensor:
    """Return which response holds more than half of its group's weight: at most one per group. bool [M].

    Only for this one G - h_j cancels (and underflows: lambda = 0.01 makes weights of exp(-200000)); for all
    others c_j lies in [-1/G, 1)."""
    return h_M > 0.5 * groups.sizes[groups.ids]


def _jackknife_others(groups: Groups, h_M: Tensor) -> Tensor:
    """Return sum_{j != i, j not dominant} c_j. [M]"""
    corrections_M = (h_M - 1) / (groups.sizes[groups.ids] - h_M)
    corrections_M = torch.where(_dominant(groups, h_M), 0.0, corrections_M)
    return groups.sum(corrections_M)[groups.ids] - corrections_M


def _jackknife_dominant(groups: Groups, h_M: Tensor, logits_M: Tensor) -> Tensor:
    """Return h_i c_d for the dominant response d of the group, i != d; 0 for d itself and without one. [M]

    G - h_d is the sum of all other h, so h_i / (G - h_d) is a softmax over the group without d.
    """
    dominant_M = _dominant(groups, h_M)
    excess_K = groups.sum(torch.where(dominant_M, h_M - 1, 0.0))
    rest_M = groups.relative_exp(logits_M.masked_fill(dominant_M, -torch.inf))  # softmax times G
    return (excess_K / groups.sizes)[groups.ids] * rest_M
