"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linear layers of a GPTModel: y = W x + alpha / rank * B A dropout(x),
with the base W frozen. q, k, v, o, gate, up and down have an A and a B each, as in PEFT, also where Megatron fuses them.

The fact to know: an adapter is split over tensor ranks like its layer, and what its ranks exchange is rank-sized. Where
its parameters lie in the whole model is the business of weights/table.py, which names them as PEFT does.
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
    fuses, one above the other. `b` [rows, rank]: each row belongs to the B of the matrix that the layer's row belongs to.
    rows, columns: of this rank's shard of the layer's weight."""

    def __init__(self, weight: Weight, config: TransformerConfig, lora: LoRAConfig):
        """weight: of the layer, in the table."""
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
        # Under sequence parallelism each rank sees a part of the tokens where the parameter is replicated: a sum is owed.
        replicated = self.b if self.row_parallel else self.a
        replicated.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """The layer's input [T, 1, in] -> what is added to its output [T, 1, out], both as the layer has them (T over TP
        under sequence parallelism: the input of a column-parallel layer, the output of a row-parallel one)."""
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
        """This rank's shard of W + alpha / rank * B A [rows, columns], computed in fp32, in the dtype of `weight`."""
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
        if binding.parameter is not None and binding.weight.is_linear_layer:
            binding.layer.lora = Adapter(binding.weight, gpt.config, lora)
            binding.layer.register_forward_hook(_add_update)
    gpt.lora_rank = lora.rank
    if gpt.config.recompute_granularity == "full" and gpt.pre_process:
        # A checkpointed layer has a gradient only if its input asks for one, and frozen embeddings do not.
        gpt.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())


@torch.no_grad()
def initialise_adapters(gpt: torch.nn.Module, arch: Architecture, seed: int) -> None:
    """Values as PEFT's: A uniform within 1 / sqrt(in), B zero, so that training begins at the base model. They depend on
    `seed` and the matrix alone, not on the layout."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    for binding in bind_adapters(gpt, arch):
        if binding.parameter is not None:
            fill(binding.parameter, binding.weight, rank, [_initial(*t, seed) for t in binding.weight.hugging_face])


@contextlib.contextmanager
def switched_off(gpt: torch.nn.Module) -> Iterator[None]:
    """Inside, the model is its frozen base."""
    adapters = [module for module in gpt.modules() if isinstance(module, Adapter)]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enabled = True


def sharded_adapters(gpt: torch.nn.Module, arch: Architecture) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """Parameter name -> its place in the whole model, as megatron-core's sharded_state_dict gives for other weights: stacked
    over layers, gates above ups."""
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
        if len(weight.hugging_face) == 2 and not weight.replicated:  # gate and up, of which a rank has a part each
            sharded = apply_swiglu_sharded_factory(sharded, stack)
        state[names[id(parameter)]] = sharded
    return state


def _add_update(layer: torch.nn.Module, inputs: tuple, output: tuple) -> tuple | None:
    if not layer.lora.enabled:
        return None  # as it is
    if output[0].requires_grad:
        output[0].register_hook(_with_plain_strides)
    return output[0] + layer.lora(inputs[0]), *output[1:]


def _with_plain_strides(grad: Tensor) -> Tensor:
    """[T, 1, out] as one matrix sees it. A frozen layer multiplies this by its weight outside of autograd, where torch takes
    the batch of size 1, if its stride is unusual, for T products and makes T copies of the weight."""
    return grad.flatten(0, 1).unsqueeze(1)


def merge(weight: Tensor, a: Tensor, b: Tensor, member: Tensor | None, scale: float) -> Tensor:
    """A shard of W with its update, computed in fp32, in the dtype of `weight`. Shapes as in Adapter; member [rows, S] is
    None where nothing is fused."""
    return (_wide(b.float(), member) @ a.float()).mul_(scale).add_(weight).to(weight.dtype)


def membership(weight: Weight, tensor_rank: int) -> Tensor:
    """1 where a row of a tensor rank's shard belongs to one of the fused matrices: [rows, S]."""
    member = torch.zeros(weight.shard_shape[0], len(weight.hugging_face))
    for segment in weight.segments:
        if segment.rank == tensor_rank:
            member[segment.offset : segment.offset + segment.length, segment.source] = 1
    return member


def _wide(b: Tensor, member: Tensor | None) -> Tensor:
    """B [rows, S * rank]: zero where a row and an A are of different matrices, so that one product serves all."""
    return b if member is None else (member.to(b.dtype)[:, :, None] * b[:, None, :]).flatten(1)


def _initial(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if name.endswith("lora_B.weight"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[1])
