"""GGUF files of tiny models, as llama.cpp's converter writes them, by the writer of the package gguf."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from conversion_checks import tensors
from tiny_models import make_tiny

from frpo_nemo.examples.new_model import train_tokenizer
from frpo_nemo.megatron.architecture import Architecture

TEXTS = ["def f(x): return 12.5", "Two words, and 2024 rolls."]
# Llama 3.1's, whose factors are on all sides of the middle at this head size.
LLAMA3 = dict(
    rope_type="llama3", rope_theta=50000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)  # fmt: skip
OWN = {"llama": dict(rope_parameters=LLAMA3, max_position_embeddings=16384)}
NAMES = {"mistral": "llama"}  # what llama.cpp calls the family


def make_source(path: Path, family: str, **options) -> str:
    """Return a random model of `family` with a byte-level tokenizer, in Hugging Face format."""
    tokenizer = train_tokenizer(TEXTS, 290)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    make_tiny(path, family, vocab=len(tokenizer), **OWN.get(family, {}) | ids | options)
    tokenizer.save_pretrained(path)
    return str(path)


def write_gguf(
    model: str,
    path: Path,
    kind: str = "F32",
    *,
    fields: dict | None = None,
    tensors_besides: dict[str, np.ndarray] | None = None,
    leave_out: str | None = None,
    raw: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] | None = None,
) -> Path:
    """`model` with its matrices stored as `kind`. fields: metadata of other values, or None for none of a key. raw: tensors
    to store as they are instead."""
    arch = Architecture.from_hf(model)
    name = NAMES.get(arch.family, arch.family)
    metadata = {**_metadata(arch, name), **_tokenizer(model), **(fields or {})}
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", name))
    for key, value in metadata.items():
        if value is not None:
            writer.add_key_value(key, value, *_types(value))
    stored = {**_tensors(model, arch, name), **(tensors_besides or {})}
    for own, tensor in stored.items():
        as_type = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
        data = gguf.quantize(np.ascontiguousarray(tensor), as_type)
        data, as_type = (raw or {}).get(own, (data, as_type))
        if own != leave_out:
            writer.add_tensor(own, data, raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(arch: Architecture, name: str) -> dict:
    sizes = {
        "context_length": arch.max_position_embeddings,
        "embedding_length": arch.hidden_size,
        "block_count": arch.num_layers,
        "feed_forward_length": arch.ffn_hidden_size,
        "attention.head_count": arch.num_heads,
        "attention.head_count_kv": arch.num_kv_heads,
        "attention.key_length": arch.head_dim,
        "attention.value_length": arch.head_dim,
        "rope.dimension_count": arch.head_dim,
        "vocab_size": arch.vocab_size,
        "attention.layer_norm_rms_epsilon": arch.norm_eps,
        "rope.freq_base": arch.rope_theta,
    }
    if arch.rope_scaling and arch.rope_scaling["rope_type"] == "linear":
        sizes |= {"rope.scaling.type": "linear", "rope.scaling.factor": arch.rope_scaling["factor"]}
    return {
        "general.name": "Tiny",
        "general.license": "apache-2.0",
        **{f"{name}.{key}": value for key, value in sizes.items()},
    }


def _tokenizer(model: str) -> dict:
    file = json.loads((Path(model) / "tokenizer.json").read_text())
    vocabulary, special = file["model"]["vocab"], {token["content"] for token in file["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    ids = {
        name: vocabulary[text] for name, text in (("bos", "<|bos|>"), ("eos", "<|endoftext|>"), ("padding", "<|pad|>"))
    }
    own = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": tokens,
        "token_type": [int(gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL) for t in tokens],
        "merges": [" ".join(pair) for pair in file["model"]["merges"]],
        **{f"{name}_token_id": index for name, index in ids.items()},
        "eot_token_id": vocabulary["<|user|>"],
    }
    template = (Path(model) / "chat_template.jinja").read_text()
    return {f"tokenizer.ggml.{key}": value for key, value in own.items()} | {"tokenizer.chat_template": template}


def _tensors(model: str, arch: Architecture, name: str) -> dict[str, np.ndarray]:
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[name], arch.num_layers)
    stored = {}
    if arch.rope_scaling and arch.rope_scaling["rope_type"] == "llama3":
        stored["rope_freqs.weight"] = rope_factors(arch)
    for hugging_face, tensor in tensors(Path(model)).items():
        module, _, kind = hugging_face.rpartition(".")
        if name == "llama" and module.endswith(("q_proj", "k_proj")):
            halves = tensor.view(-1, 2, arch.head_dim // 2, arch.hidden_size)  # heads, halves of a head
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        stored[f"{names.get_name(module)}.{kind}"] = tensor.float().numpy()
    return stored


def rope_factors(arch: Architecture) -> np.ndarray:
    """Return the factor on each wavelength, computed one by one as in llama.cpp's converter."""
    scaling, factors = arch.rope_scaling, []
    low = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
    high = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
    for frequency in arch.rope_theta ** -(torch.arange(0, arch.head_dim, 2) / arch.head_dim):
        wavelength = 2 * torch.pi / frequency.item()
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(scaling["factor"])
        else:
            smooth = (scaling["original_max_position_embeddings"] / wavelength - scaling["low_freq_factor"]) / (
                scaling["high_freq_factor"] - scaling["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def _types(value) -> tuple:
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    if isinstance(value, list):
        return gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[kinds[type(value[0])]]
    return (gguf.GGUFValueType[kinds[type(value)]],)
