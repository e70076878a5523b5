"""A stand-in for transformer_engine_torch, the compiled part of Transformer Engine, which needs a CUDA toolkit to build.

With it Transformer Engine's own Python imports, and its layers and recipes are made on any machine; nothing computes.
`install` comes before megatron.core is imported, in a process of its own.
"""

from __future__ import annotations

import os
import sys
import types
from importlib import metadata

# What Transformer Engine asks while it is imported or a layer is made: versions, and what the device can do.
_ANSWERS = {
    "get_cudnn_version": 92400,
    "get_cublasLt_version": 130100,
    "get_num_cublas_streams": 4,
    "device_supports_multicast": False,
}


class _Compiled(type):
    """A name of the compiled part: an enum that has whatever member is asked for, and a function that cannot run."""

    def __getattr__(cls, member: str):
        if member.startswith("__"):
            raise AttributeError(member)
        value = int.__new__(cls, len(cls.__members__))
        setattr(cls, member, value)
        return value

    @property
    def __members__(cls) -> dict:
        return {name: value for name, value in vars(cls).items() if isinstance(value, cls)}

    def __call__(cls, *args, **kwargs):
        if cls.__name__ in _ANSWERS:
            return _ANSWERS[cls.__name__]
        raise RuntimeError(f"transformer_engine_torch.{cls.__name__} was called; its stand-in computes nothing.")


class _Extension(types.ModuleType):
    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        compiled = _Compiled(name, (int,), {})
        setattr(self, name, compiled)
        return compiled


class _Changed:
    """`target` with some attributes replaced, for one module that has imported it."""

    def __init__(self, target, **replaced):
        self.__dict__ |= {"_target": target, **replaced}

    def __getattr__(self, name: str):
        return getattr(self._target, name)


def is_possible() -> bool:
    """Return whether Transformer Engine is installed, with or without its compiled part."""
    try:
        return bool(metadata.version("transformer-engine"))
    except metadata.PackageNotFoundError:
        return False


def install() -> None:
    """Import transformer_engine.pytorch over the stand-in."""
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron.core has looked for Transformer Engine already; install the stand-in before.")
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # Transformer Engine then leaves its CUDA libraries alone
    sys.modules["transformer_engine_torch"] = _Extension("transformer_engine_torch")
    sys.modules["transformer_engine.pytorch"] = None  # the package would import it before the next lines
    import transformer_engine.common

    del sys.modules["transformer_engine.pytorch"]
    transformer_engine.common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch
    from transformer_engine.pytorch.module import base

    # The one place that refuses to make a layer without a device.
    base.torch = _Changed(base.torch, cuda=_Changed(base.torch.cuda, is_available=lambda: True))
