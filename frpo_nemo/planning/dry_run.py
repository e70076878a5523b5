"""Build the real model of every pipeline stage without memory or processes: on the meta device, in a fake process group as
large as the job. Compare it with the table of weights, with transformers' own model, and with memory.py's arithmetic.
Run this in a separate process without GPUs: megatron-core would put weights on one, whatever the default device is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from frpo_nemo.config.options import ModelConfig
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.model import build_model
from frpo_nemo.megatron.weights.binding import bind
from frpo_nemo.megatron.weights.table import EXPERT_NAMES, hf_shapes
from frpo_nemo.planning.memory import Layout, rank_parameters


@dataclass(frozen=True)
class Stage:
    """One pipeline stage: the bytes of parameters on each of its ranks, and memory.py's number."""

    number: int
    layers: range
    parameters: int
    bytes: int
    estimate: int


def dry_run(model: ModelConfig, layout: Layout) -> list[Stage]:
    """Build one rank of each stage (tensor-parallel ranks have equal shapes) and check it. layout: the
    sizes of `model`. Raises ValueError that names what differs."""
    arch = Architecture.from_hf(model.path)
    arch.check_parallel(layout.tp, layout.pp, layout.first, layout.last, layout.ep)
    check_against_transformers(arch)
    # Neither changes a parameter, and both need Transformer Engine; context-parallel ranks count as replicas.
    model = replace(model, fp8=None, context_parallel_size=1)
    stages = [_stage(arch, model, layout, number) for number in range(layout.pp)]
    wrong = [stage for stage in stages if stage.bytes != stage.estimate]
    if wrong:
        raise ValueError(
            f"Stage {wrong[0].number} holds {wrong[0].bytes} bytes of parameters; planning/memory.py has "
            f"{wrong[0].estimate}."
        )
    return stages


def check_against_transformers(arch: Architecture) -> int:
    """Compare the names and shapes that the table expects of the Hugging Face model with transformers' model of the same
    config.json. Returns the number of tensors; raises ValueError."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(arch.source, trust_remote_code=False))
    found = {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}
    found = _as_in_files(found, arch) if arch.experts else found
    expected = hf_shapes(arch)
    for name in found.keys() | expected.keys():
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{name} of {arch.source} has shape {found.get(name)} in transformers and {expected.get(name)} here."
            )
    return len(found)


def _as_in_files(shapes: dict[str, tuple[int, ...]], arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of files for those of transformers' modules, which stack the experts of a layer."""
    prefix, (gate, up, down) = EXPERT_NAMES[arch.family]
    found = {}
    for name, shape in shapes.items():
        name = name.replace("mlp.", f"{prefix}.") if ".mlp.gate.weight" in name or ".experts." in name else name
        layer, _, kind = name.rpartition(".experts.")
        names = {"gate_up_proj": (gate, up), "down_proj": (down,)}.get(kind, ())
        if not names:
            found[name] = shape
        for expert in range(shape[0] if names else 0):
            each = (shape[1] // len(names), shape[2])
            found |= {f"{layer}.experts.{expert}.{projection}.weight": each for projection in names}
    return found


def _stage(arch: Architecture, model: ModelConfig, layout: Layout, number: int) -> Stage:
    replicas = layout.dp * layout.cp
    with _fake_world(layout, rank=number * layout.tp * replicas), torch.device("meta"):
        gpt = build_model(arch, model)
        bind(gpt, arch)  # checks against the table of weights
    held = list(gpt.parameters())
    if any(not parameter.is_meta for parameter in held):
        raise ValueError("A parameter is not on the meta device; hide the GPUs (CUDA_VISIBLE_DEVICES=).")
    return Stage(
        number=number,
        layers=arch.layers_of_stage(number, layout.pp, layout.first, layout.last),
        parameters=sum(parameter.numel() for parameter in held),
        bytes=sum(parameter.numel() * parameter.element_size() for parameter in held),
        estimate=rank_parameters(arch, layout, number) * layout.element,
    )


@contextmanager
def _fake_world(layout: Layout, rank: int) -> Iterator[None]:
    from megatron.core import parallel_state  # after frpo_nemo.megatron, which may hide Transformer Engine from it

    size = layout.tp * layout.pp * layout.cp * layout.dp
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            layout.tp,
            layout.pp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
