"""A run continues, and reports it, when its files have moved or are spelled differently; not when their content differs."""

import json
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from frpo_nemo.config.load import load
from frpo_nemo.config.options import FRPORun
from frpo_nemo.errors import ConfigError
from frpo_nemo.examples.new_model import new_model
from frpo_nemo.examples.toy import toy_tokenizer
from frpo_nemo.training import start_record
from frpo_nemo.training.checks.resume import check_same_run, source_digests

REWARD = "def score(prompt, response):\n    return {}\n"


def configuration(**paths: str) -> FRPORun:
    paths = {"model": "model", "data": "rows.jsonl", "prompts": "probes", "target": "reward.py:score"} | paths
    values = {
        "run_dir": "run",
        "model": {"path": paths["model"]},
        "objective": {"name": "grpo"},
        "optim": {"lr": 1e-3},
        "data": {"train": [{"path": paths["data"]}]},
        "probe": {"prompts": [{"path": paths["prompts"]}]},
        "rollout": {"prompts_per_step": 1, "max_response_tokens": 4},
        "reward": {"mine": {"target": paths["target"]}},
        "trainer": {"max_steps": 9},
    }
    return load(FRPORun, values)


def small_model(path: Path, seed: int) -> None:
    sizes = dict(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, ffn_hidden_size=16)
    options = dict(tokenizer=toy_tokenizer(), family="llama", max_position_embeddings=64, tie=False, seed=seed)
    new_model(path, **options, **sizes)


@pytest.fixture
def begun(tmp_path, monkeypatch) -> Path:
    """Return a directory, which is the working directory, with the files of a run and what a start of it wrote down."""
    monkeypatch.chdir(tmp_path)
    small_model(Path("model"), seed=1)
    Path("rows.jsonl").write_text('{"prompt": "1+1?"}\n')
    Path("probes").mkdir()
    Path("probes/a.jsonl").write_text('{"prompt": "2+2?"}\n')
    Path("reward.py").write_text(REWARD.format(1.0))
    Path("run").mkdir()
    begin(configuration())
    return tmp_path


def begin(cfg: FRPORun) -> None:
    """Write down what a start of `cfg` writes down."""
    start_record.write_config(Path("run"), OmegaConf.to_container(OmegaConf.structured(cfg)))
    start = {"directory": str(Path.cwd()), "files": source_digests(cfg)}
    (Path("run") / start_record.FILE).write_text(json.dumps(start) + "\n")


def other_spellings(root: Path) -> dict[str, str]:
    Path("link").symlink_to("model")
    return {
        "model": "link",
        "data": f"{root}/rows.jsonl",
        "prompts": f"../{root.name}/probes",
        "target": f"{root}/reward.py:score",
    }


def copies(root: Path) -> dict[str, str]:
    Path("elsewhere").mkdir()
    for name in ("model", "probes"):
        shutil.copytree(name, f"elsewhere/{name}")
    for name in ("rows.jsonl", "reward.py"):
        shutil.copy(name, "elsewhere")
    names = {"model": "model", "data": "rows.jsonl", "prompts": "probes", "target": "reward.py:score"}
    return {key: f"elsewhere/{name}" for key, name in names.items()}


def moved(root: Path) -> dict[str, str]:
    paths = copies(root)
    shutil.rmtree("model")
    shutil.rmtree("probes")
    Path("rows.jsonl").unlink()
    Path("reward.py").unlink()
    return paths


@pytest.mark.parametrize("change", [other_spellings, copies, moved])
def test_the_same_files_under_another_path_continue_the_run(begun, capsys, change):
    paths = change(begun)
    check_same_run(configuration(**paths), Path("run/config.yaml"))
    said = capsys.readouterr().out
    assert f"model.path={paths['model']} holds the same files as model, with which the run in run began." in said
    assert said.count("holds the same files as") == 4


@pytest.mark.parametrize("old, new", [("probes/*.jsonl", "{}/probes/*.jsonl"), ("probes/[ab].*", "elsewhere/**/[ab].*"),
                                      ("probes:main", "./elsewhere:main")])  # fmt: skip
def test_a_pattern_or_a_configuration_means_the_files_that_it_finds(begun, capsys, old, new):
    Path("probes").rename("elsewhere")
    Path("probes").symlink_to("elsewhere")
    begin(configuration(prompts=old))
    Path("probes").unlink()
    new = new.format(begun).replace("/probes/", "/elsewhere/")
    check_same_run(configuration(prompts=new), Path("run/config.yaml"))
    assert f"probe.prompts.0.path={new} holds the same files as {old}" in capsys.readouterr().out
    Path("elsewhere/a.jsonl").write_text('{"prompt": "2+3?"}\n')
    with pytest.raises(ConfigError, match="probe.prompts.0.path="):
        check_same_run(configuration(prompts=new), Path("run/config.yaml"))


def test_a_judges_template_may_lie_elsewhere(begun, capsys):
    def with_judge(file: str) -> FRPORun:
        cfg = configuration()
        cfg.reward["mine"].args = {"judge": {"template_file": file}}
        return cfg

    Path("judge.txt").write_text("Harmful? {response}")
    begin(with_judge("judge.txt"))
    Path("judge.txt").rename("moved.txt")
    check_same_run(with_judge("moved.txt"), Path("run/config.yaml"))
    assert "judge.template_file=moved.txt holds the same files as judge.txt" in capsys.readouterr().out
    Path("moved.txt").write_text("Harmless? {response}")
    with pytest.raises(ConfigError, match="judge.template_file=moved.txt"):
        check_same_run(with_judge("moved.txt"), Path("run/config.yaml"))


def test_a_run_of_another_directory_is_continued_from_here(begun, monkeypatch):
    """The run's relative paths are relative to the directory in which it started."""
    (begun / "below").mkdir()
    monkeypatch.chdir(begun / "below")
    names = {"model": "../model", "data": "../rows.jsonl", "prompts": "../probes", "target": "../reward.py:score"}
    cfg = configuration(**names)
    cfg.run_dir = "../run"
    check_same_run(cfg, Path("../run/config.yaml"))


@pytest.mark.parametrize("change", [copies, moved])
def test_other_files_are_another_run(begun, change):
    paths = change(begun)
    shutil.rmtree("elsewhere/model")
    small_model(Path("elsewhere/model"), seed=2)
    Path("elsewhere/rows.jsonl").write_text('{"prompt": "1+2?"}\n')
    Path("elsewhere/probes/a.jsonl").write_text('{"prompt": "2+3?"}\n')
    Path("elsewhere/reward.py").write_text(REWARD.format(2.0))
    with pytest.raises(ConfigError) as refused:
        check_same_run(configuration(**paths), Path("run/config.yaml"))
    for key in ("model.path", "data.train.0.path", "probe.prompts.0.path", "reward.mine.target"):
        assert f"{key}=elsewhere/" in str(refused.value)


def test_another_tokenizer_is_another_model(begun):
    shutil.copytree("model", "elsewhere")
    settings = json.loads(Path("elsewhere/tokenizer_config.json").read_text())
    Path("elsewhere/tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages }}"}))
    with pytest.raises(ConfigError, match=r"model.path=elsewhere \(was model\)"):
        check_same_run(configuration(model="elsewhere"), Path("run/config.yaml"))


def test_another_function_of_the_same_file_is_another_reward(begun):
    with pytest.raises(ConfigError, match=r"reward.mine.target=\S*reward.py:other \(was reward.py:score\)"):
        check_same_run(configuration(target=f"{begun}/reward.py:other"), Path("run/config.yaml"))


def test_nothing_is_not_the_same_as_nothing(begun):
    Path("empty").mkdir()
    shutil.rmtree("probes")
    Path("probes").mkdir()
    with pytest.raises(ConfigError, match=r"probe.prompts.0.path=empty \(was probes\)"):
        check_same_run(configuration(prompts="empty"), Path("run/config.yaml"))
