"""Reading config.json: both styles, every refusal, and how a model divides over ranks. No process group, no weights."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture

LLAMA_8B = dict(  # Llama-3.1-8B-Instruct, as transformers 4 wrote it
    model_type="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    hidden_act="silu",
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=dict(
        factor=8.0,
        high_freq_factor=4.0,
        low_freq_factor=1.0,
        original_max_position_embeddings=8192,
        rope_type="llama3",
    ),
    attention_bias=False,
    mlp_bias=False,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
)


def read(tmp_path, **changes) -> Architecture:
    """Return the architecture of LLAMA_8B with changes; None removes a key."""
    config = {key: value for key, value in {**LLAMA_8B, **changes}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return Architecture.from_hf(tmp_path)


def test_both_styles_of_config_give_the_same_architecture(tmp_path):
    old = read(tmp_path)
    scaling = dict(LLAMA_8B["rope_scaling"], rope_theta=500000.0)
    new = read(
        tmp_path, rope_theta=None, rope_scaling=None, torch_dtype=None, rope_parameters=scaling, dtype="bfloat16"
    )
    assert old == new
    assert old.rope_theta == 500000.0 and old.rope_scaling["factor"] == 8.0 and old.dtype == "bfloat16"
    assert old.head_dim == 128 and old.num_kv_heads == 8 and not old.qkv_bias and not old.qk_norm


@pytest.mark.parametrize(
    "family, flags",
    [("llama", (False, False)), ("mistral", (False, False)), ("qwen2", (True, False)), ("qwen3", (False, True))],
)
def test_families_differ_in_bias_and_norms(tmp_path, family, flags):
    arch = read(tmp_path, model_type=family, sliding_window=8)
    assert (arch.qkv_bias, arch.qk_norm) == flags


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(model_type="gpt2"), "supported are llama, mistral, qwen2, qwen3"),
        (dict(num_local_experts=8), "num_local_experts=8, but models of model_type='llama' are dense"),
        (dict(model_type="deepseek_v3", n_routed_experts=8), "supported are llama, .*, qwen3_moe, mixtral"),
        (dict(model_type="qwen3_moe", num_experts=0), "num_experts=0; it must be a whole number of at least 1"),
        (dict(model_type="qwen3_moe", num_experts=4), "num_experts_per_tok=8, more than its 4 experts"),
        (dict(model_type="mixtral", num_experts_per_tok=1), "so its router has no gradient"),
        (dict(model_type="qwen3_moe", decoder_sparse_step=99), "gives no layer experts"),
        (dict(model_type="qwen3_moe", mlp_only_layers=[0, 99]), r"mlp_only_layers=\[0, 99\]; it must be a list of layers"),
        (dict(model_type="qwen3_moe", mlp_only_layers=2), "mlp_only_layers=2; it must be a list of layers"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'"),
        (dict(attention_bias=True), "attention_bias=true"),
        (dict(mlp_bias=True), "mlp_bias=true"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        (dict(rope_scaling=dict(type="yarn", factor=4.0)), "rope_type='yarn'"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=4.0)), "without low_freq_factor, high_freq_factor"),
        (dict(rope_scaling=dict(type="linear")), "rope_type='linear' without factor"),
        (dict(quantization_config=dict(quant_method="fp8")), "quantized"),
        (dict(torch_dtype="float8_e4m3fn"), "dtype 'float8_e4m3fn'"),
        (dict(hidden_size=None, vocab_size=None), "lacks vocab_size, hidden_size"),
    ],
)
def test_refuses_what_it_cannot_train(tmp_path, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(max_position_embeddings=None), "max_position_embeddings=null; it must be a whole number of at least 1"),
        (dict(max_position_embeddings=-1), "max_position_embeddings=-1"),
        (dict(vocab_size="128256"), 'vocab_size="128256"'),
        (dict(num_hidden_layers=32.0), "num_hidden_layers=32.0"),
        (dict(model_type="mistral", sliding_window=[4096]), "sliding_window="),
        (dict(rms_norm_eps=None), "rms_norm_eps=null; it must be a number such as 1e-6"),
    ],
)
def test_a_value_that_is_no_number_is_a_sentence(tmp_path, changes, sentence):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B | changes))
    with pytest.raises(ConfigError, match=sentence):
        Architecture.from_hf(tmp_path)


@pytest.mark.parametrize("nulls", [["num_key_value_heads"], ["head_dim"], ["max_window_layers", "sliding_window"]])
def test_null_stays_what_it_is_where_transformers_has_it(tmp_path, nulls):
    config = LLAMA_8B | dict(model_type="qwen2", use_sliding_window=False) | dict.fromkeys(nulls)
    (tmp_path / "config.json").write_text(json.dumps(config))
    arch = Architecture.from_hf(tmp_path)
    assert arch.num_kv_heads == (32 if nulls == ["num_key_value_heads"] else 8) and arch.head_dim == 128


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_windows_in_some_layers_are_refused_for_vllm(tmp_path, family):
    def with_windows(**changes):
        return read(tmp_path, model_type=family, use_sliding_window=True, sliding_window=64, **changes)

    mixed = ["full_attention"] * 20 + ["sliding_attention"] * 12
    for changes in (dict(max_window_layers=20), dict(max_window_layers=20, layer_types=mixed)):
        with pytest.raises(ConfigError, match="use_sliding_window for 12 of 32 layers, which vLLM does not support"):
            with_windows(**changes).check_engine_windows()
    for changes in (dict(max_window_layers=32), dict(max_window_layers=0), dict(layer_types=["full_attention"] * 32)):
        with_windows(**changes).check_engine_windows()


def test_refuses_a_directory_without_a_readable_config(tmp_path):
    with pytest.raises(ConfigError, match="config.json does not exist"):
        Architecture.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        Architecture.from_hf(tmp_path)


@pytest.mark.parametrize(
    "changes, window",
    [
        (dict(model_type="mistral", sliding_window=4096), 4096),
        (dict(model_type="mistral"), 4096),  # transformers' default
        (dict(model_type="qwen2", sliding_window=4096, use_sliding_window=False), None),
        (dict(model_type="qwen2", sliding_window=4096, use_sliding_window=True, max_window_layers=28), 4096),
        (dict(model_type="qwen2", sliding_window=4096, use_sliding_window=True, max_window_layers=32), None),
        (
            dict(model_type="qwen3", use_sliding_window=True, sliding_window=99, layer_types=["full_attention"] * 32),
            None,
        ),
        (dict(model_type="llama", sliding_window=4096), None),  # llama has none
    ],
)
def test_sliding_window_is_known_only_where_it_is_active(tmp_path, changes, window):
    assert read(tmp_path, **changes).sliding_window == window


def test_mistral_with_null_window_attends_to_everything(tmp_path):
    config = dict(LLAMA_8B, model_type="mistral", sliding_window=None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Architecture.from_hf(tmp_path).sliding_window is None


def test_sequences_longer_than_the_window_or_the_model_are_refused(tmp_path):
    arch = read(tmp_path, model_type="mistral", sliding_window=100, max_position_embeddings=200)
    arch.check_sequence_length(100)
    with pytest.raises(ConfigError, match="101 tokens exceed sliding_window=100"):
        arch.check_sequence_length(101)
    with pytest.raises(ConfigError, match="201 tokens exceed max_position_embeddings=200"):
        read(tmp_path, max_position_embeddings=200).check_sequence_length(201)


def test_rope_frequencies_equal_transformers(tmp_path):
    import torch
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for scaling in (
        LLAMA_8B["rope_scaling"],
        dict(LLAMA_8B["rope_scaling"], low_freq_factor=2.0),
        dict(type="linear", factor=3.0),
    ):
        arch = read(tmp_path, rope_scaling=scaling)
        kind = scaling.get("rope_type", scaling.get("type"))
        expected, _ = ROPE_INIT_FUNCTIONS[kind](AutoConfig.from_pretrained(tmp_path), "cpu")
        assert torch.equal(arch.rope_frequencies(), expected)


def test_padded_vocabulary_is_minimal_and_the_same_for_usual_layouts(tmp_path):
    arch = read(tmp_path, vocab_size=131)
    assert [arch.padded_vocab_size(tp) for tp in (1, 2, 4, 8, 64)] == [192] * 5
    assert arch.padded_vocab_size(3) == 192 and arch.padded_vocab_size(5) == 320
    assert read(tmp_path).padded_vocab_size(8) == 128256


@pytest.mark.parametrize(
    "split, sentence",
    [
        (dict(tp=3, pp=1), "tensor_model_parallel_size=3 does not divide num_attention_heads=32 .model.path="),
        (dict(tp=1, pp=5), "pipeline_model_parallel_size=5 does not divide num_hidden_layers=32"),
        (dict(tp=1, pp=1, first=3), "num_layers_in_first_pipeline_stage needs pipeline_model_parallel_size above 1"),
        (dict(tp=1, pp=2, first=0), "num_layers_in_first_pipeline_stage=0 must be at least 1"),
        (dict(tp=1, pp=2, first=32), "leaves 0 of 32 layers for the other 1 of 2"),
        (dict(tp=1, pp=2, first=3, last=3), "leaves 26 of 32 layers for the other 0 of 2"),
        (dict(tp=1, pp=4, first=7), "leaves 25 of 32 layers for the other 3 of 4"),
        (dict(tp=1, pp=4, first=30, last=30), "leaves -28 of 32 layers"),
    ],
)
def test_impossible_splits_are_refused(tmp_path, split, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read(tmp_path).check_parallel(**split)


def test_key_value_heads_divide_or_multiply_the_tensor_size(tmp_path):
    read(tmp_path).check_parallel(tp=16, pp=1)
    with pytest.raises(ConfigError, match="neither a divisor nor a multiple of num_key_value_heads=6"):
        read(tmp_path, num_key_value_heads=6, num_attention_heads=48, intermediate_size=14400).check_parallel(
            tp=4, pp=1
        )
    with pytest.raises(ConfigError, match="does not divide intermediate_size=14337"):
        read(tmp_path, intermediate_size=14337).check_parallel(tp=2, pp=1)


@pytest.mark.parametrize(
    "pp, first, last", [(1, None, None), (4, None, None), (2, 5, None), (3, None, 8), (4, 7, 5), (2, 20, 12)]
)
def test_stages_hold_the_layers_that_megatron_core_gives_them(tmp_path, pp, first, last):
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    arch = read(tmp_path)
    arch.check_parallel(1, pp, first, last)
    config = SimpleNamespace(
        num_layers=32,
        pipeline_model_parallel_size=pp,
        pipeline_model_parallel_layout=None,
        virtual_pipeline_model_parallel_size=None,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
    )
    stages = [arch.layers_of_stage(rank, pp, first, last) for rank in range(pp)]
    assert [layer for stage in stages for layer in stage] == list(range(32))
    for rank, stage in enumerate(stages):
        assert len(stage) == get_num_layers_to_build(config, pp_rank=rank)
        assert stage.start == get_transformer_layer_offset(config, pp_rank=rank)
