"""Read a model's Hugging Face config.json into one frozen value. No other module reads that file.

Nothing here loads weights, torch or transformers (`rope_frequencies` imports torch when called), so a bad model or a
bad parallel layout is rejected in milliseconds. A key absent from config.json has transformers' default.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frpo_nemo.errors import ConfigError

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral")

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32, "qwen3_moe": 4, "mixtral": 8}  # llama: as many as heads
_DEFAULT_MAX_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_DEFAULT_MAX_POSITIONS |= {"qwen3_moe": 32768, "mixtral": 131072}
_DEFAULT_EPSILON = {"mixtral": 1e-5}  # the others: 1e-6
_DEFAULT_THETA = {"mixtral": 1e6}  # the others: 1e4
_SIZES = (*_REQUIRED, "max_position_embeddings")
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "sliding_window")  # may be null
_EXPERT_FAMILIES = ("qwen3_moe", "mixtral")
# The hub has the first, transformers 5 writes the second.
_NUMBER_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_ROPE_SETTINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: each token goes to `chosen` of `number` experts. ffn_size: of one expert. normalised: the weights
    of those chosen sum to 1. layers: which layers of the model have experts, instead of one feed-forward network."""

    number: int
    chosen: int
    ffn_size: int
    normalised: bool
    layers: tuple[bool, ...]


@dataclass(frozen=True)
class Architecture:
    """A decoder of one of the SUPPORTED families.

    ffn_hidden_size: of layers without experts. experts: None for a dense model.
    rope_scaling: None, {"rope_type": "linear", "factor": f}, or {"rope_type": "llama3", "factor": f,
    "low_freq_factor": f, "high_freq_factor": f, "original_max_position_embeddings": n}.
    sliding_window: tokens that a layer attends to, or None. Attention here is full, which is the same for sequences up to
    that length; `check_sequence_length` rejects longer ones.
    dtype: "float32", "bfloat16", "float16" or None: the weights' dtype according to config.json.
    """

    family: str
    source: str  # the directory, for messages
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None = field(hash=False)
    qkv_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    max_position_embeddings: int
    sliding_window: int | None
    dtype: str | None
    experts: Experts | None
    hf_config: dict[str, Any] = field(repr=False, compare=False)

    @classmethod
    def from_hf(cls, path: str | Path) -> Architecture:
        """Read `path`/config.json, in the style of transformers 4 or 5. Raises ConfigError if it isn't supported."""
        return cls.from_config(_read_config(Path(path)), path)

    @classmethod
    def from_config(cls, config: dict[str, Any], path: str | Path) -> Architecture:
        """Do the same for the content of a config.json, which need not exist. path: the model's, for messages."""
        family = _supported_family(config, path)
        missing = [key for key in _REQUIRED if config.get(key) is None]
        if missing:
            raise ConfigError(f"{path}/config.json lacks {', '.join(missing)}.")
        as_in_file = config
        epsilon = _DEFAULT_EPSILON.get(family, 1e-6)
        config = {"max_position_embeddings": _DEFAULT_MAX_POSITIONS[family], "rms_norm_eps": epsilon, **config}
        _check_numbers(config, path)
        _refuse_unsupported(config, family, path)
        heads, max_positions = config["num_attention_heads"], config["max_position_embeddings"]
        theta, scaling = _rope(config, family, path)
        return cls(
            family=family,
            source=str(path),
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads", _DEFAULT_KV_HEADS.get(family)) or heads,
            head_dim=_head_dim(config, family),
            vocab_size=config["vocab_size"],
            norm_eps=float(config["rms_norm_eps"]),
            rope_theta=theta,
            rope_scaling=scaling,
            qkv_bias=family == "qwen2",
            qk_norm=family in ("qwen3", "qwen3_moe"),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_position_embeddings=max_positions,
            sliding_window=_sliding_window(config, family),
            dtype=_dtype(config, path),
            experts=_experts(config, family, path),
            hf_config=as_in_file,
        )

    def padded_vocab_size(self, tp: int) -> int:
        """Return the rows of the embedding and output layers: the smallest multiple of lcm(64, tp) that holds the vocabulary.

        64 keeps a shard's rows a multiple of 8 (tensor cores) up to TP8, and makes the size the same for every such
        layout, so that a checkpoint loads in another. Published models need no padding. Padding rows are zero, are
        never exported, and must be left out of every softmax.
        """
        divisor = math.lcm(64, tp)
        return -(-self.vocab_size // divisor) * divisor

    def rope_frequencies(self):
        """Return the inverse frequencies of the rotary embedding, float32 [head_dim / 2], as transformers computes them.

        megatron-core's own llama3 scaling fixes low_freq_factor=1, high_freq_factor=4 and an original length of 8192,
        whatever config.json has, so the model uses these instead.
        """
        import torch

        steps = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device="cpu")  # also under torch.device("meta")
        frequencies = 1.0 / self.rope_theta ** (steps / self.head_dim)
        scaling = self.rope_scaling
        if scaling is None:
            return frequencies
        factor = scaling["factor"]
        if scaling["rope_type"] == "linear":
            return frequencies / factor
        # llama3: waves longer than the original context / low are slowed, shorter than / high kept, others in between.
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        rotations = scaling["original_max_position_embeddings"] / (2 * math.pi / frequencies)
        smooth = (rotations - low) / (high - low)
        between = (1 - smooth) * frequencies / factor + smooth * frequencies
        slowed = torch.where(rotations < low, frequencies / factor, between)
        return torch.where(rotations > high, frequencies, slowed)

    def layers_of_stage(self, pp_rank: int, pp: int, first: int | None = None, last: int | None = None) -> range:
        """Return global indices of the layers on pipeline stage `pp_rank`; `first` and `last` are the layers of the first and
        last stage in an uneven split. The same as megatron-core's get_num_layers_to_build and
        get_transformer_layer_offset; the split must have passed `check_parallel`."""
        middle_stages = pp - (first is not None) - (last is not None)
        per_stage = (self.num_layers - (first or 0) - (last or 0)) // middle_stages if middle_stages else 0
        sizes = [per_stage] * pp
        if first is not None:
            sizes[0] = first
        if last is not None:
            sizes[-1] = last
        start = sum(sizes[:pp_rank])
        return range(start, start + sizes[pp_rank])

    def check_parallel(
        self, tp: int, pp: int, first: int | None = None, last: int | None = None, ep: int = 1
    ) -> None:
        """Raise ConfigError when the model cannot be split over `tp` tensor and `pp` pipeline ranks.

        ep: expert parallel ranks. Fewer key-value heads than tensor ranks are fine when they divide `tp`: megatron-core
        then splits a query group's heads over several ranks, and the table of weights follows.
        """
        where = f"(model.path={self.source})"
        for name, size in (("num_attention_heads", self.num_heads), ("intermediate_size", self.ffn_hidden_size)):
            if size % tp:
                raise ConfigError(f"tensor_model_parallel_size={tp} does not divide {name}={size} {where}.")
        if self.num_kv_heads % tp and tp % self.num_kv_heads:
            raise ConfigError(
                f"tensor_model_parallel_size={tp} is neither a divisor nor a multiple of "
                f"num_key_value_heads={self.num_kv_heads} {where}."
            )
        self._check_stages(pp, first, last, where)
        if ep > 1 and self.experts is None:
            raise ConfigError(f"expert_model_parallel_size={ep} needs a mixture of experts; {self.source} is dense.")
        if self.experts and self.experts.number % ep:
            raise ConfigError(
                f"expert_model_parallel_size={ep} does not divide the {self.experts.number} experts {where}."
            )

    def _check_stages(self, pp: int, first: int | None, last: int | None, where: str) -> None:
        given = {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}
        given = {name: layers for name, layers in given.items() if layers is not None}
        if given and pp == 1:
            raise ConfigError(f"{next(iter(given))} needs pipeline_model_parallel_size above 1.")
        for name, layers in given.items():
            if layers < 1:
                raise ConfigError(f"{name}={layers} must be at least 1.")
        stages, layers = pp - len(given), self.num_layers - sum(given.values())
        if not given and layers % stages:
            raise ConfigError(
                f"pipeline_model_parallel_size={pp} does not divide num_hidden_layers={self.num_layers} {where}; set "
                "num_layers_in_first_pipeline_stage or num_layers_in_last_pipeline_stage for an uneven split."
            )
        if given and (layers % stages or layers < stages if stages else layers != 0):
            settings = ", ".join(f"{name}={value}" for name, value in given.items())
            raise ConfigError(
                f"{settings} leaves {layers} of {self.num_layers} layers for the other {stages} of {pp} pipeline "
                f"stages, which must share them evenly {where}."
            )

    def check_sequence_length(self, tokens: int) -> None:
        """Raise ConfigError when this model cannot be trained here on sequences of up to `tokens` tokens."""
        if self.sliding_window is not None and tokens > self.sliding_window:
            raise ConfigError(
                f"Sequences of up to {tokens} tokens exceed sliding_window={self.sliding_window} of {self.source}: "
                "attention here is full, which equals the model's own only up to that length. Shorten the prompts or "
                "the responses."
            )
        if tokens > self.max_position_embeddings:
            raise ConfigError(
                f"Sequences of up to {tokens} tokens exceed max_position_embeddings={self.max_position_embeddings} "
                f"of {self.source}. Shorten the prompts or the responses."
            )

    def check_engine_windows(self) -> None:
        """Raise ConfigError when vLLM cannot run this model because a window is set for some of its layers (Qwen)."""
        if self.family == "qwen2" or self.family == "qwen3":
            layers, config = _windowed_layers(self.hf_config), self.hf_config
            if any(layers) and not all(layers) and config.get("max_window_layers") != self.num_layers:
                raise ConfigError(
                    f"{self.source}/config.json sets use_sliding_window for {sum(layers)} of {self.num_layers} layers, which "
                    f"vLLM does not support; set use_sliding_window to false there: attention is the same for sequences of "
                    f"up to sliding_window={self.sliding_window} tokens, and longer ones are rejected here anyway."
                )


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; model.path must be a directory in Hugging Face format.")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} holds a JSON {type(config).__name__}, not an object of settings.")
    return config


def _check_numbers(config: dict[str, Any], path: str | Path) -> None:
    for key in (*_SIZES, *_OPTIONAL_SIZES):
        value = config.get(key)
        if value is None and key in _OPTIONAL_SIZES:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(
                f"{path}/config.json has {key}={json.dumps(value)}; it must be a whole number of at least 1."
            )
    epsilon = config["rms_norm_eps"]
    if not isinstance(epsilon, int | float) or isinstance(epsilon, bool) or epsilon < 0:
        raise ConfigError(
            f"{path}/config.json has rms_norm_eps={json.dumps(epsilon)}; it must be a number such as 1e-6."
        )


def _supported_family(config: dict[str, Any], path: str | Path) -> str:
    family = config.get("model_type")
    if family not in SUPPORTED:
        raise ConfigError(f"{path} has model_type={family!r}; supported are {', '.join(SUPPORTED)}.")
    experts = [key for key in _NUMBER_OF_EXPERTS if config.get(key)]
    if experts and family not in _EXPERT_FAMILIES:
        raise ConfigError(
            f"{path}/config.json has {experts[0]}={config[experts[0]]}, but models of model_type={family!r} are dense; the "
            f"families with experts are {', '.join(_EXPERT_FAMILIES)}."
        )
    return family


def _refuse_unsupported(config: dict[str, Any], family: str, path: str | Path) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{path} has hidden_act={config['hidden_act']!r}; only 'silu' is supported.")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise ConfigError(f"{path} has {key}=true, which is not supported for model_type={family!r}.")
    if config.get("quantization_config"):
        raise ConfigError(f"{path} holds quantized weights (quantization_config); use the unquantized checkpoint.")
    if config.get("use_mrope"):
        raise ConfigError(f"{path} has use_mrope=true; only text models with plain rotary embeddings are supported.")


def _head_dim(config: dict[str, Any], family: str) -> int:
    default = 128 if family == "qwen3" else None
    return config.get("head_dim", default) or config["hidden_size"] // config["num_attention_heads"]


def _rope(config: dict[str, Any], family: str, path: str | Path) -> tuple[float, dict[str, Any] | None]:
    """Return (theta, scaling) from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or _DEFAULT_THETA.get(family, 1e4))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ConfigError(f"{path} has partial_rotary_factor={partial}; only full rotary embeddings are supported.")
    if kind == "default":
        return theta, None
    if kind not in _ROPE_SETTINGS:
        raise ConfigError(f"{path} has rope_type={kind!r}; supported are 'default', 'linear' and 'llama3'.")
    rope = {"original_max_position_embeddings": config["max_position_embeddings"], **rope}
    missing = [key for key in _ROPE_SETTINGS[kind] if rope.get(key) is None]
    if missing:
        raise ConfigError(f"{path}/config.json has rope_type={kind!r} without {', '.join(missing)}.")
    return theta, {"rope_type": kind, **{key: rope[key] for key in _ROPE_SETTINGS[kind]}}


def _dtype(config: dict[str, Any], path: str | Path) -> str | None:
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(f"{path} has weights of dtype {dtype!r}; supported are float32, bfloat16 and float16.")
    return dtype


def _experts(config: dict[str, Any], family: str, path: str | Path) -> Experts | None:
    if family not in _EXPERT_FAMILIES:
        return None
    mixtral, layers = family == "mixtral", config["num_hidden_layers"]
    settings = {
        "num_experts": next((config[key] for key in _NUMBER_OF_EXPERTS if key in config), 8 if mixtral else 128),
        "num_experts_per_tok": config.get("num_experts_per_tok", 2 if mixtral else 8),
        "moe_intermediate_size": config["intermediate_size"] if mixtral else config.get("moe_intermediate_size", 768),
        "decoder_sparse_step": 1 if mixtral else config.get("decoder_sparse_step", 1),
    }
    for name, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{path}/config.json has {name}={json.dumps(value)}; it must be a whole number of at least 1.")
    number, chosen, ffn_size, step = settings.values()
    if chosen > number:
        raise ConfigError(f"{path}/config.json has num_experts_per_tok={chosen}, more than its {number} experts.")
    normalised = mixtral or bool(config.get("norm_topk_prob", False))
    if chosen == 1 and normalised:
        raise ConfigError(
            f"{path}/config.json chooses one expert per token with a weight of 1 (num_experts_per_tok=1, norm_topk_prob=true), "
            "so its router has no gradient; that is not supported."
        )
    dense = [] if mixtral else config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(i not in range(layers) for i in dense):
        raise ConfigError(
            f"{path}/config.json has mlp_only_layers={json.dumps(dense)}; it must be a list of layers, 0 to {layers - 1}."
        )
    has_experts = tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))
    if not any(has_experts):
        raise ConfigError(f"{path}/config.json gives no layer experts (mlp_only_layers, decoder_sparse_step={step}).")
    return Experts(number, chosen, ffn_size, normalised, has_experts)


def _sliding_window(config: dict[str, Any], family: str) -> int | None:
    if family == "llama":
        return None
    if family == "mixtral":
        return config.get("sliding_window")
    window = config.get("sliding_window", 4096)
    if family == "mistral":
        return window
    if family == "qwen3_moe":  # a window holds for all layers of this family
        return window if config.get("use_sliding_window", False) else None
    return window if any(_windowed_layers(config)) else None


def _windowed_layers(config: dict[str, Any]) -> list[bool]:
    """Return which layers of a Qwen model attend to a window."""
    layers = config["num_hidden_layers"]
    if not config.get("use_sliding_window", False):
        return [False] * layers
    if config.get("layer_types"):
        return [kind == "sliding_attention" for kind in config["layer_types"]]
    first = config.get("max_window_layers")
    return [layer >= (28 if first is None else first) for layer in range(layers)]
