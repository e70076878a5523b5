"""config.json of published models, with the values that matter here."""

from __future__ import annotations

import json
from pathlib import Path


def _model(family: str, vocab, hidden, ffn, layers, heads, kv_heads, positions, **more) -> dict:
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    name = (names | {"qwen3_moe": "Qwen3Moe", "mixtral": "Mixtral"})[family]
    return {
        "model_type": family,
        "architectures": [f"{name}ForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        **more,
    }


_LLAMA3 = {
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_QWEN = {"rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "use_sliding_window": False}
_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1}
_MIXTRAL = {"rope_theta": 1000000.0, "rms_norm_eps": 1e-5, "sliding_window": None}
_MISTRAL = {"rope_theta": 10000.0, "rms_norm_eps": 1e-5, "sliding_window": 4096}

MODELS = {
    "Mistral-7B-Instruct-v0.1": _model("mistral", 32000, 4096, 14336, 32, 32, 8, 32768, **_MISTRAL),
    "Qwen2.5-0.5B-Instruct": _model(
        "qwen2", 151936, 896, 4864, 24, 14, 2, 32768, **_QWEN | {"tie_word_embeddings": True}
    ),
    "Qwen2.5-7B-Instruct": _model("qwen2", 152064, 3584, 18944, 28, 28, 4, 32768, **_QWEN),
    "Qwen2.5-14B-Instruct": _model("qwen2", 152064, 5120, 13824, 48, 40, 8, 32768, **_QWEN),
    "Qwen2.5-32B-Instruct": _model("qwen2", 152064, 5120, 27648, 64, 40, 8, 32768, **_QWEN),
    "Qwen2.5-72B-Instruct": _model("qwen2", 152064, 8192, 29568, 80, 64, 8, 32768, **_QWEN),
    "Qwen3-8B": _model("qwen3", 151936, 4096, 12288, 36, 32, 8, 40960, head_dim=128, **_QWEN),
    "Llama-3.1-8B-Instruct": _model("llama", 128256, 4096, 14336, 32, 32, 8, 131072, **_LLAMA3),
    "Llama-3.1-70B-Instruct": _model("llama", 128256, 8192, 28672, 80, 64, 8, 131072, **_LLAMA3),
}

MODELS |= {
    "Qwen3-30B-A3B-Instruct-2507": _model(
        "qwen3_moe", 151936, 2048, 6144, 48, 32, 4, 262144, head_dim=128, **_QWEN, **_EXPERTS, moe_intermediate_size=768
    ),
    "Qwen3-235B-A22B": _model(
        "qwen3_moe", 151936, 4096, 12288, 94, 64, 4, 40960, head_dim=128, **_QWEN, **_EXPERTS, moe_intermediate_size=1536
    ),
    "Mixtral-8x7B-Instruct-v0.1": _model(
        "mixtral", 32000, 4096, 14336, 32, 32, 8, 32768, num_local_experts=8, num_experts_per_tok=2, **_MIXTRAL
    ),
}


def write_config(name: str, directory: Path) -> Path:
    """Write config.json of the model `name` to a directory below `directory`; returns it."""
    path = directory / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(MODELS[name]))
    return path
