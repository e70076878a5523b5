"""Makes every FP8 recipe that the configuration allows, through megatron-core, and collects the facts. Imported by
te_process.py, over the stand-in."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.distributed as dist
import transformer_engine.pytorch as te
from fake_world import fake_world, or_the_error
from megatron.core import fp8_utils, parallel_state
from tiny_models import make_tiny

from frpo_nemo.config.option import own_options
from frpo_nemo.config.options import ModelConfig
from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.megatron import model
from frpo_nemo.megatron.actor import PolicyActor
from frpo_nemo.megatron.architecture import Architecture

CHOICES = {each.key: each.rule.choices for each in own_options(ModelConfig)}
LAYOUTS = {
    "TP1": {},
    "TP2": dict(tensor_model_parallel_size=2),
    "TP2, sequence parallelism": dict(tensor_model_parallel_size=2, sequence_parallel=True),
    "TP2 x CP2": dict(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2),
}


def all_recipes() -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as directory:
        path = make_tiny(directory, "qwen2")
        for format in filter(None, CHOICES["fp8"]):
            for recipe in CHOICES["fp8_recipe"]:
                for layout, sizes in LAYOUTS.items():
                    settings = ModelConfig(path=path, fp8=format, fp8_recipe=recipe, **sizes)
                    case = {"format": format, "recipe": recipe, "layout": layout}
                    yield case | facts(settings)


@or_the_error
def facts(settings: ModelConfig) -> dict:
    """Return the facts of the first rank of two replicas."""
    arch = Architecture.from_hf(settings.path)
    with fake_world(settings, rank=0, replicas=2):
        config = model.transformer_config(arch, settings, transformer_engine=True)
        context = fp8_utils.get_fp8_context(config)
        group = dist.get_process_group_ranks(context._amax_reduction_group)
        return {
            "is_autocast": isinstance(context, te.autocast),
            "class": [cls.__name__ for cls in type(context._recipe).__mro__],
            "te_format": context._recipe.fp8_format.name,
            "amax_group": group,
            "replica": dist.get_process_group_ranks(parallel_state.get_tensor_and_context_parallel_group()),
            "alignment": fp8_utils.get_fp8_align_size(config.fp8_recipe),
            "tokens": [packed.tokens.shape[1] for packed in microbatches(settings)],
        }


def microbatches(settings: ModelConfig) -> list:
    """Return packs of one sequence each as the actor pads them; this replica has two of the four."""
    actor = SimpleNamespace(config=settings, microbatch_tokens=8, device=torch.device("cpu"))
    batch = SequenceBatch.from_lists([[3] * length for length in (20, 17, 5, 2)], [[4, 5, 6]] * 4)
    return PolicyActor._microbatches(actor, batch)
