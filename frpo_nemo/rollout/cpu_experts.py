"""Let vLLM's experts on a CPU compute with what was last loaded, and keep their parameters readable.

vLLM 0.32 packs the weights of experts for its CPU kernel when it first loads them, in place, but not when it loads them again:
after a refit, the kernel reads unpacked weights as if they were packed, while the parameters hold what was sent. Here the
kernel gets a packed copy, made anew by every load, and the parameters stay as loaded, so that a refit can be verified.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def install() -> None:
    """Replace the packing, in this process."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    if CPUUnquantizedExperts.process_weights_after_loading is _pack:
        return
    set_up, compute = UnquantizedFusedMoEMethod._setup_kernel, CPUUnquantizedExperts.apply

    def set_up_and_pack(self, layer: torch.nn.Module, w13: torch.Tensor, w2: torch.Tensor) -> None:
        again = self.moe_kernel is not None  # then vLLM does not pack
        set_up(self, layer, w13, w2)
        if again:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    def compute_with_packed(self, *, w1: torch.Tensor, w2: torch.Tensor, **inputs) -> None:
        w1, w2 = self.packed
        compute(self, w1=w1, w2=w2, **inputs)

    CPUUnquantizedExperts.process_weights_after_loading = _pack
    CPUUnquantizedExperts.apply = compute_with_packed
    UnquantizedFusedMoEMethod._setup_kernel = set_up_and_pack


def _pack(self, layer: torch.nn.Module) -> None:
    """Keep packed copies of layer.w13_weight [E, 2 * F, H], the gate above the up projection, and layer.w2_weight [E, H, F]."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    self.packed = None  # first, so that there are never two
    gate_up, down = layer.w13_weight, layer.w2_weight
    if padding := self._padded_intermediate_size(self.moe_config) - down.shape[2]:
        gate_up = torch.cat([F.pad(half, (0, 0, 0, padding)) for half in gate_up.chunk(2, dim=1)], dim=1)
        down = F.pad(down, (0, padding))
    self.packed = cpu_prepack_moe_weight(gate_up, self.isa), cpu_prepack_moe_weight(down, self.isa)
