"""Measure steps of FRPO with a tiny mixture of experts: speed against a dense model of equal active size, and the cost of
routing replay and what it does to the gap between vLLM's and the trainer's log-probs, in bf16.

    python benchmarks/mixture.py [--steps 12] [--rounds 2]

Runs recipes/frpo.py on two processes (TP2, EP2), the sides in turn, and prints the median of each side's steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from frpo_nemo.examples.new_model import new_model
from frpo_nemo.examples.toy import toy_tokenizer
from frpo_nemo.records import read_jsonl

ROOT = Path(__file__).resolve().parents[1]
SIZES = dict(hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=4, max_position_embeddings=512)
EXPERT, CHOSEN = 128, 2
OPTIONS = [
    "--config-name=experiment/demo",
    "model.precision=bf16",
    "model.sequence_parallel=true",
    "rollout.prompts_per_step=32",
    "rollout.group_size=8",
    "rollout.max_response_tokens=64",
    "trainer.val_interval=0",
    "trainer.save_interval=0",
    "optim.lr=1e-6",  # all sides keep sampling long responses
]
SIDES = {
    "dense": ("dense", []),
    "mixture": ("mixture", []),
    "mixture, router in bf16": ("mixture", ["model.fp32_router=false"]),
    "mixture, replay": ("mixture", ["rollout.routing_replay=true"]),
    "mixture, replay, router in bf16": ("mixture", ["rollout.routing_replay=true", "model.fp32_router=false"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    rows: dict[str, list[dict]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as directory:
        models = Path(directory)
        new_model(models / "dense", tokenizer=toy_tokenizer(), ffn_hidden_size=CHOSEN * EXPERT, **SIZES)
        new_model(
            models / "mixture", tokenizer=toy_tokenizer(), family="qwen3_moe", ffn_hidden_size=EXPERT, num_experts=8, **SIZES
        )
        for number in range(arguments.rounds):
            for name, (model, options) in SIDES.items():
                run_dir = models / f"{name} {number}".replace(",", "").replace(" ", "_")
                rows[name] += run(models / model, options, run_dir, arguments.steps)
    print("| | s/step | generation | train | gap, mean | gap, largest |\n|---|---|---|---|---|---|")
    for name, steps in rows.items():
        numbers = [
            statistics.median(row[key] for row in steps) for key in ("seconds/step", "seconds/generate", "seconds/train")
        ]
        gaps = [steps[-1][f"rollout_mismatch/{kind}_abs_logprob_gap"] for kind in ("mean", "max")]
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in [*numbers, *gaps]) + " |")


def run(model: Path, options: list[str], run_dir: Path, steps: int) -> list[dict]:
    """Return the metrics of all steps but the first two."""
    experts = ["model.expert_model_parallel_size=2"] if model.name == "mixture" else []
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "recipes/frpo.py"]
    command += [*OPTIONS, f"model.path={model}", f"trainer.max_steps={steps}", f"run_dir={run_dir}", *experts, *options]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return [row for row in read_jsonl(run_dir / "metrics.jsonl") if "seconds/step" in row and row["step"] > 2]


if __name__ == "__main__":
    main()
