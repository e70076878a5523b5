"""What this machine is, as one line of JSON: `python -m acceptance.facts`. It is a separate process, because asking CUDA
takes GPU memory."""

from __future__ import annotations

import json
import platform

import torch

from frpo_nemo import stack
from frpo_nemo.planning.cluster import peak_flops

PACKAGES = (*stack.PACKAGES, "transformer-engine-torch", "flash-attn", "nemo-toolkit")


def facts() -> dict:
    """Look at the packages and the first GPU. peak_tflops: by the data sheet, if configs/cluster has it. transformer_engine:
    installed. packed_attention: whether Transformer Engine's attention over packs runs on this GPU."""
    found = {name: version for name in PACKAGES if (version := stack.version(name))}
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name(0) if cuda else f"CPU ({platform.machine()})"
    capability = list(torch.cuda.get_device_capability(0)) if cuda else None
    peak = peak_flops(device)
    return {
        "cuda": cuda,
        "device": device,
        "capability": capability,
        "gpus": torch.cuda.device_count() if cuda else 0,
        "peak_tflops": peak and peak / 1e12,
        "transformer_engine": "transformer-engine" in found,
        "packed_attention": cuda and (capability >= [9, 0] or "flash-attn" in found),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda} | found,
    }


if __name__ == "__main__":
    print(json.dumps(facts()))
