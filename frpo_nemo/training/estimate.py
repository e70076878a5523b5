"""How many bytes a run will need on disk and on each GPU: arithmetic on the architecture, before anything is loaded."""

from __future__ import annotations


def parameters(arch) -> int:
    """Number of parameters of an Architecture, without the padding of the vocabulary."""
    attention = arch.hidden_size * arch.head_dim * 2 * (arch.num_heads + arch.num_kv_heads)
    biases = arch.head_dim * (arch.num_heads + 2 * arch.num_kv_heads) if arch.qkv_bias else 0
    norms = 2 * arch.hidden_size + (2 * arch.head_dim if arch.qk_norm else 0)
    per_layer = attention + biases + norms + 3 * arch.hidden_size * arch.ffn_hidden_size
    embeddings = arch.vocab_size * arch.hidden_size * (1 if arch.tied_embeddings else 2)
    return arch.num_layers * per_layer + embeddings + arch.hidden_size


def checkpoint_bytes(arch, precision: str) -> int:
    """One checkpoint: weights, and the optimizer's two moments and, beside bf16 weights, the main weights in fp32."""
    return parameters(arch) * (2 + 12 if precision == "bf16" else 4 + 8)


def training_bytes_per_rank(arch, precision: str, model_parallel: int, replicas: int) -> int:
    """Weights, fp32 gradients, and the optimizer's share of each of `replicas`; activations come on top."""
    weights, optimizer = (2, 12) if precision == "bf16" else (4, 8)
    share = parameters(arch) / model_parallel
    return int(share * (weights + 4) + share * optimizer / replicas)


def readable(size: float) -> str:
    """`size` bytes in the largest unit that leaves a number of at least 1."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"
