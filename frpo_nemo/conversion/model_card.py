"""What a run's records say about one of its checkpoints: the model that it began from, and the README.md of its conversion.

The README.md holds the configuration and is meant to be published, so secrets (redact.py) and the directories of this
machine are hidden in it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from frpo_nemo import __version__, redact
from frpo_nemo.config.hub import is_hub_name
from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.checkpoint import files as checkpoint_files
from frpo_nemo.records import read_jsonl
from frpo_nemo.training import start_record

# /home/me/data.jsonl, ~/data.jsonl or file:///home/me/data.jsonl, also inside a command; not a part of a URL
_ABSOLUTE = re.compile(
    r"""(?<![^\s=:,'"(\[{])(?:file://)?(?:~[^\s/'"]*|/[^\s/'"]+)(?:/[^\s/'"]+)*/([^\s/'",:)\]}]+)/?"""
)


def trained_from(checkpoint: Path) -> str | None:
    """Return the model that the checkpoint's run began from: a hub name, or a path that is valid from here. None if the
    checkpoint isn't in a run. The run may have started in another directory, to which its model.path may be relative."""
    config = _config(checkpoint)
    if config is None:
        return None
    path, directory = config["model"]["path"], Path(_last_start(checkpoint).get("directory", "."))
    if (directory / path).is_dir() or not (Path(path).is_dir() or is_hub_name(path, directory)):
        return str(directory / path)
    return path


def model_card(checkpoint: Path, arch: Architecture, *, adapter: bool = False) -> str:
    """Return the README.md of `checkpoint` in Hugging Face format, as far as the run around it has the records. Absolute
    paths are cut to their last part, because readers need not know whose directories those are. adapter: for PEFT's
    directory with only the checkpoint's adapters."""
    record, config, run_dir = checkpoint_files.read(checkpoint), _config(checkpoint), _run_dir(checkpoint)
    origin = trained_from(checkpoint)
    front = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    if origin and is_hub_name(origin):
        front["base_model"] = origin
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---"]
    if config is None:
        parts += [f"# {arch.family} model", f"Converted by frpo-nemo from {_public(origin or 'a checkpoint')}."]
    else:
        parts += [
            f"# {run_dir.name}, step {record['step']}",
            f"Trained from {_public(config['model']['path'])} with {_method(config)}, for {record['step']} of "
            f"{config['trainer']['max_steps']} steps, by frpo-nemo.",
        ]
        parts += _figures(run_dir / "metrics.jsonl", record["step"])
    start = {} if config is None else _last_start(checkpoint)
    parts += ["## Versions", _versions(record["versions"], start)]
    if config is not None:
        text = yaml.safe_dump(_public(config), sort_keys=False, allow_unicode=True)
        parts += ["## Configuration", f"```yaml\n{text}```"]
    return "\n\n".join(parts) + "\n"


def gguf_card(path: Path, fields: dict[str, Any], stored_as: dict[str, int], dtype: str) -> str:
    """Return the README.md of the GGUF file `path`, with metadata `fields`, in Hugging Face format, with the licence that
    it names. stored_as: storage type -> number of tensors. dtype: of the weights that were written."""
    front = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if licence := fields.get("general.license"):
        front["license"] = str(licence)
    types = ", ".join(f"{count} in {kind}" for kind, count in stored_as.items())
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {fields.get('general.name', path.stem)}",
        f"Converted by frpo-nemo {__version__} from {path.name}: of its tensors {types}, all written in {dtype}.",
    ]
    return "\n\n".join(parts) + "\n"


def _run_dir(checkpoint: Path) -> Path:
    return checkpoint.resolve().parent.parent


def _config(checkpoint: Path) -> dict[str, Any] | None:
    """Return the configuration of the run that saved a checkpoint; None when there is none, or only another program's."""
    file = _run_dir(checkpoint) / "config.yaml"
    if not file.is_file():
        return None
    try:
        config = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{file} isn't valid YAML, so the model that {checkpoint} was trained from is unknown."
        ) from error
    return config if _has(config, "model", "path") and _has(config, "trainer", "max_steps") else None


def _has(config: Any, section: str, option: str) -> bool:
    return isinstance(config, dict) and isinstance(config.get(section), dict) and bool(config[section].get(option))


def _last_start(checkpoint: Path) -> dict[str, Any]:
    return next(reversed(start_record.starts(_run_dir(checkpoint))), {})


def _public(nested: Any) -> Any:
    """Return nested values without secrets, and with only the last part of absolute paths."""
    return _without_places(redact.values(nested))


def _without_places(nested: Any) -> Any:
    if isinstance(nested, dict):
        return {name: _without_places(item) for name, item in nested.items()}
    if isinstance(nested, list):
        return [_without_places(item) for item in nested]
    return _ABSOLUTE.sub(r"\1", nested) if isinstance(nested, str) else nested


def _method(config: dict[str, Any]) -> str:
    if "objective" not in config:
        return "supervised fine-tuning"
    objective = _public(config["objective"])
    name = objective.pop("name", None) or objective.pop("_target_")
    settings = ", ".join(f"{key}={value}" for key, value in objective.items())
    return f"objective {name}" + (f" ({settings})" if settings else "")


def _figures(file: Path, step: int) -> list[str]:
    """Return a table of rewards and KL at the run's first measurement and at the last one up to `step`."""
    measured: dict[str, list[tuple[int, float]]] = {}
    for row in read_jsonl(file) if file.is_file() else []:
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


def _versions(of_checkpoint: dict[str, str], start: dict[str, Any]) -> str:
    """Return the versions of the programs that trained, from the record of the run's last start, and of the converter."""
    listed = of_checkpoint | {"commit": start.get("commit"), "python": start.get("python")} | start.get("packages", {})
    listed["converted by frpo-nemo"] = __version__
    return "\n".join(f"- {name}: {version}" for name, version in listed.items() if version)
