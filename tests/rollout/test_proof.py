"""The check of what the engine computes, after the first refit of a start and before the first rollout."""

import checks
import pytest


@pytest.mark.parametrize("layer", ["model.layers.3.mlp.down_proj", "model.layers.0.self_attn.qkv_proj"])
def test_a_layer_that_computes_with_a_copy_is_found_before_the_first_rollout(one, layer):
    [message] = one(checks.check_proof_by_computing, name="qwen3", layer=layer)
    assert "The engine does not compute what the policy computes" in message
