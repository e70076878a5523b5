"""The models of all sizes, built without memory: their bytes are those of the arithmetic, exactly."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from dry_run_all import EXPERIMENTS, LAYOUTS
from known_models import MODELS
from scripts import printed_by

from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.planning.dry_run import check_against_transformers
from frpo_nemo.planning.memory import Layout, parameters, rank_parameters

REPOSITORY = Path(__file__).parents[2]

BILLIONS = {  # as published on the model cards
    "Mistral-7B-Instruct-v0.1": 7.24,
    "Qwen2.5-0.5B-Instruct": 0.49,
    "Qwen2.5-7B-Instruct": 7.62,
    "Qwen2.5-14B-Instruct": 14.77,
    "Qwen2.5-32B-Instruct": 32.76,
    "Qwen2.5-72B-Instruct": 72.71,
    "Qwen3-8B": 8.19,
    "Llama-3.1-8B-Instruct": 8.03,
    "Llama-3.1-70B-Instruct": 70.55,
    "Qwen3-30B-A3B-Instruct-2507": 30.53,
    "Qwen3-235B-A22B": 235.09,
    "Mixtral-8x7B-Instruct-v0.1": 46.70,
}


@pytest.fixture(scope="module")
def built() -> dict[str, dict]:
    """Return what dry_run checked on the way: the table of weights, and names and shapes in transformers."""
    return {row["name"]: row for row in printed_by("dry_run_all.py")}


@pytest.mark.parametrize("name", MODELS)
def test_every_stage_holds_the_bytes_of_the_arithmetic(name, built):
    stages = built[name]["stages"]
    assert len(stages) == LAYOUTS[name][1]
    assert sum(layers for layers, _, _ in stages) == MODELS[name]["num_hidden_layers"]
    assert [real for _, real, _ in stages] == [estimate for _, _, estimate in stages]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_models_of_the_jobs_build_in_their_layouts(name, built):
    stages = built[name]["stages"]
    assert len(stages) == (4 if name.endswith("70b") else 1)
    assert [real for _, real, _ in stages] == [estimate for _, _, estimate in stages]


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_the_published_number(name, known):
    assert parameters(Architecture.from_hf(known[name])) / 1e9 == pytest.approx(BILLIONS[name], abs=0.01)


def test_names_and_shapes_that_transformers_does_not_have_are_found(known):
    arch = Architecture.from_hf(known["Qwen2.5-0.5B-Instruct"])
    assert check_against_transformers(arch) == 290
    with pytest.raises(ValueError, match="_proj.bias of .* has shape .* in transformers and None here"):
        check_against_transformers(replace(arch, qkv_bias=False))
    with pytest.raises(ValueError, match="has shape .*4864.* in transformers and .*4865.* here"):
        check_against_transformers(replace(arch, ffn_hidden_size=4865))


def test_a_wrong_number_of_parameters_ends_the_command_with_one_sentence(known):
    code = f"""
import runpy
from frpo_nemo.planning import memory
right = memory.rank_parameters
memory.rank_parameters = lambda arch, layout, stage: right(arch, layout, stage) + stage
runpy.run_path({str(REPOSITORY / "recipes/plan.py")!r}, run_name="__main__")
"""
    given = ["--dry-run", "--config-name", "experiment/gsm8k_frpo", "parallel=pp2"]
    ended = subprocess.run(
        [sys.executable, "-c", code, *given, f"model.path={known['Qwen2.5-0.5B-Instruct']}"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1 and ended.stdout == "", ended
    lines = ended.stderr.splitlines()
    assert lines[-1].startswith("plan.py: Stage 1 holds ") and "Traceback" not in ended.stderr, ended.stderr


def test_padding_of_the_vocabulary_counts(tmp_path, known):
    arch = Architecture.from_hf(known["Llama-3.1-8B-Instruct"])
    odd = type(arch)(**{**vars(arch), "vocab_size": arch.vocab_size - 63})
    assert rank_parameters(odd, Layout(tp=4), 0) == rank_parameters(arch, Layout(tp=4), 0)
    assert parameters(odd) < parameters(arch)


def test_layers_that_do_not_divide_are_refused(known):
    with pytest.raises(ConfigError, match="pipeline_model_parallel_size=8 does not divide num_hidden_layers=28"):
        Architecture.from_hf(known["Qwen2.5-7B-Instruct"]).check_parallel(4, 8)
