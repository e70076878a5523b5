"""Adapters on the Megatron policy: PEFT's in every layout, and nothing else is trained."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import checkpoint_checks
import gradient_checks
import lora_checks
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_gradient import SETTINGS, relative_error
from tiny_models import make_tiny

from frpo_nemo.config.options import LoRAConfig, ModelConfig
from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.checkpoint import files as checkpoint_files
from frpo_nemo.megatron.checkpoint.save_load import read_metadata
from frpo_nemo.megatron.weights import adapter_files

LORA = LoRAConfig(rank=5, alpha=7.0)
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model") / "qwen2", "qwen2", layers=2)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """Return a directory that PEFT wrote; A and B are random, so that both have gradients."""
    return write_adapter(model, tmp_path_factory.mktemp("adapter") / "peft")


def write_adapter(model: str, path, matrices: list[str] = MATRICES) -> str:
    config = LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=matrices, task_type="CAUSAL_LM")
    peft = get_peft_model(gradient_checks.hugging_face_model(model).float(), config)
    generator = torch.Generator().manual_seed(3)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    peft.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def expected(model, adapter):
    return gradient_checks.group_loss_gradient(model, SETTINGS, adapter)


LAYOUTS = {
    "one process": dict(world=1),
    "recomputed activations": dict(world=1, recompute="full", microbatch_tokens=64),
    "DP2": dict(world=2, microbatch_tokens=100),
    "TP2": dict(world=2, tp=2, microbatch_tokens=128),
    "TP2 with sequence parallelism": dict(world=2, tp=2, sp=True, microbatch_tokens=90),
    "PP2": dict(world=2, pp=2, microbatch_tokens=64),
    "TP4 with a query group on two ranks": dict(world=4, tp=4, sp=True),
    "TP2 PP2 with sequence parallelism": dict(world=4, tp=2, pp=2, sp=True, recompute="full", microbatch_tokens=64),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_gradient_of_adapters_is_that_of_peft_in_every_layout(workers, model, adapter, expected, layout):
    world, arguments = layout["world"], {key: value for key, value in layout.items() if key != "world"}
    arguments |= dict(path=model, objective=SETTINGS, lora=LORA, adapter=adapter)
    gradient = workers.run(world, gradient_checks.step_gradient, **arguments)[0]
    assert relative_error(gradient, expected) < 1e-5


# -- the policy, its reference, what is sent and written


WORLDS = [
    pytest.param(1, {}, id="one process"),
    pytest.param(2, dict(tp=2), id="TP2"),
    pytest.param(4, dict(tp=2, pp=2, sp=True), id="TP2 PP2 with sequence parallelism"),
]


def peft_model(model: str, adapter: str):
    return PeftModel.from_pretrained(gradient_checks.hugging_face_model(model), adapter, autocast_adapter_dtype=False)


@pytest.mark.parametrize("world, layout", WORLDS)
def test_the_reference_is_the_base_with_adapters_switched_off(workers, model, adapter, world, layout):
    columns = workers.run(world, lora_checks.compared_with_reference, path=model, lora=LORA, adapter=adapter, **layout)[
        0
    ]
    for name, expected in (
        ("logprobs", peft_model(model, adapter)),
        ("reference_logprobs", gradient_checks.hugging_face_model(model)),
    ):
        with torch.no_grad():
            logprobs = torch.cat(gradient_checks.response_logprobs(expected.double(), gradient_checks.example_batch()))
        torch.testing.assert_close(columns[name].double(), logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("world, layout", [*WORLDS, pytest.param(4, dict(tp=4), id="TP4, shared query groups")])
def test_a_refit_sends_the_weights_that_peft_merges(workers, model, adapter, world, layout):
    merged = peft_model(model, adapter).merge_and_unload().float()
    expected = {name: parameter.detach() for name, parameter in merged.named_parameters()}
    workers.run(
        world, lora_checks.check_merged_stream, path=model, lora=LORA, adapter=adapter, expected=expected, **layout
    )


def test_training_begins_at_the_base_whatever_the_layout(workers, model):
    first = workers.run(1, lora_checks.initial_adapters, path=model, lora=LORA)[0]
    assert all(tensor.any() == ("lora_A" in name) for name, tensor in first.items())
    bound = 1 / first["model.layers.0.self_attn.q_proj.lora_A.weight"].shape[1] ** 0.5
    assert 0.9 * bound < first["model.layers.0.self_attn.q_proj.lora_A.weight"].max() < bound
    again = workers.run(4, lora_checks.initial_adapters, path=model, lora=LORA, tp=2, pp=2, sp=True)[0]
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("world, layout", WORLDS)
def test_only_adapters_are_trained(workers, model, world, layout, dropout):
    lora = replace(LORA, dropout=dropout)
    workers.run(world, lora_checks.check_only_adapters_are_trained, path=model, lora=lora, **layout)


def test_recomputed_layers_drop_what_they_dropped_before(workers, model):
    lora = replace(LORA, dropout=0.3)
    losses = workers.run(1, lora_checks.losses_with, path=model, lora=lora)[0]
    assert losses == workers.run(1, lora_checks.losses_with, path=model, lora=lora, recompute="full")[0]
    assert losses != workers.run(1, lora_checks.losses_with, path=model, lora=LORA)[0]


@pytest.mark.parametrize("world, layout", WORLDS)
def test_peft_loads_an_exported_adapter_with_equal_log_probs(workers, model, tmp_path, world, layout):
    out = str(tmp_path / "adapter")
    ours = workers.run(world, lora_checks.export_trained, path=model, lora=LORA, out=out, **layout)[0]
    with torch.no_grad():
        theirs = gradient_checks.response_logprobs(peft_model(model, out), gradient_checks.example_batch())
    torch.testing.assert_close(ours.double(), torch.cat(theirs), rtol=0, atol=1e-5)


# -- checkpoints


@pytest.mark.parametrize("world, layout", [WORLDS[0], WORLDS[2]])
def test_a_resumed_run_continues_bitwise_also_with_dropout(workers, model, tmp_path, world, layout):
    lora = replace(LORA, dropout=0.2)
    workers.run(world, checkpoint_checks.check_bitwise_resume, path=model, run_dir=str(tmp_path), lora=lora, **layout)


def test_an_adapter_names_its_base_for_a_reader_in_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    named = json.loads(adapter_files.peft_config(8, 16.0, "base", []))["base_model_name_or_path"]
    assert named == str(tmp_path / "base")
    assert json.loads(adapter_files.peft_config(8, 16.0, "org/base", []))["base_model_name_or_path"] == "org/base"


def test_bf16_adapters_of_a_model_with_tied_embeddings(workers, tmp_path):
    """Both ends of the pipeline hold the frozen embedding, and main weights are kept of adapters alone."""
    arguments = dict(path=make_tiny(tmp_path / "tied", "llama", tied=True), lora=LORA, precision="bf16")
    workers.run(2, lora_checks.check_only_adapters_are_trained, pp=2, **arguments)
    workers.run(2, checkpoint_checks.check_bitwise_resume, pp=2, run_dir=str(tmp_path / "resumed"), **arguments)
    arguments["run_dir"] = str(tmp_path / "run")
    workers.run(2, checkpoint_checks.save_reference, pp=2, **arguments)
    workers.run(2, checkpoint_checks.check_reshaped_resume, loss_tolerance=2e-2, tp=2, **arguments)


def test_a_checkpoint_holds_adapters_alone_and_loads_in_any_layout(workers, model, tmp_path):
    run_dir = str(tmp_path / "run")
    workers.run(4, checkpoint_checks.save_reference, path=model, run_dir=run_dir, lora=LORA, tp=2, pp=2, sp=True)
    saved = checkpoint_files.newest(run_dir)
    names = set(read_metadata(saved).state_dict_metadata)
    assert names and all(".lora." in name for name in names)
    for world, layout in ((1, {}), (4, dict(tp=4)), (2, dict(pp=2))):
        workers.run(
            world,
            checkpoint_checks.check_reshaped_resume,
            path=model,
            run_dir=run_dir,
            loss_tolerance=1e-5,
            lora=LORA,
            **layout,
        )


def test_a_checkpoint_belongs_to_the_base_that_was_loaded_not_to_what_took_its_place(workers, model, tmp_path):
    base = shutil.copytree(model, tmp_path / "base")
    other = make_tiny(tmp_path / "other", "qwen2", layers=2, seed=1)
    workers.run(
        1, lora_checks.save_after_the_base_was_replaced, path=str(base), other=other, run_dir=str(tmp_path), lora=LORA
    )
    saved, replaced = checkpoint_files.newest(tmp_path), ModelConfig(path=str(base), lora=LORA)
    with pytest.raises(ConfigError, match="adapters of a base whose weights are not those in model.path="):
        adapter_files.check(saved, replaced, adapter_files.record(replaced))
    original = replace(replaced, path=model)
    adapter_files.check(saved, original, adapter_files.record(original))


def test_a_checkpoint_is_refused_for_other_adapters_or_another_base(model, tmp_path):
    base = ModelConfig(path=model, lora=LORA)
    saved = tmp_path / "step_00000001"
    saved.mkdir()

    def write(record):
        (saved / "state.json").write_text(json.dumps({"format": checkpoint_files.FORMAT, "lora": record}))

    write(adapter_files.record(base))
    adapter_files.check(saved, base, adapter_files.record(base))
    copy = shutil.copytree(model, tmp_path / "copy")
    shutil.copyfile(copy / "model.safetensors", copy / "consolidated.safetensors")  # is not loaded
    adapter_files.check(saved, base, adapter_files.record(replace(base, path=str(copy))))
    other = make_tiny(tmp_path / "other", "qwen2", layers=2, seed=1)
    for changed, sentence in [
        (replace(base, lora=LoRAConfig()), "set model.lora.rank=5|holds adapters with model.lora.rank=5"),
        (replace(base, lora=replace(LORA, rank=6)), "rank=5 .*this run has model.lora.rank=6"),
        (replace(base, lora=replace(LORA, alpha=8.0)), "alpha=7.0; this run has .*alpha=8.0"),
        (replace(base, path=other), "adapters of a base whose weights are not those in model.path="),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            adapter_files.check(saved, changed, adapter_files.record(changed))
    write(None)
    with pytest.raises(ConfigError, match="holds all weights of a model and no adapters; set model.lora.rank=0"):
        adapter_files.check(saved, base, adapter_files.record(base))
