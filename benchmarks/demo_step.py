"""One step of the demo, by phase, with FRPO and with GRPO in turn: what does the objective cost, what does the loop?

    python benchmarks/demo_step.py            # after make demo, whose pre-trained model it uses

Overhead is everything that is neither generation, nor reward, nor a forward or backward pass with its update.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
OBJECTIVES = {
    "FRPO": ["objective=frpo", "objective.lambda_=0.2"],
    "GRPO": ["objective=grpo", "~objective.lambda_"],
}
WORK = ("generate", "reward", "logprobs", "train")
WARM_UP_STEPS = 5


def phases(objective: list[str], steps: int) -> dict[str, float]:
    """Return the median milliseconds of each phase of a step, over the steps after the warm-up."""
    with tempfile.TemporaryDirectory() as run_dir:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "recipes/frpo.py"]
        command += ["--config-name=experiment/demo", f"run_dir={run_dir}", *objective]
        command += [f"trainer.max_steps={steps}", "trainer.val_interval=0", "trainer.save_interval=0"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    steps_counted = [line for line in lines if line["step"] > WARM_UP_STEPS]
    names = [name for name in steps_counted[0] if name.startswith("seconds/")]
    return {name[8:]: 1000 * statistics.median(line.get(name, 0.0) for line in steps_counted) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    runs = {name: [] for name in OBJECTIVES}
    for _ in range(arguments.repetitions):
        for name, objective in OBJECTIVES.items():
            runs[name].append(phases(objective, arguments.steps))
            print(f"{name}: {runs[name][-1]['step']:.1f} ms a step", file=sys.stderr, flush=True)

    medians = {name: {p: statistics.median(run[p] for run in each) for p in each[0]} for name, each in runs.items()}
    print("| phase, ms | " + " | ".join(medians) + " |\n| --- |" + " ---: |" * len(medians))
    for phase in next(iter(medians.values())):
        print(f"| {phase} | " + " | ".join(f"{values[phase]:.1f}" for values in medians.values()) + " |")
    overhead = [1 - sum(values[p] for p in WORK) / values["step"] for values in medians.values()]
    print("| overhead | " + " | ".join(f"{share:.1%}" for share in overhead) + " |")
    print(f"\nFRPO / GRPO: {medians['FRPO']['step'] / medians['GRPO']['step']:.3f}")


if __name__ == "__main__":
    main()
