"""Time and memory of recipes/convert.py: a checkpoint of a random model, compared byte by byte with that model.

    python benchmarks/conversion.py /tmp/conversion     # 7B: 18 GB of memory to make it, 46 GB of disk, free again at the end
    python benchmarks/conversion.py /tmp/conversion --layers 2 --vocab 8192

The shapes are Qwen2.5-7B's in bfloat16. The conversion is a process of its own; its peak is VmHWM of /proc, which counts
mapped pages of files too, less what it had after its imports. ru_maxrss would begin with the parent's.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import math
import multiprocessing
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

CONFIG = dict(
    model_type="qwen2",
    architectures=["Qwen2ForCausalLM"],
    hidden_size=3584,
    intermediate_size=18944,
    num_attention_heads=28,
    num_key_value_heads=4,
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
)


def make_model(directory: Path, layers: int, vocab: int, shard_gb: float) -> None:
    """Return a model of random weights, written one shard at a time."""
    import torch

    warnings.simplefilter("ignore")
    from frpo_nemo.megatron.architecture import Architecture
    from frpo_nemo.megatron.weights.export import write_files
    from frpo_nemo.megatron.weights.table import hf_shapes

    directory.mkdir(parents=True)
    config = {**CONFIG, "num_hidden_layers": layers, "vocab_size": vocab}
    (directory / "config.json").write_text(json.dumps(config))
    arch = Architecture.from_hf(directory)
    # One block of numbers over and over, because drawing all of them takes longer than everything else; its length is
    # prime, so that no two rows of the model begin at the same place for long.
    block = torch.randn(1_299_709, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        start = 0
        for name, shape in hf_shapes(arch).items():
            flat = torch.empty(math.prod(shape), dtype=torch.bfloat16)
            for offset in range(-start, flat.numel(), block.numel()):
                piece = block[max(-offset, 0) : flat.numel() - offset]
                flat[max(offset, 0) :][: piece.numel()] = piece
            start = (start + flat.numel()) % block.numel()
            yield name, flat.view(shape)

    write_files(tensors(), arch, directory, directory, torch.bfloat16, shard_gb * 1e9)


def save_checkpoint(model: str, run_dir: str) -> str:
    """Save the model as a run of one process does; return the checkpoint."""
    warnings.simplefilter("ignore")
    from frpo_nemo.config.options import ModelConfig
    from frpo_nemo.megatron.actor import PolicyActor
    from frpo_nemo.megatron.checkpoint import save_load
    from frpo_nemo.megatron.groups import start_model_parallel
    from frpo_nemo.processes import world

    config = ModelConfig(path=model, precision="bf16")
    world.start_world()
    start_model_parallel(config, seed=1)
    return str(save_load.save(run_dir, PolicyActor(config, None, microbatch_tokens=1), {}, step=1, seed=1))


def convert_measured(source: str, out: str, shard_gb: float, base: str) -> tuple[float, float, float]:
    """Return (seconds, bytes at the peak above those after the imports, bytes after the imports), in this process."""
    warnings.simplefilter("ignore")
    from frpo_nemo.conversion.convert import ConvertRun, convert

    before, started = memory("VmRSS"), time.monotonic()
    convert(ConvertRun(input=source, out=out, base=base, max_shard_gb=shard_gb))
    return time.monotonic() - started, memory("VmHWM") - before, before


def memory(name: str) -> int:
    """Return a line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0]) * 1024


def in_own_process(function, *arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path, help="a new one, removed at the end")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocab", type=int, default=152064)
    parser.add_argument("--shard-gb", type=float, default=5.0, help="10^9 bytes")
    arguments = parser.parse_args()
    directory, shard_gb = arguments.directory, arguments.shard_gb
    directory.mkdir(parents=True)
    model, again = directory / "model", directory / "again"
    try:
        started = time.monotonic()
        in_own_process(make_model, model, arguments.layers, arguments.vocab, shard_gb)
        files = sorted(model.glob("*.safetensors"))
        size, largest = sum(file.stat().st_size for file in files), max(file.stat().st_size for file in files)
        print(
            f"random model: {size / 1e9:.2f} GB in {len(files)} files, the largest {largest / 1e9:.2f} GB, made in "
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )
        checkpoint = in_own_process(save_checkpoint, str(model), str(directory / "run"))
        seconds, peak, before = in_own_process(convert_measured, checkpoint, str(again), shard_gb, str(model))
        print(
            f"checkpoint to Hugging Face: {seconds:.0f} s, {size / 1e6 / seconds:.0f} MB/s, peak {peak / 1e9:.2f} GB "
            f"above {before / 1e9:.2f} GB after the imports, {(peak + before) / largest:.2f} of the largest file in all",
            flush=True,
        )
        names = sorted(file.name for file in (*model.glob("*.safetensors*"), *again.glob("*.safetensors*")))
        equal = [filecmp.cmp(model / name, again / name, shallow=False) for name in set(names)]
        assert all(equal) and len(names) == 2 * len(equal), "the files differ"
        print(f"{len(equal)} files are equal, byte by byte")
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
