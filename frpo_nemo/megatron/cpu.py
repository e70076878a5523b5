"""Run megatron-core without CUDA: everything that is replaced, and why. Nothing here runs where a CUDA device exists.

megatron-core names "cuda" literally in tensor factories and asks `torch.cuda` for devices, streams, events and RNG
states. Two things make it run on CPU with gloo: stand-ins for those `torch.cuda` functions (installed once), and a
`TorchFunctionMode` that turns cuda devices into cpu (active only inside `megatron_device()`, because it slows every
torch call).
"""

from __future__ import annotations

import contextlib
import functools
import logging

import torch
from torch.overrides import TorchFunctionMode

# oneDNN compiles a kernel for every new shape of a bf16 product: 1 to 2 ms, and .7 MiB of memory that it keeps (finding:
# findings/onednn_compiles_every_shape_of_bf16.sh). Ragged batches have ever new shapes, so their rows are rounded up to this.
BF16_ROWS = 32


def megatron_device() -> contextlib.AbstractContextManager:
    """Return a context for every call into megatron-core, which makes it run on a CPU if there is no CUDA device."""
    if torch.cuda.is_available():
        return contextlib.nullcontext()
    _install_stand_ins()
    return _CudaIsCpu()


def without_device_mapping() -> contextlib.AbstractContextManager:
    """Suspend `megatron_device()` for code that names no device, so that the layers' own operations cost nothing extra."""
    return contextlib.nullcontext() if torch.cuda.is_available() else torch._C.DisableTorchFunction()


def runs_on_megatron_device(function):
    """Apply `megatron_device()` as a decorator."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        with megatron_device():
            return function(*args, **kwargs)

    return wrapper


class _CudaIsCpu(TorchFunctionMode):
    """Map cuda devices to cpu in factories, `.to`, `.cuda`; `Tensor.type()` returns what it would on CUDA."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The distributed optimizer sorts parameters by type names such as 'torch.cuda.FloatTensor'.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if kwargs.get("device") is not None and "cuda" in str(kwargs["device"]):
            kwargs = dict(kwargs, device="cpu")
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], (str, torch.device)):
            args = (args[0], "cpu" if "cuda" in str(args[1]) else args[1], *args[2:])
        return func(*args, **kwargs)


class _Stream:
    """Stand in for a stream or an event on a machine where everything happens in program order."""

    def __init__(self, *args, **kwargs):
        pass

    def _nothing(self, *args, **kwargs):
        return None

    record = wait = synchronize = wait_stream = wait_event = _nothing

    def record_event(self, *args):
        return _Stream()

    def query(self) -> bool:
        return True


def _as_on_cpu(tensor: torch.Tensor, as_numpy: bool = False, record_stream: bool = False):
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


@functools.cache
def _install_stand_ins() -> None:
    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher
    from megatron.core.transformer.moe.router import TopKRouter

    def nothing(*args, **kwargs):
        return None

    cuda = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.Stream = cuda.Event = _Stream
    cuda.synchronize = cuda.set_device = cuda.empty_cache = nothing
    cuda.nvtx.range_push = cuda.nvtx.range_pop = nothing
    cuda.memory_allocated = cuda.max_memory_allocated = lambda *args, **kwargs: 0
    # Decorated with torch.compile, which would need a C++ compiler in every forward pass of a router.
    TopKRouter._apply_expert_bias = TopKRouter._apply_expert_bias._torchdynamo_orig_callable
    # megatron-core makes split sizes lists only when they come from a CUDA tensor; gloo's all-to-all takes no tensors.
    token_dispatcher.maybe_move_tensor_to_cpu = _as_on_cpu
    # Megatron's RNG tracker forks the "CUDA" generator; on a CPU that is the one global generator, and the tracker would warn
    # at every fork that it has changed.
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
