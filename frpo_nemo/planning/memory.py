"""Compute bytes per GPU (or per process on a CPU), by part and by phase, before anything is loaded: pure arithmetic on an
Architecture, without torch and megatron-core. Weights, gradients and optimizer are exact; activations follow what the
layers save for the backward pass; docs/planning.md has the formulas. Callers decide what to do with the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.stack import SLOW_IN_BF16

GIB = 2**30
WEIGHT_BYTES = {"bf16": 2, "fp32": 4}
OPTIMIZER_BYTES = {"bf16": 12, "fp32": 8}  # two moments in fp32, and main weights if the weights aren't fp32
GRADIENT_BYTES = 4
GPU_RESERVE = 3 * GIB  # CUDA context, buffers of NCCL and cuBLAS, memory of a sleeping vLLM
CPU_RESERVE = GIB  # libraries; measured: 0.6 GiB with megatron-core, 1.0 GiB with vLLM as well
VLLM_RESERVE = 2 * GIB  # of vLLM's share: activations of its largest batch, CUDA graphs
CPU_KV_CACHE = GIB  # rollout/engine.py's limit for an engine rank
FP8_WEIGHT_BYTES = 2  # Transformer Engine keeps a weight and its transpose in FP8 from one update to the next
ROTARY_TABLES = 32  # number that megatron-core keeps in fp32, each for the longest sequence of a pack
ATTENTION_PADDING = 4 / 3  # of the local attention's rectangles, for lengths even over a power of two


@dataclass(frozen=True)
class Engine:
    """The vLLM engine of a layout. `utilization`: its share of GPU memory. `longest`: tokens of prompt and response."""

    tp: int = 1
    utilization: float = 0.6
    max_num_seqs: int = 256
    longest: int = 2048
    bucket_bytes: int = 512 << 20


@dataclass(frozen=True)
class Layout:
    """What decides the memory of a training run. `first`, `last`: layers of those stages, if uneven. `gpu`: else a CPU,
    where nothing sleeps or is offloaded. `transformer_engine`: its layers, else the local ones of megatron/layers.py.
    `microbatch_tokens`: in an actual pack. `update_tokens`: of a replica in one optimizer step (None: many packs).
    `reference`: a copy of the first weights in host memory. `lora_rank`: of adapters, with all else frozen; 0: none."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    first: int | None = None
    last: int | None = None
    sequence_parallel: bool = False
    precision: str = "bf16"
    recompute: str = "none"
    microbatch_tokens: int = 8192
    update_tokens: int | None = None
    logprob_chunk_tokens: int = 1024
    engine: Engine | None = None
    reference: bool = False
    reference_average: bool = False  # then it is kept in fp32 too
    lora_rank: int = 0
    lora_dropout: bool = False
    gpu: bool = True
    transformer_engine: bool = True
    fp8: bool = False

    @property
    def element(self) -> int:
        """Return the bytes of a weight and of an activation."""
        return WEIGHT_BYTES[self.precision]

    @property
    def tokens(self) -> float:
        """Return the tokens of a microbatch on one context-parallel rank."""
        return self.microbatch_tokens / self.cp

    def __str__(self) -> str:
        engine = f", vLLM TP{self.engine.tp}" if self.engine else ""
        cp = f" CP{self.cp}" if self.cp > 1 else ""
        ep = f" EP{self.ep}" if self.ep > 1 else ""
        return f"TP{self.tp} PP{self.pp}{cp} DP{self.dp}{ep}{engine}"


@dataclass(frozen=True)
class PhaseMemory:
    """One phase on the ranks of the pipeline stage that needs most of it. `parts`: bytes by name."""

    name: str
    stage: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def parameters(arch: Architecture) -> int:
    """Return the number of parameters, without the padding of the vocabulary."""
    embeddings = arch.vocab_size * arch.hidden_size * (1 if arch.tied_embeddings else 2)
    return layers_parameters(arch, 1, range(arch.num_layers)) + embeddings + arch.hidden_size


def active_parameters(arch: Architecture) -> int:
    """Return the parameters that one token uses: in a layer with experts, of those that are chosen for it."""
    if not arch.experts:
        return parameters(arch)
    one = expert_parameters(arch, range(arch.num_layers), arch.experts.number)  # of every layer
    return parameters(arch) - (arch.experts.number - arch.experts.chosen) * one


def layers_parameters(arch: Architecture, tp: int, layers: range, ep: int = 1) -> int:
    """Return the parameters of `layers` on one rank of `tp` and `ep`."""
    heads = arch.num_heads + 2 * arch.num_kv_heads
    attention = (arch.hidden_size * (heads + arch.num_heads) + (heads if arch.qkv_bias else 0)) * arch.head_dim
    norms = 2 * arch.hidden_size + (2 * arch.head_dim if arch.qk_norm else 0)
    mixtures = layers_with_experts(arch, layers)
    routers = mixtures * arch.experts.number * arch.hidden_size if mixtures else 0
    dense = (len(layers) - mixtures) * 3 * arch.hidden_size * arch.ffn_hidden_size
    return (len(layers) * attention + dense) // tp + len(layers) * norms + routers + expert_parameters(arch, layers, ep)


def layers_with_experts(arch: Architecture, layers: range) -> int:
    """Return how many of `layers` have experts."""
    return sum(arch.experts.layers[layer] for layer in layers) if arch.experts else 0


def expert_parameters(arch: Architecture, layers: range, ep: int) -> int:
    """Return the parameters of the experts in `layers` on one of `ep` ranks."""
    if not arch.experts:
        return 0
    one = 3 * arch.hidden_size * arch.experts.ffn_size
    return layers_with_experts(arch, layers) * arch.experts.number // ep * one


def adapter_parameters(arch: Architecture, rank: int, tp: int) -> int:
    """Return the parameters of one layer's adapters of rank `rank`, on one tensor-parallel rank; 0 without any."""
    if arch.experts:  # on attention only
        queries, keys = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        return rank * (4 * arch.hidden_size + (2 * queries + 2 * keys) // tp)
    h, f, q, kv = (
        arch.hidden_size,
        arch.ffn_hidden_size,
        *(n * arch.head_dim for n in (arch.num_heads, arch.num_kv_heads)),
    )
    whole, split = 5 * h + 2 * h, q + 2 * kv + q + 2 * f + f  # A of q, k, v, gate, up and B of o, down; the others
    return rank * (whole + split // tp)


def trained_parameters(arch: Architecture, layout: Layout, stage: int) -> int:
    """Return the parameters of a rank that have gradients and an optimizer."""
    if not layout.lora_rank:
        return rank_parameters(arch, layout, stage)
    layers = len(arch.layers_of_stage(stage, layout.pp, layout.first, layout.last))
    return layers * adapter_parameters(arch, layout.lora_rank, layout.tp)


def rank_parameters(arch: Architecture, layout: Layout, stage: int) -> int:
    """Return the parameters of one rank of pipeline stage `stage`, including padding of the vocabulary and adapters;
    tensor-parallel ranks are equal."""
    layers = arch.layers_of_stage(stage, layout.pp, layout.first, layout.last)
    adapters = len(layers) * adapter_parameters(arch, layout.lora_rank, layout.tp)
    vocabulary = arch.padded_vocab_size(layout.tp) // layout.tp * arch.hidden_size
    own_output = not arch.tied_embeddings or layout.pp > 1  # a tied embedding has a copy on the last of several stages
    last = stage == layout.pp - 1
    return (
        layers_parameters(arch, layout.tp, layers, layout.ep)
        + adapters
        + (vocabulary if stage == 0 else 0)
        + (arch.hidden_size + (vocabulary if own_output else 0) if last else 0)
    )


def checkpoint_bytes(arch: Architecture, precision: str, lora_rank: int = 0, reference_mix: float | None = None) -> int:
    """Return the bytes of one checkpoint: weights and optimizer of the trained parameters. reference_mix: of a reference that
    moves, which is saved too, an average in fp32."""
    trained = arch.num_layers * adapter_parameters(arch, lora_rank, 1) if lora_rank else parameters(arch)
    reference = 0 if reference_mix is None else WEIGHT_BYTES[precision] if reference_mix == 1 else 4
    return trained * (WEIGHT_BYTES[precision] + OPTIMIZER_BYTES[precision] + reference)


def state_bytes(arch: Architecture, layout: Layout, stage: int) -> dict[str, int]:
    """Return the bytes of a rank's weights and gradients, and of its share of the optimizer, sharded over DP and CP, of experts
    over the ranks that hold the same ones."""
    trained = trained_parameters(arch, layout, stage)
    layers = arch.layers_of_stage(stage, layout.pp, layout.first, layout.last)
    experts = 0 if layout.lora_rank else expert_parameters(arch, layers, layout.ep)
    replicas = layout.dp * layout.cp
    share = (trained - experts) / replicas + experts * layout.ep / (layout.tp * replicas)
    return {
        "weights": rank_parameters(arch, layout, stage) * layout.element,
        "gradients": trained * GRADIENT_BYTES,
        "optimizer": math.ceil(share * OPTIMIZER_BYTES[layout.precision]),
    }


def phases(arch: Architecture, layout: Layout, limit: int) -> list[PhaseMemory]:
    """Return the phases of a step, each for its worst stage: generate and refit with an engine, log-probs, train. `limit`:
    bytes that a rank may use, of which vLLM takes its share on a GPU."""
    found = []
    for name in ("generate", "log-probs", "train", "refit"):
        if layout.engine is None and name in ("generate", "refit"):
            continue
        stages = [PhaseMemory(name, s, _parts(name, arch, layout, s, limit)) for s in range(layout.pp)]
        found.append(max(stages, key=lambda phase: phase.total))
    return found


def _parts(name: str, arch: Architecture, layout: Layout, stage: int, limit: int) -> dict[str, int]:
    state = state_bytes(arch, layout, stage)
    if name in ("generate", "refit") and layout.gpu and layout.precision != "fp32":
        state = {"weights": state["weights"]}  # the optimizer is in host memory, the gradients are released
    parts = {"reserve": GPU_RESERVE if layout.gpu else CPU_RESERVE} | state
    if layout.fp8:
        layers = arch.layers_of_stage(stage, layout.pp, layout.first, layout.last)
        parts["FP8 weights"] = FP8_WEIGHT_BYTES * layers_parameters(arch, layout.tp, layers, layout.ep)
    if layout.transformer_engine:
        longest = min(layout.microbatch_tokens, layout.engine.longest if layout.engine else layout.microbatch_tokens)
        parts["rotary tables"] = ROTARY_TABLES * longest * arch.head_dim * 4
    if layout.reference and not layout.gpu:
        parts["reference"] = state["weights"] * _copies_of_reference(layout)
    if layout.engine and (name in ("generate", "refit") or not layout.gpu):
        parts |= engine_bytes(arch, layout, limit, kv_cache=name != "refit" or not layout.gpu)
    if name == "log-probs":
        parts |= forward_bytes(arch, layout, stage)
    if name == "train":
        parts |= training_peak(arch, layout, stage)
    if name == "refit":
        bucket = max(layout.engine.bucket_bytes, _largest_weight(arch, layout) * layout.element)
        parts["refit buckets"] = 3 * min(bucket, parameters(arch) * layout.element)
    return parts


def engine_bytes(arch: Architecture, layout: Layout, limit: int, *, kv_cache: bool) -> dict[str, int]:
    """Return the bytes of vLLM's weights and KV cache, which on a GPU takes the rest of vLLM's share."""
    engine = layout.engine
    weights = parameters(arch)
    if not layout.gpu:  # rollout/cpu_experts.py keeps a packed copy
        weights += expert_parameters(arch, range(arch.num_layers), 1)
    parts = {"vLLM weights": math.ceil(weights * layout.element / engine.tp)}
    if kv_cache and layout.gpu:
        parts |= {"vLLM KV cache": max(cache_room(arch, layout, limit), 0), "vLLM activations": VLLM_RESERVE}
    elif kv_cache:
        used = engine.max_num_seqs * engine.longest * kv_bytes(arch, layout)
        parts["vLLM KV cache"] = min(CPU_KV_CACHE, used)
    return parts


def cache_room(arch: Architecture, layout: Layout, limit: int) -> int:
    """Return the bytes that vLLM's share of a GPU leaves for its KV cache; negative if the weights alone are too large. At
    least one sequence of the engine's `longest` must fit."""
    weights = math.ceil(parameters(arch) * layout.element / layout.engine.tp)
    return int(limit * layout.engine.utilization) - weights - VLLM_RESERVE


def kv_bytes(arch: Architecture, layout: Layout) -> int:
    """Return the bytes of one token's keys and values on one rank of an engine."""
    heads = max(arch.num_kv_heads / layout.engine.tp, 1)
    return int(2 * arch.num_layers * heads * arch.head_dim * layout.element)


def host_bytes(arch: Architecture, layout: Layout) -> int:
    """Return the host memory of one GPU's process: the sleeping vLLM's weights, the offloaded optimizer, the reference."""
    state = max((state_bytes(arch, layout, s) for s in range(layout.pp)), key=lambda parts: parts["weights"])
    asleep = engine_bytes(arch, layout, 0, kv_cache=False)["vLLM weights"] if layout.engine else 0
    offloaded = state["optimizer"] if layout.engine and layout.precision != "fp32" else 0
    reference = state["weights"] * _copies_of_reference(layout) if layout.reference else 0
    return CPU_RESERVE + asleep + offloaded + reference


def _copies_of_reference(layout: Layout) -> int:
    """Return how many times the weights' bytes a reference takes: an average is kept in fp32 too."""
    return 1 + (4 // layout.element if layout.reference_average else 0)


# Tensors that a microbatch keeps for the backward pass.


def saved_per_token(arch: Architecture, layout: Layout, *, experts: bool = False) -> float:
    """Return the bytes that a layer, with experts or without, keeps of one token between forward and backward pass, without
    recomputation."""
    e, h = layout.element, arch.hidden_size / _sequence_split(layout)
    queries, keys, ffn = (size / layout.tp for size in _widths(arch))
    # Each of two norms keeps its input and its output; if not fused, the input is kept twice in fp32, raw and normalised.
    norms = 2 * (2 * e if layout.gpu else 8 + e) * h
    if layout.transformer_engine:
        attention = 3 * e * (queries + keys)  # the fused qkv, which v keeps alive; rotated q and k; the output
    else:
        padded = ATTENTION_PADDING * 2 * (queries + keys)  # rectangles of q, k, v and the output
        short = not layout.gpu and layout.engine is not None and layout.engine.longest < SLOW_IN_BF16
        # Short sequences attend in fp32 on a CPU. The output as a pack; cos and sin, of q and of k.
        attention = (4 if short else e) * padded + e * (queries + 4 * arch.head_dim)
    # Gate and up together, silu(gate), a copy of up, their product.
    network = _saved_by_experts(arch, layout) if experts else 5 * e * ffn
    return norms + attention + network + _adapter_saved(arch, layout)


def _saved_by_experts(arch: Architecture, layout: Layout) -> float:
    """Return the bytes that the experts of a layer keep of one token on its ranks, if all experts get equally many: the rows
    sent to each chosen expert, back and put in order, the expert's five tensors and their product with the token's weight,
    and the router's scores in fp32."""
    experts, split = arch.experts, _sequence_split(layout)
    rows = experts.chosen * layout.element * (3 * arch.hidden_size + 6 * experts.ffn_size)
    return (rows + 2 * 4 * experts.number) / split


def saved_by_layers(arch: Architecture, layout: Layout, layers: range) -> float:
    """Return the bytes that `layers` keep of one token."""
    mixtures = layers_with_experts(arch, layers)
    dense = (len(layers) - mixtures) * saved_per_token(arch, layout)
    return dense + (mixtures * saved_per_token(arch, layout, experts=True) if mixtures else 0)


def _adapter_saved(arch: Architecture, layout: Layout) -> float:
    """Return the additional bytes of adapters. An adapter's input is kept instead of its layer's, whose weight is frozen. In
    addition: which of its elements were dropped (bytes on a GPU, factors on a CPU), and A's products, gathered over TP if
    the following B is split."""
    h, queries, _, ffn = arch.hidden_size / _sequence_split(layout), *(size / layout.tp for size in _widths(arch))
    products = layout.lora_rank * (5 + 2 / _sequence_split(layout))
    dropped = (2 * h + queries + ffn) * (1 if layout.gpu else layout.element) if layout.lora_dropout else 0
    return products * layout.element + dropped


def training_peak(arch: Architecture, layout: Layout, stage: int) -> dict[str, int]:
    """Return activations and logits of a stage at their peak in a training step: when the last stage begins its backward
    pass with the logits, or any stage that of a layer. On a CPU, gloo's copy of the gradients may be larger than both."""
    e, tokens = layout.element, layout.tokens
    layers = arch.layers_of_stage(stage, layout.pp, layout.first, layout.last)
    input_bytes = e * arch.hidden_size / _sequence_split(layout)
    layer = max(saved_by_layers(arch, layout, range(i, i + 1)) for i in layers)
    held = tokens * (layout.pp - stage)  # of the microbatches in flight in the 1F1B schedule
    if layout.update_tokens is not None:
        held = min(held, layout.update_tokens / layout.cp)
    full = layout.recompute == "full"
    saved = held * (len(layers) * input_bytes if full else saved_by_layers(arch, layout, layers))
    ffn, ffn_weight = _network(arch, layout)
    ffn_weight = 0 if layout.lora_rank else ffn_weight
    # Backward of the second projection: gradients of output and input, and of the weight before it is added to the buffer.
    backward = tokens * (layer if full else 0) + tokens * (input_bytes + e * ffn) + e * ffn_weight
    peaks = [{"activations": saved + backward}]
    if stage == layout.pp - 1:
        peaks.append({"activations": saved + _head_activations(arch, layout), "logits": logits_backward(arch, layout)})
    count = trained_parameters(arch, layout, stage)
    if not layout.gpu:
        peaks.append({"gradient reduction": count * GRADIENT_BYTES})
    elif not layout.transformer_engine:
        peaks.append({"optimizer step": count * 4 / (layout.dp * layout.cp)})  # one temporary tensor of torch's AdamW
    return _whole(max(peaks, key=lambda parts: sum(parts.values())))


def forward_bytes(arch: Architecture, layout: Layout, stage: int) -> dict[str, int]:
    """Return the peak of a pass without gradient: inside one feed-forward layer, or at the logits."""
    e, tokens, h = layout.element, layout.tokens, arch.hidden_size / _sequence_split(layout)
    layer = {"activations": tokens * e * (2 * h + 5 * _network(arch, layout)[0])}
    if stage < layout.pp - 1:
        return _whole(layer)
    head = {"activations": tokens * e * (h + 2 * arch.hidden_size), "logits": 16 * _chunk(arch, layout)}
    return _whole(max(layer, head, key=lambda parts: sum(parts.values())))


def logits_backward(arch: Architecture, layout: Layout) -> float:
    """Return the peak of megatron/logprobs.py: a chunk of fp32 logits, their gradient, and the gradient of the output
    weight, in fp32 and as a product that is added to it, unless the weight is frozen."""
    e, chunk = layout.element, _chunk(arch, layout)
    if layout.lora_rank:
        return (12 + e) * chunk
    weight = arch.padded_vocab_size(layout.tp) // layout.tp * arch.hidden_size
    added = e * weight + (4 * weight if e == 2 and not layout.gpu else 0)  # a CPU converts the product before adding
    return 4 * weight + max((12 + e) * chunk, (4 + e) * chunk + added)


def _head_activations(arch: Architecture, layout: Layout) -> float:
    """Return bytes after the layers: the final norm, the hidden states gathered over TP, those of responses with gradient."""
    e, h = layout.element, arch.hidden_size / _sequence_split(layout)
    norm = 2 * e * h if layout.gpu else 8 * h
    gathered = e * arch.hidden_size if layout.sequence_parallel else 0
    return layout.tokens * (norm + gathered + 2 * e * arch.hidden_size)


def _chunk(arch: Architecture, layout: Layout) -> float:
    """Return the elements of the logits that exist at one time."""
    return min(layout.logprob_chunk_tokens, layout.tokens) * arch.padded_vocab_size(layout.tp) / layout.tp


def _widths(arch: Architecture) -> tuple[int, int, int]:
    return arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim, arch.ffn_hidden_size


def _network(arch: Architecture, layout: Layout) -> tuple[float, float]:
    """Return the inner width of a layer's feed-forward network on one rank, for one token, and the elements of its second
    matrix there; of the larger where layers differ."""
    kinds = []
    if not arch.experts or not all(arch.experts.layers):
        width = arch.ffn_hidden_size / layout.tp
        kinds.append((width, arch.hidden_size * width))
    if arch.experts:
        width = arch.experts.ffn_size
        kinds.append((arch.experts.chosen * width / _sequence_split(layout), arch.hidden_size * width))
    return tuple(map(max, zip(*kinds, strict=True)))


def _largest_weight(arch: Architecture, layout: Layout) -> int:
    experts = 2 * arch.experts.ffn_size * layout.ep if arch.experts else 0
    return arch.hidden_size * max(arch.vocab_size, 2 * arch.ffn_hidden_size, experts)


def _sequence_split(layout: Layout) -> int:
    return layout.tp if layout.sequence_parallel else 1


def _whole(parts: dict[str, float]) -> dict[str, int]:
    return {name: math.ceil(size) for name, size in parts.items()}


def readable(size: float) -> str:
    """Return `size` bytes in the largest unit that leaves at least 1."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"
