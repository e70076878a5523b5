"""Several updates per rollout, through the training loop: every update's gradient is that of the paper's group loss at
the policy of that moment, whatever the layout, and lambda is one number for the whole rollout batch."""

import pytest
from off_policy_checks import UPDATES, Expected, recorded_step
from test_gradient import relative_error
from tiny_models import make_tiny

LAYOUTS = {"one": dict(world=1), "DP2": dict(world=2), "TP2": dict(world=2, tp=2), "PP2": dict(world=2, pp=2)}
in_every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
LAMBDA, RADIUS = 0.5, 0.1
ON_RADIUS = {"lambda_": "null", "kl_radius": RADIUS}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model") / "qwen2", "qwen2", layers=2)


@pytest.fixture(scope="module")
def expected(model):
    return Expected(model)


def run(workers, model, layout, **settings):
    """Return (updates, what each rank logged) of one step."""
    world, sizes = layout["world"], {name: size for name, size in layout.items() if name != "world"}
    ranks = workers.run(world, recorded_step, path=model, **sizes, **settings)
    updates = ranks[0][0]
    assert [update.groups for update in updates] == [[0, 1], [2, 3], [4, 5]]
    assert updates[0].mean_ratio_gap < 1e-5, "the first update is on-policy"
    for update in updates[1:]:
        assert update.mean_ratio_gap > 0.02 and 0.05 < update.clipped_share < 0.95
    return updates, [logged for _, logged in ranks]


@in_every_layout
def test_every_update_has_the_gradient_of_the_group_loss_at_the_policy_of_its_moment(workers, model, expected, layout):
    updates, ranks = run(workers, model, layout, lambda_=LAMBDA)
    for update in updates:
        assert relative_error(update.gradient, expected.gradient(update, LAMBDA)) < 1e-5
    for logged in ranks:
        assert logged["passes"] == 2 + UPDATES - 1, "reference, rollout's policy, and before each later update"


@in_every_layout
def test_the_reverse_gradient_of_the_kl_counts_every_token_by_its_ratio(workers, model, expected, layout):
    updates, _ = run(workers, model, layout, lambda_=LAMBDA, kl_gradient="reverse")
    for update in updates:
        assert relative_error(update.gradient, expected.gradient(update, LAMBDA, reverse=True)) < 1e-5
    assert relative_error(updates[-1].gradient, expected.gradient(updates[-1], LAMBDA)) > 1e-4


@in_every_layout
def test_frozen_importance_takes_on_policy_advantages_and_no_further_passes(workers, model, expected, layout):
    updates, ranks = run(workers, model, layout, lambda_=LAMBDA, refresh_importance="false")
    for update in updates:
        assert relative_error(update.gradient, expected.gradient(update, LAMBDA, frozen=True)) < 1e-5
    for update in updates[1:]:
        exact = expected.gradient(update, LAMBDA)
        assert relative_error(update.gradient, exact) > 1e-3, "frozen importance is an approximation"
    for logged in ranks:
        assert logged["passes"] == 2, "reference and rollout's policy"


@in_every_layout
def test_the_kl_radius_gives_all_updates_and_ranks_the_lambda_of_the_whole_batch(workers, model, expected, layout):
    updates, ranks = run(workers, model, layout, **ON_RADIUS)
    lambda_ = expected.lambda_of_radius(RADIUS)
    for logged in ranks:
        assert logged["objective/lambda"] == logged["memory/lambda_"] == ranks[0]["objective/lambda"]
        assert logged["objective/lambda"] == pytest.approx(lambda_, rel=1e-8)
        assert logged["objective/worst_case_divergence"] == pytest.approx(RADIUS, rel=1e-8)
    for update in updates:
        assert relative_error(update.gradient, expected.gradient(update, lambda_)) < 1e-5
