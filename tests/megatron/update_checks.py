"""Updates of the real model in any layout (every rank calls these), and the same by torch's AdamW in float64 on
transformers' model: nothing of ours but the batches."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from gradient_checks import by_expert, hugging_face_model, response_logprobs, set_adapters
from peft import PeftModel
from worlds import use_layout

from frpo_nemo.config.options import LoRAConfig, ModelConfig, OptimizerConfig
from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.megatron import weight_decay
from frpo_nemo.megatron.actor import Losses, PolicyActor
from frpo_nemo.megatron.checkpoint import files as checkpoint_files
from frpo_nemo.megatron.checkpoint import save_load
from frpo_nemo.megatron.weights.export import stream_adapters
from frpo_nemo.training.loss import CompletionLoss

SEQUENCES, UPDATES = 8, 3
# Clipped at each update, warmed up over the first two of four. eps is not small next to the smallest gradients, of which
# AdamW would otherwise show the rounding error at full size.
OPTIM = OptimizerConfig(
    lr=1e-2, schedule="cosine", warmup_ratio=0.5, weight_decay=0.1, clip_grad=0.5, adam_beta2=0.99, adam_eps=1e-5
)
RATES = (0.5e-2, 1e-2, 1e-2)


def batch(update: int) -> SequenceBatch:
    """Return ragged prompts and completions."""
    generator = torch.Generator().manual_seed(update)

    def tokens(low: int, high: int) -> list[int]:
        count = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, 100, (count,), generator=generator).tolist()

    return SequenceBatch.from_lists([tokens(2, 9) for _ in range(SEQUENCES)], [tokens(3, 20) for _ in range(SEQUENCES)])


def make_actor(
    path: str, *, tp=1, pp=1, ep=1, sp=False, precision="fp32", lora: LoRAConfig | None = None, optim: OptimizerConfig = OPTIM
) -> PolicyActor:
    model = ModelConfig(
        path=path,
        precision=precision,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        sequence_parallel=sp,
        logprob_chunk_tokens=32,
        lora=lora or LoRAConfig(),
    )
    use_layout(model)
    return PolicyActor(model, optim, microbatch_tokens=64)


def weights(actor: PolicyActor) -> dict[str, torch.Tensor]:
    """Return Hugging Face name -> value of what is trained: all weights, or adapters alone."""
    stream = stream_adapters(actor.gpt, actor.arch) if actor.config.lora.rank else actor.stream_hf_weights()
    return {name: tensor.clone() for name, tensor in stream}


def changes(
    path: str, *, adapter: str | None = None, rule: str = weight_decay.MATRICES, **layout
) -> dict[str, torch.Tensor]:
    """Hugging Face name -> what three updates add to each weight. With `lora` in the layout, adapters of PEFT's directory
    `adapter` are trained. rule: what is decayed."""
    actor = make_actor(path, **layout)
    actor.decay(rule)
    if adapter:
        set_adapters(actor, adapter)
        actor.optimizer.reload_model_params()
    before = weights(actor)
    for update in range(UPDATES):
        examples = batch(update)
        loss = CompletionLoss(int(examples.response_lengths.sum()))
        result = actor.train_step(examples, loss, update=update, total_updates=2 * UPDATES - 2)
        assert result.grad_norm > OPTIM.clip_grad, "the gradient is clipped"
    return {name: after - before[name] for name, after in weights(actor).items()}


def changes_by_adamw(path: str, adapter: str | None = None) -> dict[str, torch.Tensor]:
    """Return what `changes` should be."""
    model = hugging_face_model(path)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True, autocast_adapter_dtype=False).double()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained.values() if p.dim() > 1], "weight_decay": OPTIM.weight_decay},
            {"params": [p for p in trained.values() if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(OPTIM.adam_beta1, OPTIM.adam_beta2),
        eps=OPTIM.adam_eps,
    )
    for update, rate in enumerate(RATES):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        (-torch.cat(response_logprobs(model, batch(update))).mean()).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), OPTIM.clip_grad)
        optimizer.step()
    found = {name: (parameter.detach() - before[name]) for name, parameter in trained.items()}
    found = by_expert(found, model.config.model_type)
    return {name.removeprefix("base_model.model.").replace(".default", ""): change for name, change in found.items()}


# -- what is decayed, found by a gradient of zero


def shrinkage(path: str, **layout) -> dict[str, float]:
    """Return Hugging Face name -> the factor by which an update without gradient changes a weight."""
    return _shrink(make_actor(path, **layout))


def shrinkage_after_resume(path: str, run_dir: str, *, as_recorded_before: bool, **layout) -> dict[str, float]:
    """Return the `shrinkage` of a run that is resumed twice; as_recorded_before: its first checkpoint names no rule."""
    saved = save_load.save(run_dir, make_actor(path, **layout), {}, step=1, seed=7)
    record = checkpoint_files.read(saved)
    if as_recorded_before:
        del record["decayed"]
        torch.distributed.barrier()
        (Path(saved) / checkpoint_files.RECORD).write_text(json.dumps(record))
    for step in (2, 3):
        torch.distributed.barrier()
        actor = make_actor(path, **layout)
        save_load.load(checkpoint_files.directory(run_dir, step - 1), actor)
        save_load.save(run_dir, actor, {}, step=step, seed=7)
    return _shrink(actor)


def _shrink(actor: PolicyActor) -> dict[str, float]:
    before = weights(actor)
    actor.train_step(batch(0), _no_gradient, update=0, total_updates=1)  # at the whole rate
    return {
        name: (after.double().norm() / before[name].double().norm()).item() for name, after in weights(actor).items()
    }


def _no_gradient(logprobs, entropy, sequences) -> Losses:
    return Losses(torch.stack([part.sum() for part in (0 * logprobs).split(sequences.response_lengths.tolist())]))
