"""Estimated memory against what a training step really takes on this CPU, and how it moves with the options."""

from dataclasses import replace

import pytest
from measure_memory import CASES, CHUNK, LAYERS, LENGTHS, MIXTURE, SHAPE, VOCABULARY
from scripts import printed_by
from tiny_models import make_tiny

from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.planning.memory import (
    ATTENTION_PADDING,
    GIB,
    Engine,
    Layout,
    layers_parameters,
    phases,
    state_bytes,
    training_peak,
)

PACK = sum(LENGTHS)


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str, str, int, float], dict[str, int]]:
    rows = printed_by("measure_memory.py", "none", "full")
    return {(row["family"], row["precision"], row["recompute"], row["rank"], row["dropout"]): row for row in rows}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Architecture:
    path = tmp_path_factory.mktemp("small")
    return Architecture.from_hf(make_tiny(path, "llama", layers=LAYERS, vocab=VOCABULARY, **SHAPE))


def on_cpu(precision: str, recompute: str, rank: int, dropout: float) -> Layout:
    return Layout(
        lora_rank=rank,
        lora_dropout=dropout > 0,
        precision=precision,
        recompute=recompute,
        microbatch_tokens=PACK,
        logprob_chunk_tokens=CHUNK,
        gpu=False,
        transformer_engine=False,
    )


@pytest.mark.parametrize(
    "recompute, rank, dropout", [(recompute, *case) for recompute in CASES for case in CASES[recompute]]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_estimate_is_near_the_tensors_of_a_measured_step(precision, recompute, rank, dropout, measured, small):
    case = (precision, recompute, rank, dropout)
    layout, row = on_cpu(*case), measured["llama", *case]
    # gloo's thread may give back its copy of the gradients later, up to 7% of the state with adapters.
    assert sum(state_bytes(small, layout, 0).values()) == pytest.approx(row["state"], rel=0.1)
    assert sum(training_peak(small, layout, 0).values()) == pytest.approx(row["peak"], rel=0.1)


@pytest.mark.parametrize("recompute", CASES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_estimate_is_near_the_tensors_of_a_measured_step_of_a_mixture(precision, recompute, measured, tmp_path):
    mixture = Architecture.from_hf(make_tiny(tmp_path, "qwen3_moe", layers=LAYERS, vocab=VOCABULARY, **MIXTURE))
    case = (precision, recompute, 0, 0.0)
    layout, row = on_cpu(*case), measured["qwen3_moe", *case]
    assert sum(state_bytes(mixture, layout, 0).values()) == pytest.approx(row["state"], rel=0.1)
    assert sum(training_peak(mixture, layout, 0).values()) == pytest.approx(row["peak"], rel=0.1)


def test_the_measured_pack_is_padded_as_much_as_the_estimate_assumes():
    assert len(LENGTHS) * max(LENGTHS) / PACK == pytest.approx(ATTENTION_PADDING, rel=1e-3)


def test_a_stage_keeps_no_more_tokens_in_flight_than_its_replica_has(known):
    arch = Architecture.from_hf(known["Llama-3.1-70B-Instruct"])
    many = Layout(tp=8, pp=4, dp=2, sequence_parallel=True, microbatch_tokens=4096)
    one, four = replace(many, update_tokens=4096), replace(many, update_tokens=4 * 4096)
    needed = [[training_peak(arch, layout, s)["activations"] for s in (0, 3)] for layout in (one, four, many)]
    assert needed[0][0] < needed[1][0] == needed[2][0]  # the first stage waits for the last
    assert needed[0][1] == needed[1][1] == needed[2][1]


def total(arch: Architecture, layout: Layout, phase: str, limit: int = 79 * GIB) -> int:
    return next(found.total for found in phases(arch, layout, limit) if found.name == phase)


def test_fp8_keeps_two_bytes_of_every_layer_weight_in_every_phase(known):
    arch = Architecture.from_hf(known["Llama-3.1-70B-Instruct"])
    layout = Layout(tp=8, pp=2, dp=4, sequence_parallel=True, engine=Engine(tp=8))
    weights = 2 * layers_parameters(arch, 8, range(arch.num_layers // 2))
    for without, with_fp8 in zip(
        *(phases(arch, replace(layout, fp8=fp8), 79 * GIB) for fp8 in (False, True)), strict=True
    ):
        assert with_fp8.parts == without.parts | {"FP8 weights": weights}, with_fp8.name


def test_every_kind_of_splitting_lowers_the_memory_of_training(known):
    arch = Architecture.from_hf(known["Llama-3.1-70B-Instruct"])
    base = Layout(tp=4, pp=2, dp=2, sequence_parallel=True)
    needed = total(arch, base, "train")
    for change in (
        {"tp": 8},
        {"dp": 4},
        {"pp": 4},
        {"recompute": "full"},
        {"microbatch_tokens": 4096},
    ):
        assert total(arch, replace(base, **change), "train") < needed, change
    assert total(arch, replace(base, sequence_parallel=False), "train") > needed


def test_a_gpu_holds_no_optimizer_while_it_generates_but_a_cpu_does(known):
    arch = Architecture.from_hf(known["Qwen2.5-7B-Instruct"])
    layout = Layout(tp=4, dp=2, engine=Engine(tp=2))
    for gpu, precision, stays in ((True, "bf16", False), (True, "fp32", True), (False, "bf16", True)):
        found = phases(arch, replace(layout, gpu=gpu, transformer_engine=gpu, precision=precision), 79 * GIB)
        generate = next(phase.parts for phase in found if phase.name == "generate")
        assert ("optimizer" in generate) is stays and "vLLM KV cache" in generate
        train = next(phase.parts for phase in found if phase.name == "train")
        assert ("vLLM weights" in train) is not gpu  # asleep on a GPU
