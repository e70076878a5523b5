"""FP8 as megatron-core sets it up with Transformer Engine: recipes, the group that shares scales, and padding."""

import pytest
import te_stand_in

from frpo_nemo.config.option import own_options
from frpo_nemo.config.options import ModelConfig

if not te_stand_in.is_possible():
    pytest.skip("Transformer Engine is not installed; make test STACK=gpu has it", allow_module_level=True)
CHOICES = {each.key: each.rule.choices for each in own_options(ModelConfig)}
CLASSES = {"delayed": "DelayedScaling", "tensorwise": "Float8CurrentScaling", "blockwise": "Float8BlockScaling"}


@pytest.fixture(params=CHOICES["fp8_recipe"])
def recipe(request) -> str:
    return request.param


@pytest.fixture(params=filter(None, CHOICES["fp8"]))
def format(request) -> str:
    return request.param


@pytest.fixture
def facts(format, recipe, te_facts) -> list[dict]:
    """Return the facts of every layout."""
    found = te_facts(kind="fp8", format=format, recipe=recipe)
    assert len(found) == 4
    return found


def test_a_recipe_of_the_configuration_is_one_of_transformer_engine(facts, format, recipe):
    for each in facts:
        assert each["is_autocast"] and CLASSES[recipe] in each["class"] and each["te_format"] == format.upper()


def test_scales_are_shared_within_a_replica_alone(facts):
    """Replicas have different numbers of microbatches, and each would wait for the others at every one of them."""
    for each in facts:
        assert each["amax_group"] == each["replica"]
        assert len(each["replica"]) == {"TP1": 1, "TP2 x CP2": 4}.get(each["layout"], 2)  # of two replicas' ranks


def test_packs_have_as_many_tokens_as_the_products_want(facts):
    for each in facts:
        tensor_ranks = 2 if each["layout"] in ("TP2, sequence parallelism", "TP2 x CP2") else 1
        assert len(each["tokens"]) == 2
        assert all(tokens % (tensor_ranks * each["alignment"]) == 0 for tokens in each["tokens"]), each
