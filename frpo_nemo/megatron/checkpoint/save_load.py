"""Save and load checkpoints of a run: model, optimizer and random number generators of all ranks, and the caller's state.
With adapters, only the adapters of the model are saved.

A checkpoint is a directory in megatron-core's torch_dist format that loads in any layout of the same model; on the
layout that saved it, training continues bitwise as if it had never stopped. It appears under its name when it is
complete and on disk, or not at all (files.py). Loading never runs code.

Not saved: frozen weights (of model.path: freeze a reference before `load`; one that moves is saved), learning rate and schedule
(functions of the step), and, under delayed-scaling FP8, the amax history (it fills again within its length).
"""

from __future__ import annotations

import json
import logging
import math
import pickle
import secrets
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factory_merges, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    mcore_to_pyt_state_dict,
)
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from frpo_nemo import __version__, stack
from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron import weight_decay
from frpo_nemo.megatron.checkpoint import files, optimizer_state, rng
from frpo_nemo.megatron.cpu import runs_on_megatron_device
from frpo_nemo.megatron.lora import sharded_adapters
from frpo_nemo.megatron.reference import Reference
from frpo_nemo.megatron.weights import adapter_files
from frpo_nemo.processes import world

_LOG = logging.getLogger(__name__)
_LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
)
_PACKAGES = ("megatron-core", "torch", "transformer-engine")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. Nothing is left of it, and earlier ones are untouched."""


@runs_on_megatron_device
def save(
    run_dir: str | Path, actor, state: dict[str, Any], *, step: int, seed: int, score: float | None = None
) -> Path:
    """Write the checkpoint of `step`; returns its directory. Every rank calls this.

    state: returned to the caller by `load`, as JSON; rank 0's is saved. seed: the run's, for a resume in another
    layout. score: of these weights in validation, higher is better; None if they were not validated. An older
    checkpoint of the same step is replaced. Raises CheckpointError, on all ranks, when one of them cannot write.
    """
    final = files.directory(run_dir, step)
    record = json.dumps(_record(actor, state, step, seed, score), indent=1)
    token = world.gather_objects(secrets.token_hex(4))[0]
    temporary = files.temporary_name(final, token)

    def begin():
        files.begin(final, token)

    def write():
        _write_tensors(temporary, actor)  # a failure of one rank reaches all here, so that none waits
        files.write(temporary / _rng_file(), to_safetensors(rng.capture()))
        if dist.get_rank() == 0:
            files.write(temporary / files.RECORD, record.encode())

    def publish():
        files.publish(temporary, final)

    _on_every_rank(begin, temporary, only_first=True)
    _on_every_rank(write, temporary)
    _on_every_rank(publish, temporary, only_first=True)
    return final


@runs_on_megatron_device
@torch.no_grad()
def load(checkpoint: str | Path, actor) -> dict[str, Any]:
    """Continue from `checkpoint`; returns the caller's state with "step" and "rng_restored". Every rank calls this,
    with the same path.

    Without an optimizer in `actor`, only the weights are read. On another layout than the saving one, random number
    generators are seeded with (seed, step) instead, and "rng_restored" is False. Raises ConfigError, before
    anything has changed, when the checkpoint is of another model or of another program.
    """
    record = files.read(checkpoint)
    files.check_matches(checkpoint, actor.arch)
    adapter_files.check(checkpoint, actor.config, actor.adapter_record)
    read_metadata(checkpoint)
    model = _model_state(actor)
    wanted = {"model": model, "optimizer": optimizer_state.to_load(actor.optimizer, model)}
    if actor.reference is not None and record.get("reference"):
        actor.reference.prepare_to_load(average=record["reference"] == "average")
        wanted["reference"] = _reference_state(actor, model)
    loaded = _read_tensors(Path(checkpoint), wanted)
    parameters = dict(actor.gpt.named_parameters())
    for name, value in loaded["model"].items():
        parameters[name].copy_(value)
    if "reference" in loaded:
        actor.reference.restore(loaded["reference"])
    if actor.optimizer is not None:
        optimizer_state.restore(actor.optimizer, parameters, loaded.get("optimizer", {}), record["adam_step"])
        actor.decay(weight_decay.rule_of(record))
    restored = {"expert_model_parallel_size": 1} | record["layout"] == _layout(actor)  # an earlier version had no such key
    if restored:
        rng.restore(load_file(Path(checkpoint) / _rng_file()))
    else:
        rng.reseed(record["seed"], record["step"])
        if dist.get_rank() == 0 and actor.optimizer is not None:
            _LOG.warning(
                "%s was saved in another layout (%s): weights and optimizer are the same, random number generators "
                "start from the seed and the step.",
                checkpoint,
                ", ".join(f"{key}={value}" for key, value in record["layout"].items() if value is not None),
            )
    return {**record["state"], "step": record["step"], "rng_restored": restored}


def read_metadata(checkpoint: str | Path) -> Metadata:
    """Return the index of a checkpoint's tensors, the only pickle that is read. Raises ConfigError when it is missing,
    cut off, or would create anything except descriptions of tensors."""
    path = Path(checkpoint) / ".metadata"
    if not path.is_file():
        raise ConfigError(f"{checkpoint} is not a whole checkpoint: it has no .metadata.")
    with path.open("rb") as file:
        try:
            metadata = _DescriptionsOnly(file, path).load()
        except (pickle.UnpicklingError, EOFError) as error:
            raise ConfigError(f"{checkpoint} is not a whole checkpoint: its .metadata is cut off ({error}).") from error
    if not isinstance(metadata, Metadata):
        raise ConfigError(f"{path} holds a {type(metadata).__name__}, not an index of tensors.")
    return metadata


class _DescriptionsOnly(pickle.Unpickler):
    """Read a pickle that names only these classes and functions."""

    _ALLOWED = {
        "torch": {"Size", "float32", "bfloat16", "float16", "uint8", "strided"},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.metadata": {
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "pathlib": {"PosixPath"},
        "pathlib._local": {"PosixPath"},  # its module in Python 3.13
    }

    def __init__(self, file, path: Path):
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str):
        if name not in self._ALLOWED.get(module, ()):
            raise ConfigError(
                f"{self._path} refers to {module}.{name}, which no checkpoint of frpo-nemo does; do not load it."
            )
        return super().find_class(module, name)


class Writer(torch_checkpoint.FileSystemWriter):
    """Write like torch's writer, but report a full disk as such: its zip writer raises another error while handling it."""

    def write_data(self, plan, planner):
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


class _InProcessSave:
    """Write megatron-core's torch_dist format with torch's own writer, in this thread.

    megatron-core's writer starts a manager process, which imports `__main__` again (seconds, once), and forks one
    process per file from a process full of gloo, CUDA and vLLM threads. The ranks give enough parallelism: each GPU's process
    writes its share, copying from the GPU meanwhile. It uses one thread, because torch's writer drops failures in others.
    """

    def save(self, sharded_state_dict: dict, checkpoint_dir: Path) -> None:
        by_key: dict[str, list] = {}
        for tensor in nested_values(sharded_state_dict):
            if is_main_replica(tensor.replica_id):
                by_key.setdefault(tensor.key, []).append(tensor)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(by_key),
            storage_writer=Writer(checkpoint_dir, thread_count=1, sync_files=True),
            planner=MCoreSavePlanner(flatten_state_dict=False),
        )


def _write_tensors(directory: Path, actor) -> None:
    """Write all ranks' tensors: weights divided over the replicas that hold them, the optimizer's as they are."""
    model = _model_state(actor)
    tensors = {"model": model, "optimizer": optimizer_state.to_save(actor.optimizer, model)}
    if actor.reference is not None and actor.reference.moved:
        tensors["reference"] = _reference_state(actor, model)
    state, _ = save_preprocess(tensors, False)
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    FullyParallelSaveStrategyWrapper(_InProcessSave(), replicas).save(state, directory)
    if dist.get_rank() == 0:  # two files that only other Megatron programs need to read it
        files.write(directory / "metadata.json", json.dumps(asdict(CheckpointingConfig("torch_dist"))).encode())
        torch.save({}, directory / "common.pt")


def _read_tensors(directory: Path, wanted: dict) -> dict:
    sharded, _, factories = load_preprocess(wanted)
    return apply_factory_merges(TorchDistLoadShardedStrategy().load(sharded, directory), factories)


def _model_state(actor) -> dict:
    """Return name -> place in the whole model of every parameter that is trained, without Transformer Engine's
    `_extra_state`, which are pickles."""
    if actor.config.lora.rank:
        return sharded_adapters(actor.gpt, actor.arch)
    state = actor.gpt.sharded_state_dict()
    return {name: sharded for name, sharded in state.items() if not isinstance(sharded, ShardedObject)}


def _reference_state(actor, model: dict) -> dict:
    """Return the reference's weights at the places of the policy's, under keys of their own."""
    state = {}
    for name, weight in actor.reference.saved().items():
        if name in model:  # tied embeddings have one place
            dtype = {"dtype": weight.dtype} if isinstance(model[name], ShardedTensor) else {}
            state[name] = replace(model[name], key=f"reference.{model[name].key}", data=weight, **dtype)
    return state


def _record(actor, state: dict, step: int, seed: int, score: float | None) -> dict[str, Any]:
    return {
        "format": files.FORMAT,
        "step": step,
        "seed": seed,
        "score": score if score is not None and math.isfinite(score) else None,
        "adam_step": optimizer_state.adam_step(actor.optimizer),
        "decayed": actor.decayed,
        "reference": _kind_of_reference(actor.reference),
        "precision": actor.config.precision,
        "layout": _layout(actor),
        "architecture": files.identity(actor.arch),
        "lora": actor.adapter_record,
        "versions": versions(),
        "state": state,
    }


def _kind_of_reference(reference: Reference | None) -> str | None:
    """Return what a checkpoint holds of it; None for one that has not moved."""
    if reference is None or not reference.moved:
        return None
    return "average" if reference.averages else "weights"


def _layout(actor) -> dict[str, int | None]:
    """Return the sizes that determine which rank holds what."""
    return {"world_size": dist.get_world_size(), **{name: getattr(actor.config, name) for name in _LAYOUT}}


def _rng_file() -> str:
    return f"rng_{dist.get_rank():05d}.safetensors"


def versions() -> dict[str, str]:
    """Return the versions of this program and of the packages that write its files."""
    return {"frpo-nemo": __version__} | {name: v for name in _PACKAGES if (v := stack.version(name))}


def _on_every_rank(action: Callable[[], None], temporary: Path, *, only_first: bool = False) -> None:
    """Do `action` on every rank, or the first. If it fails on any, clean up and raise CheckpointError on all."""
    problem = None
    try:
        if dist.get_rank() == 0 or not only_first:
            action()
    except (OSError, RuntimeError, CheckpointException) as error:
        problem = _sentence(error)
    problems = world.gather_objects(problem)
    first = next((text for text in problems if text), None)
    if first is None:
        return
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    dist.barrier()  # otherwise an error on another rank might end this one
    raise CheckpointError(
        f"The checkpoint {temporary.with_suffix('')} could not be written: {first}. Its partial files are removed; "
        "earlier checkpoints are untouched."
    )


def _sentence(error: BaseException) -> str:
    """Return the error and its rank, without the stack frames."""
    rank = dist.get_rank()
    if isinstance(error, CheckpointException):  # torch's: rank -> (error, traceback) of those that failed
        rank, (error, _) = min(error.failures.items())
    text = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
    return f"{text.splitlines()[0]} (rank {rank})"
