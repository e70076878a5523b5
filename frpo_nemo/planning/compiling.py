"""Decide whether vLLM compiles its model on a CPU. There, half of a decoding step of a small model is Python and single
operations; on a GPU, CUDA graphs replace both."""

from __future__ import annotations

import math
import os
import shutil
import sysconfig
from pathlib import Path

from frpo_nemo.config.options import FRPORun
from frpo_nemo.megatron.architecture import Architecture

SECONDS = 30.0  # to compile, with a cold cache
SAVED = 2e-4  # seconds that a compiled layer saves in a forward pass (docs/performance.md)


def can_compile() -> bool:
    """Return whether this machine has what torch needs to compile for a CPU: a C++ compiler and Python's headers."""
    return bool(shutil.which(os.environ.get("CXX") or "g++")) and Path(sysconfig.get_path("include"), "Python.h").is_file()


def compiles_on_cpu(cfg: FRPORun, arch: Architecture, world_size: int) -> bool:
    """Return whether a run compiles: as rollout.enforce_eager says, or if it saves twice the time that compiling takes. A run
    that continues under the same options compiles as before, because it does not matter how many steps remain."""
    rollout = cfg.rollout
    if rollout.enforce_eager is not None:
        return not rollout.enforce_eager
    engines = world_size // rollout.tensor_model_parallel_size
    together = math.ceil(rollout.prompts_per_step * rollout.group_size / engines / rollout.max_num_seqs)
    passes = cfg.trainer.max_steps * rollout.max_response_tokens * together
    return can_compile() and arch.experts is None and passes * arch.num_layers * SAVED > 2 * SECONDS
