"""Sends a pack through the policy of Transformer Engine's layers and checks how megatron-core calls them. The layers'
computations are replaced by ones that give the shape alone. Imported by te_process.py, over the stand-in."""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from collections.abc import Callable, Iterator
from itertools import product

import torch
import transformer_engine.pytorch as te
from fake_world import fake_world, or_the_error
from layouts import LORA_RANK
from megatron.core.extensions import transformer_engine as extension
from te_fp8 import microbatches
from te_layers import build
from tiny_models import FAMILIES, make_tiny

from frpo_nemo.config.options import LoRAConfig, ModelConfig
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.cpu import megatron_device


def all_families() -> Iterator[dict]:
    """How Transformer Engine's functions were called; or the error, when a call did not fit."""
    with tempfile.TemporaryDirectory() as directory:
        for family, lora in product(FAMILIES, (False, True)):
            path = make_tiny(f"{directory}/{family}-{lora}", family)
            settings = ModelConfig(path=path, lora=LoRAConfig(rank=LORA_RANK if lora else 0))
            yield {"family": family, "lora": lora} | calls(settings)


@or_the_error
def calls(settings: ModelConfig) -> dict:
    with fake_world(settings, rank=0), shapes_alone() as given, megatron_device():
        gpt = build(Architecture.from_hf(settings.path), settings, meta=False)
        pack = microbatches(settings)[0]
        hidden = gpt(pack.tokens, pack.position_ids, None, packed_seq_params=pack.packed)
        attention = given["DotProductAttention.forward"][0]
        return {
            "called": {name: len(arguments) for name, arguments in given.items()},
            "hidden": [*hidden.shape],
            "expected": [*pack.tokens.shape, gpt.config.hidden_size],
            "format": attention["qkv_format"],
            "mask": attention["attn_mask_type"],
            # Two tensors with the same values would be taken for padding between the sequences.
            "without_padding": all(
                attention[f"cu_seqlens_{x}"] is attention[f"cu_seqlens_{x}_padded"] for x in ("q", "kv")
            ),
        }


@contextlib.contextmanager
def shapes_alone() -> Iterator[dict[str, list[dict]]]:
    """Functions of Transformer Engine that take what the real ones take, and return tensors of the right shape. Yields the
    arguments of every call, by function."""
    given: dict[str, list[dict]] = {}
    with contextlib.ExitStack() as undo:
        for owner, name, shape in (
            (te.Linear, "forward", _linear),
            (te.LayerNormLinear, "forward", _linear),
            (te.RMSNorm, "forward", lambda self, input: input),
            (te.DotProductAttention, "forward", _attention),
            (extension, "apply_rotary_pos_emb", lambda t, freqs: t),
        ):
            real = getattr(owner, name)
            calls_of_this = given[f"{owner.__name__.rpartition('.')[2]}.{name}"] = []
            undo.callback(setattr, owner, name, real)
            setattr(owner, name, _checked(real, shape, calls_of_this))
        yield given


def _checked(real: Callable, shape: Callable, calls: list[dict]) -> Callable:
    """A function that refuses what the signature of `real` does, and returns what `shape` makes of the first two arguments."""
    signature = inspect.signature(real)

    def call(*args, **kwargs):
        calls.append(dict(signature.bind(*args, **kwargs).arguments))
        return shape(*args[:2])

    return call


def _linear(layer, x: torch.Tensor) -> torch.Tensor:
    return x.new_zeros(*x.shape[:-1], layer.weight.shape[0])


def _attention(layer, query: torch.Tensor) -> torch.Tensor:
    """Return [T, heads, d] -> [T, heads * d]"""
    return query.flatten(-2)
