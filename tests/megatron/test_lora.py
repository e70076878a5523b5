"""Adapters on the Megatron policy: PEFT's in every layout, and nothing else is trained."""

import gradient_checks
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_gradient import SETTINGS, relative_error
from tiny_models import make_tiny

from frpo_nemo.training.config import LoRAConfig

LORA = LoRAConfig(rank=5, alpha=7.0)
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model") / "qwen2", "qwen2", layers=2)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """A directory that PEFT wrote; A and B are random, so that both have gradients."""
    return write_adapter(model, tmp_path_factory.mktemp("adapter") / "peft")


def write_adapter(model: str, path) -> str:
    config = LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=MATRICES, task_type="CAUSAL_LM")
    peft = get_peft_model(gradient_checks.hugging_face_model(model).float(), config)
    generator = torch.Generator().manual_seed(3)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    peft.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def expected(model, adapter):
    return gradient_checks.group_loss_gradient(model, SETTINGS, adapter)


LAYOUTS = {
    "one process": dict(world=1),
    "recomputed activations": dict(world=1, recompute="full", microbatch_tokens=64),
    "DP2": dict(world=2, microbatch_tokens=100),
    "TP2": dict(world=2, tp=2, microbatch_tokens=128),
    "TP2 with sequence parallelism": dict(world=2, tp=2, sp=True, microbatch_tokens=90),
    "PP2": dict(world=2, pp=2, microbatch_tokens=64),
    "TP4 with a query group on two ranks": dict(world=4, tp=4, sp=True),
    "TP2 PP2 with sequence parallelism": dict(world=4, tp=2, pp=2, sp=True, recompute="full", microbatch_tokens=64),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_gradient_of_adapters_is_that_of_peft_in_every_layout(workers, model, adapter, expected, layout):
    world, arguments = layout["world"], {key: value for key, value in layout.items() if key != "world"}
    arguments |= dict(path=model, objective=SETTINGS, lora=LORA, adapter=adapter)
    gradient = workers.run(world, gradient_checks.step_gradient, **arguments)[0]
    assert relative_error(gradient, expected) < 1e-5
