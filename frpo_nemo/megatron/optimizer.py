"""Build Megatron's distributed Adam (fp32 main weights and moments, sharded over data-parallel ranks) and the schedule.

The learning rate is a function of the step alone, so a resumed run has nothing to restore.
"""

from __future__ import annotations

import math

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from frpo_nemo.config import options


class NonFiniteGradient(RuntimeError):
    """The gradient norm is NaN or infinite; no weight was changed."""


def build_optimizer(model: DistributedDataParallel, optim: options.OptimizerConfig, dtype: torch.dtype):
    """Return megatron-core's optimizer of `model`; weight_decay.py sets later what is decayed."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        clip_grad=optim.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    return get_megatron_optimizer(config, [model])


def learning_rate(update: int, total_updates: int, optim: options.OptimizerConfig) -> float:
    """Return the rate of optimizer update `update` (from 0). The first W = warmup_ratio of all have lr / W, 2 lr / W, ..., lr;
    then it is constant, or half a cosine from lr that would reach min_lr one update after the last."""
    warmup = round(optim.warmup_ratio * total_updates)
    if update < warmup:
        return optim.lr * (update + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    progress = (update - warmup) / max(total_updates - warmup, 1)
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def step(optimizer, lr: float, clip_grad: float) -> float:
    """Clip and update; returns the gradient norm before clipping. Raises NonFiniteGradient before any change."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        raise NonFiniteGradient(f"gradient norm {norm}")
    if clip_grad > 0:
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()
    return norm
