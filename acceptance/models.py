"""Random models in Hugging Face format, made when a check first asks for them. No hub.

Every parameter is random, also those that transformers initialises to 0 or 1, so that a missing or swapped weight is
visible. They are saved in bf16, so that bf16 and fp32 computations have the same weights.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from acceptance.context import Context
from frpo_nemo.examples.new_model import new_model
from frpo_nemo.examples.toy import toy_tokenizer
from frpo_nemo.processes import world

# Odd vocabularies, so that padding is exercised; the stack's is Mistral 7B's, like its other sizes.
SMALL = dict(model_type="qwen3", num_hidden_layers=8, hidden_size=1024, intermediate_size=3072, vocab_size=32003)
SMALL |= dict(num_attention_heads=16, num_key_value_heads=8, head_dim=128)
STACK = dict(model_type="llama", num_hidden_layers=4, hidden_size=4096, intermediate_size=14336, vocab_size=32000)
STACK |= dict(num_attention_heads=32, num_key_value_heads=8, head_dim=128)
TINY = dict(num_hidden_layers=2, hidden_size=96, intermediate_size=192, vocab_size=131)
TINY |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=32)
POSITIONS = 8192


def small(context: Context) -> str:
    """Return the directory of a model of 0.2 billion parameters (tiny on a CPU) with normalised queries and keys."""
    return _made_once(context, "small", lambda path: _write(path, SMALL | context.on(cuda={}, cpu=TINY)))


def stack(context: Context) -> str:
    """Return the directory of a few layers of a 7B model (tiny on a CPU)."""
    return _made_once(context, "stack", lambda path: _write(path, STACK | context.on(cuda={}, cpu=TINY)))


def toy_model(context: Context) -> str:
    """Return the directory of a model that knows the words of the toy task."""
    sizes = context.on(
        cuda=dict(hidden_size=1024, num_layers=4, num_heads=8, num_kv_heads=8, ffn_hidden_size=4096),
        cpu=dict(hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=2, ffn_hidden_size=128),
    )
    return _made_once(
        context, "toy", functools.partial(new_model, tokenizer=toy_tokenizer(), dtype=torch.bfloat16, **sizes)
    )


def _made_once(context: Context, name: str, write) -> str:
    """Return the directory `name`, complete on every rank. Two groups may want it at once: the second to finish drops its
    own."""
    path = context.work / "models" / name
    if not path.is_dir() and (not dist.is_initialized() or dist.get_rank() == 0):
        scratch = path.with_name(f"{name}.{os.getpid()}")
        write(scratch)
        with contextlib.suppress(OSError):
            scratch.rename(path)
        shutil.rmtree(scratch, ignore_errors=True)
    if dist.is_initialized():
        world.wait_for_all()
    return str(path)


def _write(path: Path, sizes: dict) -> None:
    config = AutoConfig.for_model(
        **sizes,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with world.device():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    _randomise(model)
    model.save_pretrained(path)


@torch.no_grad()
def _randomise(model: torch.nn.Module) -> None:
    """Draw all parameters. Matrices keep activations of order one, logits get a spread of about one, norms lie around 1."""
    generator = torch.Generator(model.device).manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, device=model.device)
        parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else noise / parameter.shape[1] ** 0.5)
