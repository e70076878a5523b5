"""Convert a checkpoint of a run or a GGUF file to the Hugging Face format, in one process that never holds the model.

This module has the order of the work. megatron/weights/ maps tensors to each other, megatron/checkpoint/weights.py reads
the bytes of a checkpoint from disk, and gguf_file.py reads a GGUF file.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from frpo_nemo.conversion.gguf_tokenizer import build_tokenizer, generation_config
from frpo_nemo.conversion.inputs import Conversion, ConvertRun, check_conversion
from frpo_nemo.conversion.model_card import gguf_card, model_card
from frpo_nemo.conversion.verify import verify
from frpo_nemo.data.tokenizer import check_read_alike
from frpo_nemo.megatron.checkpoint.weights import MergedWeights, StoredWeights
from frpo_nemo.megatron.weights.export import write_adapter, write_files
from frpo_nemo.megatron.weights.files import CARD, begin_export, publish_export


def convert(cfg: ConvertRun, conversion: Conversion | None = None) -> Path:
    """Write `cfg.out` and return it. Raises ConfigError before anything is written, and VerificationError with nothing at
    `cfg.out`; until then everything is below OUT.incomplete, which the next start removes. conversion: the result of
    `check_conversion`, if that was called."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process, as intended
    conversion = conversion or check_conversion(cfg)
    if conversion.gguf is not None:
        _from_gguf(conversion, cfg)
    else:
        _to_hugging_face(conversion, cfg)
    return conversion.out


def _to_hugging_face(conversion: Conversion, cfg: ConvertRun) -> None:
    arch, dtype, lora = conversion.arch, getattr(torch, conversion.dtype), conversion.lora
    if lora:
        stored: MergedWeights | StoredWeights = MergedWeights(conversion.checkpoint, arch, conversion.model)
    else:
        stored = StoredWeights(conversion.checkpoint, arch)
    # First, so that a mistake in a run's records does not cost a conversion.
    card = model_card(conversion.checkpoint, arch, adapter=cfg.adapter)
    temporary = begin_export(conversion.out)
    with _progress(conversion) as advance:
        if cfg.adapter and isinstance(stored, MergedWeights):
            stream = _counted(stored.stream_adapters(dtype), advance)
            write_adapter(stream, lora["rank"], lora["alpha"], temporary, conversion.base)
        else:
            stream = _counted(stored.stream(dtype), advance)
            write_files(stream, arch, conversion.model, temporary, dtype, cfg.max_shard_gb * 1e9)
    (temporary / CARD).write_text(card)
    if cfg.verify:
        verify(temporary, conversion.checkpoint, dtype, base=conversion.model if lora else None)
    publish_export(temporary, conversion.out)


def _from_gguf(conversion: Conversion, cfg: ConvertRun) -> None:
    file, dtype = conversion.gguf, getattr(torch, conversion.dtype)
    tokenizer = build_tokenizer(file.fields)
    temporary = begin_export(conversion.out)
    with _progress(conversion) as advance:
        stream = _counted(file.stream(dtype), advance)
        write_files(stream, conversion.arch, None, temporary, dtype, cfg.max_shard_gb * 1e9)
    tokenizer.save_pretrained(temporary)
    (temporary / "generation_config.json").write_text(json.dumps(generation_config(file.fields), indent=2) + "\n")
    (temporary / CARD).write_text(gguf_card(file.path, file.fields, file.stored_as, conversion.dtype))
    check_read_alike(str(temporary))
    if cfg.verify:
        verify(file.path, temporary, dtype)
    publish_export(temporary, conversion.out)


@contextmanager
def _progress(conversion: Conversion) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal, nothing elsewhere; yield the function that adds bytes to it."""
    console = Console(stderr=True)
    title = TextColumn(str(conversion.out), markup=False)
    columns = (title, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=conversion.weight_bytes)
        yield lambda size: progress.advance(task, size)


def _counted(
    stream: Iterator[tuple[str, torch.Tensor]], advance: Callable[[int], None]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in stream:
        advance(tensor.nbytes)
        yield name, tensor
