"""Makes the policy of Transformer Engine's layers, as on a GPU, for every family and layout, and collects the facts about
each pipeline stage. Imported by te_process.py, over the stand-in."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace

import torch
from fake_world import fake_world, or_the_error
from layouts import EXPERT_LAYOUTS, LAYOUTS, LORA_RANK
from tiny_models import EXPERT_FAMILIES, FAMILIES, make_tiny

from frpo_nemo.config.options import LoRAConfig, ModelConfig
from frpo_nemo.megatron import model
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.checkpoint import save_load
from frpo_nemo.megatron.checkpoint import weights as checkpoint_weights
from frpo_nemo.megatron.weights.binding import bind, bind_adapters
from frpo_nemo.megatron.weights.table import WeightLayout, adapter_weights, weights


def all_layouts() -> Iterator[dict]:
    """Facts about one rank of every stage; or, where the model could not be made, the error."""
    with tempfile.TemporaryDirectory() as directory:
        for family, tied in product(FAMILIES, (False, True)):
            path = make_tiny(f"{directory}/{family}-{tied}", family, tied=tied)
            for lora, layout in product((False, True), LAYOUTS):
                settings = ModelConfig(path=path, lora=LoRAConfig(rank=LORA_RANK if lora else 0), **LAYOUTS[layout])
                for stage in range(settings.pipeline_model_parallel_size):
                    case = {"family": family, "tied": tied, "lora": lora, "layout": layout, "stage": stage}
                    yield case | facts(settings, stage)


def expert_layouts() -> Iterator[dict]:
    """The same of mixtures, of which every second layer is dense."""
    with tempfile.TemporaryDirectory() as directory:
        for family in EXPERT_FAMILIES:
            sizes = dict(decoder_sparse_step=2) if family == "qwen3_moe" else {}
            path = make_tiny(f"{directory}/{family}", family, **sizes)
            for lora, layout in product((False, True), EXPERT_LAYOUTS):
                settings = ModelConfig(path=path, lora=LoRAConfig(rank=LORA_RANK if lora else 0), **EXPERT_LAYOUTS[layout])
                for stage in range(settings.pipeline_model_parallel_size):
                    yield {"family": family, "lora": lora, "layout": layout} | facts(settings, stage)


@or_the_error
def facts(settings: ModelConfig, stage: int) -> dict:
    """About the last rank of a pipeline stage."""
    arch = Architecture.from_hf(settings.path)
    replicas = settings.expert_model_parallel_size
    ranks_of_stage = settings.tensor_model_parallel_size * settings.context_parallel_size * replicas
    with fake_world(settings, rank=(stage + 1) * ranks_of_stage - 1, replicas=replicas):
        on_meta = build(arch, settings, meta=True)
        gpt = build(arch, settings, meta=False)
        return {
            "on_meta": {name: [*p.shape] for name, p in on_meta.named_parameters()},
            "not_on_meta": [name for name, p in on_meta.named_parameters() if not p.is_meta],
            "parameters": {name: [*p.shape] for name, p in gpt.named_parameters()},
            "bound": bound(on_meta, arch, stage),
            "marks": {name: marks(parameter) for name, parameter in gpt.named_parameters()},
            "classes": {name: type(module).__name__ for name, module in gpt.named_modules() if ".0." in name},
            **stored(gpt, arch, settings),
        }


def build(arch: Architecture, settings: ModelConfig, *, meta: bool):
    """Return the product's model."""
    with as_on_a_gpu(meta=meta), torch.device("meta") if meta else contextlib.nullcontext():
        return model.build_model(arch, settings)


@contextlib.contextmanager
def as_on_a_gpu(*, meta: bool) -> Iterator[None]:
    """Inside, models are configured as where there is a CUDA device. meta: on the meta device; otherwise on megatron-core's
    stand-in for CUDA, the CPU, where Transformer Engine marks its parameters."""

    def configured(*args, **kwargs):
        config = configure(*args, **kwargs)
        config.use_cpu_initialization, config.init_model_with_meta_device = False, meta
        return config

    configure, model.transformer_config = model.transformer_config, configured
    try:
        yield
    finally:
        model.transformer_config = configure


def bound(gpt, arch: Architecture, stage: int) -> list:
    """Return [parameter's name or None, shape of the shard by the table] of each weight of this stage."""
    names = {id(parameter): name for name, parameter in gpt.named_parameters()}
    bindings = [b for b in (*bind(gpt, arch), *bind_adapters(gpt, arch)) if b.weight.stage == stage]
    return [[names.get(id(binding.parameter)), [*binding.weight.shard_shape]] for binding in bindings]


def marks(parameter) -> list[bool]:
    """Return [sequence_parallel, tensor_model_parallel]"""
    return [bool(getattr(parameter, mark, False)) for mark in ("sequence_parallel", "tensor_model_parallel")]


def stored(gpt, arch: Architecture, settings: ModelConfig) -> dict:
    """Keys in a checkpoint: what this rank saves, and what checkpoint_weights reads of the whole model."""
    state = save_load._model_state(SimpleNamespace(config=settings, gpt=gpt, arch=arch))
    rank = settings.lora.rank
    table = adapter_weights(arch, WeightLayout(), rank) if rank else weights(arch, WeightLayout())
    return {
        "saved": sorted({sharded.key for sharded in state.values()}),
        "read": sorted({checkpoint_weights._place(weight, arch)[0] for weight in table}),
        "extra_states": sum(name.endswith("_extra_state") for name in gpt.sharded_state_dict()),
    }
