"""What `--check` prints of weight decay, by the checkpoint that the run would continue from."""

import json
import sys
import threading
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiny_models import make_tiny

from frpo_nemo.config.cli import compose, main
from frpo_nemo.config.load import load
from frpo_nemo.config.options import FRPORun
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.checkpoint import files as checkpoint_files
from frpo_nemo.training.checks.config import validate_frpo

OPTIONS = [
    "run_dir=run",
    "model=tiny_fp32",
    "model.path=model",
    "objective=grpo",
    "optim.lr=1e-3",
    "trainer.max_steps=9",
]
OPTIONS += ["data.train=[{path: prompts.jsonl}]", "data.max_prompt_tokens=64", "rollout.prompts_per_step=4"]
OPTIONS += ["rollout.max_response_tokens=8", "reward.right.target=length", "reward.right.args.max=9"]
MATRICES = "optim.weight_decay=0.1 applies to embeddings and linear layers, not to norms and biases\n"
EVERYTHING = "optim.weight_decay=0.1 applies to all weights, norms and biases included, as when this run began"


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """Return what --check prints for further options."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    for module in (sys, threading):
        monkeypatch.setattr(module, "excepthook", module.excepthook)
    make_tiny("model", "qwen2", layers=1)
    Path("prompts.jsonl").write_text('{"prompt": "1+1?"}\n' * 4)

    def check(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["frpo.py", "--check", *OPTIONS, *options])
        main(None, FRPORun, "frpo", validate_frpo)
        return capsys.readouterr().out

    return check


def write_run(run_dir: str, **record) -> Path:
    """Return what the checks read of a run after step 2, whose checkpoint says `record` of itself."""
    checkpoint = checkpoint_files.directory(run_dir, 2)
    checkpoint.mkdir(parents=True)
    record |= {"format": checkpoint_files.FORMAT, "step": 2, "adam_step": 2, "score": None}
    record["architecture"] = checkpoint_files.identity(Architecture.from_hf("model"))
    (checkpoint / checkpoint_files.RECORD).write_text(json.dumps(record))
    cfg = load(FRPORun, compose("frpo", [*OPTIONS, "optim.weight_decay=0.1"]))
    OmegaConf.save(OmegaConf.structured(cfg), Path(run_dir) / "config.yaml")
    return checkpoint


def test_a_new_run_decays_matrices(printed):
    assert MATRICES in printed("optim.weight_decay=0.1")
    assert "optim.weight_decay=0: no weights are decayed\n" in printed()
    assert "optim.weight_decay=0.1 applies to the adapters" in printed("optim.weight_decay=0.1", "model.lora.rank=4")


def test_a_run_says_what_it_has_decayed_since_it_began(printed):
    write_run("run")
    assert EVERYTHING in printed("optim.weight_decay=0.1")


def test_a_run_of_this_version_says_that_it_goes_on_with_matrices(printed):
    write_run("run", decayed="matrices")
    assert MATRICES in printed("optim.weight_decay=0.1")


def test_a_run_that_continues_another_ones_checkpoint_decays_as_that_did(printed):
    earlier = write_run("earlier")
    assert EVERYTHING in printed("optim.weight_decay=0.1", f"checkpoint.resume={earlier}")
