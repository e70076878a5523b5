"""Build the policy, a megatron-core GPTModel, from an Architecture and a ModelConfig. weights/ loads its weights.

The model has Transformer Engine's layers (FP8, context parallelism) if stack.uses_transformer_engine allows it; otherwise
megatron-core's local ones with the replacements of layers.py. Either gets lora.py's adapters if model.lora.rank is above 0.
The output layer passes hidden states through: logprobs.py computes what is needed of the logits, in chunks.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from frpo_nemo.config.options import ModelConfig
from frpo_nemo.megatron import routing
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.cpu import runs_on_megatron_device
from frpo_nemo.megatron.layers import PackedRotaryEmbedding, PaddedExperts, RMSNorm, local_layer_spec
from frpo_nemo.megatron.lora import add_adapters
from frpo_nemo.megatron.weights.binding import bind, bind_adapters
from frpo_nemo.stack import uses_transformer_engine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(arch: Architecture, model: ModelConfig, *, transformer_engine: bool) -> TransformerConfig:
    """Return megatron-core's configuration."""
    dtype = DTYPES[model.precision]
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=model.precision == "bf16",
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        context_parallel_size=model.context_parallel_size,
        sequence_parallel=model.sequence_parallel,
        num_layers_in_first_pipeline_stage=model.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=model.num_layers_in_last_pipeline_stage,
        # Packs differ in length; for that, megatron-core requires this (unused) MoE dispatcher.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # Losses are global sums with global denominators, so megatron-core must not average anything.
        calculate_per_token_loss=True,
        # Every weight is loaded, so none is initialised.
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        # The fused versions need CUDA extensions or torch.compile; Transformer Engine brings its own.
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=transformer_engine,
        **_experts(arch, model, transformer_engine),
        **_recompute(model.recompute),
        **_fp8(model),
    )


def layer_spec(
    arch: Architecture, *, transformer_engine: bool, adapters: bool = False, has_experts: bool = False
) -> ModuleSpec:
    """Return one transformer layer, of Transformer Engine's modules or local. adapters: its linear layers will have some."""
    experts = arch.experts.number if has_experts else None
    if not transformer_engine:
        return local_layer_spec(arch.qk_norm, experts)
    spec = get_gpt_layer_with_transformer_engine_spec(
        qk_layernorm=arch.qk_norm, num_experts=experts, moe_grouped_gemm=has_experts
    )
    if adapters:
        _take_norms_apart(spec, has_experts)
    return spec


def _take_norms_apart(spec: ModuleSpec, has_experts: bool) -> None:
    """Separate norms from linear layers: an adapter needs its layer's input, which a layer that normalises it first hides."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = TENorm
    layer.self_attention.submodules.linear_qkv = TEColumnParallelLinear
    if not has_experts:  # experts have no adapters, and their norm is separate
        mlp = layer.mlp.keywords["submodules"]  # of functools.partial(MLP.as_mlp_submodule, submodules=...)
        mlp.linear_fc1 = TEColumnParallelLinear


@runs_on_megatron_device
def build_model(arch: Architecture, model: ModelConfig) -> GPTModel:
    """Return this rank's part of the policy, weights and adapters not set. Model parallel groups must exist already."""
    transformer_engine = uses_transformer_engine(model.precision)
    config = transformer_config(arch, model, transformer_engine=transformer_engine)
    layers = _layers_of_stage(arch, model, config, transformer_engine)
    gpt = GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=layers, layer_norm=_final_norm(transformer_engine)),
        vocab_size=arch.padded_vocab_size(model.tensor_model_parallel_size),
        max_sequence_length=arch.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        rotary_base=arch.rope_theta,
        share_embeddings_and_output_weights=arch.tied_embeddings,
        parallel_output=True,
    )
    if gpt.post_process:
        gpt.output_layer.__class__ = _HiddenStatesOutput
    if not transformer_engine:
        gpt.rotary_pos_emb.__class__ = PackedRotaryEmbedding
    if arch.experts and model.precision == "bf16" and not torch.cuda.is_available():
        for layer in gpt.decoder.layers:
            if isinstance(getattr(layer.mlp, "experts", None), SequentialMLP):
                layer.mlp.experts.__class__ = PaddedExperts
    if arch.experts:
        routing.follow(gpt, arch, get_transformer_layer_offset(config), model.expert_balance)
    if model.lora.rank:
        add_adapters(gpt, arch, model.lora)
    _mark_tensor_parallel(gpt, arch)
    gpt.rotary_pos_emb.inv_freq = arch.rope_frequencies().to(gpt.rotary_pos_emb.inv_freq.device)
    return gpt


def _layers_of_stage(
    arch: Architecture, model: ModelConfig, config: TransformerConfig, transformer_engine: bool
) -> list[ModuleSpec]:
    """Return the specs of this pipeline stage's layers."""
    adapters, specs = model.lora.rank > 0, {}
    for has_experts in (False, True) if arch.experts else (False,):
        specs[has_experts] = layer_spec(
            arch, transformer_engine=transformer_engine, adapters=adapters, has_experts=has_experts
        )
    first = get_transformer_layer_offset(config)
    layers = range(first, first + get_num_layers_to_build(config))
    return [specs[arch.experts is not None and arch.experts.layers[layer]] for layer in layers]


def output_weight(gpt: GPTModel) -> torch.Tensor:
    """Return the last stage's output projection, [padded vocabulary / TP, hidden]."""
    return (
        gpt.shared_embedding_or_output_weight() if gpt.share_embeddings_and_output_weights else gpt.output_layer.weight
    )


class _HiddenStatesOutput(ColumnParallelLinear):
    """Hold the output weight like the parent class, but return the final hidden states as the model's output."""

    def forward(self, input_, weight=None, runtime_gather_output=None, **kwargs):
        return input_, None


def _mark_tensor_parallel(gpt: GPTModel, arch: Architecture) -> None:
    """Mark sharded parameters, which megatron-core does only when it initialises their values. Otherwise the gradient norm
    would count them on TP rank 0 only."""
    for binding in (*bind(gpt, arch), *bind_adapters(gpt, arch)):
        if binding.parameter is not None:
            binding.parameter.tensor_model_parallel = not binding.weight.replicated


def _final_norm(transformer_engine: bool):
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return RMSNorm


def _experts(arch: Architecture, model: ModelConfig, transformer_engine: bool) -> dict:
    """Return the options of a mixture of experts (docs/moe.md)."""
    experts = arch.experts
    if experts is None:
        return {}
    return dict(
        num_moe_experts=experts.number,
        moe_router_topk=experts.chosen,
        moe_ffn_hidden_size=experts.ffn_size,
        moe_layer_freq=[int(has_experts) for has_experts in experts.layers],
        moe_router_score_function="softmax",
        moe_router_pre_softmax=not experts.normalised,  # softmax over those chosen is softmax over all, normalised
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_router_dtype="fp32" if model.fp32_router else None,
        moe_grouped_gemm=transformer_engine,
        expert_model_parallel_size=model.expert_model_parallel_size,
        expert_tensor_parallel_size=1,
    )


def _recompute(mode: str) -> dict:
    if mode == "full":
        return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    return {}


def _fp8(model: ModelConfig) -> dict:
    """Return the options of FP8. Under the delayed recipe, Transformer Engine reduces the largest values of each microbatch
    over a group. Replicas have unequal numbers of microbatches, so a group across them would make a rank wait forever."""
    return dict(fp8=model.fp8, fp8_recipe=model.fp8_recipe, tp_only_amax_red=True) if model.fp8 else {}
