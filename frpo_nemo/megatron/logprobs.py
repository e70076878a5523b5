"""Compute log-probabilities, entropy and KL from hidden states, vocabulary-parallel and in chunks of tokens.

Only `chunk_tokens` rows of fp32 logits exist at any time, in the forward and in the backward pass (which recomputes
them). The output layer of the model therefore passes hidden states through (see model.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from frpo_nemo.data.batch import KeptTokens

ROWS_AT_A_TIME = 8192  # rows of an output layer multiplied at a time in fp32 on a CPU


def vocab_parallel_logits(
    hidden: Tensor, weight: Tensor, *, vocab_size: int, tp_rank: int, temperature: float, in_fp32: bool = False
) -> Tensor:
    """Return this rank's part of the logits in fp32: hidden [T, H], weight [V/tp, H] -> [T, V/tp].

    Rows of a padded vocabulary get -inf: they aren't tokens. in_fp32: do not round the product to the dtype of `hidden`.
    """
    logits = _fp32_product(hidden, weight) if in_fp32 else (hidden @ weight.t()).float()
    if temperature != 1.0:
        logits = logits / temperature
    first = tp_rank * weight.shape[0]
    if first + weight.shape[0] > vocab_size:
        logits[:, max(vocab_size - first, 0) :] = float("-inf")
    return logits


def _fp32_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return hidden @ weight^T in fp32, without an fp32 copy of the whole weight: a GPU sums in fp32 and can return that."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    product = hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=torch.float32)
    hidden = hidden.float()
    for rows in _chunks(weight.shape[0], ROWS_AT_A_TIME):
        torch.mm(hidden, weight[rows].float().t(), out=product[:, rows])
    return product


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup,
    chunk_tokens: int,
    temperature: float = 1.0,
    in_fp32: bool = False,
    kept: KeptTokens | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log softmax(hidden @ weight^T / temperature) at `targets`, the entropy of that distribution, and 1 where the
    target is its likeliest token, else 0 (without gradient).

    hidden: [T, H], equal on all TP ranks; its gradient is *partial* (this rank's vocabulary only), and the caller's mapping
    sums it over TP. weight: [V/tp, H]. targets: int64 [T], global ids. in_fp32: see vocab_parallel_logits. kept: at each
    token, the only ids (global, the target among them) that the softmax runs over; None: all.
    Returns three fp32 [T].
    """
    options = dict(vocab_size=vocab_size, tp_rank=dist.get_rank(tp_group), temperature=temperature, in_fp32=in_fp32)
    return _TokenLogprobs.apply(hidden, weight, targets, tp_group, chunk_tokens, options, _Kept.of(kept))


@torch.no_grad()
def token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup,
    chunk_tokens: int,
    temperature: float = 1.0,
    in_fp32: bool = False,
) -> Tensor:
    """Return the exact KL of softmax(hidden @ weight^T / temperature) from the same of the reference, at every token. Shapes
    as in token_logprobs, weights and hidden states of the two models. fp32 [T]."""
    options = dict(vocab_size=vocab_size, tp_rank=dist.get_rank(tp_group), temperature=temperature, in_fp32=in_fp32)
    kl = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    for chunk in _chunks(hidden.shape[0], chunk_tokens):
        own = _log_softmax(vocab_parallel_logits(hidden[chunk], weight, **options), tp_group)
        reference = _log_softmax(vocab_parallel_logits(ref_hidden[chunk], ref_weight, **options), tp_group)
        # Both are -inf in the rows of a padded vocabulary, and only there: leave those out of the sum.
        difference = (own - reference).masked_fill(own == float("-inf"), 0.0)
        kl[chunk] = (torch.exp(own) * difference).sum(dim=1)
        dist.all_reduce(kl[chunk], group=tp_group)
    return kl


def _log_softmax(logits: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
    """Return the log softmax of logits [T, V/tp] whose rows are split over the group."""
    maximum = logits.amax(dim=1, keepdim=True)
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=tp_group)
    total = torch.exp(logits - maximum).sum(dim=1, keepdim=True)
    dist.all_reduce(total, group=tp_group)
    return logits - maximum - total.log()


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, tp_group, chunk_tokens, options, kept):
        ctx.options, ctx.chunk_tokens, ctx.kept = options, chunk_tokens, kept
        tokens = hidden.shape[0]
        logprobs, entropy, likeliest, logsumexp = (hidden.new_empty(tokens, dtype=torch.float32) for _ in range(4))
        for chunk in _chunks(tokens, chunk_tokens):
            logits = vocab_parallel_logits(hidden[chunk], weight, **ctx.options)
            if kept is not None:
                kept.leave(logits, chunk, ctx.options["tp_rank"])
            local, owned = _local_targets(targets[chunk], weight.shape[0], ctx.options["tp_rank"])
            target_logits = torch.where(owned, logits.gather(1, local[:, None]).squeeze(1), 0.0)
            maximum = logits.amax(dim=1)
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=tp_group)
            probabilities = torch.exp(logits - maximum[:, None])
            # A padded row has probability 0 times -inf; only -inf itself is replaced, so that a NaN stays visible.
            weighted = (probabilities * logits.masked_fill(logits == float("-inf"), 0.0)).sum(dim=1)
            sums = torch.stack([probabilities.sum(dim=1), weighted, target_logits])
            dist.all_reduce(sums, group=tp_group)
            logsumexp[chunk] = sums[0].log() + maximum
            entropy[chunk] = logsumexp[chunk] - sums[1] / sums[0]
            logprobs[chunk] = sums[2] - logsumexp[chunk]
            likeliest[chunk] = (sums[2] >= maximum).float()
        ctx.save_for_backward(hidden, weight, targets, logsumexp, entropy)
        ctx.mark_non_differentiable(likeliest)
        ctx.set_materialize_grads(False)
        return logprobs, entropy, likeliest

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy, _):
        hidden, weight, targets, logsumexp, entropy = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(logsumexp)
        grad_hidden = torch.empty_like(hidden)
        # fp32: many chunks add up, and bf16 would drop the small ones. A frozen weight has none.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for chunk in _chunks(hidden.shape[0], ctx.chunk_tokens):
            logits = vocab_parallel_logits(hidden[chunk], weight, **ctx.options)
            if ctx.kept is not None:
                ctx.kept.leave(logits, chunk, ctx.options["tp_rank"])
            local, owned = _local_targets(targets[chunk], weight.shape[0], ctx.options["tp_rank"])
            scale = grad_logprobs[chunk] / ctx.options["temperature"]
            # d logp / d logits = onehot(target) - softmax
            if grad_entropy is None:
                grad_logits = torch.exp(logits - logsumexp[chunk, None]) * -scale[:, None]
            else:
                entropy_scale = grad_entropy[chunk] / ctx.options["temperature"]
                grad_logits = _softmax_gradient(logits, logsumexp[chunk], scale, entropy[chunk], entropy_scale)
            grad_logits.scatter_add_(1, local[:, None], torch.where(owned, scale, 0.0)[:, None])
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[chunk] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden[chunk]
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


@dataclass(frozen=True)
class _Kept:
    """KeptTokens by place: those of token t are ids[ends[t - 1] : ends[t]]."""

    counts: Tensor
    ids: Tensor
    ends: list[int]

    @classmethod
    def of(cls, kept: KeptTokens | None) -> _Kept | None:
        return None if kept is None else cls(kept.counts, kept.ids, kept.counts.cumsum(0).tolist())

    def leave(self, logits: Tensor, chunk: slice, tp_rank: int) -> None:
        """Set all other logits [t, V/tp] of a chunk of tokens to -inf: their probability is 0, and so is their gradient."""
        tokens, rows = logits.shape
        first = self.ends[chunk.start - 1] if chunk.start else 0
        local = self.ids[first : self.ends[chunk.stop - 1]].long() - tp_rank * rows
        token = torch.repeat_interleave(torch.arange(tokens, device=local.device), self.counts[chunk])
        here = (local >= 0) & (local < rows)
        others = torch.ones_like(logits, dtype=torch.bool)
        others[token[here], local[here]] = False
        logits.masked_fill_(others, float("-inf"))


def _softmax_gradient(logits: Tensor, logsumexp: Tensor, scale: Tensor, entropy: Tensor, entropy_scale: Tensor) -> Tensor:
    """Return the part of d (scale logp + entropy_scale entropy) / d logits that is a multiple of the softmax p: d entropy /
    d logits = -p (log p + entropy). [T, V/tp]; overwrites logits."""
    log_p = logits.sub_(logsumexp[:, None])
    p = torch.exp(log_p)
    log_p.masked_fill_(p == 0, 0.0)  # a padded row: 0 times -inf
    return p.mul_(log_p.add_(entropy[:, None]).mul_(-entropy_scale[:, None]).sub_(scale[:, None]))


def _chunks(tokens: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _local_targets(targets: Tensor, rows: int, tp_rank: int) -> tuple[Tensor, Tensor]:
    """Return (row on this rank, whether this rank has it) of each target id; the row of a target elsewhere is 0."""
    local = targets - tp_rank * rows
    owned = (local >= 0) & (local < rows)
    return torch.where(owned, local, 0), owned
