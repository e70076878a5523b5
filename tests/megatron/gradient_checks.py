"""One training step's gradient through the real model, in any layout: every rank calls these."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from worlds import use_layout

from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.megatron.actor import PolicyActor
from frpo_nemo.megatron.cpu import megatron_device
from frpo_nemo.objective import build_objective
from frpo_nemo.training.config import ModelConfig, OptimizerConfig
from frpo_nemo.training.loss import PolicyLoss

GROUPS, GROUP_SIZE = 4, 4


def example_batch() -> SequenceBatch:
    """16 ragged responses in 4 groups that are interleaved (so that they straddle any split), one unscored, with
    log-probs of a slightly different old policy and of a reference."""
    generator = torch.Generator().manual_seed(0)

    def draw(low, high, count):
        return torch.randint(low, high, (count,), generator=generator).tolist()

    sizes = draw(2, 30, GROUPS * GROUP_SIZE)
    prompts = [draw(3, 100, 2 + index % 5) for index in range(GROUPS * GROUP_SIZE)]
    batch = SequenceBatch.from_lists(
        prompts,
        [draw(3, 100, size) for size in sizes],
        group=[index % GROUPS for index in range(GROUPS * GROUP_SIZE)],
        reward=torch.rand(GROUPS * GROUP_SIZE, generator=generator).double(),
    )
    batch.columns["reward"][5] = float("nan")
    for name, spread in (("shift_old", 0.1), ("shift_reference", 0.3)):
        batch.token_columns[name] = spread * torch.randn(sum(sizes), generator=generator)
    return batch


def step_gradient(
    path: str, objective: dict, *, tp=1, pp=1, sp=False, microbatch_tokens=4096, recompute="none"
) -> dict:
    """Hugging Face name -> gradient, on rank 0 (None elsewhere), of the loss of one step over `example_batch`."""
    model = ModelConfig(
        path=path,
        precision="fp32",
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=sp,
        recompute=recompute,
        logprob_chunk_tokens=32,
    )
    use_layout(model)
    actor = PolicyActor(model, OptimizerConfig(lr=0.1), microbatch_tokens=microbatch_tokens)
    batch, goal = example_batch(), build_objective(objective)
    current = actor.get_inference_log_probs(batch)
    batch.token_columns["old_logprobs"] = current + batch.token_columns["shift_old"]
    batch.token_columns["reference_logprobs"] = current + batch.token_columns["shift_reference"]
    importance = None
    if goal.uses_importance:
        importance = goal.importance(current, batch.token_columns["old_logprobs"], batch.response_lengths)
    rewards, groups = batch.columns["reward"], batch.columns["group"]
    batch.columns["advantage"] = goal.effective_advantages(rewards, groups, importance)
    batch.columns["coefficient"] = goal.coefficients(rewards, groups)
    with megatron_device():
        actor.accumulate_gradient(batch, PolicyLoss(goal, batch.num_sequences))
    gradients = _hugging_face_gradients(actor)
    return gradients if dist.get_rank() == 0 else None


@torch.no_grad()
def _hugging_face_gradients(actor: PolicyActor) -> dict[str, torch.Tensor]:
    """The distributed optimizer leaves each replica one shard of every bucket's sum: gather them, put gradients in the
    weights' place, and let the weight export do the rest."""
    group = parallel_state.get_data_parallel_group()
    replicas = dist.get_world_size(group)
    for buffer in actor.ddp.buffers:
        for bucket in buffer.buckets:
            shards = list(bucket.grad_data.chunk(replicas))
            dist.all_gather(shards, shards[dist.get_rank(group)].clone(), group=group)
    for parameter in actor.gpt.parameters():
        parameter.copy_(parameter.main_grad)
    return {name: tensor.clone() for name, tensor in actor.stream_hf_weights()}


def group_loss_gradient(path: str, settings: dict) -> dict[str, torch.Tensor]:
    """The same gradient by autograd through transformers' model in float64 and the group loss as the paper writes it
    (FRPO with jackknife and baseline): nothing of ours but the batch."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).train()
    batch = example_batch()
    logprobs = []
    for prompt, response in batch.unpack():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logprobs.append(torch.log_softmax(logits, -1)[torch.arange(len(response)), torch.tensor(response)])
    lengths = batch.response_lengths.tolist()
    shift_old = batch.token_columns["shift_old"].double().split(lengths)
    shift_reference = batch.token_columns["shift_reference"].double().split(lengths)
    # m = mean over tokens of min(pi / pi_old, 1 + eps); pi_old = pi e^shift at this point, a constant.
    importance, kl = [], []
    for own, old, reference in zip(logprobs, shift_old, shift_reference, strict=True):
        ratio = torch.exp(own - own.detach() - old)
        importance.append(torch.minimum(ratio, torch.tensor(1 + settings["clip_high"], dtype=torch.float64)).mean())
        difference = own.detach() + reference - own
        kl.append((torch.exp(difference) - difference - 1).mean())
    loss = settings["beta"] * torch.stack(kl).mean()
    rewards, groups, lambda_ = batch.columns["reward"], batch.columns["group"], settings["lambda_"]
    for group in range(GROUPS):
        members = [i for i in range(len(lengths)) if groups[i] == group and not rewards[i].isnan()]
        r, m, size = rewards[members], torch.stack([importance[i] for i in members]), len(members)
        terms = torch.exp(-(r - r.mean()) / lambda_) * m
        leave_one_out = (terms.sum() - terms) / (size - 1)
        risk = size * terms.mean().log() - (size - 1) * leave_one_out.log().mean()
        loss = loss + max(lambda_, 1.0) * (risk - m.mean()) / GROUPS
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return gradients
