"""A whole run by the command that a user types, on the toy task."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from acceptance import models
from acceptance.context import Context

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3


def frpo(context: Context) -> dict:
    """Run three steps of recipes/frpo.py with validation, a checkpoint and the export. The recipe stops by itself when a refit
    does not arrive or the log-prob gap is too large."""
    run_dir = context.work / "recipe"
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [sys.executable, "recipes/frpo.py", *_overrides(models.toy_model(context), run_dir)]
    code = subprocess.run(command, cwd=ROOT).returncode
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()] if code == 0 else []
    steps = [row for row in rows if "loss" in row]
    gradients = [row["gradient_norm"] or 0.0 for row in steps]  # null where not finite
    return {
        "exit_code": code,
        "steps": len(steps),
        "gradient_norm": min(gradients, default=math.nan),
        "gap": max((row["rollout_mismatch/mean_abs_logprob_gap"] for row in steps), default=math.nan),
        "changed_tensors": _changed(Path(models.toy_model(context)), run_dir / "hf") if code == 0 else 0,
        "seconds_step": steps[-1]["seconds/step"] if steps else math.nan,
    }


def _overrides(model: str, run_dir: Path) -> list[str]:
    overrides = ["--config-name=experiment/demo", "parallel=single", "model=bf16", f"model.path={model}"]
    overrides += [f"run_dir={run_dir}", "optim.lr=1e-3", f"trainer.max_steps={STEPS}", "trainer.val_interval=3"]
    overrides += ["rollout.prompts_per_step=16", "rollout.group_size=4", "rollout.gpu_memory_utilization=0.3"]
    return [*overrides, "data.validation.0.limit=32", f"reward.variety.target={ROOT}/acceptance/reward.py:variety"]


def _changed(before: Path, after: Path) -> int:
    """Count the exported tensors that differ from those that training began with."""
    old, new = (
        {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for path in (before, after)
    )
    return sum(not tensor.equal(new[name].to(tensor.dtype)) for name, tensor in old.items())
