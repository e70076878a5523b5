"""The whole path on a laptop, in minutes: make a model, pre-train it, train it with FRPO and verify the export; then compare
FRPO with GRPO under later fine-tuning.

    make demo            (or: python recipes/demo.py)

Runs the same recipes as large jobs, as the commands that it prints. Finished parts are not repeated.
"""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path

from frpo_nemo.study.recipe import environment, run_recipe


def main() -> None:
    out = Path("runs/demo")
    started = time.monotonic()
    make_model(out)
    # With one thread each: the matrices are small, and more threads would slow each other down.
    run_recipe("sft", ["--config-name", "experiment/demo_sft"], title="Pre-train the reference policy")
    run_recipe("frpo", ["--config-name", "experiment/demo"], title="FRPO on two ranks (tensor parallel)", processes=2)
    os.environ |= environment()
    warnings.simplefilter("ignore")  # libraries warn about packages that only GPUs need
    from frpo_nemo.examples.demo_report import report, report_forgetting

    report(out, time.monotonic() - started)
    study = "Does the reward survive fine-tuning? FRPO and GRPO, each fine-tuned on something harmless"
    run_recipe("forgetting", ["--config-name", "study/demo"], title=study)
    report_forgetting(out / "forgetting")


def make_model(out: Path) -> None:
    if (out / "base" / "config.json").exists():
        return
    shape = ["hidden_size=64", "num_layers=2", "num_heads=2", "ffn_hidden_size=128", "max_position_embeddings=64"]
    run_recipe("new_model", [f"out={out / 'base'}", "source=toy", *shape], title="Make a random model")


if __name__ == "__main__":
    main()
