"""The search for a layout: what it chooses fits, what it rejects has a reason; the hours of a run; and all commands print."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from published import RUNS
from rich.console import Console

from frpo_nemo.config.cli import compose
from frpo_nemo.config.load import load
from frpo_nemo.config.options import FRPORun, SFTRun
from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.planning import compiling
from frpo_nemo.planning.cluster import CLUSTERS, peak_flops
from frpo_nemo.planning.layouts import default_base, find_layouts, overrides
from frpo_nemo.planning.plan import PlanRun, plan
from frpo_nemo.planning.report import print_layouts
from frpo_nemo.planning.timing import Workload, seconds
from frpo_nemo.training.checks import config as checks
from frpo_nemo.training.checks.resources import layout_of, step_of

REPOSITORY = Path(__file__).parents[2]
HOURS = r"step: ([\d.]+) s .*: ([\d.e+]+) hours, ([\d.e+]+) GPU hours"


def options(*given: str) -> PlanRun:
    return load(PlanRun, compose("plan", given))


def search(path: Path, *given: str):
    cfg = options(f"model.path={path}", *given)
    base = default_base("bf16", True, cfg.gpu_memory_utilization, cfg.max_num_seqs, cfg.model.lora_rank)
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


def test_adapters_take_less_memory_and_time_than_all_weights(known):
    _, all_weights, _ = search(known["Llama-3.1-70B-Instruct"], "cluster.num_nodes=8")
    _, adapters, _ = search(known["Llama-3.1-70B-Instruct"], "cluster.num_nodes=8", "model.lora_rank=64")
    assert len(adapters) > len(all_weights)
    for candidate in all_weights:
        same = replace(candidate.layout, lora_rank=64, reference=False)
        lighter = next(found for found in adapters if found.layout == same)
        assert lighter.seconds["training"] < candidate.seconds["training"]
        trains = [next(phase.total for phase in c.phases if phase.name == "train") for c in (lighter, candidate)]
        assert trains[0] < trains[1]


def test_70b_on_one_node_is_refused_with_the_reason(known):
    with pytest.raises(ConfigError, match="No layout fits 1 x 8 H100 .*memory of train.*cluster.num_nodes"):
        plan(options(f"model.path={known['Llama-3.1-70B-Instruct']}"), Console(quiet=True))


@pytest.mark.parametrize(
    "given", [[], ["model.lora_rank=64"], ["workload.prompts_per_step=12", "workload.updates_per_rollout=4"]], ids=str
)
def test_a_run_with_the_printed_options_has_the_layout_that_was_planned(given, known):
    cfg, found, _ = search(known["Qwen2.5-7B-Instruct"], "workload.max_response_tokens=1024", *given)
    for candidate in (found[0], found[-1]):
        printed = overrides(candidate.layout, cfg.cluster, cfg.workload).split()
        run = load(FRPORun, compose("experiment/gsm8k_frpo", ["objective.beta=0.1", *printed]))
        planned = replace(candidate.layout, transformer_engine=False)  # it is planned for, but not installed here
        assert replace(layout_of(run, 8, gpu=True), transformer_engine=False) == planned
        checks._check_batch(run, 8)


def test_no_engine_and_no_update_is_without_a_prompt(known):
    path = known["Qwen2.5-7B-Instruct"]
    _, found, rejected = search(path, "workload.prompts_per_step=4", "workload.group_size=16")
    assert min(candidate.layout.engine.tp for candidate in found) == 2
    assert rejected["vLLM TP=1: more engines than the 4 prompts"] > 0
    with pytest.raises(ConfigError, match="updates_per_rollout=3 must divide workload.prompts_per_step=64"):
        plan(options(f"model.path={path}", "workload.updates_per_rollout=3"), Console(quiet=True))


def test_fp32_has_its_own_peak_and_offloads_nothing(known):
    arch = Architecture.from_hf(known["Qwen2.5-7B-Instruct"])
    cfg, found, _ = search(known["Qwen2.5-7B-Instruct"])
    training = {
        (precision, host): seconds(
            arch, replace(found[0].layout, precision=precision), replace(cfg.cluster, host_gb_per_s=host), cfg.workload
        )["training"]
        for precision in ("bf16", "fp32")
        for host in (25, 50)
    }
    assert training["fp32", 50] > 10 * training["bf16", 50]
    assert training["fp32", 25] == training["fp32", 50] and training["bf16", 25] > training["bf16", 50]


def test_formulas_are_imported_without_torch():
    modules = ", ".join(
        f"frpo_nemo.planning.{name}" for name in ("communication", "layouts", "memory", "plan", "timing")
    )
    code = f"import sys, {modules}; print([name for name in ('torch', 'megatron.core') if name in sys.modules])"
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout == "[]\n"


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
    assert (
        wrong.returncode == 2
        and wrong.stderr == "plan.py: cluster.num_nodes=0 must be a whole number at least 1 (Machines).\n"
    )


def test_hours_of_an_experiment_are_its_steps_times_seconds_times_gpus(known):
    given = [f"model.path={known['Mistral-7B-Instruct-v0.1']}", "objective.lambda_=0.5", "trainer.max_steps=36000"]
    given += ["cluster=h200", "workload.prompt_tokens=110", "workload.response_tokens=300"]
    printed = run("--hours", "--config-name", "experiment/safety_mistral_7b", *given)
    assert printed.returncode == 0, printed.stderr
    assert "TP2 PP1 DP4, vLLM TP8 on 1 x 8 H200" in printed.stdout
    assert "128 sequences per step, of 110 + 300 tokens" in printed.stdout
    step, hours, gpu_hours = map(float, re.search(HOURS, printed.stdout, re.DOTALL).groups())
    assert hours == pytest.approx(10 * step, rel=0.06) and gpu_hours == pytest.approx(80 * step, rel=0.06)


def test_a_step_of_supervised_training_is_its_training_alone(known):
    """The engine that its probes have takes no time of a step."""
    given = [f"model.path={known['Qwen2.5-7B-Instruct']}", "run_dir=none"]
    cfg = load(SFTRun, compose("experiment/sft_code", given))
    layout, work = step_of(cfg, Workload(prompt_tokens=200, response_tokens=10_000))
    assert layout_of(cfg, 8, gpu=True).engine is not None
    assert (work.sequences, work.prompt_tokens, work.response_tokens) == (64, 200, 4096)  # as long as it may be
    spent = seconds(Architecture.from_hf(cfg.model.path), layout, options("model.path=x").cluster, work)
    assert list(spent) == ["training"]


def test_passes_before_training_are_those_that_the_configuration_needs(known):
    for beta, updates, passes in ((0, 1, 0), (0.1, 1, 1), (0, 2, 1), (0.1, 2, 2)):
        given = [f"objective.beta={beta}", f"trainer.updates_per_rollout={updates}"]
        cfg = load(FRPORun, compose("experiment/gsm8k_frpo", given))
        assert step_of(cfg, Workload())[1].logprob_passes == passes


def test_dry_run_of_an_experiment_shows_every_stage(known):
    given = [f"model.path={known['Llama-3.1-70B-Instruct']}", "parallel=tp8_pp4_dp2", "model.precision=bf16"]
    printed = run("--dry-run", "--config-name", "experiment/gsm8k_frpo", *given)
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.count("equal") == 4 and "2,270,756,864" in printed.stdout


def test_layouts_of_a_mixture_say_how_many_ranks_share_its_experts(known):
    cfg, found, _ = search(known["Qwen3-30B-A3B-Instruct-2507"], "cluster.num_nodes=2")
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    print_layouts(console, found, cfg.show)
    header, _, *rows = console.export_text().splitlines()[2:]
    place = header.split().index("EP")
    assert any(int(row.split()[place]) > 1 for row in rows if row.strip())


@pytest.mark.parametrize(
    "given, machine, compiles",
    [
        ([], True, False),
        (["trainer.max_steps=1000", "rollout.max_response_tokens=1000"], True, True),
        (["trainer.max_steps=1000", "rollout.max_response_tokens=1000"], False, False),
        (["trainer.max_steps=1000", "rollout.max_response_tokens=1000", "rollout.enforce_eager=true"], True, False),
        (["rollout.enforce_eager=false"], True, True),
    ],
)
def test_vllm_compiles_on_a_cpu_where_a_long_run_pays_for_it(known, monkeypatch, given, machine, compiles):
    """machine: whether it has a compiler."""
    monkeypatch.setattr(compiling, "can_compile", lambda: machine)
    cfg = load(FRPORun, compose("experiment/demo", given))
    arch = Architecture.from_hf(known["Qwen2.5-0.5B-Instruct"])
    assert compiling.compiles_on_cpu(cfg, replace(arch, num_layers=2), 2) is compiles
