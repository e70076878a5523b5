"""Conversion between a run's checkpoints and the Hugging Face format, in one process that never holds the model.

Here is the order of the work. How tensors correspond is the business of megatron/hf_weights/, how the bytes of a
checkpoint lie on disk that of megatron/checkpoint_weights.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from frpo_nemo.conversion.inputs import Conversion, ConvertRun, check_conversion
from frpo_nemo.conversion.model_card import model_card
from frpo_nemo.conversion.verify import verify
from frpo_nemo.megatron.checkpoint_weights import MergedWeights, StoredWeights, write_checkpoint
from frpo_nemo.megatron.hf_weights.export import write_adapter, write_files
from frpo_nemo.megatron.hf_weights.files import CARD, begin_export, publish_export
from frpo_nemo.megatron.hf_weights.load import check_checkpoint
from frpo_nemo.training.hub import is_hub_name


def convert(cfg: ConvertRun) -> Path:
    """Write `cfg.out`; returns it. Raises ConfigError before anything is written, and VerificationError with nothing under
    the name of `cfg.out`; what is written until then is below OUT.incomplete, which the next start removes."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process, as it should be
    conversion = check_conversion(cfg)
    if conversion.checkpoint is None:
        _to_checkpoint(conversion, cfg)
    else:
        _to_hugging_face(conversion, cfg)
    return conversion.out


def _to_hugging_face(conversion: Conversion, cfg: ConvertRun) -> None:
    arch, dtype, lora = conversion.arch, getattr(torch, conversion.dtype), conversion.lora
    if lora:
        stored = MergedWeights(conversion.checkpoint, arch, conversion.model)
    else:
        stored = StoredWeights(conversion.checkpoint, arch)
    # First: no mistake in a run's records costs a conversion.
    card = model_card(conversion.checkpoint, arch, adapter=cfg.adapter)
    temporary = begin_export(conversion.out)
    with _progress(conversion) as advance:
        if cfg.adapter:
            stream = _counted(stored.stream_adapters(dtype), advance)
            write_adapter(stream, lora["rank"], lora["alpha"], temporary, conversion.base)
        else:
            stream = _counted(stored.stream(dtype), advance)
            write_files(stream, arch, conversion.model, temporary, dtype, cfg.max_shard_gb * 1e9)
    (temporary / CARD).write_text(card)
    if cfg.verify:
        verify(temporary, conversion.checkpoint, dtype, base=conversion.model if lora else None)
    publish_export(temporary, conversion.out)


def _to_checkpoint(conversion: Conversion, cfg: ConvertRun) -> None:
    arch, dtype = conversion.arch, getattr(torch, conversion.dtype)
    source = check_checkpoint(arch, conversion.model)
    temporary = begin_export(conversion.out)
    state = {"converted_from": cfg.input if is_hub_name(cfg.input) else str(conversion.model.resolve())}
    with _progress(conversion) as advance:
        write_checkpoint(temporary, arch, source, dtype, state=state, written=advance)
    if cfg.verify:
        verify(conversion.model, temporary, dtype)
    publish_export(temporary, conversion.out)


@contextmanager
def _progress(conversion: Conversion) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere; gives the function that adds bytes to it."""
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
