"""Describe the machines of a plan. configs/cluster/ has the known ones, and is the only list of GPU data sheets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from frpo_nemo.config.option import option
from frpo_nemo.planning.memory import GIB

CLUSTERS = Path(__file__).resolve().parents[2] / "configs" / "cluster"


@dataclass
class Cluster:
    """Nodes of equal GPUs. Bandwidths are per GPU and direction, in GB/s (1e9 bytes)."""

    gpu: str = option("Name of the GPU, as its driver spells it.", example="H100")
    num_nodes: int = option("Machines.", 1, at_least=1)
    gpus_per_node: int = option("GPUs per machine, connected by NVLink.", 8, at_least=1)
    gpu_memory_gib: float = option("Memory of a GPU, in GiB.", above=0, example="79")
    host_memory_gib: float = option("Memory of a machine, in GiB.", above=0, example="2000")
    peak_tflops: float = option("Dense bf16 TFLOP/s of a GPU, by its data sheet.", above=0, example="989")
    peak_fp32_tflops: float = option("The same in fp32, without TF32.", above=0, example="67")
    memory_gb_per_s: float = option("Bandwidth of the memory of a GPU.", above=0, example="3350")
    nvlink_gb_per_s: float = option("Bandwidth to the other GPUs of a machine.", above=0, example="450")
    network_gb_per_s: float = option("Bandwidth to other machines.", above=0, example="50")
    host_gb_per_s: float = option("Bandwidth to host memory.", above=0, example="50")

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.gpus_per_node

    @property
    def gpu_memory(self) -> int:
        """Return the memory of a GPU in bytes."""
        return int(self.gpu_memory_gib * GIB)


def peak_flops(device_name: str) -> float | None:
    """Return dense bf16 FLOP/s of a GPU by its data sheet; None for one that is not in configs/cluster/."""
    for file in sorted(CLUSTERS.glob("*.yaml")):
        known = yaml.safe_load(file.read_text())
        if known["gpu"] in device_name:
            return known["peak_tflops"] * 1e12
    return None
