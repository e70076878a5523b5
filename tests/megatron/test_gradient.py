"""The gradient of one training step: equal to autograd of the paper's group loss, whatever the layout."""

import gradient_checks
import pytest
import torch
from tiny_models import make_tiny

SETTINGS = {"name": "frpo", "lambda_": 0.5, "beta": 0.1, "clip_high": 0.05}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model") / "qwen2", "qwen2", layers=2)


@pytest.fixture(scope="module")
def expected(model):
    return gradient_checks.group_loss_gradient(model, SETTINGS)


def relative_error(gradient: dict, expected: dict) -> float:
    """Over all parameters together: |difference| / |expected|."""
    assert gradient.keys() == expected.keys()
    difference = sum((gradient[name].double() - expected[name]).square().sum() for name in expected)
    return torch.sqrt(difference / sum(tensor.square().sum() for tensor in expected.values())).item()


LAYOUTS = {
    "one microbatch": dict(world=1),
    "a microbatch per sequence": dict(world=1, microbatch_tokens=1),
    "recomputed activations": dict(world=1, recompute="full", microbatch_tokens=64),
    "DP2, groups straddle replicas": dict(world=2, microbatch_tokens=100),
    "DP4": dict(world=4, microbatch_tokens=64),
    "TP2": dict(world=2, tp=2, microbatch_tokens=128),
    "TP2 with sequence parallelism": dict(world=2, tp=2, sp=True, microbatch_tokens=90),
    "PP2": dict(world=2, pp=2, microbatch_tokens=64),
    "TP2 PP2 with sequence parallelism": dict(world=4, tp=2, pp=2, sp=True, microbatch_tokens=64),
    "TP2 DP2": dict(world=4, tp=2, microbatch_tokens=50),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_gradient_is_that_of_the_group_loss_in_every_layout(workers, model, expected, layout):
    world, arguments = layout["world"], {key: value for key, value in layout.items() if key != "world"}
    gradient = workers.run(world, gradient_checks.step_gradient, path=model, objective=SETTINGS, **arguments)[0]
    assert relative_error(gradient, expected) < 1e-5


def test_gradient_with_that_of_the_kl_itself(workers, model):
    """kl_gradient=reverse, off-policy; tests/training/test_off_policy.py has it on TP2, PP2 and DP2."""
    settings = SETTINGS | {"kl_gradient": "reverse"}
    gradient = workers.run(1, gradient_checks.step_gradient, path=model, objective=settings, microbatch_tokens=64)[0]
    assert relative_error(gradient, gradient_checks.group_loss_gradient(model, settings)) < 1e-5
    assert relative_error(gradient, gradient_checks.group_loss_gradient(model, SETTINGS)) > 1e-3


@pytest.mark.parametrize("name", ["a microbatch per sequence", "TP2 PP2 with sequence parallelism", "TP2 DP2"])
def test_gradient_over_the_tokens_that_sampling_kept(workers, model, expected, name):
    """Of policy, old policy and reference, the KL term included."""
    layout = dict(LAYOUTS[name])
    gradient = workers.run(
        layout.pop("world"), gradient_checks.step_gradient, path=model, objective=SETTINGS, kept=True, **layout
    )[0]
    assert relative_error(gradient, gradient_checks.group_loss_gradient(model, SETTINGS, kept=True)) < 1e-5
    assert relative_error(gradient, expected) > 0.1


@pytest.mark.parametrize("name", ["a microbatch per sequence", "TP2 PP2 with sequence parallelism", "TP2 DP2"])
def test_gradient_by_tokens_with_an_entropy_bonus(workers, model, name):
    layout = dict(LAYOUTS[name])
    settings = {"name": "dr_grpo", "aggregation": "token", "beta": 0.1, "entropy_bonus": 0.05}
    settings |= {"clip_low": 0.99, "clip_high": 100.0}
    gradient = workers.run(
        layout.pop("world"), gradient_checks.step_gradient, path=model, objective=settings, **layout
    )[0]
    assert relative_error(gradient, gradient_checks.token_loss_gradient(model, 0.1, 0.05)) < 1e-5
    assert relative_error(gradient, gradient_checks.token_loss_gradient(model, 0.1, 0.0)) > 1e-3


@pytest.mark.parametrize(
    "name", ["a microbatch per sequence", "DP2, groups straddle replicas", "TP2 PP2 with sequence parallelism"]
)
def test_supervised_training_has_loss_and_gradient_of_the_cross_entropy_of_completions(workers, model, name):
    layout = dict(LAYOUTS[name])
    [found, *_] = workers.run(layout.pop("world"), gradient_checks.supervised_gradient, path=model, **layout)
    expected = gradient_checks.cross_entropy_gradient(model)
    assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-6)
    assert relative_error(found, expected) < 1e-5


def test_the_comparison_notices_a_wrong_objective(workers, model, expected):
    wrong = SETTINGS | {"jackknife": False}
    gradient = workers.run(1, gradient_checks.step_gradient, path=model, objective=wrong)[0]
    assert relative_error(gradient, expected) > 1e-2
