"""Paired differences against values worked out by hand."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from frpo_nemo.report.comparisons import holm, paired_test
from frpo_nemo.report.tables import mean_text, p_text

NAN = float("nan")


def compared(first, second):
    return paired_test(pd.Series(first), pd.Series(second))


def test_the_spread_is_the_sample_standard_deviation_and_one_value_has_none():
    assert mean_text(pd.Series([1.0, 2.0, 4.0])) == "2.333 ± 1.528"  # sqrt(((4/3)^2 + (1/3)^2 + (5/3)^2) / 2)
    assert mean_text(pd.Series([1.0, NAN, 2.0, 4.0])) == "2.333 ± 1.528"
    assert mean_text(pd.Series([0.5])) == "0.500"
    assert mean_text(pd.Series([NAN])) == "–"


def test_paired_statistics_are_those_of_the_differences_by_seed():
    found = compared({1: 0.6, 2: 0.9, 3: 0.8}, {3: 0.5, 2: 0.7, 1: 0.5})  # .1, .2, .3
    assert (found.mean, found.std, found.n) == (pytest.approx(0.2), pytest.approx(0.1), 3)
    assert (found.wins, found.losses) == (3, 0)
    t = 0.2 / (0.1 / math.sqrt(3))
    assert found.t_p == pytest.approx(1 - t / math.sqrt(t**2 + 2))  # Student's t with two degrees of freedom
    half = 4.302652729696 * 0.1 / math.sqrt(3)  # its 97.5% point, from a table
    assert (found.low, found.high) == pytest.approx((0.2 - half, 0.2 + half))
    assert found.wilcoxon_p == pytest.approx(2 / 2**3)  # all of one sign: one of the 2**3 assignments, on either side


def test_only_common_seeds_are_paired():
    found = compared({1: 1.0, 2: 1.0, 4: 9.0, 5: NAN}, {1: 0.5, 2: 0.0, 3: 9.0, 5: 1.0})
    assert (found.n, found.mean) == (2, 0.75)
    assert compared({1: 1.0}, {2: 1.0}).n == 0


def test_one_seed_has_no_spread_and_no_test():
    found = compared({1: 1.0}, {1: 0.4})
    assert (found.mean, found.n, found.wins) == (pytest.approx(0.6), 1, 1)
    assert all(math.isnan(value) for value in (found.std, found.low, found.high, found.t_p, found.wilcoxon_p))


def test_equal_differences_have_no_t_test_and_no_differences_have_no_test_at_all():
    equal = compared({1: 0.3, 2: 0.5}, {1: 0.2, 2: 0.4})  # both .1 except for rounding
    assert math.isnan(equal.t_p) and math.isnan(equal.low) and equal.wilcoxon_p == pytest.approx(0.5)
    none = compared({1: 0.3, 2: 0.5}, {1: 0.3, 2: 0.5})
    assert math.isnan(none.t_p) and math.isnan(none.wilcoxon_p) and (none.wins, none.losses) == (0, 0)


def test_wilcoxon_reaches_five_percent_with_six_seeds_and_not_with_five():
    rising = {seed: 0.1 * seed for seed in range(1, 7)}
    zero = dict.fromkeys(rising, 0.0)
    assert compared(rising, zero).wilcoxon_p == pytest.approx(0.03125)
    del rising[6]
    assert compared(rising, zero).wilcoxon_p == pytest.approx(0.0625)


def test_holm_steps_down_and_leaves_out_what_was_not_tested():
    found = holm(pd.Series([0.01, 0.04, NAN, 0.03])).tolist()
    assert found == pytest.approx([0.03, 0.06, NAN, 0.06], nan_ok=True)
    assert holm(pd.Series([0.9, 0.8])).tolist() == [1.0, 1.0]
    assert holm(pd.Series([], dtype=float)).empty


@pytest.mark.parametrize("p, text", [(0.0625, ".0625"), (0.0312499, ".0312"), (1.0, "1"), (1e-5, "<.001"), (NAN, "–")])
def test_p_values_are_written_with_three_digits(p, text):
    assert p_text(p) == text
