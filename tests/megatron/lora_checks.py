"""Adapters in real worlds of processes: every rank calls these."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from checkpoint_checks import make_actor, train
from gradient_checks import example_batch, set_adapters
from megatron.core import parallel_state

from frpo_nemo.config.options import LoRAConfig
from frpo_nemo.megatron.checkpoint import rng, save_load
from frpo_nemo.megatron.checkpoint.optimizer_state import _parts
from frpo_nemo.megatron.weights.binding import bind_adapters
from frpo_nemo.megatron.weights.export import save_adapter, stream_adapters
from frpo_nemo.processes import world


def compared_with_reference(path: str, lora: LoRAConfig, adapter: str, **layout) -> dict[str, torch.Tensor]:
    """Return the log-probs of the example's responses by the policy with PEFT's `adapter`, and by its reference."""
    actor = make_actor(path, lora=lora, **layout)
    set_adapters(actor, adapter)
    actor.freeze_reference()
    columns = actor.compare_with_reference(example_batch())
    assert torch.equal(columns["reference_logprobs"], actor.get_init_policy_logprobs(example_batch()))
    assert torch.equal(columns["logprobs"], actor.get_inference_log_probs(example_batch())), "adapters are on again"
    return columns


def check_merged_stream(path: str, lora: LoRAConfig, adapter: str, expected: dict, **layout) -> None:
    """What a refit or an export sends are the weights that PEFT merges."""
    actor = make_actor(path, lora=lora, **layout)
    set_adapters(actor, adapter)
    streamed = dict(actor.stream_hf_weights(bucket_bytes=1 << 16))
    assert streamed.keys() == expected.keys()
    for name, tensor in streamed.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-6, msg=name)


def initial_adapters(path: str, lora: LoRAConfig, **layout) -> dict[str, torch.Tensor]:
    """Return PEFT's name -> tensor."""
    actor = make_actor(path, lora=lora, **layout)
    return dict(stream_adapters(actor.gpt, actor.arch))


def check_only_adapters_are_trained(path: str, lora: LoRAConfig, **layout) -> None:
    """After updates every adapter has changed and no other parameter; gradients and moments exist for adapters alone; and
    what tensor ranks hold in common is the same on all of them."""
    actor = make_actor(path, lora=lora, **layout)
    before = {name: parameter.clone() for name, parameter in actor.gpt.named_parameters()}
    train(actor, range(3))
    once, again = (actor.get_inference_log_probs(example_batch()) for _ in range(2))
    assert torch.equal(once, again), "nothing is dropped but in training"
    trained = 0
    for name, parameter in actor.gpt.named_parameters():
        is_adapter = ".lora." in name
        assert parameter.requires_grad == is_adapter == (not torch.equal(parameter, before[name])), name
        assert hasattr(parameter, "main_grad") == is_adapter, name
        trained += parameter.numel() if is_adapter else 0
    moments = [state["exp_avg"] for part in _parts(actor.optimizer) for state in part.optimizer.state.values()]
    assert 0 < sum(moment.numel() for moment in moments) <= trained
    bound = [binding for binding in bind_adapters(actor.gpt, actor.arch) if binding.parameter is not None]
    common = [binding.parameter.detach() for binding in bound if binding.weight.replicated]
    everywhere = world.gather_objects((parallel_state.get_pipeline_model_parallel_rank(), common))
    for stage, others in everywhere:
        if stage == parallel_state.get_pipeline_model_parallel_rank():
            assert all(torch.equal(own, other) for own, other in zip(common, others, strict=True))


def save_after_the_base_was_replaced(path: str, other: str, run_dir: str, lora: LoRAConfig) -> None:
    """Save as when a first stage runs again into the directory from which a second one began."""
    actor = make_actor(path, lora=lora)
    shutil.copyfile(Path(other) / "model.safetensors", Path(path) / "model.safetensors")
    save_load.save(run_dir, actor, {}, step=1, seed=7)


def losses_with(path: str, lora: LoRAConfig, **layout) -> list[float]:
    """Return the losses of three updates that begin with the same random numbers."""
    actor = make_actor(path, lora=lora, **layout)
    rng.reseed(0, 0)
    return train(actor, range(3))


def export_trained(path: str, lora: LoRAConfig, out: str, **layout) -> torch.Tensor:
    """Train, write PEFT's directory `out`; returns the policy's log-probs of the example's responses."""
    actor = make_actor(path, lora=lora, **layout)
    train(actor, range(3))
    save_adapter(actor.gpt, actor.arch, lora, out, base=path)
    return actor.get_inference_log_probs(example_batch())
