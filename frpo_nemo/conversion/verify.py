"""Checks that both sides of a conversion compute the same: transformers' log-probs from the Hugging Face directory or the
GGUF file against Megatron's from the checkpoint or the directory.

One whole model after the other is in memory, so a model that converts in a few GB may be too large to verify.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from frpo_nemo.config.options import LoRAConfig, ModelConfig
from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.megatron.actor import PolicyActor
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.checkpoint import files as checkpoint_files
from frpo_nemo.megatron.checkpoint import save_load as checkpoints
from frpo_nemo.megatron.groups import start_model_parallel, stop_model_parallel
from frpo_nemo.megatron.weights.adapter_files import PEFT_CONFIG
from frpo_nemo.processes import world
from frpo_nemo.rollout.refit_check import GAP_LIMITS, logprob_gap

LENGTHS = (2, 17, 64, 256)  # tokens of the sequences


class VerificationError(RuntimeError):
    """The converted model does not compute what the input computes."""


def verify(model: Path, other: Path, dtype: torch.dtype, base: Path | None = None) -> None:
    """Compare the log-probs of random tokens under `model` (Hugging Face) and `other`, its checkpoint, and print the
    difference. Or `model` is a GGUF file, which transformers reads as well, and `other` is its conversion to Hugging Face
    format. Raises VerificationError when the difference is larger than rounding explains (GAP_LIMITS). base: for a checkpoint
    of adapters, the model that they were trained on; `model` is then the merged model or PEFT's directory.

    dtype: what was written. bfloat16 computes in bfloat16, everything else in float32, from weights that are rounded to
    `dtype` on both sides, because the input may hold more digits than the output. Adapters are not merged in the checkpoint,
    so they are not rounded as their sum is: any type except float32 may then differ as much as bfloat16 may.
    """
    directory, checkpoint = (other, None) if model.is_file() else (base or model, other)
    arch = Architecture.from_hf(directory)
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    generator = torch.Generator().manual_seed(0)
    longest = min(arch.max_position_embeddings, arch.sliding_window or arch.max_position_embeddings)
    lengths = [min(length, longest) for length in LENGTHS]
    sequences = [torch.randint(arch.vocab_size, (length,), generator=generator) for length in lengths]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries warn about their own calls
        expected = _transformers(model, sequences, precision, dtype, directory)
        found = _megatron(directory, checkpoint, sequences, precision, dtype)
    mean, largest = logprob_gap(found, expected)
    rounding = "bf16" if base and dtype != torch.float32 else precision
    statistic, limit = GAP_LIMITS[rounding]
    value = mean if statistic == "mean" else largest
    line = (
        f"log-probs of {len(found)} tokens: transformers and Megatron differ by {largest:.2e} at most and {mean:.2e} on "
        f"average ({rounding}: the {statistic} may be {limit:g})"
    )
    if not value <= limit:
        raise VerificationError(f"{line}: the conversion is wrong. Compared were {model} and {other}.")
    Console(soft_wrap=True, highlight=False, markup=False).print(line)


@torch.no_grad()
def _transformers(
    model: Path, sequences: list[torch.Tensor], precision: str, rounded_to: torch.dtype, base: Path
) -> torch.Tensor:
    """Return log-probs, fp32, of all tokens of each sequence except the first. base: for adapters their model; for a GGUF
    file the directory with its configuration, because transformers leaves out a part of it."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    load = partial(AutoModelForCausalLM.from_pretrained, dtype=dtype, trust_remote_code=False)
    if model.is_file():
        with contextlib.redirect_stderr(io.StringIO()):  # hides a bar that no setting hides
            config = AutoConfig.from_pretrained(base, trust_remote_code=False)
            reference = load(model.parent, gguf_file=model.name, config=config).eval()
    elif (model / PEFT_CONFIG).is_file():
        reference = _with_adapter(load(base).eval(), model)
    else:
        reference = load(model).eval()
    _round(reference, rounded_to)
    out = []
    for tokens in sequences:
        logprobs = reference(tokens[None]).logits[0, :-1].float().log_softmax(-1)
        out.append(logprobs.gather(-1, tokens[1:, None]).squeeze(-1))
    return torch.cat(out)


def _with_adapter(reference: torch.nn.Module, adapter: Path) -> torch.nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(reference, adapter, autocast_adapter_dtype=False).eval()


def _megatron(
    model: Path, checkpoint: Path | None, sequences: list[torch.Tensor], precision: str, rounded_to: torch.dtype
) -> torch.Tensor:
    """Return the same from the checkpoint, or from `model` where there is none, computed by the training actor."""
    lora = LoRAConfig.of_record(checkpoint_files.read(checkpoint).get("lora") if checkpoint else None)
    config = ModelConfig(path=str(model), precision=precision, lora=lora)
    world.start_world()
    start_model_parallel(config, seed=1)
    actor = PolicyActor(config, None, microbatch_tokens=sum(map(len, sequences)))
    if checkpoint:
        with torch.no_grad():
            for name, parameter in actor.gpt.named_parameters():
                if not lora.rank or ".lora." in name:
                    parameter.fill_(float("nan"))  # shows whatever the checkpoint does not give
        checkpoints.load(checkpoint, actor)
    _round(actor.gpt, rounded_to)
    lists = [tokens.tolist() for tokens in sequences]
    batch = SequenceBatch.from_lists([tokens[:1] for tokens in lists], [tokens[1:] for tokens in lists])
    logprobs = actor.get_inference_log_probs(batch)
    stop_model_parallel()
    dist.destroy_process_group()
    return logprobs


@torch.no_grad()
def _round(model: torch.nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
