"""The whole path on a laptop, in minutes: make a model, pre-train it, train it with FRPO, prove the export; then FRPO
against GRPO under later fine-tuning.

    make demo            (or: python recipes/demo.py)

Runs the same recipes that large jobs run, as the commands that it prints. Finished parts are not repeated.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
import warnings
from pathlib import Path

RECIPES = Path(__file__).resolve().parent
# Small matrices on two ranks: more threads only get in each other's way. The log level hides a note about NUMA.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def main() -> None:
    out = Path("runs/demo")
    started = time.monotonic()
    make_model(out)
    run("sft.py", ["--config-name", "experiment/demo_sft"], processes=1, title="Pre-train the reference policy")
    run("frpo.py", ["--config-name", "experiment/demo"], processes=2, title="FRPO on two ranks (tensor parallel)")
    os.environ |= ENVIRONMENT
    warnings.simplefilter("ignore")  # of libraries, about packages that only GPUs need
    from frpo_nemo.evaluation.demo_report import report, report_forgetting

    report(out, time.monotonic() - started)
    study = "Does it last? FRPO and GRPO, each fine-tuned on something harmless"
    run("forgetting.py", ["--config-name", "study/demo"], processes=1, title=study)
    report_forgetting(out / "forgetting")


def make_model(out: Path) -> None:
    if (out / "base" / "config.json").exists():
        return
    shape = ["hidden_size=64", "num_layers=2", "num_heads=2", "ffn_hidden_size=128", "max_position_embeddings=64"]
    run("new_model.py", [f"out={out / 'base'}", "source=world", *shape], processes=1, title="Make a random model")


def run(recipe: str, arguments: list[str], *, processes: int, title: str) -> None:
    """Run a recipe as its own command; exit with its code if it fails."""
    script = (
        [str((RECIPES / recipe).relative_to(Path.cwd()))]
        if RECIPES.is_relative_to(Path.cwd())
        else [str(RECIPES / recipe)]
    )
    shown = ["python"] if processes == 1 else ["torchrun", "--nproc_per_node", str(processes)]
    real = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", *shown[1:]]
    print(f"\n== {title}\n$ {shlex.join([*shown, *script, *arguments])}", flush=True)
    code = subprocess.run([*real, *script, *arguments], env=os.environ | ENVIRONMENT).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
