"""Let vLLM's experts on a CPU compute with their own parameters.

vLLM 0.32 packs the weights of experts for its CPU kernel when it first loads them, but not when it loads them again: after a
refit, the kernel reads unpacked weights as if they were packed, while the parameters hold what was sent. Here nothing is
packed, so what the parameters hold is what is computed, and a refit can be verified. Slower than vLLM's kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def install() -> None:
    """Replace the packing and the kernel, in this process."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    CPUUnquantizedExperts.process_weights_after_loading = lambda self, layer: None
    CPUUnquantizedExperts.apply = _apply


def _apply(
    self,
    output: Tensor,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation,
    *args,
    **kwargs,
) -> None:
    """Write to `output` [T, H] the weighted sum of each token's chosen experts. w1: [E, 2 * F, H], the gate above the up
    projection. w2: [E, H, F]. topk_weights, topk_ids: [T, chosen]."""
    if activation.value != "silu":
        raise NotImplementedError(f"experts with the activation {activation.value} on a CPU")
    chosen = topk_ids.long()
    order = chosen.flatten().argsort(stable=True)  # (token, choice) pairs, expert after expert
    counts = torch.bincount(chosen.flatten(), minlength=w1.shape[0]).tolist()
    tokens, results = order // chosen.shape[1], []
    for expert, rows in enumerate(hidden_states[tokens].split(counts)):
        if len(rows):
            gate, up = F.linear(rows, w1[expert]).chunk(2, -1)
            results.append(F.linear(F.silu(gate) * up, w2[expert]))
    weighted = torch.cat(results).float() * topk_weights.flatten()[order].unsqueeze(1)
    output.copy_(torch.zeros(output.shape, dtype=torch.float32).index_add_(0, tokens, weighted))
