"""megatron-core's calls of Transformer Engine: of a forward pass each is bound to the signature of the installed function,
which itself is not run; of the optimizer's state everything but the update."""

import pytest
import te_stand_in
from tiny_models import FAMILIES

if not te_stand_in.is_possible():
    pytest.skip("Transformer Engine is not installed; make test STACK=gpu has it", allow_module_level=True)
LAYERS = 4  # of a tiny model


@pytest.mark.parametrize("lora", (False, True), ids=("", "LoRA"))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_goes_through_functions_that_take_it(family, lora, te_facts):
    (facts,) = te_facts(kind="calls", family=family, lora=lora)
    norms = 2 if family == "qwen3" else 0
    assert facts["called"] == {
        "LayerNormLinear.forward": 0 if lora else 2 * LAYERS,
        "Linear.forward": (4 if lora else 2) * LAYERS,
        "RMSNorm.forward": (norms + 2 if lora else norms) * LAYERS + 1,
        "DotProductAttention.forward": LAYERS,
        "transformer_engine.apply_rotary_pos_emb": 2 * LAYERS,
    }
    assert facts["hidden"] == facts["expected"]
    assert (facts["format"], facts["mask"], facts["without_padding"]) == ("thd", "padding_causal", True)


@pytest.fixture
def optimizer(te_facts) -> dict:
    (facts,) = te_facts(kind="optimizer")
    return facts


def test_its_adam_is_used_and_survives_a_checkpoint(optimizer):
    assert optimizer["class"] == "transformer_engine.pytorch.optimizers.fused_adam.FusedAdam"
    assert optimizer["moments"] == 2 * optimizer["parameters"]
    assert optimizer["restored"] and optimizer["step"] == 7


def test_the_offload_gives_gradients_up_and_keeps_the_moments(optimizer):
    before, between, after = optimizer["gradient_bytes"]
    assert before == after > 0 == between
    assert optimizer["kept"]
