"""Save a rank's random number generators as plain tensors: python, numpy, torch on CPU and GPU, Megatron's tracker."""

from __future__ import annotations

import random

import numpy as np
import torch
from megatron.core import tensor_parallel
from torch import Tensor

from frpo_nemo.megatron.cpu import runs_on_megatron_device

_TRACKER = "megatron."  # prefix of the names of the tracker's generators


@runs_on_megatron_device
def capture() -> dict[str, Tensor]:
    """Return the current states, for `restore`."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "python": torch.tensor(words),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy.position": torch.tensor([position, has_gauss]),
        "numpy.gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    tracked = tensor_parallel.get_cuda_rng_tracker().get_states()
    return states | {_TRACKER + name: state for name, state in tracked.items()}


@runs_on_megatron_device
def restore(states: dict[str, Tensor]) -> None:
    """Set every generator back to the state of `capture`."""
    gauss = states["python.gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = states["numpy.position"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, states["numpy.gauss"].item()))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    tracked = {name.removeprefix(_TRACKER): s for name, s in states.items() if name.startswith(_TRACKER)}
    tensor_parallel.get_cuda_rng_tracker().set_states(tracked)


@runs_on_megatron_device
def reseed(seed: int, step: int) -> None:
    """Set states that depend only on the run's seed and the step, if those of the saving ranks have no meaning."""
    mixed = (seed * 1_000_003 + step) % 2**31
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
    tensor_parallel.random.model_parallel_cuda_manual_seed(mixed)
