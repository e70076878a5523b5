"""The search for a layout: what it chooses fits, what it rejects has a reason, and both commands print."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from published import RUNS
from rich.console import Console

from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.planning.cluster import CLUSTERS, peak_flops
from frpo_nemo.planning.layouts import default_base, find_layouts, overrides
from frpo_nemo.planning.plan import PlanRun, plan
from frpo_nemo.training.cli import compose
from frpo_nemo.training.schema import load

REPOSITORY = Path(__file__).parents[2]


def options(*given: str) -> PlanRun:
    return load(PlanRun, compose("plan", given))


def search(path: Path, *given: str):
    cfg = options(f"model.path={path}", *given)
    base = default_base("bf16", True, cfg.gpu_memory_utilization, cfg.max_num_seqs)
    return cfg, *find_layouts(Architecture.from_hf(path), cfg.cluster, cfg.workload, base, cfg.head_room)


def test_what_is_chosen_fits_and_uses_all_gpus(known):
    cfg, found, rejected = search(known["Llama-3.1-70B-Instruct"], "cluster.num_nodes=8")
    assert found and rejected
    for candidate in found:
        layout = candidate.layout
        assert candidate.peak <= 0.9 * cfg.cluster.gpu_memory
        assert layout.tp * layout.pp * layout.dp == 64 and 64 % layout.engine.tp == 0
        assert layout.tp <= 8 and layout.microbatch_tokens >= cfg.workload.longest
    assert found[0].step <= 1.03 * min(candidate.step for candidate in found)


def test_70b_on_one_node_is_refused_with_the_reason(known):
    with pytest.raises(ConfigError, match="No layout fits 1 x 8 H100 .*memory of train.*cluster.num_nodes"):
        plan(options(f"model.path={known['Llama-3.1-70B-Instruct']}"), Console(quiet=True))


def test_the_printed_options_choose_the_layout(known):
    cfg, found, _ = search(known["Qwen2.5-7B-Instruct"])
    given = overrides(found[0].layout, cfg.cluster).split()
    chosen = compose("frpo", given)
    assert chosen.model.tensor_model_parallel_size == found[0].layout.tp
    assert chosen.rollout.tensor_model_parallel_size == found[0].layout.engine.tp
    assert chosen.trainer.num_nodes * chosen.trainer.devices == 8


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.model)
def test_estimated_seconds_are_of_the_size_of_published_ones(run, known):
    estimate = run.estimate(Architecture.from_hf(known[run.model]))
    for phase in ("generation", "log-probs", "training"):
        assert estimate[phase] == pytest.approx(run.seconds[phase], rel=0.5), phase


@pytest.mark.parametrize("file", sorted(CLUSTERS.glob("*.yaml")), ids=lambda file: file.stem)
def test_clusters_fit_the_schema_and_are_known_to_the_mfu(file):
    cluster = options("model.path=x", f"cluster={file.stem}").cluster
    assert peak_flops(f"NVIDIA {cluster.gpu} 80GB HBM3") == cluster.peak_tflops * 1e12
    assert peak_flops("NVIDIA GeForce RTX 4090") is None


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "recipes/plan.py", *arguments]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)


def test_command_prints_the_plan_and_a_mistake_is_one_line(known):
    path = known["Qwen2.5-7B-Instruct"]
    printed = run(f"model.path={path}", "cluster=h200")
    assert printed.returncode == 0 and "layouts fit" in printed.stdout, printed
    assert "rollout.tensor_model_parallel_size=" in printed.stdout and "others do not fit" in printed.stdout
    wrong = run(f"model.path={path}", "cluster.num_nodes=0")
    assert wrong.returncode == 2 and wrong.stderr == "plan.py: cluster.num_nodes=0 must be above 0.\n"


def test_dry_run_of_an_experiment_shows_every_stage(known):
    given = [f"model.path={known['Llama-3.1-70B-Instruct']}", "parallel=tp8_pp4_dp2", "model.precision=bf16"]
    printed = run("--dry-run", "--config-name", "experiment/gsm8k_frpo", *given)
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.count("equal") == 4 and "2,270,756,864" in printed.stdout
