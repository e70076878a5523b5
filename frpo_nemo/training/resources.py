"""Will the disk and the GPUs be large enough? Arithmetic on the architecture, before anything is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture

WEIGHT_BYTES = {"bf16": 2, "fp32": 4}
OPTIMIZER_BYTES = {"bf16": 12, "fp32": 8}  # two moments in fp32, and main weights where the weights are not
GRADIENT_BYTES = 4
PEAK_FLOPS = {"B200": 2.25e15, "H200": 989e12, "H100": 989e12, "A100": 312e12}


def check_disk(cfg, arch: Architecture, directory: Path) -> None:
    """Raise ConfigError when the checkpoints to keep, and one being written, do not fit on the disk of `directory`."""
    keep = cfg.checkpoint
    kept = 1 if cfg.trainer.save_interval == 0 else keep.keep_last + keep.keep_best
    one = checkpoint_bytes(arch, cfg.model.precision)
    needed, free = (kept + 1) * one, shutil.disk_usage(directory).free
    if needed > free:
        raise ConfigError(
            f"run_dir={cfg.run_dir} has {readable(free)} of free disk, but checkpoints need {readable(needed)}: "
            f"{kept + 1} of {readable(one)} with checkpoint.keep_last={keep.keep_last} and "
            f"keep_best={str(keep.keep_best).lower()}, counting the one being written; free some, keep fewer, or take "
            "another run_dir."
        )


def check_gpu_memory(cfg, arch: Architecture, world_size: int) -> None:
    """Raise ConfigError when weights, gradients and optimizer, or vLLM's weights, cannot fit a GPU. Activations and
    the KV cache come on top and are not counted. Checks nothing without a GPU."""
    memory, model = gpu_memory(), cfg.model
    if memory is None:
        return
    ranks = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
    needed = training_bytes_per_rank(arch, model.precision, ranks, world_size // ranks)
    if needed > memory:
        raise ConfigError(
            f"Weights, gradients and optimizer need {readable(needed)} on each GPU, which has {readable(memory)}; "
            f"raise model.tensor_model_parallel_size={model.tensor_model_parallel_size} or "
            f"model.pipeline_model_parallel_size={model.pipeline_model_parallel_size}, or start more processes."
        )
    if not hasattr(cfg, "objective") and not cfg.probe.interval:
        return  # no engine
    rollout = cfg.rollout
    weights = parameters(arch) * WEIGHT_BYTES[model.precision] // rollout.tensor_model_parallel_size
    allowed = int(memory * rollout.gpu_memory_utilization)
    if weights > allowed:
        raise ConfigError(
            f"vLLM's weights need {readable(weights)} on each GPU, more than the {readable(allowed)} of "
            f"rollout.gpu_memory_utilization={rollout.gpu_memory_utilization}; raise it, or "
            f"rollout.tensor_model_parallel_size={rollout.tensor_model_parallel_size}."
        )


def parameters(arch: Architecture) -> int:
    """Number of parameters, without the padding of the vocabulary."""
    attention = arch.hidden_size * arch.head_dim * 2 * (arch.num_heads + arch.num_kv_heads)
    biases = arch.head_dim * (arch.num_heads + 2 * arch.num_kv_heads) if arch.qkv_bias else 0
    norms = 2 * arch.hidden_size + (2 * arch.head_dim if arch.qk_norm else 0)
    per_layer = attention + biases + norms + 3 * arch.hidden_size * arch.ffn_hidden_size
    embeddings = arch.vocab_size * arch.hidden_size * (1 if arch.tied_embeddings else 2)
    return arch.num_layers * per_layer + embeddings + arch.hidden_size


def checkpoint_bytes(arch: Architecture, precision: str) -> int:
    """Of one checkpoint: weights and optimizer."""
    return parameters(arch) * (WEIGHT_BYTES[precision] + OPTIMIZER_BYTES[precision])


def training_bytes_per_rank(arch: Architecture, precision: str, ranks: int, replicas: int) -> int:
    """Weights and gradients split over the `ranks` of a model, and the optimizer over its `replicas` as well."""
    per_parameter = WEIGHT_BYTES[precision] + GRADIENT_BYTES + OPTIMIZER_BYTES[precision] / replicas
    return int(parameters(arch) / ranks * per_parameter)


def gpu_memory() -> int | None:
    """Bytes of this process's GPU; None without one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def readable(size: float) -> str:
    """`size` bytes in the largest unit that leaves at least 1."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its data sheet; None for one that is not listed."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)
