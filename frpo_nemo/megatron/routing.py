"""Follow megatron-core's routers: replay the experts that vLLM chose, count the tokens of each expert, balance their load.

In bf16 trainer and engine choose other experts for a few per cent of the tokens, because router scores differ by rounding.
With the engine's choices replayed in every pass (arXiv 2510.11370), the weights of the chosen experts, and their gradients,
are the trainer's. The balance loss is that of each sequence (DeepSeek-V3, arXiv 2412.19437, equation 17), which does not
depend on how a batch is cut: megatron-core's own are of a microbatch.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from frpo_nemo.megatron.architecture import Architecture, Experts
from frpo_nemo.megatron.packing import Microbatch


@dataclass(frozen=True)
class _Pass:
    """What the routers need of a microbatch, of the tokens that this rank has of it. routes: int64 [t, layers with experts,
    chosen] to replay, or None. sequence: int64 [t], that of each token; S for padding. lengths: [S], in tokens. batch: the
    number of sequences over which the balance loss is averaged."""

    routes: Tensor | None
    sequence: Tensor
    lengths: Tensor
    batch: int


class FollowedRouter:
    """What megatron-core calls as `router.router_replay` to choose experts. One for each router of this stage."""

    def __init__(self, router: torch.nn.Module, experts: Experts, layer: int, balance: float, recompute: bool):
        """layer: its place among the model's layers with experts. balance: weight of the balance loss. recompute: the layer's
        forward pass runs twice, without gradient and again when its backward pass begins, after those of other microbatches."""
        self.layer, self._router, self._experts = layer, router, experts
        self._balance, self._recompute = balance, recompute
        self.next: _Pass | None = None  # of the microbatch that runs forward next
        self.pending: deque[_Pass | None] = deque()
        self.counts = torch.zeros(experts.number, dtype=torch.float64)
        self.imbalance = torch.zeros((), dtype=torch.float64)

    def get_replay_topk(self, scores: Tensor, topk: int, num_groups=None, group_topk=None, default_compute_topk=None):
        """Return the scores [t, topk] of the chosen experts, and these. scores: [t, E], logits or probabilities."""
        current, again = self._current()
        if current is None or current.routes is None:
            values, chosen = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        else:
            chosen = current.routes[:, self.layer]
            values = scores.gather(1, chosen)
        if current is not None and self._router.training:
            values = self._follow(current, again, scores, values, chosen)
        return values, chosen

    def _current(self) -> tuple[_Pass | None, bool]:
        """Return the microbatch that runs now, and whether it does for the second time."""
        if not (self._recompute and self._router.training):
            return self.next, False
        if torch.is_grad_enabled():
            return self.pending.popleft(), True
        self.pending.append(self.next)
        return self.next, False

    def _follow(self, current: _Pass, again: bool, scores: Tensor, values: Tensor, chosen: Tensor) -> Tensor:
        """Count, and return `values` such that their backward pass adds the gradient of the balance loss."""
        sequences, experts = len(current.lengths), self._experts
        pairs = current.sequence[:, None].expand_as(chosen) * experts.number + chosen
        counts = torch.bincount(pairs.flatten(), minlength=(sequences + 1) * experts.number)
        counts = counts.view(sequences + 1, experts.number)[:sequences].to(torch.float32)  # without padding
        if not again:
            self.counts += counts.sum(0).double().cpu()
        if not sequences:
            return values
        probabilities = scores.float().softmax(-1) if experts.normalised else scores.float()
        sums = probabilities.new_zeros(sequences + 1, experts.number).index_add(0, current.sequence, probabilities)
        if _tokens_are_split():  # a sequence's tokens are on all ranks of the tensor group
            dist.all_reduce(counts, group=parallel_state.get_tensor_model_parallel_group())
        lengths = current.lengths[:, None]
        shares, means = counts / (lengths * experts.chosen), sums[:sequences] / lengths
        imbalance = experts.number * (shares * means).sum() / current.batch
        if not again:
            self.imbalance += imbalance.detach().double().cpu()
        if not self._balance:
            return values
        return _WithLoss.apply(values, imbalance * self._balance / sum(experts.layers))


class _WithLoss(torch.autograd.Function):
    """Return the values; backward, add a loss to the one of which the gradient is taken."""

    @staticmethod
    def forward(ctx, values: Tensor, loss: Tensor):
        ctx.like = loss
        return values.view_as(values)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, torch.ones_like(ctx.like)


@dataclass(frozen=True)
class ExpertLoad:
    """shares: float64 [layers with experts, E], of all (token, choice) pairs of a layer that each expert got. imbalance: the
    balance loss without its weight, averaged over layers: 1 if every expert gets equally many with equal probability."""

    shares: Tensor
    imbalance: float


def follow(gpt: torch.nn.Module, arch: Architecture, first_layer: int, balance: float) -> None:
    """Follow this stage's routers. first_layer: of the stage, in the whole model. balance: weight of the balance loss."""
    recompute = gpt.config.recompute_granularity == "full"
    for number, layer in enumerate(gpt.decoder.layers, start=first_layer):
        if arch.experts.layers[number]:
            place, router = sum(arch.experts.layers[:number]), layer.mlp.router
            router.router_replay = FollowedRouter(router, arch.experts, place, balance, recompute)


def followed(gpt: torch.nn.Module) -> list[FollowedRouter]:
    """Return those of this stage; none of a dense model."""
    routers = [getattr(layer.mlp, "router", None) for layer in gpt.decoder.layers]
    return [router.router_replay for router in routers if router is not None]


def begin_pass(gpt: torch.nn.Module, microbatch: Microbatch, batch: int) -> None:
    """Tell the routers which microbatch runs forward next. batch: sequences of the global batch."""
    routers = followed(gpt)
    if not routers:
        return
    lengths, total = microbatch.sequences.lengths, microbatch.tokens.shape[1]
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    sequence = torch.nn.functional.pad(sequence, (0, total - len(sequence)), value=len(lengths))
    routes = None if microbatch.routes is None else _own_tokens(microbatch.routes).long()
    now = _Pass(routes, _own_tokens(sequence), lengths, batch)
    for router in routers:
        router.next = now


def end_pass(gpt: torch.nn.Module) -> None:
    """Drop what a pass has left. megatron-core's dispatchers keep tensors of the last microbatch: with their graph, which leads
    back to the model by its hooks, they would keep the model and its process groups alive forever."""
    for router in followed(gpt):
        router.next = None
        router.pending.clear()
    for layer in gpt.decoder.layers:
        dispatcher = getattr(layer.mlp, "token_dispatcher", None)
        for name, value in vars(dispatcher).items() if dispatcher else ():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                setattr(dispatcher, name, None)


def take_load(gpt: torch.nn.Module, arch: Architecture, passes: int) -> ExpertLoad:
    """Return the load of the `passes` training passes since the last call. Collective over the world."""
    layers, number = sum(arch.experts.layers), arch.experts.number
    counts = torch.zeros(layers, number + 1, dtype=torch.float64)
    for router in followed(gpt):
        counts[router.layer, :number], counts[router.layer, number] = router.counts, router.imbalance
        router.counts.zero_()
        router.imbalance.zero_()
    counts = counts.to(next(gpt.parameters()).device)
    dist.all_reduce(counts)
    counts = counts.cpu()
    pairs = counts[:, :number]
    return ExpertLoad(pairs / pairs.sum(1, keepdim=True).clamp(min=1), counts[:, number].mean().item() / max(passes, 1))


def _own_tokens(tokens: Tensor) -> Tensor:
    """Return this rank's part of a pack [T, ...], which sequence parallelism splits."""
    if not _tokens_are_split():
        return tokens
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    return tokens.chunk(size)[rank]


def _tokens_are_split() -> bool:
    """Return whether tensor ranks have different tokens: mixtures are trained with sequence parallelism."""
    return parallel_state.get_tensor_model_parallel_world_size() > 1
