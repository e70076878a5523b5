"""Combine the rewards of one response, its parts, of which some may be missing (NaN), into the reward that a group compares.

A missing part is never 0, which would count for the response or against it. docs/theory.md, section 11, explains the filling.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compared_rewards(parts_NP: Tensor, weights_P: Tensor, groups_N: Tensor) -> Tensor:
    """Return the weighted sum of each response's parts, a missing one filled with the mean of those that the group has.

    parts_NP: float, NaN = missing. groups_N: int64, any ids; whole groups. Returns float64 [N]. NaN: a response that has
    none of the parts in which its group differs, because nothing compares it with the others; if no part differs, one
    without any part. So a part that is equal wherever a group has it changes no advantage.
    """
    weighted_NP = parts_NP.double() * weights_P.double()
    given_NP = ~weighted_NP.isnan()
    lowest_NP = _reduced(weighted_NP.where(given_NP, torch.inf), groups_N, "amin")
    differs_NP = _reduced(weighted_NP.where(given_NP, -torch.inf), groups_N, "amax") > lowest_NP
    # Relative to the lowest, so that the mean of equal parts is exactly that part, however it rounds.
    above_NP = (weighted_NP - lowest_NP).where(given_NP, 0.0)
    count_NP = _reduced(given_NP.double(), groups_N, "sum")
    filling_NP = (lowest_NP + _reduced(above_NP, groups_N, "sum") / count_NP).where(count_NP > 0, 0.0)
    totals_N = sum(weighted_NP.where(given_NP, filling_NP).unbind(1))
    compared_N = torch.where(differs_NP.any(1), (given_NP & differs_NP).any(1), given_NP.any(1))
    return totals_N.where(compared_N, torch.nan)


def partly_scored(parts_NP: Tensor, groups_N: Tensor) -> Tensor:
    """Return which responses have a part but lack one that another of their group has. bool [N]. See compared_rewards."""
    given_NP = ~parts_NP.isnan()
    lacking_NP = ~given_NP & (_reduced(given_NP.double(), groups_N, "amax") > 0)
    return given_NP.any(1) & lacking_NP.any(1)


def _reduced(values_NP: Tensor, groups_N: Tensor, how: str) -> Tensor:
    """Return each group's reduction (amin, amax or sum) for each of its members. [N, P]"""
    ids, places_N = torch.unique(groups_N, return_inverse=True)
    reduced = values_NP.new_zeros(ids.numel(), values_NP.shape[1])
    index_NP = places_N.unsqueeze(1).expand_as(values_NP)
    return reduced.scatter_reduce_(0, index_NP, values_NP, how, include_self=False)[places_N]
