"""One training step's gradient through the real model, in any layout (every rank calls this), and the group loss as the
paper writes it, by autograd through transformers' model in float64: nothing of ours but the batch."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from peft import PeftModel
from safetensors.torch import load_file
from worlds import use_layout

from frpo_nemo.config.options import LoRAConfig, ModelConfig, OptimizerConfig
from frpo_nemo.data.batch import KeptTokens, SequenceBatch
from frpo_nemo.megatron.actor import PolicyActor
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.cpu import megatron_device
from frpo_nemo.megatron.groups import stop_model_parallel
from frpo_nemo.megatron.routing import ExpertLoad
from frpo_nemo.megatron.weights.binding import bind_adapters
from frpo_nemo.megatron.weights.export import stream_adapters
from frpo_nemo.megatron.weights.load import fill
from frpo_nemo.objective import build_objective
from frpo_nemo.training.loss import CompletionLoss, PolicyLoss

GROUPS, GROUP_SIZE = 4, 4


def example_batch(groups: int = GROUPS) -> SequenceBatch:
    """Return ragged responses in groups of 4 that are interleaved (so that they straddle any split), one unscored, with
    log-probs of a slightly different old policy and of a reference."""
    count = groups * GROUP_SIZE
    generator = torch.Generator().manual_seed(0)

    def draw(low, high, count):
        return torch.randint(low, high, (count,), generator=generator).tolist()

    sizes = draw(2, 30, count)
    prompts = [draw(3, 100, 2 + index % 5) for index in range(count)]
    batch = SequenceBatch.from_lists(
        prompts,
        [draw(3, 100, size) for size in sizes],
        group=[index % groups for index in range(count)],
        reward=torch.rand(count, generator=generator).double(),
    )
    batch.columns["reward"][5] = float("nan")
    for name, spread in (("shift_old", 0.1), ("shift_reference", 0.3)):
        batch.token_columns[name] = spread * torch.randn(sum(sizes), generator=generator)
    return batch


def with_kept_tokens(batch: SequenceBatch) -> SequenceBatch:
    """Return the batch as if every response token had been sampled from 1 to 12 tokens."""
    generator = torch.Generator().manual_seed(4)
    targets = torch.tensor([token for _, response in batch.unpack() for token in response])
    counts = torch.randint(1, 13, targets.shape, generator=generator)
    ids = []
    for target, count in zip(targets.tolist(), counts.tolist(), strict=True):
        others = torch.randperm(100, generator=generator)
        ids += [target, *others[others != target][: count - 1].tolist()]
    return replace(batch, kept=KeptTokens(counts, torch.tensor(ids, dtype=torch.int32)))


def with_routes(batch: SequenceBatch, path: str) -> SequenceBatch:
    """Return the batch as if vLLM had chosen experts at random for every token."""
    experts = Architecture.from_hf(path).experts
    shape = len(batch.tokens), sum(experts.layers), experts.number
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(6))
    return replace(batch, routes=scores.argsort(-1)[..., : experts.chosen].to(torch.uint8))


def make_actor(
    path: str, *, tp=1, pp=1, ep=1, sp=False, microbatch_tokens=4096, recompute="none", lora: LoRAConfig | None = None, **more
) -> PolicyActor:
    model = ModelConfig(
        path=path,
        precision="fp32",
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        sequence_parallel=sp,
        recompute=recompute,
        logprob_chunk_tokens=32,
        lora=lora or LoRAConfig(),
        **more,
    )
    use_layout(model)
    return PolicyActor(model, OptimizerConfig(lr=0.1), microbatch_tokens=microbatch_tokens)


def step_gradient(
    path: str, objective: dict, *, adapter: str | None = None, kept: bool = False, routes: bool = False, **layout
) -> dict:
    """Hugging Face name -> gradient, on rank 0 (None elsewhere), of the loss of one step over `example_batch`. With `lora`
    in the layout those of adapters alone, whose values are read from PEFT's directory `adapter`."""
    actor = make_actor(path, **layout)
    if adapter:
        set_adapters(actor, adapter)
    batch, built = with_kept_tokens(example_batch()) if kept else example_batch(), build_objective(objective)
    if routes:
        batch = with_routes(batch, path)
    current = actor.get_inference_log_probs(batch)
    batch.token_columns["old_logprobs"] = current + batch.token_columns["shift_old"]
    batch.token_columns["reference_logprobs"] = current + batch.token_columns["shift_reference"]
    importance = None
    if built.uses_importance:
        importance = built.importance(current, batch.token_columns["old_logprobs"], batch.response_lengths)
    rewards, groups = batch.columns["reward"], batch.columns["group"]
    batch.columns["advantage"] = built.effective_advantages(rewards, groups, importance)
    count, lengths = batch.num_sequences, batch.response_lengths
    batch.columns["coefficient"] = built.by_length(built.coefficients(rewards, groups), lengths)
    batch.columns["share"] = built.by_length(torch.full((count,), 1 / count), lengths)
    with megatron_device():
        actor.accumulate_gradient(batch, PolicyLoss(built, batch.num_sequences))
    gradients = hugging_face_gradients(actor)
    return gradients if dist.get_rank() == 0 else None


def expert_load(path: str, **layout) -> ExpertLoad:
    """Return the load of experts in a step of supervised training over `example_batch`."""
    actor, batch = make_actor(path, **layout), example_batch()
    with megatron_device():
        actor.accumulate_gradient(batch, CompletionLoss(int(batch.response_lengths.sum())))
    return actor.take_expert_load()


def threads_without_model_parallel() -> int:
    """Return the threads of this process after all groups of its layout are gone."""
    stop_model_parallel()
    return len(os.listdir("/proc/self/task"))


def supervised_gradient(path: str, **layout) -> dict:
    """Return what step_gradient does, for supervised training's loss of `example_batch`."""
    actor, batch = make_actor(path, **layout), example_batch()
    with megatron_device():
        columns, _ = actor.accumulate_gradient(batch, CompletionLoss(int(batch.response_lengths.sum())))
    gradients = {**hugging_face_gradients(actor), "loss": columns["loss"].sum()}
    return gradients if dist.get_rank() == 0 else None


def cross_entropy_gradient(path: str) -> dict[str, torch.Tensor]:
    """Return what supervised_gradient should be: of the mean cross-entropy of all completion tokens."""
    model = hugging_face_model(path)
    loss = -torch.cat(response_logprobs(model, example_batch())).mean()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()} | {"loss": loss.detach()}


@torch.no_grad()
def hugging_face_gradients(actor: PolicyActor) -> dict[str, torch.Tensor]:
    """The distributed optimizer leaves each replica one shard of every bucket's sum: gather them, put gradients in the
    weights' place for a moment, and let the weight export do the rest."""
    for buffer in (*actor.ddp.buffers, *actor.ddp.expert_parallel_buffers):
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            shards = list(bucket.grad_data.chunk(dist.get_world_size(group)))
            dist.all_gather(shards, shards[dist.get_rank(group)].clone(), group=group)
    trained = [parameter for parameter in actor.gpt.parameters() if parameter.requires_grad]
    weights = [parameter.clone() for parameter in trained]
    for parameter in trained:
        parameter.copy_(parameter.main_grad)
    stream = stream_adapters(actor.gpt, actor.arch) if actor.config.lora.rank else actor.stream_hf_weights()
    gradients = {name: tensor.clone() for name, tensor in stream}
    for parameter, weight in zip(trained, weights, strict=True):
        parameter.copy_(weight)
    return gradients


@torch.no_grad()
def set_adapters(actor: PolicyActor, path: str) -> None:
    """Give the adapters the values of a directory that PEFT wrote."""
    values = load_file(Path(path) / "adapter_model.safetensors")
    for binding in bind_adapters(actor.gpt, actor.arch):
        if binding.parameter is not None:
            tensors = [values[f"base_model.model.{name}"] for name, _ in binding.weight.hugging_face]
            fill(binding.parameter, binding.weight, parallel_state.get_tensor_model_parallel_rank(), tensors)


def group_loss_gradient(
    path: str, settings: dict, adapter: str | None = None, kept: bool = False, routes: bool = False, balance=0.0
) -> dict[str, torch.Tensor]:
    """Return what step_gradient should be; with `adapter`, by PEFT. balance: weight of the experts' balance loss."""
    model, batch = hugging_face_model(path), with_kept_tokens(example_batch()) if kept else example_batch()
    batch = with_routes(batch, path) if routes else batch
    if adapter:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True, autocast_adapter_dtype=False).double()
    logprobs, lengths = response_logprobs(model, batch), batch.response_lengths.tolist()
    shifts = (batch.token_columns[name].double().split(lengths) for name in ("shift_old", "shift_reference"))
    old, reference = ([own.detach() + shift for own, shift in zip(logprobs, s, strict=True)] for s in shifts)
    importance = clipped_importance(logprobs, old, settings["clip_high"])
    kl = kl_of_reference(logprobs, reference, old if settings.get("kl_gradient") == "reverse" else None)
    (group_loss(importance, batch, settings["lambda_"]) + settings["beta"] * kl).backward()
    if balance:
        (balance * balance_loss(model, batch)[0]).backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = by_expert(trained, model.config.model_type)
    return {name.removeprefix("base_model.model.").replace(".default", ""): grad for name, grad in trained.items()}


def balance_loss(model, batch: SequenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean over sequences and layers of E * sum over experts of (share of the choices * mean probability), and the
    shares of all choices of the batch [layers with experts, E]."""
    seen, losses, totals = [], [], 0
    gates = [module for name, module in model.named_modules() if name.endswith(".gate")]
    hooks = [gate.register_forward_hook(lambda gate, inputs, output: seen.append(output)) for gate in gates]
    for prompt, response in batch.unpack():
        seen.clear()
        model(torch.tensor([prompt + response]))
        counts = torch.stack([torch.bincount(chosen.flatten(), minlength=len(gates[0].weight)) for *_, chosen in seen])
        means = torch.stack([logits.softmax(-1).mean(0) for logits, *_ in seen])
        losses.append(counts.shape[1] * (counts / counts.sum(1, keepdim=True) * means).sum(1).mean())
        totals = totals + counts
    for hook in hooks:
        hook.remove()
    return torch.stack(losses).mean(), totals / totals.sum(1, keepdim=True)


def by_expert(gradients: dict, family: str) -> dict:
    """Return the gradients under the names of files: transformers stacks all experts of a layer in two parameters."""
    found = {}
    for name, grad in gradients.items():
        layer, _, kind = name.rpartition(".experts.")
        if kind not in ("gate_up_proj", "down_proj"):
            found[name.replace("mlp.gate.", "block_sparse_moe.gate.") if family == "mixtral" else name] = grad
            continue
        names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        layer = layer.replace("mlp", "block_sparse_moe") if family == "mixtral" else layer
        for expert, one in enumerate(grad):
            parts = zip(names[:2], one.chunk(2), strict=True) if kind == "gate_up_proj" else [(names[2], one)]
            found |= {f"{layer}.experts.{expert}.{projection}.weight": part for projection, part in parts}
    return found


def token_loss_gradient(path: str, beta: float, entropy_bonus: float) -> dict[str, torch.Tensor]:
    """Return what step_gradient should be for Dr. GRPO by tokens, unclipped: sums over all tokens, divided by the tokens that
    take part; the KL term and the entropy, over all of the vocabulary, by all tokens."""
    model, batch = hugging_face_model(path), example_batch()
    logprobs, lengths = response_logprobs(model, batch), batch.response_lengths.tolist()
    shifts = (batch.token_columns[name].double().split(lengths) for name in ("shift_old", "shift_reference"))
    old, reference = ([own.detach() + shift for own, shift in zip(logprobs, s, strict=True)] for s in shifts)
    rewards, groups, scored = batch.columns["reward"], batch.columns["group"], ~batch.columns["reward"].isnan()
    tokens = sum(length for length, counts in zip(lengths, scored.tolist(), strict=True) if counts)
    total = torch.zeros((), dtype=torch.float64)
    for index in scored.nonzero().flatten().tolist():
        advantage = rewards[index] - rewards[scored & (groups == groups[index])].mean()
        total = total - advantage * torch.exp(logprobs[index] - old[index]).sum() / tokens
    differences = torch.cat([y - x for x, y in zip(logprobs, reference, strict=True)])
    total = total + beta * (torch.exp(differences) - differences - 1).mean()
    entropy = []
    for prompt, response in batch.unpack():
        full = torch.log_softmax(model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1], -1)
        entropy.append(-(full.exp() * full).sum(-1))
    (total - entropy_bonus * torch.cat(entropy).mean()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def hugging_face_model(path: str):
    """Return transformers' model in float64."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager").train()


def response_logprobs(model, batch: SequenceBatch) -> list[torch.Tensor]:
    """Return the log-probs of each sequence's response tokens, among those that were kept, differentiable."""
    logprobs = []
    kept = iter([] if batch.kept is None else batch.kept.ids.split(batch.kept.counts.tolist()))
    routes = iter([] if batch.routes is None else batch.routes.split(batch.lengths.tolist()))
    for prompt, response in batch.unpack():
        if batch.routes is not None:
            force_routes(model, next(routes).long())
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        if batch.kept is not None:
            others = torch.ones_like(logits, dtype=torch.bool)
            for row in others:
                row[next(kept).long()] = False
            logits = logits.masked_fill(others, -torch.inf)
        logprobs.append(torch.log_softmax(logits, -1)[torch.arange(len(response)), torch.tensor(response)])
    return logprobs


def force_routes(model, routes: torch.Tensor) -> None:
    """Make the routers of transformers' model choose `routes` [T, layers with experts, chosen] in the next forward pass."""
    gates = [module for name, module in model.named_modules() if name.endswith(".gate")]
    for place, gate in enumerate(gates):

        def forward(hidden, gate=gate, chosen=routes[:, place]):
            logits = torch.nn.functional.linear(hidden, gate.weight)
            scores = logits.softmax(-1).gather(1, chosen)
            if getattr(gate, "norm_topk_prob", True):
                scores = scores / scores.sum(-1, keepdim=True)
            return logits, scores, chosen

        gate.forward = forward


def clipped_importance(logprobs: list, old: list, clip_high: float) -> torch.Tensor:
    """Return m of each sequence: the mean over its tokens of min(pi / pi_old, 1 + clip_high)."""
    bound = torch.tensor(1 + clip_high, dtype=torch.float64)
    return torch.stack([torch.minimum(torch.exp(x - y), bound).mean() for x, y in zip(logprobs, old, strict=True)])


def kl_of_reference(logprobs: list, reference: list, old: list | None = None) -> torch.Tensor:
    """KL to the reference by k3, averaged over the tokens of a sequence, then over sequences; with `old`, the log-probs under
    the policy that sampled, each token is weighed by its ratio, so that autograd finds the gradient of the KL itself."""
    differences = [y - x for x, y in zip(logprobs, reference, strict=True)]
    terms = [torch.exp(d) - d - 1 for d in differences]
    if old is not None:
        terms = [torch.exp(x - y) * term for x, y, term in zip(logprobs, old, terms, strict=True)]
    return torch.stack([term.mean() for term in terms]).mean()


def group_loss(importance: torch.Tensor, batch: SequenceBatch, lambda_: float) -> torch.Tensor:
    """Return the mean over groups of FRPO's loss with jackknife and baseline, in the authors' scale."""
    rewards, groups = batch.columns["reward"], batch.columns["group"]
    losses = []
    for group in groups.unique():
        members = (groups == group) & ~rewards.isnan()
        r, m, size = rewards[members], importance[members], int(members.sum())
        terms = torch.exp(-(r - r.mean()) / lambda_) * m
        leave_one_out = (terms.sum() - terms) / (size - 1)
        risk = size * terms.mean().log() - (size - 1) * leave_one_out.log().mean()
        losses.append(risk - m.mean())
    return max(lambda_, 1.0) * torch.stack(losses).mean()
