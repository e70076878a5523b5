"""The machines that a plan is made for. configs/cluster/ has the known ones, and is the only list of GPU data sheets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import yaml
from omegaconf import MISSING

from frpo_nemo.planning.memory import GIB

CLUSTERS = Path(__file__).resolve().parents[2] / "configs" / "cluster"


@dataclass
class Cluster:
    """Nodes of equal GPUs. Bandwidths are per GPU and direction, in GB/s (1e9 bytes)."""

    gpu: str = field(default=MISSING, metadata={"example": "H100"})
    num_nodes: int = 1
    gpus_per_node: int = 8
    gpu_memory_gib: float = field(default=MISSING, metadata={"example": "79"})
    host_memory_gib: float = field(default=MISSING, metadata={"example": "2000"})
    peak_tflops: float = field(default=MISSING, metadata={"example": "989"})
    peak_fp32_tflops: float = field(default=MISSING, metadata={"example": "67"})
    memory_gb_per_s: float = field(default=MISSING, metadata={"example": "3350"})
    nvlink_gb_per_s: float = field(default=MISSING, metadata={"example": "450"})
    network_gb_per_s: float = field(default=MISSING, metadata={"example": "50"})
    host_gb_per_s: float = field(default=MISSING, metadata={"example": "50"})

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.gpus_per_node

    @property
    def gpu_memory(self) -> int:
        """Bytes."""
        return int(self.gpu_memory_gib * GIB)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its data sheet; None for one that is not in configs/cluster/."""
    for file in sorted(CLUSTERS.glob("*.yaml")):
        known = yaml.safe_load(file.read_text())
        if known["gpu"] in device_name:
            return known["peak_tflops"] * 1e12
    return None
