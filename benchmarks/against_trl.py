"""Seconds per training step of frpo_nemo and of TRL's GRPOTrainer on the same work, on two cores.

    python benchmarks/against_trl.py            # needs .venv-trl: benchmarks/README.md

Both sides: the model and prompts of tiny_model.py, fp32, 16 prompts x 8 responses a step, every response exactly
64 (256) tokens, or with --ragged at most 496 and .9% of the tokens the last one, beta 0.04 against a frozen reference, one
optimizer step per rollout. The sides take turns, and each repetition is a process of its own; a side's figure is the median
over repetitions of the median step.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BENCHMARKS = REPOSITORY / "benchmarks"
TRL_BIN = REPOSITORY / ".venv-trl" / "bin"
WARM_UP_STEPS = 2  # as in trl_step.py
CORES = 2
RESPONSES = 16 * 8
LONGEST = 496  # with the prompt's 16 all that the model can take


def trl_step(work: Path, length: int, steps: int, ragged: bool, processes: int, generation: str) -> tuple[float, float]:
    """Return TRL's median seconds per step, with its own generation (hf) or the repaired vLLM mode (vllm), and mean length."""
    command = [*_python(TRL_BIN, processes), str(BENCHMARKS / "trl_step.py"), f"--model={work / 'model'}"]
    command += [f"--prompts={work / 'prompts.jsonl'}", f"--mode={generation}"]
    command += [f"--max-response={length}", f"--steps={steps}", *["--ragged"] * ragged]
    report = json.loads(_run(command, processes, work).strip().splitlines()[-1])
    return report["median_step_s"], report["mean_length"]


def frpo_step(
    work: Path, length: int, steps: int, ragged: bool, processes: int, objective: list[str]
) -> tuple[float, float]:
    """Return the median seconds per step of recipes/frpo.py, from one step's end to the next one's, and the mean length."""
    with tempfile.TemporaryDirectory(dir=work) as run_dir:
        command = [*_python(Path(sys.executable).parent, processes), str(REPOSITORY / "recipes" / "frpo.py")]
        command += ["--config-name=experiment/benchmark", f"run_dir={run_dir}", f"model.path={work / 'model'}"]
        command += [f"data.train=[{{path: {work / 'prompts.jsonl'}}}]", *objective]
        command += [f"rollout.max_response_tokens={length}", f"trainer.max_steps={steps}"]
        command += [f"trainer.devices={processes}"]
        _run(command, processes, work)
        lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if line["step"] > WARM_UP_STEPS and "seconds/step" in line]
    lengths = [line["response_length/mean"] for line in training]
    if not ragged and set(lengths) != {length}:
        raise SystemExit(f"some responses of frpo_nemo have not {length} tokens, so its work was not TRL's")
    return statistics.median(line["seconds/step"] for line in training), statistics.mean(lengths)


FRPO, GRPO = ["objective=frpo", "objective.lambda_=0.2"], ["objective=grpo"]
SIDES = {  # name: (what it is, function of work, length and steps)
    "frpo": ("frpo_nemo, FRPO, 1 process", partial(frpo_step, processes=1, objective=FRPO)),
    "frpo-dp2": ("frpo_nemo, FRPO, 2 processes", partial(frpo_step, processes=2, objective=FRPO)),
    "grpo": ("frpo_nemo, GRPO, 1 process", partial(frpo_step, processes=1, objective=GRPO)),
    "trl": ("TRL, its own generation, 1 process", partial(trl_step, processes=1, generation="hf")),
    "trl-dp2": ("TRL, its own generation, 2 processes", partial(trl_step, processes=2, generation="hf")),
    "trl-vllm": ("TRL, vLLM colocate (repaired), 1 process", partial(trl_step, processes=1, generation="vllm")),
}


def _python(bin_directory: Path, processes: int) -> list[str]:
    if processes == 1:
        return [str(bin_directory / "python")]
    return [str(bin_directory / "torchrun"), "--standalone", f"--nproc_per_node={processes}"]


def _run(command: list[str], processes: int, work: Path) -> str:
    """Return the standard output of the command; its standard error goes to a file, and is shown when it fails."""
    settings = {
        "OMP_NUM_THREADS": str(CORES // processes),
        "VLLM_PLUGINS": "",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    log = work / "stderr.log"
    with log.open("w") as stderr:
        done = subprocess.run(
            command, env=os.environ | settings, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    if done.returncode:
        last_lines = log.read_text().splitlines()[-30:]
        raise SystemExit("\n".join([*last_lines, f"exit code {done.returncode}: {' '.join(command)}"]))
    return done.stdout


def print_table(length: int, seconds: dict[str, list[float]], tokens: dict[str, float]) -> None:
    """tokens: the mean length of each side's responses."""
    reference = statistics.median(next(iter(seconds.values())))
    each = f"{min(tokens.values()):.0f} to {max(tokens.values()):.0f}"
    print(f"\n{RESPONSES} responses of at most {length} tokens, {each} on average\n")
    print("| side | s/step | repetitions | tokens/s | times the first |")
    print("| --- | --- | --- | --- | --- |")
    for side, repetitions in seconds.items():
        median = statistics.median(repetitions)
        each = " ".join(f"{value:.2f}" for value in repetitions)
        speed = RESPONSES * tokens[side] / median
        print(f"| {SIDES[side][0]} | {median:.2f} | {each} | {speed:.0f} | {median / reference:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256], help="tokens of every response")
    parser.add_argument("--ragged", action="store_true", help="responses of at most 496 tokens that end by themselves")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["frpo", "trl", "trl-vllm"])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help=f"of each repetition; {WARM_UP_STEPS} are not counted")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        make = [TRL_BIN / "python", BENCHMARKS / "tiny_model.py", work, f"--end={0.009 if arguments.ragged else 0}"]
        subprocess.run(make, check=True, capture_output=True)
        for length in [LONGEST] if arguments.ragged else arguments.lengths:
            seconds, tokens = {side: [] for side in arguments.sides}, {}
            for _, side in itertools.product(range(arguments.repetitions), arguments.sides):
                step, tokens[side] = SIDES[side][1](work, length, arguments.steps, arguments.ragged)
                seconds[side].append(step)
                print(f"{length} tokens, {SIDES[side][0]}: {step:.3f} s/step", file=sys.stderr, flush=True)
            print_table(length, seconds, tokens)


if __name__ == "__main__":
    main()
