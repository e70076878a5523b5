"""The models of all sizes, built without memory: their bytes are those of the arithmetic, exactly."""

import pytest
from dry_run_all import LAYOUTS
from known_models import MODELS
from scripts import printed_by

from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.planning.memory import Layout, parameters, rank_parameters

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
}


@pytest.fixture(scope="module")
def built() -> dict[str, dict]:
    """What dry_run checked on the way: the table of weights, and names and shapes in transformers."""
    return {row["name"]: row for row in printed_by("dry_run_all.py")}


@pytest.mark.parametrize("name", MODELS)
def test_every_stage_holds_the_bytes_of_the_arithmetic(name, built):
    stages = built[name]["stages"]
    assert len(stages) == LAYOUTS[name][1]
    assert sum(layers for layers, _, _ in stages) == MODELS[name]["num_hidden_layers"]
    assert [real for _, real, _ in stages] == [estimate for _, _, estimate in stages]


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_the_published_number(name, known):
    assert parameters(Architecture.from_hf(known[name])) / 1e9 == pytest.approx(BILLIONS[name], abs=0.01)


def test_padding_of_the_vocabulary_counts(tmp_path, known):
    arch = Architecture.from_hf(known["Llama-3.1-8B-Instruct"])
    odd = type(arch)(**{**vars(arch), "vocab_size": arch.vocab_size - 63})
    assert rank_parameters(odd, Layout(tp=4), 0) == rank_parameters(arch, Layout(tp=4), 0)
    assert parameters(odd) < parameters(arch)


def test_layers_that_do_not_divide_are_refused(known):
    with pytest.raises(ConfigError, match="pipeline_model_parallel_size=8 does not divide num_hidden_layers=28"):
        Architecture.from_hf(known["Qwen2.5-7B-Instruct"]).check_parallel(4, 8)
