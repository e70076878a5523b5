"""A model in a GGUF file: its configuration in the terms of config.json, and its tensors under their Hugging Face names.

The package gguf finds and dequantises the tensors. Their meaning is read here, because transformers' reader silently leaves
out part of it: the rotary scaling of Llama 3, and head sizes other than the family's. A file with a setting that isn't known
here is refused. Tokenizers: gguf_tokenizer.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from frpo_nemo.conversion.gguf_tokenizer import check_tokenizer
from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.weights.table import hf_shapes
from frpo_nemo.megatron.weights.tensors import check_range, some

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,  # Mistral's models, too
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ROPE = "rope_freqs.weight"  # factors of the rotary embedding's wavelengths, float32 [head_dim / 2]
LLAMA3 = {  # llama.cpp writes the factors that follow from these, not the settings; only the first differs between models
    "rope_type": "llama3",
    "factor": None,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CHUNK = 1 << 22  # values that are dequantised at a time


@dataclass(frozen=True)
class GGUFFile:
    """path: of the file. fields: its metadata. tensors: by their Hugging Face names. arch: the content of config.json."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, gguf.ReaderTensor]
    arch: Architecture

    @property
    def stored_as(self) -> dict[str, int]:
        """Return storage type -> number of tensors."""
        return dict(Counter(tensor.tensor_type.name for tensor in self.tensors.values()).most_common())

    def stream(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, new tensor in `dtype`) for every tensor of the Hugging Face model, in its order. Memory: one tensor,
        twice that where its rows are reordered. Raises ConfigError when a weight does not fit into float16."""
        for name, shape in hf_shapes(self.arch).items():
            whole = self._dequantised(self.tensors[name], shape, dtype)
            check_range(whole, name)
            yield name, self._in_order(name, whole)

    def _dequantised(self, tensor: gguf.ReaderTensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Read through the file, not its mapping: pages of a mapping count as this process's memory."""
        rows, whole = _rows(tensor), torch.empty(shape, dtype=dtype)
        target, step = whole.view(len(rows), -1), max(1, CHUNK // shape[-1])
        with self.path.open("rb") as file:
            file.seek(tensor.data_offset)
            for start in range(0, len(rows), step):
                part = rows[start : start + step]
                stored = np.fromfile(file, part.dtype, part.size).reshape(part.shape)
                values = gguf.dequantize(stored, tensor.tensor_type)
                target[start : start + step] = torch.from_numpy(values.astype(np.float32, copy=False))
        return whole

    def _in_order(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """Restore the order of rows. llama.cpp rotates neighbours, transformers a head's first half with its second, so the
        file interleaves the rows of llama's queries and keys."""
        if self.fields["general.architecture"] != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
            return whole
        heads = whole.shape[0] // self.arch.head_dim
        return whole.view(heads, self.arch.head_dim // 2, 2, -1).transpose(1, 2).reshape(whole.shape)


def read_gguf(path: Path) -> GGUFFile:
    """Read everything except the weights. Raises ConfigError for a file that is cut off, or whose model, tokenizer or
    quantisation is not supported."""
    fields, stored = _content(path)
    config = _config(fields, stored, path)
    arch = Architecture.from_config(config, path)
    if ROPE in stored:
        _check_rope(arch, stored[ROPE])
    check_tokenizer(fields, path)
    tensors = _named(arch, fields["general.architecture"], stored, path)
    _check_types(tensors, path)
    return GGUFFile(path, fields, tensors, arch)


def _content(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    """Return (metadata, tensors by their own names)."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ConfigError(f"{path} is not a GGUF file: it begins with {magic!r}, not with b'GGUF'.")
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        if "GGMLQuantizationType" in str(error):
            raise ConfigError(
                f"{path} has tensors in a quantisation that gguf {version('gguf')} does not know ({error}); take another "
                "quantisation of this model."
            ) from error
        raise ConfigError(
            f"{path} is cut off or damaged ({error}); its {path.stat().st_size:,} bytes are not a whole GGUF file."
        ) from error
    if reader.byte_order != "I":
        raise ConfigError(f"{path} is in the byte order of another kind of processor; take the little-endian file.")
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def _config(fields: dict[str, Any], stored: dict[str, gguf.ReaderTensor], path: Path) -> dict[str, Any]:
    """Return the content of config.json."""
    family = str(fields.get("general.architecture"))
    if family not in ARCHITECTURES:
        raise ConfigError(
            f"{path} holds a model of architecture {family!r}; supported are {', '.join(ARCHITECTURES)} (llama is Mistral's, "
            "too)."
        )
    if fields.get("split.count", 0) > 1:
        raise ConfigError(
            f"{path} is one of {fields['split.count']} parts; join them first (llama-gguf-split --merge)."
        )

    def number(key: str, default: Any = None) -> int | float:
        value = fields.get(f"{family}.{key}", default)
        if not isinstance(value, int | float):
            problem = "lacks it" if value is None else f"has {str(value)[:60]}"
            raise ConfigError(f"{family}.{key} must be one number for all layers, and {path} {problem}.")
        return float(str(np.float32(value))) if isinstance(value, float) else value

    heads, hidden = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", number("rope.dimension_count", hidden // max(heads, 1)))
    rotary = number("rope.dimension_count", head_dim)
    config = {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "vocab_size": number("vocab_size", len(fields.get("tokenizer.ggml.tokens", ()))),
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": number("context_length"),
        "rope_parameters": {"rope_theta": number("rope.freq_base", 10000.0)}
        | _rope_scaling(number, fields, stored, path),
        "tie_word_embeddings": "output.weight" not in stored,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "dtype": FLOATS.get(_type_of_matrices(stored), "float32"),
    }
    # Settings that have their own error messages, and that config.json need not have.
    if number("expert_count", 0):
        raise ConfigError(f"{path} is a mixture of experts, which is not read from GGUF; take its safetensors files.")
    Architecture.from_config(config, path)
    Architecture.from_config(config | {"partial_rotary_factor": rotary / head_dim}, path)
    return config


def _type_of_matrices(stored: dict[str, gguf.ReaderTensor]) -> str:
    """Return the storage type of most matrices."""
    types = Counter(tensor.tensor_type.name for tensor in stored.values() if len(tensor.shape) == 2)
    return max(types, key=types.__getitem__, default="F32")


def _rope_scaling(number, fields: dict[str, Any], stored: dict[str, gguf.ReaderTensor], path: Path) -> dict[str, Any]:
    """Return rope_parameters of config.json without theta. number: reads a number of the model from the metadata."""
    if ROPE in stored:
        return LLAMA3 | {"factor": float(stored[ROPE].data.max())}
    kind = fields.get(f"{fields['general.architecture']}.rope.scaling.type", "none")
    factor = number("rope.scaling.factor", number("rope.scale_linear", 1.0))
    if kind not in ("none", "linear"):
        raise ConfigError(
            f"{path} scales its rotary embedding by {kind!r}; supported are 'linear' and Llama 3's scaling."
        )
    return {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}


def _check_rope(arch: Architecture, factors: gguf.ReaderTensor) -> None:
    """Raise ConfigError unless the settings derived from `factors` give the same factors again."""
    expected = replace(arch, rope_scaling=None).rope_frequencies() / arch.rope_frequencies()
    if factors.data.shape != expected.shape or not np.allclose(factors.data, expected, rtol=1e-4):
        known = ", ".join(f"{key}={LLAMA3[key]}" for key in ("low_freq_factor", "high_freq_factor"))
        raise ConfigError(
            f"{arch.source} scales its rotary embedding by factors ({ROPE}) that Llama 3's scaling with {known} does not give; "
            "another scaling cannot be recognised from its factors."
        )


def _named(
    arch: Architecture, family: str, stored: dict[str, gguf.ReaderTensor], path: Path
) -> dict[str, gguf.ReaderTensor]:
    """Return Hugging Face name -> tensor, for exactly the tensors of the model."""
    names, tensors, left = gguf.get_tensor_name_map(ARCHITECTURES[family], arch.num_layers), {}, dict(stored)
    left.pop(ROPE, None)
    for name, shape in hf_shapes(arch).items():
        module, _, kind = name.rpartition(".")
        own = f"{names.get_name(module)}.{kind}"
        if own not in left:
            raise ConfigError(f"{path} lacks {own}, which its metadata requires in a model of architecture {family}.")
        tensors[name] = left.pop(own)
        if (found := tuple(reversed(tensors[name].shape.tolist()))) != shape:
            raise ConfigError(f"{path}: {own} has shape {list(found)}; its metadata gives {list(shape)}.")
    if left:
        raise ConfigError(f"{path} has {some(list(left))}, which is not supported in a model of architecture {family}.")
    return tensors


def _check_types(tensors: dict[str, gguf.ReaderTensor], path: Path) -> None:
    """Raise ConfigError for the first quantisation that gguf cannot dequantise."""
    one_of_each = {tensor.tensor_type: tensor for tensor in tensors.values()}
    for kind, tensor in one_of_each.items():
        try:
            gguf.dequantize(_rows(tensor)[:1], kind)
        except NotImplementedError as error:
            raise ConfigError(
                f"{path} has tensors in {kind.name}, which gguf {version('gguf')} cannot dequantise; take another quantisation "
                "of this model."
            ) from error


def _rows(tensor: gguf.ReaderTensor) -> np.ndarray:
    """Return [rows, values or bytes]; a vector is one row."""
    return tensor.data.reshape(-1, tensor.data.shape[-1])
