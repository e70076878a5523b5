"""What a run says of one of its checkpoints: the model that it began from, and the README.md of its conversion.

The configuration goes into a file that is meant to be published, so its secrets are hidden (redact.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from frpo_nemo import __version__, redact
from frpo_nemo.megatron import checkpoint_files
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.training import record as run_record
from frpo_nemo.training.hub import is_hub_name


def trained_from(checkpoint: Path) -> str | None:
    """The model.path of the checkpoint's run, or what the checkpoint was converted from; None if neither is known."""
    config = _config(checkpoint)
    return config["model"]["path"] if config else checkpoint_files.read(checkpoint)["state"].get("converted_from")


def model_card(checkpoint: Path, arch: Architecture) -> str:
    """The README.md of `checkpoint` in Hugging Face format, as far as there is a run around it to tell from."""
    record, config, origin = checkpoint_files.read(checkpoint), _config(checkpoint), trained_from(checkpoint)
    front = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if origin and is_hub_name(origin):
        front["base_model"] = origin
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---"]
    if config is None:
        parts += [f"# {arch.family} model", f"Converted by frpo-nemo from {redact.text(origin or 'a checkpoint')}."]
    else:
        parts += [
            f"# {checkpoint.parents[1].resolve().name}, step {record['step']}",
            f"Trained from {redact.text(config['model']['path'])} with {_method(config)}, for {record['step']} of "
            f"{config['trainer']['max_steps']} steps, by frpo-nemo.",
        ]
        parts += _figures(checkpoint.parents[1] / "metrics.jsonl", record["step"])
    parts += ["## Versions", _versions(record["versions"], checkpoint.parents[1])]
    if config is not None:
        text = yaml.safe_dump(redact.values(config), sort_keys=False, allow_unicode=True)
        parts += ["## Configuration", f"```yaml\n{text}```"]
    return "\n\n".join(parts) + "\n"


def _config(checkpoint: Path) -> dict[str, Any] | None:
    file = checkpoint.absolute().parents[1] / "config.yaml"
    return yaml.safe_load(file.read_text()) if file.is_file() else None


def _method(config: dict[str, Any]) -> str:
    if "objective" not in config:
        return "supervised fine-tuning"
    objective = dict(redact.values(config["objective"]))
    name = objective.pop("name", None) or objective.pop("_target_")
    settings = ", ".join(f"{key}={value}" for key, value in objective.items())
    return f"objective {name}" + (f" ({settings})" if settings else "")


def _figures(file: Path, step: int) -> list[str]:
    """A table of rewards and KL where the run measured them first, and last before or at `step`."""
    rows = [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.is_file() else []
    measured: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if row["step"] <= step and value is not None and _is_figure(name):
                measured.setdefault(name, []).append((row["step"], value))
    if not measured:
        return []
    lines = [
        f"| {name} | {values[0][1]:.4f} (step {values[0][0]}) | {values[-1][1]:.4f} (step {values[-1][0]}) |"
        for name, values in sorted(measured.items())
    ]
    explained = (
        "Names are those of metrics.jsonl: `validation/` and `probe/` on prompts kept aside, others on the batch."
    )
    return ["## Reward and KL", explained, "\n".join(["| metric | first | last |", "|---|---|---|", *lines])]


def _is_figure(name: str) -> bool:
    parts = name.removeprefix("validation/").removeprefix("probe/").split("/")
    return (parts[0] == "reward" and parts[-1] == "mean") or parts[0] == "kl"


def _versions(of_checkpoint: dict[str, str], run_dir: Path) -> str:
    """Of the programs that trained, by the record of the run's last start, and of the one that converts."""
    start = (run_record.starts(run_dir) or [{}])[-1]
    listed = of_checkpoint | {"commit": start.get("commit"), "python": start.get("python")} | start.get("packages", {})
    listed["converted by frpo-nemo"] = __version__
    return "\n".join(f"- {name}: {version}" for name, version in listed.items() if version)
