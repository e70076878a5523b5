"""One training step's gradient through the real model, in any layout (every rank calls this), and the group loss as the
paper writes it, by autograd through transformers' model in float64: nothing of ours but the batch."""

from __future__ import annotations

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
from frpo_nemo.megatron.cpu import megatron_device
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


def make_actor(
    path: str, *, tp=1, pp=1, sp=False, microbatch_tokens=4096, recompute="none", lora: LoRAConfig | None = None
) -> PolicyActor:
    model = ModelConfig(
        path=path,
        precision="fp32",
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=sp,
        recompute=recompute,
        logprob_chunk_tokens=32,
        lora=lora or LoRAConfig(),
    )
    use_layout(model)
    return PolicyActor(model, OptimizerConfig(lr=0.1), microbatch_tokens=microbatch_tokens)


def step_gradient(path: str, objective: dict, *, adapter: str | None = None, kept: bool = False, **layout) -> dict:
    """Hugging Face name -> gradient, on rank 0 (None elsewhere), of the loss of one step over `example_batch`. With `lora`
    in the layout those of adapters alone, whose values are read from PEFT's directory `adapter`."""
    actor = make_actor(path, **layout)
    if adapter:
        set_adapters(actor, adapter)
    batch, built = with_kept_tokens(example_batch()) if kept else example_batch(), build_objective(objective)
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
    group = parallel_state.get_data_parallel_group()
    replicas = dist.get_world_size(group)
    for buffer in actor.ddp.buffers:
        for bucket in buffer.buckets:
            shards = list(bucket.grad_data.chunk(replicas))
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
    path: str, settings: dict, adapter: str | None = None, kept: bool = False
) -> dict[str, torch.Tensor]:
    """Return what step_gradient should be; with `adapter`, by PEFT."""
    model, batch = hugging_face_model(path), with_kept_tokens(example_batch()) if kept else example_batch()
    if adapter:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True, autocast_adapter_dtype=False).double()
    logprobs, lengths = response_logprobs(model, batch), batch.response_lengths.tolist()
    shifts = (batch.token_columns[name].double().split(lengths) for name in ("shift_old", "shift_reference"))
    old, reference = ([own.detach() + shift for own, shift in zip(logprobs, s, strict=True)] for s in shifts)
    importance = clipped_importance(logprobs, old, settings["clip_high"])
    kl = kl_of_reference(logprobs, reference, old if settings.get("kl_gradient") == "reverse" else None)
    (group_loss(importance, batch, settings["lambda_"]) + settings["beta"] * kl).backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name.removeprefix("base_model.model.").replace(".default", ""): grad for name, grad in trained.items()}


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

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).train()


def response_logprobs(model, batch: SequenceBatch) -> list[torch.Tensor]:
    """Return the log-probs of each sequence's response tokens, among those that were kept, differentiable."""
    logprobs = []
    kept = iter([] if batch.kept is None else batch.kept.ids.split(batch.kept.counts.tolist()))
    for prompt, response in batch.unpack():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        if batch.kept is not None:
            others = torch.ones_like(logits, dtype=torch.bool)
            for row in others:
                row[next(kept).long()] = False
            logits = logits.masked_fill(others, -torch.inf)
        logprobs.append(torch.log_softmax(logits, -1)[torch.arange(len(response)), torch.tensor(response)])
    return logprobs


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
