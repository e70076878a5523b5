"""A model's output layer in bf16 or in fp32, in the trainer and in vLLM: the gap between the two, seconds, memory.

    python benchmarks/fp32_logits.py runs/smol/model        # after make smol, whose model it is

Real steps of recipes/frpo.py (experiment/smol) in one process, both settings in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PHASES = ("generate", "logprobs", "train", "step")
WARM_UP_STEPS = 1


def steps(model: str, fp32_logits: bool, count: int) -> tuple[list[dict], float]:
    """Return (metrics of the steps after the warm-up, GiB of memory at the process's peak)."""
    with tempfile.TemporaryDirectory() as run_dir:
        command = [sys.executable, "recipes/frpo.py", "--config-name=experiment/smol", f"model.path={model}"]
        command += [f"run_dir={run_dir}", f"model.fp32_logits={str(fp32_logits).lower()}", f"trainer.max_steps={count}"]
        command += ["trainer.val_interval=0", "trainer.save_interval=0", "optim.lr=1e-9"]
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())},
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)} ended with status {status}")
        rows = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"] > WARM_UP_STEPS], usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=2)
    options = parser.parse_args()
    rows: dict[bool, list[dict]] = {False: [], True: []}
    memory: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(options.repetitions):
        for fp32_logits in rows:
            found, peak = steps(str(Path(options.model).resolve()), fp32_logits, options.steps)
            rows[fp32_logits] += found
            memory[fp32_logits].append(peak)

    print("| | bf16 | fp32 |\n| --- | ---: | ---: |")
    for name in ("mean_abs_logprob_gap", "max_abs_logprob_gap", "share_masked"):
        values = [statistics.mean(row[f"rollout_mismatch/{name}"] for row in rows[side]) for side in rows]
        print(f"| {name} | {values[0]:.3g} | {values[1]:.3g} |")
    for phase in PHASES:
        values = [statistics.median(row[f"seconds/{phase}"] for row in rows[side]) for side in rows]
        print(f"| seconds of {phase} | {values[0]:.2f} | {values[1]:.2f} |")
    print(f"| GiB at the peak | {max(memory[False]):.2f} | {max(memory[True]):.2f} |")


if __name__ == "__main__":
    main()
