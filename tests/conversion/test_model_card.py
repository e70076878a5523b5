"""What a conversion takes from the run around a checkpoint: the model it began from, and what its model card says."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import conversion_checks as checks
import pytest

from frpo_nemo.conversion import inputs
from frpo_nemo.conversion.convert import convert
from frpo_nemo.conversion.inputs import ConvertRun
from frpo_nemo.errors import ConfigError

WEIGHTLESS = ["config.json", "tokenizer.model", "merges.txt", "additional_chat_templates/a.jinja", "LICENSE", "NOTICE"]


def test_the_model_card_has_configuration_figures_and_versions_but_no_secrets(workers, model, tmp_path):
    run_dir = tmp_path / "run"
    workers.run(1, checks.save_both, path=model, run_dir=str(run_dir), step=2)
    config = {
        "model": {"path": model},
        "objective": {"name": "frpo", "lambda_": 0.5},
        "reward": {"judge": {"target": "judge", "args": {"api_key": "s3cr3t-value", "max_tokens": 7}}},
        "trainer": {"max_steps": 5},
    }
    (run_dir / "config.yaml").write_text(json.dumps(config))
    rows = [
        {"step": 0, "validation/reward/mean": 0.125},
        {"step": 2, "reward/mean": 0.5, "kl/reference": None},
        {
            "step": 2,
            "validation/reward/mean": 0.625,
            "validation/kl/reference": 0.0625,
            "validation/share/truncated": 0,
        },
        {"step": 3, "validation/reward/mean": 0.875},
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_dir / "environment.jsonl").write_text(json.dumps({"commit": "abc123", "packages": {"vllm": "9.9"}}) + "\n")
    out = convert(ConvertRun(input=str(run_dir), out=str(tmp_path / "out")))  # the base is the run's
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "objective frpo (lambda_=0.5), for 2 of 5 steps" in card
    assert "| validation/reward/mean | 0.1250 (step 0) | 0.6250 (step 2) |" in card
    assert "| validation/kl/reference | 0.0625 (step 2) |" in card
    assert "| reward/mean | 0.5000 (step 2) |" in card
    assert "- commit: abc123" in card and "- vllm: 9.9" in card and "- megatron-core: " in card
    assert "max_tokens: 7" in card and "s3cr3t-value" not in card
    for later_or_other in ("0.8750", "truncated", "| kl/reference"):
        assert later_or_other not in card


def as_if_trained(saved: Path, run_dir: Path, config: str, starts: str) -> Path:
    """Return a run directory around a checkpoint."""
    checkpoint = shutil.copytree(saved, run_dir / "checkpoints/step_00000001")
    (run_dir / "config.yaml").write_text(config)
    (run_dir / "environment.jsonl").write_text(starts)
    return checkpoint


def config_of(path: str, **sections) -> str:
    return json.dumps({"model": {"path": path}, "trainer": {"max_steps": 5}} | sections)


def test_records_that_are_cut_off_or_not_ours_cost_no_conversion(model, saved, tmp_path):
    start = json.dumps({"commit": "abc123", "directory": "/"})
    as_if_trained(saved, tmp_path / "cut", config_of(model), start + '\n{"commit": "de')
    card = convert(ConvertRun(input=str(tmp_path / "cut"), out=str(tmp_path / "out_cut"))) / "README.md"
    assert "- commit: abc123" in card.read_text() and "step 1" in card.read_text()
    as_if_trained(saved, tmp_path / "foreign", "services: [web]", "")
    run = ConvertRun(input=str(tmp_path / "foreign"), base=model, out=str(tmp_path / "out_foreign"))
    assert "services" not in (convert(run) / "README.md").read_text()


def test_a_broken_configuration_is_told_before_anything_is_written(model, saved, tmp_path):
    as_if_trained(saved, tmp_path / "run", "model: [", "")
    with pytest.raises(ConfigError, match="config.yaml isn't valid YAML"):
        convert(ConvertRun(input=str(tmp_path / "run"), base=model, out=str(tmp_path / "out")))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_checkpoint_of_one_part_is_converted(model, saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "ckpt")
    monkeypatch.chdir(tmp_path)
    assert (convert(ConvertRun(input="ckpt", base=model, out="out")) / "README.md").is_file()


def test_the_model_card_names_no_directory_of_this_machine(model, saved, tmp_path):
    sections = {"run_dir": "/home/me/run", "reward": {"file": "file:///home/me/r.py", "url": "http://host:80/v1/a"}}
    sections |= {"data": ["~/data/rows.jsonl", "runs/probe.jsonl", "cat /home/me/a.txt /home/me/b.txt"]}
    as_if_trained(saved, tmp_path / "run", config_of(model, **sections), "")
    card = (convert(ConvertRun(input=str(tmp_path / "run"), out=str(tmp_path / "out"))) / "README.md").read_text()
    assert "/home" not in card and "~/" not in card and str(Path(model).parent) not in card
    assert f"Trained from {Path(model).name} with" in card
    for kept in ("file: r.py", "url: http://host:80/v1/a", "- rows.jsonl", "- runs/probe.jsonl", "cat a.txt b.txt"):
        assert kept in card


def test_a_relative_model_path_is_that_of_the_directory_in_which_the_run_was_started(
    model, saved, tmp_path, monkeypatch
):
    started, elsewhere = tmp_path / "started", tmp_path / "elsewhere"
    base = shutil.copytree(model, started / "models/base")
    (base / "LICENSE").write_text("of the base")
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    start = json.dumps({"directory": str(started)}) + "\n"
    as_if_trained(saved, tmp_path / "run", config_of("models/base"), start)
    run = ConvertRun(input=str(tmp_path / "run"), out=str(tmp_path / "out"))
    assert (convert(run) / "LICENSE").read_text() == "of the base"
    base.rename(started / "models/renamed")  # now it reads like a hub name, but models/ is there
    with pytest.raises(ConfigError, match="started/models/base, which .* was trained from, isn't a directory.* base="):
        convert(run)


def test_of_a_base_on_the_hub_everything_but_weights_is_asked_for(model, saved, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: asked.append((name, options)) or model
    )
    inputs.check_conversion(ConvertRun(input=str(saved), base="owner/name", out=str(tmp_path / "out")))
    (name, options), files = (
        asked[0],
        [*WEIGHTLESS, "model-00001-of-00002.safetensors", "pytorch_model.bin", "model.py"],
    )
    wanted = [file for file in files if any(fnmatch(file, pattern) for pattern in options["allow_patterns"])]
    assert name == "owner/name" and wanted == WEIGHTLESS and not options["local_files_only"]
