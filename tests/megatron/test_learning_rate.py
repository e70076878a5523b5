"""The schedule: a function of the update's number."""

import math

import pytest

from frpo_nemo.config.options import OptimizerConfig
from frpo_nemo.megatron.optimizer import learning_rate

TOTAL = 100


def rates(**options) -> list[float]:
    optim = OptimizerConfig(lr=2.0, **options)
    return [learning_rate(update, TOTAL, optim) for update in range(TOTAL)]


def test_warm_up_is_linear_and_reaches_the_rate_with_its_last_update():
    found = rates(warmup_ratio=0.1)
    assert found[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert found[10:] == [2.0] * 90, "constant afterwards"


def test_without_warm_up_the_first_update_has_the_whole_rate():
    assert rates() == [2.0] * TOTAL
    assert rates(schedule="cosine")[0] == 2.0


def test_cosine_falls_from_the_rate_to_the_minimum_after_the_warm_up():
    found = rates(schedule="cosine", warmup_ratio=0.2, min_lr=0.5)
    assert found[20] == 2.0 and max(found) == 2.0
    assert found[60] == pytest.approx((2.0 + 0.5) / 2), "half way"
    assert found[40] == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi / 4)) / 2)
    assert 0.5 < found[-1] < 0.501
    assert learning_rate(TOTAL, TOTAL, OptimizerConfig(lr=2.0, schedule="cosine", min_lr=0.5)) == 0.5
