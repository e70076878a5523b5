"""Text that a shell passes on is taken literally, and `~` is a home directory. (Mistakes: test_config.py.)"""

import subprocess
import sys
from pathlib import Path

import pytest

from frpo_nemo.config.cli import compose
from frpo_nemo.config.load import load
from frpo_nemo.config.options import SFTRun
from frpo_nemo.study.parts import EvaluationConfig, PartConfig, StudyConfig, StudyParts, compose_command

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [
    "runs/lr=1e-6",
    "runs/a,b",
    "runs/a b (c) [d] {e}",
    "runs/it's",
    'runs/"so"',
    "runs/$x & y; #z",
    "runs/größe",
    "(a)",
    "[1]",
    "1e-6",
    "007",
    "2026_11_29",
    "true",
    "a:b",
    "range(1,3)",
    "runs/100%",
    "runs\\new",
]


def sft(*overrides: str) -> SFTRun:
    return load(SFTRun, compose("experiment/demo_sft", overrides))


@pytest.mark.parametrize("prefix", ["", "++"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_path_is_the_text_that_was_typed(text, prefix):
    cfg = sft(f"{prefix}run_dir={text}", f"model.path={text}", f"data.train.0.path={text}")
    assert (cfg.run_dir, cfg.model.path, cfg.data.train[0].path) == (text, text, text)


def test_names_for_logs_are_texts_as_well():
    cfg = sft("logging.wandb_project=1e-3", "logging.wandb_name=a,b")
    assert (cfg.logging.wandb_project, cfg.logging.wandb_name) == ("1e-3", "a,b")


@pytest.mark.parametrize("typed", ["'runs/a,b (c)'", '"runs/a,b (c)"'])
def test_what_is_quoted_for_hydra_stays_right(typed):
    assert sft(f"run_dir={typed}").run_dir == "runs/a,b (c)"
    assert sft("run_dir='it\\'s'").run_dir == "it's"


@pytest.mark.parametrize("typed", ["runs/seed_${trainer.seed},b", "'runs/seed_${trainer.seed},b'"])
def test_interpolations_stay(typed):
    assert sft(f"run_dir={typed}", "trainer.seed=7").run_dir == "runs/seed_7,b"


def test_a_value_that_is_no_text_is_read_by_its_type():
    cfg = sft("optim.lr=1e-6", "data.train=[{path: 'a,b.jsonl', completion: c}]", "logging.wandb_project=null")
    assert (cfg.optim.lr, cfg.data.train[0].path, cfg.logging.wandb_project) == (1e-6, "a,b.jsonl", None)


def test_the_parts_of_a_study_lie_where_it_says(tmp_path):
    """Their commands hold the directory of the study as it is, and it may have any name."""
    out = str(tmp_path / "it's (a) b[1]{2},lr=1e-6 $x")
    steps = PartConfig("frpo", "experiment/forgetting_train", ["trainer.max_steps=1"])
    task = PartConfig("sft", "experiment/forgetting_math", ["probe.interval=1"])
    evaluations = {"e": EvaluationConfig(overrides=["benchmarks=[mmlu]"])}
    config = StudyConfig(
        out, model="{dir}/base", train=steps, arms={"a": []}, tasks={"t": task}, evaluations=evaluations
    )
    for part in StudyParts(config).all([1]):
        made = compose_command(part.recipe, part.arguments)
        assert (made.out if part.evaluation else made.run_dir) == str(part.directory)
        assert made.model.path.startswith(f"{out}/seed_1/")


def test_home_is_expanded_in_paths_alone(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    rows = "data.train=[{path: '~/a.jsonl', prompt: '~/p', completion: '~/c', where: {path: '~/w'}}]"
    cfg = sft("run_dir=~/runs/x", "model.path=~", "checkpoint.resume=~/runs/y/checkpoints/step_00000001", rows)
    assert (cfg.run_dir, cfg.model.path) == ("/home/me/runs/x", "/home/me")
    assert cfg.checkpoint.resume == "/home/me/runs/y/checkpoints/step_00000001"
    source = cfg.data.train[0]
    assert (source.path, source.prompt, source.completion) == ("/home/me/a.jsonl", "~/p", "~/c")
    assert source.where == {"path": "~/w"}


def test_home_is_expanded_in_rewards_studies_and_other_recipes(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    reward = "+reward={r: {target: '~/r.py:score', args: {model: '~/judge', remote: {url: '~/judge.url'}}}}"
    sizes = ["rollout.prompts_per_step=1", "rollout.max_response_tokens=4", "trainer.max_steps=1", "optim.lr=1"]
    given = ["objective=grpo", "data.train=[{path: x}]", "run_dir=r", "model.path=m", reward, *sizes]
    made = compose_command("frpo", given).reward["r"]
    assert made.target == "/home/me/r.py:score"
    assert made.args == {"model": "/home/me/judge", "remote": {"url": "/home/me/judge.url"}}
    study = load(StudyConfig, {"out": "~/study", "model": "~/base"})
    assert (study.out, study.model) == ("/home/me/study", "/home/me/base")


def test_a_directory_of_configurations_may_be_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/own.yaml").write_text("run_dir: x\n")
    assert compose("own", [], "~/mine").run_dir == "x"


@pytest.mark.parametrize("default", ["runs/it's ${x},(1)-7", None])
def test_the_recipe_prints_the_directory_of_its_run(default, tmp_path, monkeypatch):
    """A job script's own, as it stands, only where the configuration names none."""
    monkeypatch.delenv("FRPO_DEFAULT_RUN_DIR", raising=False)
    if default:
        monkeypatch.setenv("FRPO_DEFAULT_RUN_DIR", default)
    recipe = [sys.executable, str(ROOT / "recipes/sft.py"), "--print-run-dir"]

    def printed(*arguments: str) -> tuple[int, str]:
        done = subprocess.run([*recipe, *arguments], cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout or done.stderr

    own = ["--config-name", "experiment/demo_sft", "run_dir=runs/seed_${trainer.seed}"]
    assert printed(*own) == (0, "run_dir=runs/seed_1\n")
    code, text = printed("--config-name", "experiment/sft_7b", "model.path=m")
    expected = (0, f"run_dir={default}\n") if default else (2, "sft.py: No value for run_dir")
    assert (code, text[: len(expected[1])]) == expected
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_leaves_the_file_that_a_job_script_asks_for(tmp_path, monkeypatch):
    monkeypatch.setenv("FRPO_REFUSED", str(tmp_path / "refused"))
    recipe = [sys.executable, str(ROOT / "recipes/sft.py"), "--config-name", "experiment/demo_sft", "optim.lrr=1"]
    assert subprocess.run(recipe, cwd=tmp_path, capture_output=True).returncode == 2
    assert (tmp_path / "refused").exists()
