"""Join the table to the live model of this rank: which parameter object is which weight, and where this rank stands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.weights.table import Weight, WeightLayout, adapter_weights, check_complete, weights


def rank_of(weight: Weight) -> int:
    """Return this process's rank among those over which `weight` is split."""
    if weight.of_expert:
        return parallel_state.get_expert_model_parallel_rank()
    return parallel_state.get_tensor_model_parallel_rank()


@dataclass(frozen=True)
class Binding:
    """A weight of the table; `parameter` is this rank's shard, or None when another pipeline stage holds it. `layer`: the
    module that has the parameter."""

    weight: Weight
    parameter: torch.nn.Parameter | None
    layer: torch.nn.Module | None

    def merged(self) -> torch.Tensor:
        """Return the shard that the model computes with: the parameter, plus the update of its layer's adapter if any."""
        adapter = getattr(self.layer, "lora", None)
        if adapter is None or self.parameter.dim() < 2:
            return self.parameter
        return adapter.merge(self.parameter)


def bind(model: torch.nn.Module, arch: Architecture) -> list[Binding]:
    """Return all weights of the whole model except its adapters, in the same order on every rank. `model` is this rank's
    GPTModel, possibly in wrappers that hold it as `.module`. Raises ValueError when model and table disagree."""
    model, rank = _unwrap(model), _rank(model)
    kept = getattr(model, "bindings", None)  # every refit needs them, and a large model's table is slow to walk
    if kept and kept[0] == rank:
        return kept[1]
    layout, stage = layout_of(model), parallel_state.get_pipeline_model_parallel_rank()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    check_complete(arch, layout, stage, shapes, rank)
    found = _bind(model, stage, weights(arch, layout))
    model.bindings = rank, found  # on the model: a reference from elsewhere would keep it and its process groups alive
    return found


def bind_adapters(model: torch.nn.Module, arch: Architecture) -> list[Binding]:
    """Return all parameters of the adapters of the whole model (none without adapters), in the same order on every rank."""
    model, stage = _unwrap(model), parallel_state.get_pipeline_model_parallel_rank()
    rank = _rank(model)
    return _bind(model, stage, adapter_weights(arch, layout_of(model), rank)) if rank else []


def layout_of(model: torch.nn.Module) -> WeightLayout:
    """Return how `model` is split over the ranks."""
    config = _unwrap(model).config
    return WeightLayout(
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        config.num_layers_in_first_pipeline_stage,
        config.num_layers_in_last_pipeline_stage,
        parallel_state.get_expert_model_parallel_world_size(),
    )


def _bind(model: torch.nn.Module, stage: int, table: Iterable[Weight]) -> list[Binding]:
    parameters = dict(model.named_parameters())
    bindings = []
    for weight in table:
        if weight.stage != stage:
            bindings.append(Binding(weight, None, None))
            continue
        name = next(name for name in weight.names if name in parameters)
        bindings.append(Binding(weight, parameters[name], model.get_submodule(name.rpartition(".")[0])))
    return bindings


def _rank(model: torch.nn.Module) -> int:
    """Return the rank of the adapters; 0 without any."""
    return getattr(_unwrap(model), "lora_rank", 0)


def _unwrap(model: torch.nn.Module) -> torch.nn.Module:
    while hasattr(model, "module"):
        model = model.module
    return model
