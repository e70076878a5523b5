"""Measure a model: its reward on prompts of your own, and standard benchmarks.

    python recipes/evaluate.py model.path=runs/first benchmarks=[math500,mmlu] out=runs/first/eval
    python recipes/evaluate.py model.path=runs/first/checkpoints/step_00000100 out=runs/first/eval_100
        'probe.prompts=[{path: prompts.jsonl}]' 'probe.reward={math: {target: math}}'   (one line)
    python recipes/evaluate.py model.path=Qwen/Qwen2.5-7B-Instruct benchmarks=[math500] limit=20 out=runs/try

Options: --help, docs/options.md. Benchmarks need one process, because their tools start their own; a probe with
tensor_parallel_size above 1 needs as many processes, from torchrun. Started again, it continues where it stopped. A
mistake in the options is exit code 2, a failed benchmark or probe 1. With --check the options and the model's files are
checked, and nothing runs.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    from frpo_nemo.config.cli import CHECK, from_command_line
    from frpo_nemo.errors import ConfigError
    from frpo_nemo.evaluation.evaluate import evaluate
    from frpo_nemo.evaluation.options import EvaluateRun

    only_check = CHECK in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != CHECK]
    try:
        succeeded = evaluate(from_command_line(EvaluateRun, "evaluate"), only_check=only_check)
    except ConfigError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if succeeded else 1)


if __name__ == "__main__":
    main()
