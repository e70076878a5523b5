"""Checks of logprobs.py that run in every rank of a world."""

from __future__ import annotations

import torch
import torch.distributed as dist
from gradient_checks import example_batch
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import use_layout

from frpo_nemo.config.options import ModelConfig, OptimizerConfig
from frpo_nemo.data.batch import KeptTokens
from frpo_nemo.megatron.actor import PolicyActor
from frpo_nemo.megatron.logprobs import token_kl, token_logprobs
from frpo_nemo.training.loss import CompletionLoss

HIDDEN, VOCABULARY, PADDED = 16, 50, 64


def _tensor_group() -> dist.ProcessGroup:
    from megatron.core import parallel_state

    use_layout(ModelConfig(path="", tensor_model_parallel_size=dist.get_world_size()))
    return parallel_state.get_tensor_model_parallel_group()


def compare_with_log_softmax(chunk_tokens: int) -> dict[str, float]:
    """Return the largest errors of this rank against log_softmax over the real vocabulary."""
    group = _tensor_group()
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, HIDDEN, generator=generator)
    weight = torch.randn(PADDED, HIDDEN, generator=generator)
    targets = torch.randint(0, VOCABULARY, (37,), generator=generator)
    upstream = torch.randn(37, generator=generator)

    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    full = torch.log_softmax((h @ w[:VOCABULARY].t()) / 0.7, -1)
    expected = full.gather(1, targets[:, None]).squeeze(1)
    bonus = torch.randn(37, generator=generator)
    (expected * upstream - (full.exp() * full).sum(-1) * bonus).sum().backward()

    rows = slice(rank * PADDED // size, (rank + 1) * PADDED // size)
    own_h, own_w = hidden.clone().requires_grad_(), weight[rows].clone().requires_grad_()
    logprobs, entropy, likeliest = token_logprobs(
        own_h, own_w, targets, vocab_size=VOCABULARY, tp_group=group, chunk_tokens=chunk_tokens, temperature=0.7
    )
    (logprobs * upstream + entropy * bonus).sum().backward()
    dist.all_reduce(own_h.grad, group=group)  # what the mapping before it does in the model
    ref_hidden, ref_weight = (
        torch.randn(hidden.shape, generator=generator),
        torch.randn(weight.shape, generator=generator),
    )
    reference = torch.log_softmax((ref_hidden @ ref_weight[:VOCABULARY].t()) / 0.7, -1)
    kl = token_kl(
        hidden, weight[rows], ref_hidden, ref_weight[rows],
        vocab_size=VOCABULARY, tp_group=group, chunk_tokens=chunk_tokens, temperature=0.7,
    )  # fmt: skip
    return {
        "likeliest token": (likeliest - (full.argmax(-1) == targets).float()).abs().max().item(),
        "relative kl": ((kl - (full.exp() * (full - reference)).sum(-1)) / kl).abs().max().item(),
        "logprobs": (logprobs - expected).abs().max().item(),
        "entropy": (entropy + (full.exp() * full).sum(-1)).abs().max().item(),
        "hidden gradient": (own_h.grad - h.grad).abs().max().item(),
        "weight gradient": (own_w.grad - w.grad[rows]).abs().max().item(),
    }


def compare_with_kept_tokens(chunk_tokens: int) -> dict[str, float]:
    """Return the largest errors of this rank against log_softmax over a few tokens at each place, some on one rank only."""
    group = _tensor_group()
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, HIDDEN, generator=generator) for rows in (37, PADDED))
    counts = torch.randint(1, 9, (37,), generator=generator)
    kept = [torch.randperm(VOCABULARY, generator=generator)[:count] for count in counts]
    targets = torch.stack([ids[0] for ids in kept])
    upstream, bonus = torch.randn(2, 37, generator=generator)

    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = [(h[place] @ w[ids].t() / 0.7).log_softmax(-1) for place, ids in enumerate(kept)]
    expected = torch.stack([row[0] for row in logits])
    expected_entropy = torch.stack([-(row.exp() * row).sum() for row in logits])
    (expected * upstream + expected_entropy * bonus).sum().backward()

    rows = slice(rank * PADDED // size, (rank + 1) * PADDED // size)
    own_h, own_w = hidden.clone().requires_grad_(), weight[rows].clone().requires_grad_()
    options = dict(vocab_size=VOCABULARY, tp_group=group, chunk_tokens=chunk_tokens, temperature=0.7)
    tokens = KeptTokens(counts, torch.cat(kept).to(torch.int32))
    logprobs, entropy, _ = token_logprobs(own_h, own_w, targets, kept=tokens, **options)
    (logprobs * upstream + entropy * bonus).sum().backward()
    dist.all_reduce(own_h.grad, group=group)
    return {
        "logprobs": (logprobs - expected).abs().max().item(),
        "entropy": (entropy - expected_entropy).abs().max().item(),
        "hidden gradient": (own_h.grad - h.grad).abs().max().item(),
        "weight gradient": (own_w.grad - w.grad[rows]).abs().max().item(),
    }


def gradient_of_truncated_sampling() -> tuple[torch.Tensor, torch.Tensor]:
    """Return (the mean over samples of reward times the gradient of the log-prob among kept tokens, the gradient of the mean
    reward of the truncated distribution), both by going through its tokens."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(1, HIDDEN, generator=generator), torch.randn(PADDED, HIDDEN, generator=generator)
    ids, rewards = torch.randperm(VOCABULARY, generator=generator)[:7], torch.rand(7, generator=generator)
    h = hidden.clone().requires_grad_()
    probabilities = (h @ weight[ids].t()).softmax(-1)[0]
    (probabilities * rewards).sum().backward()
    own = hidden.clone().requires_grad_()
    each = KeptTokens(torch.full((7,), 7), ids.repeat(7).to(torch.int32))
    logprobs, _, _ = token_logprobs(
        own.expand(7, HIDDEN), weight, ids, vocab_size=VOCABULARY, tp_group=_tensor_group(), chunk_tokens=3, kept=each
    )
    (probabilities.detach() * rewards * logprobs).sum().backward()
    return own.grad, h.grad


def errors_of_bf16(in_fp32: bool) -> dict[str, float]:
    """Return the largest errors against float64 of log-probs, entropy and KL from bf16 hidden states and weights."""
    group = _tensor_group()
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, reference = (
        4 * torch.randn(rows, HIDDEN, generator=generator).bfloat16() for rows in (37, PADDED, 37)
    )
    targets = torch.randint(0, VOCABULARY, (37,), generator=generator)
    exact, other = (torch.log_softmax(h.double() @ weight[:VOCABULARY].double().t(), -1) for h in (hidden, reference))
    own = weight[rank * PADDED // size : (rank + 1) * PADDED // size]
    options = dict(vocab_size=VOCABULARY, tp_group=group, chunk_tokens=8, in_fp32=in_fp32)
    logprobs, entropy, _ = token_logprobs(hidden, own, targets, **options)
    kl = token_kl(hidden, own, reference, own, **options)
    return {
        "logprobs": (logprobs - exact.gather(1, targets[:, None]).squeeze(1)).abs().max().item(),
        "entropy": (entropy + (exact.exp() * exact).sum(-1)).abs().max().item(),
        "kl": (kl - (exact.exp() * (exact - other)).sum(-1)).abs().max().item(),
    }


class _Largest(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def largest_tensor(tokens: int, vocabulary: int, chunk_tokens: int) -> int:
    """Return the number of elements of the largest tensor in a forward and backward pass."""
    group = _tensor_group()
    hidden, weight = torch.randn(tokens, HIDDEN).requires_grad_(), torch.randn(vocabulary, HIDDEN).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,))
    with _Largest() as record:
        logprobs, _, _ = token_logprobs(
            hidden, weight, targets, vocab_size=vocabulary, tp_group=group, chunk_tokens=chunk_tokens
        )
        logprobs.sum().backward()
    return record.elements


def uniform_entropy(vocabulary: int) -> float:
    """Return the entropy when all logits are equal, with a padded vocabulary."""
    group = _tensor_group()
    hidden, weight = torch.zeros(1, HIDDEN), torch.zeros(PADDED, HIDDEN)
    targets = torch.zeros(1, dtype=torch.int64)
    _, entropy, _ = token_logprobs(hidden, weight, targets, vocab_size=vocabulary, tp_group=group, chunk_tokens=8)
    return entropy.item()


def columns_of_a_small_batch(path: str) -> dict[str, torch.Tensor]:
    """Return the columns of the first sequence alone, with and without a reference."""
    model = ModelConfig(path=path, precision="fp32")
    use_layout(model)
    actor = PolicyActor(model, None, microbatch_tokens=100)
    actor.freeze_reference()
    batch = example_batch().select([0])
    return actor.get_inference_columns(batch) | {"kl": actor.compare_with_reference(batch)["kl"]}


def distance_after_a_step(path: str, *, tp=1, pp=1, sp=False) -> tuple[dict, dict]:
    """Return (columns of compare_with_reference, the policy's Hugging Face weights) after one large step, on rank 0."""
    layout = dict(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, sequence_parallel=sp)
    model = ModelConfig(path=path, precision="fp32", logprob_chunk_tokens=32, **layout)
    use_layout(model)
    actor = PolicyActor(model, OptimizerConfig(lr=0.01), microbatch_tokens=100)
    actor.freeze_reference()
    batch = example_batch()
    actor.train_step(batch, CompletionLoss(int(batch.response_lengths.sum())), update=0, total_updates=1)
    columns = actor.compare_with_reference(batch)
    weights = {name: tensor.clone() for name, tensor in actor.stream_hf_weights()}
    assert torch.equal(columns["logprobs"], actor.get_inference_log_probs(batch)), "the policy is back in its place"
    return (columns, weights) if dist.get_rank() == 0 else ({}, {})
