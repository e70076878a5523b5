"""Nothing that is loaded is run: checkpoints, models, tokenizers, chat templates, data. Each attack is tried; the traps
in a model's directory are also there in all runs of tests/training/test_runs.py."""

import ast
import json
import pickle
from pathlib import Path

import loading_checks
import pytest
import torch
from tiny_models import make_tiny
from traps import Trap, set_traps

from frpo_nemo.config.options import SourceConfig
from frpo_nemo.data.sources import check_source, load_rows
from frpo_nemo.errors import ConfigError
from frpo_nemo.evaluation.benchmark_checks import model_directory
from frpo_nemo.evaluation.benchmark_commands import command_line
from frpo_nemo.evaluation.benchmarks import BENCHMARKS
from frpo_nemo.evaluation.options import EvaluateRun
from frpo_nemo.rewards.registry import bind

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = Path(make_tiny(tmp_path_factory.mktemp("model") / "llama", "llama", layers=2))
    set_traps(path)
    return path


def test_the_traps_work(tmp_path):
    """Or the other tests could not fail."""
    torch.save(Trap(tmp_path / "sprung"), tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "sprung").exists()


def test_a_poisoned_checkpoint_runs_nothing(workers, model, tmp_path):
    """Pickles in place of, or inside, each of its files, with an index that leads to them."""
    found = workers.run(1, loading_checks.load_poisoned_checkpoints, path=str(model), run_dir=str(tmp_path))[0]
    assert found == {
        "index": "ConfigError",
        "index with objects": "ConfigError",
        "tensors": "CheckpointException",
        "random generators": "SafetensorError",
        "what we do not read": None,
    }
    assert not (tmp_path / "sprung").exists() and not (model / "sprung").exists()


def test_code_beside_a_model_is_not_run_by_its_tokenizer_nor_its_weights(workers, model):
    workers.run(1, loading_checks.load_model_and_tokenizer, path=str(model))
    assert not (model / "sprung").exists()


def test_a_tokenizer_that_exists_only_as_code_is_refused(tmp_path):
    path = Path(make_tiny(tmp_path / "llama", "llama", layers=1))
    set_traps(path)
    for name, unknown in (("config", {"model_type": "trap"}), ("tokenizer_config", {"tokenizer_class": "Trap"})):
        content = json.loads((path / f"{name}.json").read_text())
        (path / f"{name}.json").write_text(json.dumps(content | unknown))
    from transformers import AutoTokenizer

    with pytest.raises(ValueError, match="custom code"):
        AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    assert not (path / "sprung").exists()


def test_a_chat_template_cannot_reach_the_system(tmp_path):
    from jinja2.exceptions import SecurityError
    from transformers import AutoTokenizer

    path, sprung = make_tiny(tmp_path / "llama", "llama", layers=1), tmp_path / "sprung"
    attack = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    attack += f"{{{{ cycler.__init__.__globals__.os.system('touch {sprung}') }}}}"
    (tmp_path / "llama/chat_template.jinja").write_text(attack)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    with pytest.raises(SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    assert not sprung.exists()


def test_pickled_weights_alone_are_no_model_to_evaluate(tmp_path):
    path = Path(make_tiny(tmp_path / "llama", "llama", layers=1))
    set_traps(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="has no .safetensors file; other formats can run code when read"):
        model_directory(str(path))
    assert not (path / "sprung").exists()


def test_remote_code_is_off_in_every_call_that_could_turn_it_on():
    """trust_remote_code is False wherever it is named, and named wherever an Auto class reads a directory."""
    auto = 0
    for file in [*(ROOT / "frpo_nemo").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]:
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            name = ast.unparse(call.func)
            if "trust_remote_code" in given:
                assert ast.unparse(given["trust_remote_code"]) == "False", f"{file}: {ast.unparse(call)}"
            if name.startswith("Auto") and name.endswith(".from_pretrained"):
                auto += 1
                assert "trust_remote_code" in given, f"{file}: {ast.unparse(call)}"
    assert auto >= 3


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("backend", ["vllm", "hf"])
def test_benchmarks_are_not_told_to_trust_anything(name, backend, tmp_path):
    words = " ".join(map(str, command_line(EvaluateRun(out=str(tmp_path), backend=backend), name, tmp_path)))
    assert "trust" not in words and "unsafe" not in words


# -- data and rewards


def source(path: Path) -> SourceConfig:
    return SourceConfig(path=str(path), prompt="prompt")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "rows.csv"])
def test_a_pickle_with_the_name_of_a_data_file_is_not_run(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(ConfigError):
        load_rows(source(tmp_path / name))
    assert not (tmp_path / "sprung").exists()


def test_the_loading_script_of_a_data_set_is_not_run(tmp_path):
    directory = tmp_path / "questions"
    directory.mkdir()
    (directory / "questions.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'sprung')!r}).touch()\n")
    (directory / "train.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(ConfigError, match="scripts are no longer supported"):
        check_source(source(directory))
    assert not (tmp_path / "sprung").exists()


def test_pickles_in_a_data_sets_directory_are_not_read(tmp_path):
    directory = tmp_path / "questions"
    directory.mkdir()
    for name in ("train.pkl", "dataset_info.pkl", "state.pt"):
        (directory / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(ConfigError):
        load_rows(source(directory))
    (directory / "train.jsonl").write_text('{"prompt": "a"}\n')
    assert load_rows(source(directory)) == [{"prompt": "a"}]
    assert not (tmp_path / "sprung").exists()


def test_a_reward_file_is_run_only_when_the_configuration_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("length.py", "reward.py", "frpo_nemo.py", "sitecustomize.py"):
        (tmp_path / name).write_text(
            f"import pathlib\npathlib.Path({str(tmp_path / 'sprung')!r}).touch()\nscore = len\n"
        )
    bind("length", {"limit": 1})
    assert not (tmp_path / "sprung").exists()
    bind("reward.py:score", {})
    assert (tmp_path / "sprung").exists()
