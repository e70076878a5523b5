"""Verify that a refit arrived: fingerprints of the engine's own weights, and the gap between two log-probabilities.

Nothing here starts or drives vLLM. Both sides of a fingerprint are computed on every rank, of the same slice (the part that
the rank's vLLM shard should hold). So tensor parallelism needs neither sums over ranks nor special cases for replicated
heads, and a tensor in the wrong place differs as surely as one with wrong values.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


class RefitError(RuntimeError):
    """The engine does not hold, or does not compute with, the weights that it was sent. Never continue after it."""


@dataclass(frozen=True)
class Shard:
    """The place of one Hugging Face tensor on this rank. `live`: a view of the engine's own memory; it should hold the
    `live.shape[dim]` rows (dim 0) or columns (dim 1) of the full tensor that begin at `start`."""

    live: Tensor
    dim: int = 0
    start: int = 0

    def cut(self, full: Tensor) -> Tensor | None:
        """Return the part of the Hugging Face tensor `full` that belongs here; None when the shapes do not fit."""
        length = self.live.shape[self.dim]
        if full.dim() != self.live.dim() or full.shape[self.dim] < self.start + length:
            return None
        part = full.narrow(self.dim, self.start, length)
        return part if part.shape == self.live.shape else None


class WeightCheck:
    """Fingerprint a stream of weights on its way into vLLM, then compare vLLM's live parameters with it.

    check = WeightCheck(model, dtype); reload(check.watch(weights)); problems = check.problems()
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        """Begin a check. `model`: this rank's vLLM model, whose unquantised parameters have `dtype`."""
        self._model, self._dtype = model, dtype
        self._sent: dict[str, Tensor] = {}  # name -> fingerprint of this rank's part
        self._problems: list[str] = []

    def watch(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the same (Hugging Face name, full tensor) pairs, cast to the engine's dtype; keep 8 bytes of each."""
        shards = live_shards(self._model)  # before vLLM takes the parameters apart to reload them
        tied = getattr(self._model.config, "tie_word_embeddings", False)
        for name, tensor in weights:
            tensor = tensor.detach().to(self._dtype)
            part = shards[name].cut(tensor) if name in shards else None
            if part is not None and name not in self._sent:
                self._sent[name] = fingerprint(part)
            elif name in self._sent:
                self._problems.append(f"{name} came twice in the weight stream")
            elif name in shards:
                self._problems.append(f"{name} was streamed with shape {tuple(tensor.shape)}, which does not fit")
            elif not (tied and name == "lm_head.weight"):
                self._problems.append(f"{name} was streamed, but the engine has no such tensor")
            yield name, tensor

    def problems(self) -> list[str]:
        """Return one sentence per tensor that is missing or differs on this rank; empty if none."""
        shards = live_shards(self._model)
        missing = [f"{name} was not in the weight stream" for name in shards if name not in self._sent]
        names = [name for name in shards if name in self._sent]
        if not names:
            return self._problems + missing
        sent = torch.stack([self._sent[name].cpu() for name in names])
        live = torch.stack([fingerprint(shards[name].live) for name in names]).cpu()
        different = [names[i] for i in (sent != live).nonzero().flatten().tolist()]
        return self._problems + missing + [f"{name} in the engine differs from the tensor sent" for name in different]


def live_shards(model: nn.Module) -> dict[str, Shard]:
    """Return Hugging Face name -> place of that tensor in this rank's vLLM model (decoders, unquantised)."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    # Of a mixture of experts, vLLM does not always name what its dense layers fuse.
    fused_names = {"gate_up_proj": ["gate_proj", "up_proj"]} | model.packed_modules_mapping
    shards: dict[str, Shard] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            shards |= _experts(module, path.removesuffix(".routed_experts"))
            continue
        parent, _, leaf = path.rpartition(".")
        for kind, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:  # tied embeddings appear once, as in a Hugging Face checkpoint
                continue
            seen.add(id(parameter))
            pieces = _pieces(module, kind, parameter.detach())
            for name, shard in zip(fused_names.get(leaf, [leaf]), pieces, strict=True):
                shards[f"{parent}.{name}.{kind}" if parent else f"{name}.{kind}"] = shard
    return shards


def _experts(module: nn.Module, path: str) -> dict[str, Shard]:
    """Return the places of all experts' tensors in vLLM's stacks: w13 [E, 2 * F / TP, H], the gate above the up projection,
    and w2 [E, H, F / TP]."""
    first, second, rank = module.w13_weight.detach(), module.w2_weight.detach(), module.moe_config.tp_rank
    size = second.shape[2]
    shards = {}
    for expert in range(len(first)):
        gate, up = first[expert].split(size)
        name = f"{path}.{expert}"
        shards[f"{name}.{module.ckpt_gate_proj_name}.weight"] = Shard(gate, start=rank * size)
        shards[f"{name}.{module.ckpt_up_proj_name}.weight"] = Shard(up, start=rank * size)
        shards[f"{name}.{module.ckpt_down_proj_name}.weight"] = Shard(second[expert], dim=1, start=rank * size)
    return shards


def _pieces(module: nn.Module, kind: str, live: Tensor) -> list[Shard]:
    """Return the Hugging Face tensors that `module`'s parameter holds, in order; one unless vLLM fuses several."""
    from vllm.model_executor.layers.linear import (
        ColumnParallelLinear,
        MergedColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
    )
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if isinstance(module, QKVParallelLinear):
        kv_rank = module.tp_rank // module.num_kv_head_replicas
        q, k, v = (
            module.num_heads * module.head_size,
            module.num_kv_heads * module.head_size,
            module.num_kv_heads * module.v_head_size,
        )
        sizes, ranks = [q, k, v], [module.tp_rank, kv_rank, kv_rank]
    elif isinstance(module, MergedColumnParallelLinear):
        sizes = [size // module.tp_size for size in module.output_sizes]
        ranks = [module.tp_rank] * len(sizes)
    elif isinstance(module, ColumnParallelLinear):
        sizes, ranks = [live.shape[0]], [module.tp_rank]
    elif isinstance(module, RowParallelLinear) and kind == "weight":
        return [Shard(live, dim=1, start=module.tp_rank * live.shape[1])]
    elif isinstance(module, VocabParallelEmbedding):  # the rest of its rows pad the vocabulary; vLLM cuts their logits
        indices = module.shard_indices
        return [Shard(live[: indices.num_org_elements], start=indices.org_vocab_start_index)]
    else:
        return [Shard(live)]
    return [Shard(part, start=rank * size) for part, rank, size in zip(live.split(sizes), ranks, sizes, strict=True)]


def fingerprint(tensor: Tensor) -> Tensor:
    """Return an int64 scalar on the tensor's device: the sum of the tensor's 4-byte words, each times an odd random weight
    of its place, modulo 2**64.

    An odd factor has an inverse modulo 2**64, so a change of one word always shows; any other change goes unnoticed with
    a probability of about 2**-32. Compares bits: NaN equals itself, 0.0 differs from -0.0. Reads the tensor once and
    allocates 0.5 MiB (256 MiB on CUDA).
    """
    matrix = tensor.detach().reshape(1, -1) if tensor.dim() < 2 else tensor.detach().flatten(1)
    total = torch.zeros((), dtype=torch.int64, device=matrix.device)
    if matrix.numel() == 0:
        return total
    row_bytes = matrix.shape[1] * matrix.element_size()
    word = torch.int32 if row_bytes % 4 == 0 else torch.int16  # odd rows of 2-byte elements
    columns = _odd_numbers(row_bytes // word.itemsize, 1, matrix.device)
    rows = _odd_numbers(matrix.shape[0], 2, matrix.device)
    step = max(1, (1 << 25 if matrix.is_cuda else 1 << 16) // len(columns))
    for start in range(0, matrix.shape[0], step):
        block = matrix[start : start + step].contiguous()
        if block.storage_offset() * block.element_size() % word.itemsize:
            block = block.clone()  # words cannot begin in the middle of one
        sums = block.view(word).long().mul_(columns).sum(1)
        total += (sums * rows[start : start + step]).sum()
    return total


@functools.cache
def _odd_numbers(count: int, seed: int, device: torch.device) -> Tensor:
    """Return int64 [count], odd, random, the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-(1 << 63), (1 << 63) - 1, (count,), generator=generator) | 1).to(device)


# Gap that rounding explains in any model, by the precision of model and engine: (statistic, largest value). Measured against
# transformers on CPU: fp32 4e-6 at most; bf16 0.011 to 0.014 on average (4 and 12 layers), single tokens up to 0.07. fp8
# applies to the policy only, the engine stays in bf16: .12 to .16 on average, emulated (tests/rollout/test_gap_limits.py).
GAP_LIMITS = {"fp32": ("max", 1e-4), "bf16": ("mean", 0.05), "fp8": ("mean", 0.2)}
# A trained model may round worse: SmolLM2-135M-Instruct has a mean of 0.042 to 0.049 in bf16. So a run measures the gap of
# its own model, and stops at this multiple of it. In fp8 a lost layer of 12 is 1.6 to 1.8 times the rounding.
GAP_MULTIPLES = {"bf16": 2.0, "fp8": 1.5}


@dataclass(frozen=True)
class GapLimit:
    """Largest allowed difference of vLLM's and the policy's log-probs: `value` bounds the "mean" or "max" of |difference|."""

    statistic: str
    value: float
    origin: str  # for messages

    @classmethod
    def of(cls, precision: str, measured: float | None, threshold: float | None = None) -> GapLimit:
        """Return the limit. precision: "fp32", "bf16" or "fp8". measured: the mean at the first comparison of this run, after
        a refit whose fingerprints were right; None: this is the first. threshold: the user's limit of the mean instead."""
        if threshold is not None:
            return cls("mean", threshold, "rollout.logprob_gap_threshold")
        statistic, usual = GAP_LIMITS[precision]
        if statistic == "max":
            return cls(statistic, usual, precision)
        multiple = GAP_MULTIPLES[precision]
        if measured is None:
            return cls(statistic, multiple * usual, f"{multiple:g} times what is usual in {precision}")
        origin = f"{multiple:g} times the {measured:.3g} of the run's first rollout, or {usual:g} if that is more"
        return cls(statistic, max(usual, multiple * measured), origin)


def logprob_gap(rollout_logprobs: Tensor, megatron_logprobs: Tensor) -> tuple[float, float]:
    """Return (mean, largest) |difference| over response tokens; both float [R]. (0, 0) for none; NaN if either has NaN."""
    if rollout_logprobs.numel() == 0:
        return 0.0, 0.0
    gap = (rollout_logprobs.double() - megatron_logprobs.double()).abs()
    return gap.mean().item(), gap.max().item()


def check_logprob_gap(
    rollout_logprobs: Tensor,
    megatron_logprobs: Tensor,
    response_lengths: Tensor,
    *,
    step: int,
    limit: GapLimit,
) -> tuple[float, float]:
    """Return logprob_gap of responses [R] = sum(response_lengths [N]). Raises RefitError if it is larger than `limit`. Not
    collective: pass its message to `raise_on_all_ranks` where other ranks would otherwise wait."""
    mean, largest = logprob_gap(rollout_logprobs, megatron_logprobs)
    value = mean if limit.statistic == "mean" else largest
    if value <= limit.value:
        return mean, largest
    parts = (rollout_logprobs - megatron_logprobs).abs().split(response_lengths.tolist())
    means = torch.stack([part.mean() if part.numel() else part.new_zeros(()) for part in parts]).nan_to_num(torch.inf)
    worst = int(means.argmax())
    raise RefitError(
        f"step {step}: vLLM's and Megatron's log-probs of the same responses differ by {mean:.2e} per token on average "
        f"and {largest:.2e} at most (the {limit.statistic} should be at most {limit.value:.3g}: {limit.origin}); the worst "
        f"is sequence {worst} of {len(parts)}, {means[worst]:.2e} per token over {len(parts[worst])} tokens. The engine does "
        f"not compute what the policy computes."
    )


def raise_on_all_ranks(message: str | None) -> None:
    """Raise RefitError on all ranks if any rank has a message, with the first one and its rank. Collective over the world."""
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    failed = [rank for rank, each in enumerate(messages) if each is not None]
    if failed:
        also = f" (also ranks {failed[1:]})" if len(failed) > 1 else ""
        raise RefitError(f"rank {failed[0]}{also}: {messages[failed[0]]}")
