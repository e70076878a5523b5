"""What Transformer Engine is asked for. Its modules need a CUDA device and were not run where these tests run."""

import pytest
import torch
from megatron.core.enums import Fp8Recipe
from tiny_models import make_tiny

from frpo_nemo.config.options import ModelConfig
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.model import layer_spec, transformer_config
from frpo_nemo.stack import uses_transformer_engine

WITHOUT_GPU = pytest.mark.skipif(
    not uses_transformer_engine("bf16"),
    reason="Transformer Engine needs a CUDA device; tests/stack builds its layers without one",
)


@pytest.fixture(scope="module")
def arch(tmp_path_factory):
    return Architecture.from_hf(make_tiny(tmp_path_factory.mktemp("te") / "qwen3", "qwen3"))


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
@pytest.mark.parametrize("format", ["hybrid", "e4m3"])
def test_fp8_options_reach_megatron(arch, format, recipe):
    model = ModelConfig(path="", fp8=format, fp8_recipe=recipe, context_parallel_size=2)
    # transformer_engine=True adds only the fused rotary embedding, which megatron-core refuses without the package.
    config = transformer_config(arch, model, transformer_engine=False)
    assert config.fp8 == format and Fp8Recipe(config.fp8_recipe).value == recipe
    assert config.context_parallel_size == 2 and config.params_dtype == torch.bfloat16


def test_without_fp8_nothing_of_it_is_set(arch):
    assert not transformer_config(arch, ModelConfig(path=""), transformer_engine=False).fp8


def test_delayed_scales_are_not_reduced_over_replicas(arch):
    """They have unequal numbers of microbatches, so a reduction in each would wait forever."""
    model = ModelConfig(path="", fp8="hybrid", fp8_recipe="delayed")
    assert transformer_config(arch, model, transformer_engine=False).tp_only_amax_red


@WITHOUT_GPU
def test_its_layer_normalises_queries_and_keys_where_the_family_does(arch):
    attention = layer_spec(arch, transformer_engine=True).submodules.self_attention.submodules
    assert attention.q_layernorm.__name__ != "IdentityOp" and attention.k_layernorm.__name__ != "IdentityOp"


@WITHOUT_GPU
def test_layers_with_adapters_show_their_normalised_input(arch):
    layer = layer_spec(arch, transformer_engine=True, adapters=True).submodules
    assert layer.input_layernorm.__name__ == layer.pre_mlp_layernorm.__name__ == "TENorm"
    for linear in (layer.self_attention.submodules.linear_qkv, layer.mlp.keywords["submodules"].linear_fc1):
        assert linear.__name__ == "TEColumnParallelLinear"
