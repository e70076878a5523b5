"""Measure memory and seconds of a refit with layers of the shape of Qwen3-30B-A3B, in bf16, on one process.

    python -m benchmarks.refit_experts [--layers 3]

Trainer and vLLM hold a model of real width (hidden size 2,048, 128 experts of 768, 8 chosen, vocabulary 151,936) with few
layers and random weights. Printed are the bytes of a layer's experts and what the process needs at the peak of a refit beyond
what it had before, which should not depend on the number of layers. malloc gives back what is freed at once here: by default it
keeps pages between tensors of a few megabytes, which nobody holds.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

SETTINGS = {"VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}  # read when a process starts
HIDDEN, EXPERTS, WIDTH, CHOSEN, VOCABULARY = 2048, 128, 768, 8, 151936


def write_model(directory: Path, layers: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=6144,
        moe_intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.02, 0.02)
    model.save_pretrained(directory)


def resident() -> int:
    """Return the bytes of memory that this process has of its own."""
    fields = map(str.split, Path("/proc/self/status").read_text().splitlines())
    return next(int(field[1]) * 1024 for field in fields if field[0] == "RssAnon:")


class Peak:
    """The largest resident() while it is entered, looked at every 10 ms."""

    def __enter__(self) -> Peak:
        self.bytes, self._done = resident(), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.01):
            self.bytes = max(self.bytes, resident())

    def __exit__(self, *error) -> None:
        self._done.set()
        self._thread.join()


def main(layers: int, refits: int = 3) -> None:
    from frpo_nemo.config.options import EngineConfig, ModelConfig
    from frpo_nemo.megatron.actor import PolicyActor
    from frpo_nemo.megatron.groups import start_model_parallel
    from frpo_nemo.processes import world
    from frpo_nemo.processes.phases import PhaseTimer
    from frpo_nemo.rollout.worker import RolloutWorker

    with tempfile.TemporaryDirectory() as name:
        world.start_world()
        write_model(Path(name), layers)
        model = ModelConfig(path=name, precision="bf16")
        worker = RolloutWorker(model, EngineConfig(max_num_seqs=4), PhaseTimer(), seed=1, max_model_len=64)
        start_model_parallel(model, 1)
        actor = PolicyActor(model, microbatch_tokens=256)
        layer = 3 * EXPERTS * HIDDEN * WIDTH * 2
        print(f"{layers} layers, experts of a layer: {layer / 1e9:.2f} GB", flush=True)
        for number in range(refits):
            before, started = resident(), time.monotonic()
            with Peak() as peak:
                worker.refit(actor)
            seconds, after = time.monotonic() - started, resident()
            beyond = peak.bytes - before
            print(
                f"refit {number + 1}: {seconds:.1f} s, {beyond / 1e9:.2f} GB beyond {before / 1e9:.2f} before and "
                f"{after / 1e9:.2f} after: {beyond / layer:.2f} layers' experts",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=3)
    if os.environ.keys().isdisjoint(MALLOC):
        os.execve(
            sys.executable,
            [sys.executable, "-m", "benchmarks.refit_experts", *sys.argv[1:]],
            os.environ | SETTINGS | MALLOC,
        )
    main(parser.parse_args().layers)
