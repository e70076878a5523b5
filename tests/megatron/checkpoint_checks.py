"""Checkpoints in real worlds of processes: every rank calls these."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import load_plain_tensors
from safetensors.torch import load_file, save_file
from worlds import use_layout

from frpo_nemo.config.options import ModelConfig, OptimizerConfig
from frpo_nemo.data.batch import SequenceBatch, segment_mean
from frpo_nemo.megatron.actor import Losses, PolicyActor
from frpo_nemo.megatron.checkpoint import files as checkpoint_files
from frpo_nemo.megatron.checkpoint import optimizer_state, save_load
from frpo_nemo.megatron.cpu import megatron_device

SEQUENCES = 13
STEPS = 6  # of the whole run; the checkpoint is made after BEFORE
BEFORE = 3
LOSSES = "losses"  # a key in addition to the names of weights
STATE = {"data": {"position": 39}, "note": "the caller's own"}


def check_bitwise_resume(path: str, run_dir: str, **layout) -> dict[str, float]:
    """A run that is resumed on the same layout continues bit for bit: losses, weights, Adam's state and step, and every
    random number generator. Returns seconds."""
    actor = make_actor(path, **layout)
    train(actor, range(BEFORE))
    started = time.monotonic()
    saved = save_load.save(run_dir, actor, STATE, step=BEFORE, seed=7, score=0.5)
    seconds = {"save": time.monotonic() - started}
    draws = _draw()
    uninterrupted = train(actor, range(BEFORE, STEPS))

    resumed = make_actor(path, **layout)
    started = time.monotonic()
    state = save_load.load(checkpoint_files.newest(run_dir), resumed)
    seconds["load"] = time.monotonic() - started
    assert state == {**STATE, "step": BEFORE, "rng_restored": True}, state
    assert all(torch.equal(a, b) for a, b in zip(draws, _draw(), strict=True)), "random numbers differ after a resume"
    assert optimizer_state.adam_step(resumed.optimizer) == BEFORE
    assert train(resumed, range(BEFORE, STEPS)) == uninterrupted
    _assert_same_bits(_everything(actor), _everything(resumed))
    assert checkpoint_files.newest(run_dir) == saved == Path(run_dir) / "checkpoints" / f"step_{BEFORE:08d}"
    started = time.monotonic()
    save_load.save(run_dir, resumed, STATE, step=STEPS, seed=7)
    seconds["second save"] = time.monotonic() - started
    return seconds


def check_resume_before_first_update(path: str, run_dir: str, **layout) -> None:
    """An optimizer without state saves and loads as one at step 0, and goes on training."""
    actor = make_actor(path, **layout)
    save_load.save(run_dir, actor, STATE, step=0, seed=7)
    uninterrupted = train(actor, range(2))
    resumed = make_actor(path, **layout)
    save_load.load(checkpoint_files.newest(run_dir), resumed)
    assert train(resumed, range(2)) == uninterrupted


def check_moving_reference(path: str, run_dir: str, mix: float, **layout) -> torch.Tensor:
    """A reference that has moved is what the rule says, is saved, and comes back bit for bit. Returns its log-probs."""
    actor = make_actor(path, **layout)
    actor.freeze_reference()
    expected = {name: tensor.float().clone() for name, tensor in actor.reference.saved().items()}
    for update in range(BEFORE):
        train(actor, range(update, update + 1))
        actor.update_reference(mix)
        for name, parameter in actor.gpt.named_parameters():
            expected[name] = expected[name] + mix * (parameter.detach().float() - expected[name])
    found = {name: tensor.float() for name, tensor in actor.reference.saved().items()}
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    save_load.save(run_dir, actor, STATE, step=BEFORE, seed=7)
    resumed = make_actor(path, **layout)
    resumed.freeze_reference()
    save_load.load(checkpoint_files.newest(run_dir), resumed)
    assert resumed.reference.moved
    _assert_same_bits(actor.reference.saved(), resumed.reference.saved())
    _assert_same_bits(_everything(actor), _everything(resumed))
    return resumed.get_init_policy_logprobs(_batch(99))


def reference_in_another_layout(path: str, run_dir: str, **layout) -> torch.Tensor:
    actor = make_actor(path, **layout)
    actor.freeze_reference()
    save_load.load(checkpoint_files.newest(run_dir), actor)
    return actor.get_init_policy_logprobs(_batch(99))


def save_reference(path: str, run_dir: str, **layout) -> None:
    """Train and save, and write down what a resume in any layout must reproduce: weights and the next losses."""
    actor = make_actor(path, **layout)
    train(actor, range(BEFORE))
    save_load.save(run_dir, actor, STATE, step=BEFORE, seed=7)
    reference = dict(actor.stream_hf_weights())
    reference[LOSSES] = torch.tensor(train(actor, range(BEFORE, STEPS)))
    if dist.get_rank() == 0:
        save_file(reference, Path(run_dir) / "reference.safetensors")


def check_reshaped_resume(path: str, run_dir: str, *, loss_tolerance: float = 1e-6, **layout) -> float:
    """After `save_reference` in another layout: the same weights, the same optimizer state, and next losses within
    rounding. Returns the largest difference of losses."""
    reference = load_file(Path(run_dir) / "reference.safetensors")
    expected = reference.pop(LOSSES)
    actor = make_actor(path, **layout)
    source = checkpoint_files.newest(run_dir)
    state = save_load.load(source, actor)
    assert state == {**STATE, "step": BEFORE, "rng_restored": False}, state
    _assert_same_bits(reference, dict(actor.stream_hf_weights()))
    # What this layout saves is what it has loaded: weights, fp32 main weights and moments, put together.
    again = save_load.save(f"{run_dir}-again", actor, {}, step=BEFORE, seed=7)
    rows = actor.arch.vocab_size
    _assert_same_bits(_plain_tensors(source, rows), _plain_tensors(again, rows))
    assert checkpoint_files.read(again)["adam_step"] == BEFORE
    gap = (torch.tensor(train(actor, range(BEFORE, STEPS))) - expected).abs().max().item()
    assert gap <= loss_tolerance, f"losses differ by {gap}"
    return gap


def check_weights_alone(path: str, run_dir: str, **layout) -> None:
    """An actor without optimizer takes the weights out of a training checkpoint."""
    reference = load_file(Path(run_dir) / "reference.safetensors")
    del reference[LOSSES]
    actor = make_actor(path, train=False, **layout)
    save_load.load(checkpoint_files.newest(run_dir), actor)
    _assert_same_bits(reference, dict(actor.stream_hf_weights()))


def check_failed_write(path: str, run_dir: str, failing_rank: int, limit: int, **layout) -> str:
    """Where one rank cannot write (files end at `limit` bytes), all ranks raise one sentence, what was written goes
    away, and what was there before stays. Returns the sentence."""
    actor = make_actor(path, **layout)
    before = save_load.save(run_dir, actor, STATE, step=1, seed=7)
    sizes = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == failing_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, sizes[1]))
    try:
        save_load.save(run_dir, actor, STATE, step=2, seed=7)
    except save_load.CheckpointError as error:
        sentence = str(error)
    else:
        raise AssertionError("a save with a rank that cannot write went through")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, sizes)
    assert os.listdir(before.parent) == [before.name]
    save_load.load(checkpoint_files.newest(run_dir), actor)
    save_load.save(run_dir, actor, STATE, step=2, seed=7)
    return sentence


def die_inside_save(path: str, run_dir: str, moment: str, **layout) -> None:
    """Save step 1; then every rank is killed inside the save of step 2: while "tensors" are written, or when all is
    written and only the "name" is missing."""
    actor = make_actor(path, **layout)
    save_load.save(run_dir, actor, STATE, step=1, seed=7)

    def die(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "name":
        checkpoint_files.publish = die
    else:
        torch.distributed.checkpoint.filesystem._write_item = die
    try:
        save_load.save(run_dir, actor, STATE, step=2, seed=7)
    finally:
        die()  # only the first rank publishes: the other sees a broken connection, and launchers kill it then


def check_resume_after_death(path: str, run_dir: str, **layout) -> None:
    """The step before the death is the newest, and the next save clears the remains away."""
    actor = make_actor(path, **layout)
    directory = Path(run_dir) / "checkpoints"
    remains = set(os.listdir(directory)) - {"step_00000001"}
    assert len(remains) == 1, remains
    assert save_load.load(checkpoint_files.newest(run_dir), actor)["step"] == 1
    save_load.save(run_dir, actor, STATE, step=2, seed=7)
    assert sorted(os.listdir(directory)) == ["step_00000001", "step_00000002"]


def make_actor(path: str, *, tp=1, pp=1, sp=False, precision="fp32", train=True, **model) -> PolicyActor:
    config = ModelConfig(
        path=path,
        precision=precision,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=sp,
        **model,
    )
    use_layout(config)
    # Weight decay, a schedule and a second moment with memory: whatever is not restored shows in the next steps.
    optim = OptimizerConfig(lr=1e-3, schedule="cosine", warmup_ratio=0.3, weight_decay=0.01, adam_beta2=0.99)
    return PolicyActor(config, optim if train else None, microbatch_tokens=40)


def train(actor: PolicyActor, updates: range) -> list[float]:
    """SFT on batches that depend on the update's number alone; returns their losses."""
    results = [actor.train_step(_batch(u), _sft_loss, update=u, total_updates=STEPS) for u in updates]
    return [result.per_sequence["loss"].sum().item() for result in results]


def _sft_loss(logprobs, entropy, sequences) -> Losses:
    return Losses(-segment_mean(logprobs, sequences.response_lengths) / SEQUENCES)


def _batch(update: int) -> SequenceBatch:
    generator = torch.Generator().manual_seed(update)

    def tokens(low, high):
        count = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, 100, (count,), generator=generator).tolist()

    return SequenceBatch.from_lists([tokens(2, 9) for _ in range(SEQUENCES)], [tokens(1, 9) for _ in range(SEQUENCES)])


def _draw() -> list[torch.Tensor]:
    """Return two numbers of each generator, and the states of Megatron's."""
    own = [random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.rand()]
    tracked = sorted(tensor_parallel.get_cuda_rng_tracker().get_states().items())
    return [torch.tensor(own, dtype=torch.float64), torch.rand(2), *(state for _, state in tracked)]


def _everything(actor: PolicyActor) -> dict[str, torch.Tensor]:
    """This rank's weights and pieces of the optimizer's state."""
    state = {f"weight {name}": parameter for name, parameter in actor.gpt.named_parameters()}
    for part in optimizer_state._parts(actor.optimizer):
        for index, adam in enumerate(part.optimizer.state.values()):
            state |= {f"{index} {key}": tensor for key, tensor in adam.items()}
        for index, group in enumerate(part.optimizer.param_groups):
            state |= {f"main {index} {i}": tensor for i, tensor in enumerate(group["params"])}
    return state


def _plain_tensors(directory: Path, vocabulary: int) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint, whole, by megatron-core's own reader; vocabularies without their padding."""
    with megatron_device():
        tensors = load_plain_tensors(str(directory))
    vocabularies = ("word_embeddings.weight", "output_layer.weight")
    return {name: t[:vocabulary] if name.endswith(vocabularies) else t for name, t in tensors.items()}


def _assert_same_bits(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == found.keys(), expected.keys() ^ found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype and torch.equal(_bits(tensor), _bits(found[name])), name


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """-0.0 and 0.0 are equal as numbers."""
    return tensor.detach().contiguous().view(torch.uint8 if tensor.dim() else tensor.dtype)
