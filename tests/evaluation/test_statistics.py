"""Paired differences against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from frpo_nemo.evaluation.statistics import holm, p_text, paired_difference, summarize


def test_the_spread_is_the_sample_standard_deviation_and_one_value_has_none():
    summary = summarize([1.0, 2.0, 4.0])
    assert summary.mean == pytest.approx(7 / 3) and summary.n == 3
    assert summary.std == pytest.approx(math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2))
    assert summarize([0.5]).std is None
    assert summarize([]) is None


def test_paired_statistics_are_those_of_the_differences_by_seed():
    found = paired_difference({1: 0.6, 2: 0.9, 3: 0.8}, {3: 0.5, 2: 0.7, 1: 0.5})
    assert found.by_seed == pytest.approx({1: 0.1, 2: 0.2, 3: 0.3})
    assert (found.mean, found.std, found.n) == (pytest.approx(0.2), pytest.approx(0.1), 3)
    assert (found.wins, found.losses) == (3, 0)
    t = 0.2 / (0.1 / math.sqrt(3))
    assert found.t_p == pytest.approx(1 - t / math.sqrt(t**2 + 2))  # Student's t with two degrees of freedom
    half = 4.302652729696 * 0.1 / math.sqrt(3)  # its 97.5% point, from a table
    assert found.ci == pytest.approx((0.2 - half, 0.2 + half))
    assert found.wilcoxon_p == pytest.approx(2 / 2**3)  # all of one sign: one of the 2**3 assignments, on either side


def test_only_common_seeds_are_paired():
    found = paired_difference({1: 1.0, 2: 1.0, 4: 9.0}, {1: 0.5, 2: 0.0, 3: 9.0})
    assert found.by_seed == {1: 0.5, 2: 1.0}
    assert paired_difference({1: 1.0}, {2: 1.0}) is None


def test_one_seed_has_no_spread_and_no_test():
    found = paired_difference({1: 1.0}, {1: 0.4})
    assert (found.mean, found.n, found.wins) == (pytest.approx(0.6), 1, 1)
    assert found.std is found.ci is found.t_p is found.wilcoxon_p is None


def test_equal_differences_have_no_t_test_and_no_differences_have_no_test_at_all():
    equal = paired_difference({1: 0.3, 2: 0.5}, {1: 0.2, 2: 0.4})  # both .1 but for rounding
    assert equal.t_p is equal.ci is None and equal.wilcoxon_p == pytest.approx(0.5)
    none = paired_difference({1: 0.3, 2: 0.5}, {1: 0.3, 2: 0.5})
    assert none.t_p is none.wilcoxon_p is None and (none.wins, none.losses) == (0, 0)


def test_wilcoxon_reaches_five_percent_with_six_seeds_and_not_with_five():
    rising = {seed: 0.1 * seed for seed in range(1, 7)}
    zero = dict.fromkeys(rising, 0.0)
    assert paired_difference(rising, zero).wilcoxon_p == pytest.approx(0.03125)
    del rising[6]
    assert paired_difference(rising, zero).wilcoxon_p == pytest.approx(0.0625)


def test_holm_steps_down_and_leaves_out_what_was_not_tested():
    assert holm([0.01, 0.04, None, 0.03]) == [pytest.approx(0.03), pytest.approx(0.06), None, pytest.approx(0.06)]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("p, text", [(0.0625, ".0625"), (0.0312499, ".0312"), (1.0, "1"), (1e-5, "<.001"), (None, "–")])
def test_p_values_are_written_with_three_digits(p, text):
    assert p_text(p) == text
