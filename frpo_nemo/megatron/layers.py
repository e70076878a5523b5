"""Replace modules of megatron-core where Transformer Engine is absent: a core attention and a rotary embedding for packed
sequences, an RMSNorm that works under sequence parallelism, and experts that are fast on a CPU. Also form a layer of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from frpo_nemo.megatron.cpu import BF16_ROWS
from frpo_nemo.stack import SLOW_IN_BF16


@dataclass
class AttentionPlan:
    """Arrange a pack's sequences in rectangles for batched causal attention.

    rows: int64 [B, L] tensors; each names the token positions of B sequences, right-padded to L with T (one past the
    pack). restore: int64 [T], the place of each token among all rectangles' elements, one rectangle after the other; padding
    at the pack's end has the place of another token, for it attends to nothing and nobody uses what it gets.
    """

    rows: list[Tensor]
    restore: Tensor

    @classmethod
    def of(cls, lengths: list[int], total: int, device: torch.device) -> AttentionPlan:
        """Group sequences whose lengths share a power of two, so that less than half of a rectangle is padding. total: T."""
        groups: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            groups.setdefault((length - 1).bit_length(), []).append(index)
        all_lengths = torch.tensor(lengths)
        starts = all_lengths.cumsum(0) - all_lengths
        rows = []
        for members in groups.values():
            length, start = all_lengths[members][:, None], starts[members][:, None]
            column = torch.arange(int(length.max()))[None]
            rows.append(torch.where(column < length, start + column, total))
        elements = torch.cat([r.flatten() for r in rows])
        real = (elements < total).nonzero().squeeze(1)
        restore = torch.zeros(total, dtype=torch.int64)
        restore[elements[real]] = real
        return cls([r.to(device) for r in rows], restore.to(device))


@dataclass
class PackedSequences(PackedSeqParams):
    """What the modules of this file need of a pack. `qkv_format` is "sbhd" so that megatron-core passes
    [T, 1, heads, head_dim] unchanged; its own "thd" path loops over sequences in Python for the rotary embedding.

    positions: int64 [T], of each token in its sequence.
    """

    positions: Tensor = None
    attention: AttentionPlan = None


class PackedAttention(torch.nn.Module):
    """Causal attention inside each sequence of a pack. q [T, 1, heads, d], k and v [T, 1, groups, d] -> [T, 1, heads*d].

    Padding is on the right of a row, so causality alone hides it from every real token. Rows are gathered with
    `F.embedding`, whose backward is the fast and deterministic one on CPU.
    """

    def __init__(self, config: TransformerConfig, layer_number, attn_mask_type, attention_type, **kwargs):
        super().__init__()

    def forward(self, query, key, value, attention_mask=None, packed_seq_params=None, **kwargs) -> Tensor:
        plan = packed_seq_params.attention
        tokens = query.shape[0]
        # One zero row at the end serves all padding.
        q, k, v = (F.pad(t.reshape(tokens, -1), (0, 0, 0, 1)) for t in (query, key, value))
        head_dim, attended = query.shape[-1], []
        for rows in plan.rows:
            # [B, L, heads * d] -> [B, heads, L, d]
            batch = [F.embedding(rows, t, tokens).unflatten(-1, (-1, head_dim)).transpose(1, 2) for t in (q, k, v)]
            if query.device.type == "cpu" and rows.shape[1] < SLOW_IN_BF16:
                batch = [t.float() for t in batch]
            out = F.scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True)
            attended.append(out.transpose(1, 2).flatten(2).flatten(0, 1).to(query.dtype))
        return F.embedding(plan.restore, torch.cat(attended)).unsqueeze(1)


class PaddedExperts(SequentialMLP):
    """megatron-core's experts one after the other, each with tokens rounded up to a multiple of cpu.BF16_ROWS."""

    def forward(self, hidden: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """hidden: [t, H], expert after expert. probs: [t], the weights of their outputs. Returns [t, H] and no bias."""
        outputs, counts = [], tokens_per_expert.tolist()
        for expert, tokens, weights in zip(self.local_experts, hidden.split(counts), probs.split(counts), strict=True):
            padding = -len(tokens) % BF16_ROWS
            output, _ = expert(F.pad(tokens, (0, 0, 0, padding)), F.pad(weights, (0, padding)))
            outputs.append(output[: len(tokens)])
        return torch.cat(outputs), None


class PackedRotaryEmbedding(RotaryEmbedding):
    """Rotary angles for each token's position in its own sequence: [T, 1, 1, head_dim]."""

    def get_rotary_seq_len(self, inference_context, transformer, transformer_input, config, packed_seq_params):
        # megatron-core passes the result to forward(): positions instead of a length.
        return packed_seq_params.positions

    def forward(self, positions: Tensor, **kwargs) -> Tensor:
        angles = torch.outer(positions.to(self.inv_freq.dtype), self.inv_freq.to(positions.device))
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with Megatron's mark: under sequence parallelism its gradient is summed over TP ranks."""

    def __init__(self, config: TransformerConfig | None = None, hidden_size=None, eps=1e-5, **kwargs):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


def local_layer_spec(qk_norm: bool, experts: int | None = None) -> ModuleSpec:
    """Return megatron-core's local transformer layer with the modules above. experts: their number, None for a dense layer."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=qk_norm, num_experts=experts)
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    if experts:  # checkpoints have Transformer Engine's names, and it fuses a norm with a dense layer only
        del layer.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    attention = layer.self_attention.submodules
    attention.core_attention = PackedAttention
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec
