"""The same numbers from transformers' model by autograd. Nothing here is ours except the loss, which is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.megatron.actor import Loss
from frpo_nemo.megatron.packing import to_device
from frpo_nemo.processes import world

LOGITS = 32  # compared per token, at ids spread over the vocabulary


@dataclass(frozen=True)
class Numbers:
    """What is compared, in fp32 on the CPU. logits [R, LOGITS], logprobs [R], entropy [R]: of all response tokens. losses [N]:
    of the sequences. gradient: of their sum, see `flat`."""

    logits: Tensor
    logprobs: Tensor
    entropy: Tensor
    losses: Tensor
    gradient: Tensor


def load(path: str, dtype: torch.dtype):
    """Load transformers' model to this rank's device."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(world.device()).eval()


def numbers(model, batch: SequenceBatch, loss: Loss) -> Numbers:
    """Compute sequence after sequence; leave the gradient of the summed loss in the parameters."""
    model.zero_grad()
    ids = torch.linspace(0, model.config.vocab_size - 1, LOGITS).long()
    kept, losses = [], []
    for index in range(batch.num_sequences):
        sequence = to_device(batch.select([index]), model.device)
        logits, logprobs, entropy = _response(model, sequence)
        value = loss(logprobs, entropy, sequence).losses.sum()
        value.backward()
        losses.append(value.item())
        kept.append([t.detach().cpu() for t in (logits[:, ids.to(logits.device)], logprobs, entropy)])
    logits, logprobs, entropy = (torch.cat(columns) for columns in zip(*kept, strict=True))
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Numbers(logits, logprobs, entropy, torch.tensor(losses), flat(named))


@torch.no_grad()
def logprobs(model, batch: SequenceBatch) -> Tensor:
    """Return the log-probs of all response tokens, fp32 [R] on CPU."""
    sequences = [to_device(batch.select([index]), model.device) for index in range(batch.num_sequences)]
    return torch.cat([_response(model, sequence)[1].cpu() for sequence in sequences])


def flat(named: dict[str, Tensor]) -> Tensor:
    """Join all tensors in the order of their names: fp32, on CPU."""
    return torch.cat([named[name].detach().float().cpu().flatten() for name in sorted(named)])


def _response(model, sequence: SequenceBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits [R, V], log-probs and entropy [R] of a batch of one sequence, in fp32."""
    prompt = int(sequence.prompt_lengths)
    logits = model(sequence.tokens[None]).logits[0, prompt - 1 : -1].float()
    everything = torch.log_softmax(logits, -1)
    logprobs = everything.gather(1, sequence.tokens[prompt:, None]).squeeze(1)
    return logits, logprobs, -(everything.exp() * everything).sum(-1)
