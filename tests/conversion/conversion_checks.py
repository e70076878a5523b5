"""Checks of conversion in worlds of ranks and in separate processes (see worlds.py)."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import load_plain_tensors
from safetensors.torch import load_file
from worlds import use_layout

from frpo_nemo.config.options import LoRAConfig, ModelConfig, OptimizerConfig
from frpo_nemo.megatron.actor import PolicyActor
from frpo_nemo.megatron.checkpoint import save_load
from frpo_nemo.megatron.cpu import megatron_device
from frpo_nemo.megatron.weights.binding import bind_adapters
from frpo_nemo.megatron.weights.export import save_adapter, save_hf

LORA = LoRAConfig(rank=4, alpha=6.0)
SHARD_BYTES = 300_000
SCORE = 0.25


def actor_of(path: str, *, tp=1, pp=1, precision="fp32", train=False, **model) -> PolicyActor:
    config = ModelConfig(
        path=path, precision=precision, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, **model
    )
    use_layout(config)
    return PolicyActor(config, OptimizerConfig(lr=1e-3) if train else None, microbatch_tokens=40)


def save_both(path: str, run_dir: str, *, step: int = 1, **layout) -> None:
    """The same weights, which are not those of `path`, as a checkpoint of step `step` and by `save_hf` in run_dir/live."""
    actor = actor_of(path, **layout)
    with torch.no_grad():
        for parameter in actor.gpt.parameters():
            parameter.mul_(1 + step / 8)  # every copy of a replicated or tied weight alike
    save_load.save(run_dir, actor, {}, step=step, seed=7, score=SCORE - step)
    save_hf(actor.gpt, actor.arch, path, Path(run_dir) / "live", max_shard_bytes=SHARD_BYTES)


def save_adapters(path: str, run_dir: str, **layout) -> None:
    """A checkpoint of adapters, and by `save_hf` and `save_adapter` the same in run_dir/live and run_dir/adapter."""
    actor = actor_of(path, lora=LORA, **layout)
    with torch.no_grad():
        for binding in bind_adapters(actor.gpt, actor.arch):
            if binding.parameter is not None and binding.parameter is binding.layer.b:
                binding.parameter.fill_(0.05).mul_(binding.parameter.shape[0] % 7 + 1)
    save_load.save(run_dir, actor, {}, step=1, seed=7)
    save_hf(actor.gpt, actor.arch, path, Path(run_dir) / "live", max_shard_bytes=SHARD_BYTES)
    save_adapter(actor.gpt, actor.arch, LORA, Path(run_dir) / "adapter", base=path)


def save(path: str, run_dir: str) -> None:
    """A checkpoint of the weights of `path` as they are."""
    save_load.save(run_dir, actor_of(path), {}, step=1, seed=7)


def save_trained(path: str, run_dir: str) -> None:
    """A checkpoint with an optimizer, in fp32."""
    save_load.save(run_dir, actor_of(path, train=True), {}, step=1, seed=7, score=None)


def read_by_megatron(directory: str) -> dict[str, torch.Tensor]:
    """Return all tensors, read by megatron-core's own reader and not by ours."""
    with megatron_device():
        return load_plain_tensors(directory)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


# -- each of these in a process of its own


def die_before_publishing(options: dict) -> None:
    """Die when everything is written and only the name is missing."""
    from frpo_nemo.conversion import convert
    from frpo_nemo.conversion.inputs import ConvertRun

    convert.publish_export = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    convert.convert(ConvertRun(**options))


def verification_errors(model: str, other: str, checkpoint_of_model: str, out: str) -> tuple[str, str]:
    """Return (the message for another model's weights, the message of a conversion that does not pass)."""
    from frpo_nemo.conversion import verify
    from frpo_nemo.conversion.convert import convert
    from frpo_nemo.conversion.inputs import ConvertRun

    try:
        verify.verify(Path(other), Path(checkpoint_of_model), torch.float32)
    except verify.VerificationError as error:
        first = str(error)
    verify.GAP_LIMITS = {"fp32": ("max", 0.0)}  # rounding alone is too much
    try:
        convert(ConvertRun(input=checkpoint_of_model, base=model, out=out, verify=True))
    except verify.VerificationError as error:
        return first, str(error)


def verify_in_float16(model: str, checkpoint: str, out: str) -> None:
    """Verify a conversion from weights with more digits."""
    from frpo_nemo.conversion.convert import convert
    from frpo_nemo.conversion.inputs import ConvertRun

    convert(ConvertRun(input=checkpoint, base=model, out=f"{out}/hf", dtype="float16", verify=True))


def unpermuted(file: str, out: str) -> str:
    """Return the message for queries and keys whose rows stay in llama.cpp's order."""
    from frpo_nemo.conversion.convert import convert
    from frpo_nemo.conversion.gguf_file import GGUFFile
    from frpo_nemo.conversion.inputs import ConvertRun
    from frpo_nemo.conversion.verify import VerificationError

    GGUFFile._in_order = lambda self, name, whole: whole
    try:
        convert(ConvertRun(input=file, out=out, verify=True))
    except VerificationError as error:
        return str(error)


def peaks(warm: dict, conversions: list[dict]) -> list[int]:
    """Return the bytes of memory that each conversion needs beyond what the process had before.

    VmHWM counts mapped pages of files as well; ru_maxrss would begin with the parent's.
    """
    from frpo_nemo.conversion.convert import convert
    from frpo_nemo.conversion.inputs import ConvertRun

    libc, mmap_threshold = ctypes.CDLL(None), -3
    libc.mallopt(mmap_threshold, 1 << 17)  # a tensor's memory goes back when it is freed, as it does with large ones
    convert(ConvertRun(**warm))  # whatever is imported late is there now
    found = []
    for options in conversions:
        libc.malloc_trim(0)  # or the next would use unseen what is free
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _memory("VmRSS")
        convert(ConvertRun(**options))
        found.append(_memory("VmHWM") - before)
    return found


def _memory(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024
