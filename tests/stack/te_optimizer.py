"""The actor with Transformer Engine's FusedAdam, as megatron-core takes it on a GPU: its state, there and back through a
checkpoint and through the offload. In a real world of one process; imported by te_process.py, over the stand-in."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import torch
import torch.distributed as dist
from fake_world import or_the_error
from te_layers import as_on_a_gpu
from tiny_models import make_tiny

from frpo_nemo.config.options import ModelConfig, OptimizerConfig
from frpo_nemo.megatron.actor import PolicyActor
from frpo_nemo.megatron.checkpoint import optimizer_state, save_load
from frpo_nemo.megatron.cpu import megatron_device
from frpo_nemo.megatron.groups import start_model_parallel, stop_model_parallel
from frpo_nemo.processes import world

STEP = 7


def both_ways() -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as directory:
        settings = ModelConfig(path=make_tiny(directory, "qwen2"))
        world.start_world()
        start_model_parallel(settings, seed=1)
        yield facts(settings)
        stop_model_parallel()
        dist.destroy_process_group()


@or_the_error
def facts(settings: ModelConfig) -> dict:
    with as_on_a_gpu(meta=False):
        actor = PolicyActor(settings, OptimizerConfig(lr=1e-5), microbatch_tokens=64)
    with megatron_device():
        return checkpointed(actor)


def checkpointed(actor: PolicyActor) -> dict:
    """Save and restore the optimizer's moments and step; then offload them and bring them back."""
    (part,) = optimizer_state._parts(actor.optimizer)
    optimizer_state.allocate(actor.optimizer)
    moments = [state[key] for state in part.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    for number, moment in enumerate(moments):
        moment.fill_(number + 0.5)
    optimizer_state.set_adam_step(actor.optimizer, STEP)
    before = [moment.clone() for moment in moments]
    model = save_load._model_state(actor)
    saved = optimizer_state.to_save(actor.optimizer, model)
    loaded = {name: {key: sharded.data for key, sharded in keys.items()} for name, keys in saved.items()}
    for moment in moments:
        moment.zero_()
    optimizer_state.set_adam_step(actor.optimizer, 0)
    optimizer_state.restore(actor.optimizer, dict(actor.gpt.named_parameters()), loaded, STEP)
    return {
        "class": f"{type(part.optimizer).__module__}.{type(part.optimizer).__name__}",
        "moments": len(moments),
        "parameters": len(model),
        "restored": all(map(torch.equal, moments, before)),
        "step": optimizer_state.adam_step(actor.optimizer),
        **offloaded(actor, part, before),
    }


def offloaded(actor: PolicyActor, part, moments: list[torch.Tensor]) -> dict:
    """Offload and restore as finish_training and prepare_for_training do on a GPU."""
    sizes = [gradient_bytes(actor)]
    actor.ddp.offload_grad_buffers()
    actor.optimizer.offload_to_cpu()
    sizes.append(gradient_bytes(actor))
    actor.ddp.restore_grad_buffers()
    actor.optimizer.restore_from_cpu()
    sizes.append(gradient_bytes(actor))
    now = [state[key] for state in part.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    return {"gradient_bytes": sizes, "kept": all(map(torch.equal, now, moments))}


def gradient_bytes(actor: PolicyActor) -> int:
    return sum(buffer.grad_data.untyped_storage().nbytes() for buffer in actor.ddp.buffers)
