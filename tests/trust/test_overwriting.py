"""What exists is not overwritten silently. (Exports: tests/megatron/test_hf_weights.py; results of an evaluation:
tests/evaluation/test_evaluate.py; a study's rows: tests/study/test_forgetting.py.)"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from frpo_nemo import redact
from frpo_nemo.config.load import load
from frpo_nemo.config.options import FRPORun
from frpo_nemo.errors import ConfigError
from frpo_nemo.training import start_record
from frpo_nemo.training.checks.resume import check_resume

ROOT = Path(__file__).resolve().parents[2]


def configuration(run_dir, **optim) -> FRPORun:
    sizes = {"prompts_per_step": 1, "max_response_tokens": 4}
    reward = {"judge": {"target": "length", "args": {"api_key": "first-secret"}}}
    return load(
        FRPORun,
        {
            "run_dir": str(run_dir),
            "model": {"path": "model"},
            "objective": {"name": "grpo"},
            "optim": {"lr": 1e-3} | optim,
            "data": {"train": [{"path": "python:frpo_nemo.examples.toy.rows?part=prompts"}]},
            "rollout": sizes,
            "reward": reward,
            "trainer": {"max_steps": 9},
        },
    )


@pytest.fixture
def a_run(tmp_path) -> Path:
    """Return the directory of a run that died after its second step, before its first checkpoint."""
    saved = redact.values(OmegaConf.to_container(OmegaConf.structured(configuration(tmp_path))))
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(saved))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n')
    return tmp_path


def test_the_same_configuration_may_begin_again(a_run):
    check_resume(configuration(a_run), None)


def test_another_configuration_does_not_take_the_place_of_a_run_without_checkpoints(a_run):
    with pytest.raises(ConfigError, match=r"another configuration: optim.lr=0.5 \(was 0.001\); set them back"):
        check_resume(configuration(a_run, lr=0.5), None)


def test_options_that_came_after_a_run_began_are_at_their_defaults_in_it(a_run):
    """This includes options of list and dict entries."""
    saved = OmegaConf.load(a_run / "config.yaml")
    del saved.model.lora, saved.data.train[0].split, saved.reward.judge.timeout, saved.optim.weight_decay
    (a_run / "config.yaml").write_text(OmegaConf.to_yaml(saved))
    check_resume(configuration(a_run), None)
    with pytest.raises(ConfigError, match=r"another configuration: optim.weight_decay=0.5 \(was 0.0\); set"):
        check_resume(configuration(a_run, weight_decay=0.5), None)


def test_a_start_that_made_no_step_leaves_its_place_to_another(a_run):
    (a_run / "metrics.jsonl").write_text('{"step": 0}\n')
    check_resume(configuration(a_run, lr=0.5), None)


def test_a_model_with_files_of_others_is_refused_before_the_training_that_would_replace_it(a_run):
    checkpoint, hf = a_run / "checkpoints" / "step_00000002", a_run / "hf"
    checkpoint.mkdir(parents=True)
    hf.mkdir()
    for name in ("model.safetensors", "mine.gguf"):
        (hf / name).touch()
    with pytest.raises(ConfigError, match="mine.gguf in it has another origin and would be lost"):
        check_resume(configuration(a_run), None)


def test_somebody_elses_config_yaml_is_not_overwritten(a_run):
    (a_run / "metrics.jsonl").unlink()
    (a_run / "config.yaml").write_text("server: {port: 80}\n")
    with pytest.raises(ConfigError, match="another configuration"):
        check_resume(configuration(a_run), None)


def test_a_secret_may_change_and_nothing_else_beside_it(a_run):
    cfg = configuration(a_run)
    cfg.reward["judge"].args = {"api_key": "second-secret"}
    check_resume(cfg, None)
    cfg.reward["judge"].args["limit"] = 5
    with pytest.raises(ConfigError, match="reward.judge.args.limit=5") as caught:
        check_resume(cfg, None)
    assert "second-secret" not in str(caught.value) and "api_key" not in str(caught.value)


def test_starts_are_recorded_one_after_another_also_where_git_is_not_installed(tmp_path, monkeypatch):
    for _ in range(2):
        start_record.add_start(
            tmp_path, model="m", world_size=1, data={}, moment="2026-01-02T03:04:05", resume="auto", resumed_from=None
        )
        monkeypatch.setenv("PATH", str(tmp_path))
    first, second = start_record.starts(tmp_path)
    assert first["commit"] and isinstance(first["uncommitted"], list)
    assert second["commit"] is None and second["uncommitted"] is None


def test_a_record_whose_last_line_was_cut_goes_on(tmp_path):
    """A full disk, or a kill during the write, cuts the line."""
    start = dict(model="m", world_size=1, data={}, moment="2026-01-02T03:04:05", resume="auto", resumed_from=None)
    start_record.add_start(tmp_path, **start)
    with (tmp_path / start_record.FILE).open("a") as file:
        file.write('{"time": "2026')
    assert len(start_record.starts(tmp_path)) == 1
    start_record.add_start(tmp_path, **start)
    assert [each["world_size"] for each in start_record.starts(tmp_path)] == [1, 1]


def test_a_configuration_is_replaced_whole_or_not_at_all(a_run, monkeypatch):
    def fills_the_disk(path: Path, text: str) -> None:
        with path.open("w") as file:
            file.write(text[:20])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", fills_the_disk)
    with pytest.raises(OSError, match="No space left"):
        start_record.write_config(a_run, {"another": "configuration"})
    check_resume(configuration(a_run), None)


def test_a_model_without_its_checkpoints_is_not_overwritten(a_run):
    (a_run / "hf").mkdir()
    with pytest.raises(ConfigError, match=r"holds a model \(hf/\) but no checkpoint to continue from"):
        check_resume(configuration(a_run), None)


def test_a_new_model_takes_no_directory_that_holds_something(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"precious": True}))
    sizes = ["hidden_size=32", "num_layers=1", "num_heads=1"]
    command = [sys.executable, ROOT / "recipes/new_model.py", f"out={tmp_path}", "source=toy", *sizes]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "exists and is not empty; choose another directory" in result.stderr
    assert json.loads((tmp_path / "config.json").read_text()) == {"precious": True}
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_a_configuration_that_cannot_be_read_is_told(a_run):
    (a_run / "config.yaml").write_text("run_dir: [x")
    with pytest.raises(ConfigError, match=r"config.yaml, the configuration of the run there, is cut off or damaged"):
        check_resume(configuration(a_run), None)
