"""Run in a rank: load what test_loading.py has poisoned, and report which exception that raised."""

from __future__ import annotations

import dataclasses
import io
import pickle
import shutil
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from traps import Trap
from worlds import use_layout

from frpo_nemo.config.options import ModelConfig, OptimizerConfig
from frpo_nemo.megatron.actor import PolicyActor
from frpo_nemo.megatron.checkpoint import save_load


def load_poisoned_checkpoints(path: str, run_dir: str) -> dict[str, str | None]:
    """Attack -> the exception that loading raised, if any. A payload that ran leaves run_dir/sprung."""
    actor = make_actor(path)
    whole = save_load.save(run_dir, actor, {"data": {}, "memory": {}}, step=1, seed=1)
    trap = Trap(Path(run_dir, "sprung"))
    pickled = io.BytesIO()
    torch.save(trap, pickled)
    found = {}
    for name, poison in {
        "index": poison_index,
        "index with objects": poison_index_with_objects,
        "tensors": poison_tensors,
        "random generators": poison_generators,
        "what we do not read": poison_other_files,
    }.items():
        poisoned = whole.with_name(f"step_0000000{len(found) + 2}")
        shutil.copytree(whole, poisoned)
        poison(poisoned, trap, pickled.getvalue())
        try:
            save_load.load(poisoned, actor)
            found[name] = None
        except BaseException as error:  # CheckpointException isn't an Exception
            found[name] = type(error).__name__
    return found


def load_model_and_tokenizer(path: str) -> None:
    """Load both as training does."""
    from frpo_nemo.rollout.chat import load_chat, stop_token_ids

    make_actor(path)
    stop_token_ids(path, load_chat(ModelConfig(path=path)))


def make_actor(path: str) -> PolicyActor:
    model = ModelConfig(path=path, precision="fp32")
    use_layout(model)
    return PolicyActor(model, OptimizerConfig(lr=1e-3), microbatch_tokens=64)


def poison_index(directory: Path, trap: Trap, pickled: bytes) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps(trap))


def poison_index_with_objects(directory: Path, trap: Trap, pickled: bytes) -> None:
    """Every tensor is declared to be an object, which torch would unpickle without a guard."""
    index = pickle.loads((directory / ".metadata").read_bytes())
    index.state_dict_metadata = {name: BytesStorageMetadata() for name in index.state_dict_metadata}
    (directory / ".metadata").write_bytes(pickle.dumps(index))
    for file in directory.glob("*.distcp"):
        file.write_bytes(pickled)


def poison_tensors(directory: Path, trap: Trap, pickled: bytes) -> None:
    """The bytes of every tensor are those of a pickle."""
    index = pickle.loads((directory / ".metadata").read_bytes())
    index.storage_data = {
        key: dataclasses.replace(place, offset=0, length=len(pickled)) for key, place in index.storage_data.items()
    }
    (directory / ".metadata").write_bytes(pickle.dumps(index))
    for file in directory.glob("*.distcp"):
        file.write_bytes(pickled)


def poison_generators(directory: Path, trap: Trap, pickled: bytes) -> None:
    for file in directory.glob("rng_*"):
        file.write_bytes(pickled)


def poison_other_files(directory: Path, trap: Trap, pickled: bytes) -> None:
    for name in ("common.pt", "rng.pt", "latest.pkl", "__0_9.distcp"):
        (directory / name).write_bytes(pickled)
