"""Add low-rank adapters (LoRA, arXiv 2106.09685) to the linear layers of a GPTModel: y = W x + alpha / rank * B A dropout(x),
with the base W frozen. q, k, v, o, gate, up and down have an A and a B each, as in PEFT, also where Megatron fuses them.

An adapter is split over tensor ranks like its layer, and its ranks exchange only tensors of the size of its rank.
weights/table.py defines the places of its parameters in the whole model, and names them as PEFT does.
"""

from __future__ import annotations

import contextlib
import math
import re
import zlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from frpo_nemo.config.options import LoRAConfig
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.weights.binding import bind, bind_adapters
from frpo_nemo.megatron.weights.load import fill
from frpo_nemo.megatron.weights.table import Weight


class Adapter(torch.nn.Module):
    """The update of one linear layer on this tensor rank. `a` [S * rank, columns]: the A's of the S matrices that the layer
    fuses, stacked. `b` [rows, rank]: each row belongs to the B of the matrix that the layer's row belongs to.
    rows, columns: the size of this rank's shard of the layer's weight."""

    def __init__(self, weight: Weight, config: TransformerConfig, lora: LoRAConfig):
        """Create the parameters, values not set. weight: the layer's, in the table."""
        super().__init__()
        rows, columns = weight.shard_shape
        fused, dtype = len(weight.hugging_face), config.params_dtype
        self.row_parallel, self.sequence_parallel = weight.dim == 1, config.sequence_parallel
        self.scale, self.dropout = lora.alpha / lora.rank, lora.dropout
        self.enabled = True
        self.a = torch.nn.Parameter(torch.empty(fused * lora.rank, columns, dtype=dtype))
        self.b = torch.nn.Parameter(torch.empty(rows, lora.rank, dtype=dtype))
        tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        self.register_buffer(
            "member", membership(weight, tensor_rank).to(dtype) if fused > 1 else None, persistent=False
        )
        # Under sequence parallelism a rank with a replicated parameter sees only some tokens: sum its gradient over ranks.
        replicated = self.b if self.row_parallel else self.a
        replicated.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Map the layer's input [T, 1, in] to the update of its output [T, 1, out], both as the layer has them (under sequence
        parallelism T / TP for the input of a column-parallel layer and the output of a row-parallel one)."""
        hidden = F.linear(self._drop(x), self.a)
        if self.row_parallel:
            sum_over_ranks = (
                reduce_scatter_to_sequence_parallel_region
                if self.sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
            hidden = sum_over_ranks(hidden)
        elif self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        return F.linear(hidden, _wide(self.b, self.member)) * self.scale

    @torch.no_grad()
    def merge(self, weight: Tensor) -> Tensor:
        """Return this rank's shard of W + alpha / rank * B A [rows, columns], computed in fp32, in the dtype of `weight`."""
        return merge(weight, self.a, self.b, self.member, self.scale)

    def _drop(self, x: Tensor) -> Tensor:
        if not self.training or self.dropout == 0:
            return x
        if self.row_parallel or self.sequence_parallel:
            # The ranks hold different elements, and drop them independently.
            with tensor_parallel.get_cuda_rng_tracker().fork():
                return F.dropout(x, self.dropout)
        return F.dropout(x, self.dropout)


def add_adapters(gpt: torch.nn.Module, arch: Architecture, lora: LoRAConfig) -> None:
    """Freeze this rank's GPTModel and give its linear layers adapters, values not set."""
    gpt.requires_grad_(False)
    for binding in bind(gpt, arch):
        if binding.parameter is not None and binding.weight.adapts:
            binding.layer.lora = Adapter(binding.weight, gpt.config, lora)
            binding.layer.register_forward_hook(_add_update)
    gpt.lora_rank = lora.rank
    if gpt.config.recompute_granularity == "full" and gpt.pre_process:
        # A checkpointed layer has a gradient only if its input requires one, which frozen embeddings do not.
        gpt.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())


@torch.no_grad()
def initialise_adapters(gpt: torch.nn.Module, arch: Architecture, seed: int) -> None:
    """Set values as PEFT does: A uniform within 1 / sqrt(in), B zero, so that training begins at the base model. They depend
    only on `seed` and the matrix, not on the layout."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    for binding in bind_adapters(gpt, arch):
        if binding.parameter is not None:
            fill(binding.parameter, binding.weight, rank, [_initial(*t, seed) for t in binding.weight.hugging_face])


@contextlib.contextmanager
def switched_off(gpt: torch.nn.Module) -> Iterator[None]:
    """Switch the adapters off: inside, the model is its frozen base."""
    adapters = [module for module in gpt.modules() if isinstance(module, Adapter)]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enabled = True


def sharded_adapters(gpt: torch.nn.Module, arch: Architecture) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """Return parameter name -> its place in the whole model, in the form of megatron-core's sharded_state_dict for other
    weights: stacked over layers, gates above ups."""
    names = {id(parameter): name for name, parameter in gpt.named_parameters()}
    state = {}
    for weight, parameter in ((b.weight, b.parameter) for b in bind_adapters(gpt, arch) if b.parameter is not None):
        key = re.sub(r"^decoder\.layers\.\d+", "decoder.layers", weight.names[0])
        layer = int(re.match(r"model\.layers\.(\d+)", weight.hugging_face[0][0])[1])
        stack = ((0, layer, arch.num_layers),)
        if weight.replicated:
            sharded = make_sharded_tensor_for_checkpoint(parameter, key, stack)
        else:
            sharded = make_tp_sharded_tensor_for_checkpoint(parameter, key, weight.dim, prepend_offsets=stack)
        if len(weight.hugging_face) == 2 and not weight.replicated:  # gate and up; a rank has a part of each
            sharded = apply_swiglu_sharded_factory(sharded, stack)
        state[names[id(parameter)]] = sharded
    return state


def _add_update(layer: torch.nn.Module, inputs: tuple, output: tuple) -> tuple | None:
    if not layer.lora.enabled:
        return None  # unchanged
    if output[0].requires_grad:
        output[0].register_hook(_with_plain_strides)
    return output[0] + layer.lora(inputs[0]), *output[1:]


def _with_plain_strides(grad: Tensor) -> Tensor:
    """Return [T, 1, out] with the strides of one matrix. A frozen layer multiplies it by its weight outside of autograd; with
    an unusual stride of the batch of size 1, torch would compute T products and make T copies of the weight."""
    return grad.flatten(0, 1).unsqueeze(1)


def merge(weight: Tensor, a: Tensor, b: Tensor, member: Tensor | None, scale: float) -> Tensor:
    """Return a shard of W with its update, computed in fp32, in the dtype of `weight`. Shapes as in Adapter; member [rows, S]
    is None if nothing is fused."""
    return (_wide(b.float(), member) @ a.float()).mul_(scale).add_(weight).to(weight.dtype)


def membership(weight: Weight, tensor_rank: int) -> Tensor:
    """Return 1 where a row of a tensor rank's shard belongs to one of the fused matrices: [rows, S]."""
    member = torch.zeros(weight.shard_shape[0], len(weight.hugging_face))
    for segment in weight.segments:
        if segment.rank == tensor_rank:
            member[segment.offset : segment.offset + segment.length, segment.source] = 1
    return member


def _wide(b: Tensor, member: Tensor | None) -> Tensor:
    """Return B [rows, S * rank]: zero where a row and an A belong to different matrices, so that one product serves all."""
    return b if member is None else (member.to(b.dtype)[:, :, None] * b[:, None, :]).flatten(1)


def _initial(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if name.endswith("lora_B.weight"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[1])
