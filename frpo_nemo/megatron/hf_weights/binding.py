"""Joins the table to the live model of this rank: which parameter object is which weight, and who we are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.hf_weights.table import Layout, Weight, check_complete, weights


@dataclass(frozen=True)
class Binding:
    """A weight of the table; `parameter` is this rank's shard, or None when another pipeline stage holds it."""

    weight: Weight
    parameter: torch.nn.Parameter | None


def bind(model: torch.nn.Module, arch: Architecture) -> list[Binding]:
    """All weights of the whole model, in the same order on every rank. `model` is this rank's GPTModel, possibly in
    wrappers that hold it as `.module`. Raises ValueError when model and table disagree."""
    while hasattr(model, "module"):
        model = model.module
    parameters = dict(model.named_parameters())
    layout = Layout(
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        model.config.num_layers_in_first_pipeline_stage,
        model.config.num_layers_in_last_pipeline_stage,
    )
    stage = parallel_state.get_pipeline_model_parallel_rank()
    check_complete(arch, layout, stage, {name: parameter.shape for name, parameter in parameters.items()})
    return [
        Binding(weight, _own(weight, parameters) if weight.stage == stage else None) for weight in weights(arch, layout)
    ]


def _own(weight: Weight, parameters: dict[str, torch.nn.Parameter]) -> torch.nn.Parameter:
    return next(parameters[name] for name in weight.names if name in parameters)
