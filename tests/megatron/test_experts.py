"""Mixtures of experts: import, export and logits of both families, on every layout that shares experts."""

import checkpoint_checks
import gradient_checks
import lora_checks
import parity_checks
import pytest
import torch
import update_checks
from peft import PeftModel
from safetensors.torch import load_file
from test_gradient import SETTINGS, relative_error
from test_lora import LORA, write_adapter
from test_updates import TOLERANCE, errors
from tiny_models import make_tiny

from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.checkpoint import files
from frpo_nemo.megatron.checkpoint.weights import StoredWeights

MODELS = {
    "qwen3_moe": dict(family="qwen3_moe"),
    "qwen3_moe, weights of the chosen not normalised": dict(family="qwen3_moe", norm_topk_prob=False),
    "qwen3_moe, every second layer dense": dict(family="qwen3_moe", decoder_sparse_step=2),
    "qwen3_moe, first and third layer dense": dict(family="qwen3_moe", mlp_only_layers=[0, 2]),
    "mixtral": dict(family="mixtral"),
}
LAYOUTS = {
    "one process": (1, dict(tp=1, pp=1)),
    "EP2": (2, dict(tp=1, pp=1, expert_model_parallel_size=2)),
    "TP2 EP2": (2, dict(tp=2, pp=1, sp=True, expert_model_parallel_size=2)),
    "PP2 EP2": (4, dict(tp=1, pp=2, expert_model_parallel_size=2)),
    "TP2 EP4": (4, dict(tp=2, pp=1, sp=True, expert_model_parallel_size=4)),
    "TP2 PP2 EP2": (4, dict(tp=2, pp=2, sp=True, expert_model_parallel_size=2)),
    "TP2, experts not shared": (2, dict(tp=2, pp=1, sp=True)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("models")
    return {name: make_tiny(base / name, **settings) for name, settings in MODELS.items()}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_logits_equal_transformers_and_export_after_import_is_bitwise_equal(workers, models, layout):
    world, sizes = layout
    everything = sizes in (LAYOUTS["one process"][1], LAYOUTS["TP2 PP2 EP2"][1])
    for name in models if everything else ("qwen3_moe, every second layer dense", "mixtral"):
        path = models[name]
        workers.run(world, parity_checks.check_logits_parity, path=path, **sizes)
        workers.run(world, parity_checks.check_export_bitwise, path=path, **sizes)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_saved_shards_of_shared_experts_load_again(workers, models, tmp_path, name):
    layout = dict(tp=2, pp=1, sp=True, expert_model_parallel_size=4)
    workers.run(4, parity_checks.check_save_round_trip, path=models[name], out=str(tmp_path / "out"), **layout)


# "packs of their own": replicas have different numbers of microbatches, so some run empty ones.
GRADIENT_LAYOUTS = {
    "one microbatch": (1, dict()),
    "a microbatch per sequence": (1, dict(microbatch_tokens=1)),
    "EP2, packs of their own": (2, dict(ep=2, microbatch_tokens=50)),
    "EP4": (4, dict(ep=4, microbatch_tokens=64)),
    "TP2 EP2": (4, dict(tp=2, ep=2, sp=True, microbatch_tokens=64)),
    "TP2 EP4, packs of their own": (4, dict(tp=2, ep=4, sp=True, microbatch_tokens=50)),
    "TP2, experts not shared": (4, dict(tp=2, sp=True, microbatch_tokens=64)),
    "PP2 EP2": (4, dict(pp=2, ep=2, microbatch_tokens=64)),
    "TP2 PP2 EP2, recomputed": (4, dict(tp=2, pp=2, ep=2, sp=True, recompute="full", microbatch_tokens=64)),
}


@pytest.mark.parametrize("layout", GRADIENT_LAYOUTS.values(), ids=GRADIENT_LAYOUTS)
def test_gradient_is_that_of_the_group_loss(workers, gradients, layout):
    world, sizes = layout
    for path, expected, _ in gradients.values():
        gradient = workers.run(world, gradient_checks.step_gradient, path=path, objective=SETTINGS, **sizes)[0]
        for part in (".experts.", "gate.weight", "self_attn"):
            names = [name for name in expected if part in name]
            own, other = ({name: g[name] for name in names} for g in (gradient, expected))
            assert relative_error(own, other) < 1e-5, part
        assert relative_error(gradient, expected) < 1e-5


REPLAY_LAYOUTS = {
    "a microbatch per sequence, recomputed": (1, dict(microbatch_tokens=1, recompute="full")),
    "EP2, packs of their own": (2, dict(ep=2, microbatch_tokens=50)),
    "TP2 PP2 EP2": (4, dict(tp=2, pp=2, ep=2, sp=True, microbatch_tokens=64)),
    "PP2 EP2, recomputed": (4, dict(pp=2, ep=2, recompute="full", microbatch_tokens=40)),
}


@pytest.mark.parametrize("layout", REPLAY_LAYOUTS.values(), ids=REPLAY_LAYOUTS)
def test_gradient_with_the_experts_that_vllm_chose(workers, gradients, layout):
    """Of policy, old policy and reference. With recomputation, a microbatch's choices are needed again in its backward pass,
    after other microbatches have run."""
    world, sizes = layout
    for path, own_choice, expected in gradients.values():
        check = gradient_checks.step_gradient
        gradient = workers.run(world, check, path=path, objective=SETTINGS, routes=True, **sizes)[0]
        assert relative_error(gradient, expected) < 1e-5
        assert relative_error(gradient, own_choice) > 0.1


BALANCE_LAYOUTS = {
    "a microbatch per sequence, recomputed": (1, dict(microbatch_tokens=1, recompute="full")),
    "EP2, packs of their own": (2, dict(ep=2, microbatch_tokens=50)),
    "TP2 PP2 EP2": (4, dict(tp=2, pp=2, ep=2, sp=True, microbatch_tokens=64)),
    "TP2 EP4, recomputed": (4, dict(tp=2, ep=4, sp=True, recompute="full", microbatch_tokens=50)),
}
BALANCE = 0.3  # large, so that it shows


@pytest.fixture(scope="module")
def balanced(gradients) -> dict:
    """Return model -> (path, gradient with the balance loss, its value, shares of the experts)."""
    found = {}
    for name, (path, *_) in gradients.items():
        model, batch = gradient_checks.hugging_face_model(path), gradient_checks.example_batch()
        with torch.no_grad():
            loss, shares = gradient_checks.balance_loss(model, batch)
        expected = gradient_checks.group_loss_gradient(path, SETTINGS, balance=BALANCE)
        found[name] = path, expected, loss.item(), shares
    return found


@pytest.mark.parametrize("layout", BALANCE_LAYOUTS.values(), ids=BALANCE_LAYOUTS)
def test_balance_loss_and_load_of_experts(workers, gradients, balanced, layout):
    world, sizes = layout
    for name, (path, expected, loss, shares) in balanced.items():
        step = gradient_checks.step_gradient
        gradient = workers.run(world, step, path=path, objective=SETTINGS, expert_balance=BALANCE, **sizes)[0]
        assert relative_error(gradient, expected) < 1e-5
        assert relative_error(gradient, gradients[name][1]) > 0.01
        for load in workers.run(world, gradient_checks.expert_load, path=path, **sizes):
            torch.testing.assert_close(load.shares, shares.double(), rtol=0, atol=1e-6)
            assert load.imbalance == pytest.approx(loss, rel=1e-5)


GRADIENT_MODELS = {
    "qwen3_moe": dict(family="qwen3_moe", mlp_only_layers=[0, 2], norm_topk_prob=False),
    "mixtral": dict(family="mixtral"),  # its weights are normalised
}


@pytest.fixture(scope="module")
def gradients(tmp_path_factory) -> dict:
    """Return model -> (path, the gradient that a step should have, and that with other experts chosen by vLLM)."""
    base, found = tmp_path_factory.mktemp("gradients"), {}
    for name, settings in GRADIENT_MODELS.items():
        path = make_tiny(base / name, **settings)
        own, replayed = (gradient_checks.group_loss_gradient(path, SETTINGS, routes=routes) for routes in (False, True))
        found[name] = path, own, replayed
    return found


UPDATE_LAYOUTS = {
    "one process": (1, dict()),
    "EP2": (2, dict(ep=2)),
    "TP2 EP2": (4, dict(tp=2, ep=2, sp=True)),
    "TP2, experts not shared": (2, dict(tp=2, sp=True)),
    "TP2 PP2 EP2": (4, dict(tp=2, pp=2, ep=2, sp=True)),
}


@pytest.fixture(scope="module")
def expected_updates(models) -> dict:
    return update_checks.changes_by_adamw(models["qwen3_moe"])


@pytest.mark.parametrize("layout", UPDATE_LAYOUTS.values(), ids=UPDATE_LAYOUTS)
def test_three_clipped_updates_are_those_of_adamw(workers, models, expected_updates, layout):
    """Clipping needs the norm over all experts: those of every rank count once, those that ranks repeat not twice."""
    world, sizes = layout
    found = workers.run(world, update_checks.changes, path=models["qwen3_moe"], **sizes)[0]
    wrong = errors(found, expected_updates)
    assert max(wrong.values()) < TOLERANCE, max(wrong, key=wrong.get)


TP2_EP2 = dict(tp=2, sp=True, expert_model_parallel_size=2)


def test_a_run_resumes_bit_for_bit_and_in_another_layout(workers, models, tmp_path):
    path = models["qwen3_moe, every second layer dense"]
    workers.run(4, checkpoint_checks.check_bitwise_resume, path=path, run_dir=str(tmp_path / "a"), **TP2_EP2)
    workers.run(4, checkpoint_checks.save_reference, path=path, run_dir=str(tmp_path / "b"), **TP2_EP2)
    for world, sizes in ((1, {}), (4, dict(pp=2, expert_model_parallel_size=2)), (4, dict(expert_model_parallel_size=4))):
        check = checkpoint_checks.check_reshaped_resume
        workers.run(world, check, path=path, run_dir=str(tmp_path / "b"), **sizes)


@pytest.mark.parametrize("name", ["qwen3_moe, every second layer dense", "mixtral"])
def test_a_checkpoint_becomes_the_files_of_the_model(workers, models, tmp_path, name):
    workers.run(4, checkpoint_checks.save_reference, path=models[name], run_dir=str(tmp_path), **TP2_EP2)
    expected = load_file(tmp_path / "reference.safetensors")
    arch = Architecture.from_hf(models[name])
    stored = dict(StoredWeights(files.newest(tmp_path), arch).stream(torch.float32))
    assert stored.keys() == expected.keys() - {checkpoint_checks.LOSSES}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored.items())


# -- adapters, which only attention has


ADAPTER_LAYOUTS = {
    "one process": (1, dict()),
    "TP2 EP2, recomputed": (4, dict(tp=2, ep=2, sp=True, recompute="full", microbatch_tokens=64)),
    "TP2 PP2 EP2": (4, dict(tp=2, pp=2, ep=2, sp=True, microbatch_tokens=64)),
}


ADAPTED = "qwen3_moe, every second layer dense"  # in dense layers too, only attention has adapters


@pytest.fixture(scope="module")
def adapter(models, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("adapter") / "peft"
    return write_adapter(models[ADAPTED], path, ["q_proj", "k_proj", "v_proj", "o_proj"])


@pytest.fixture(scope="module")
def adapter_gradient(models, adapter) -> dict:
    return gradient_checks.group_loss_gradient(models[ADAPTED], SETTINGS, adapter)


@pytest.mark.parametrize("layout", ADAPTER_LAYOUTS.values(), ids=ADAPTER_LAYOUTS)
def test_the_gradient_of_adapters_is_that_of_peft(workers, models, adapter, adapter_gradient, layout):
    world, sizes = layout
    check, arguments = gradient_checks.step_gradient, dict(path=models[ADAPTED], lora=LORA, adapter=adapter)
    gradient = workers.run(world, check, objective=SETTINGS, **arguments, **sizes)[0]
    assert relative_error(gradient, adapter_gradient) < 1e-5


@pytest.mark.parametrize("name", [ADAPTED, "mixtral"])
def test_peft_loads_the_adapters_of_a_mixture(workers, models, tmp_path, name):
    out = str(tmp_path / "adapter")
    check, arguments = lora_checks.export_trained, dict(path=models[name], lora=LORA, out=out)
    trained = workers.run(4, check, **arguments, **TP2_EP2)[0]
    model = PeftModel.from_pretrained(gradient_checks.hugging_face_model(models[name]), out)
    with torch.no_grad():
        logprobs = torch.cat(gradient_checks.response_logprobs(model.double(), gradient_checks.example_batch()))
    torch.testing.assert_close(trained.double(), logprobs, rtol=0, atol=1e-5)


def test_a_mixture_leaves_no_threads_behind(workers, models):
    """Each group of a layout has threads; megatron-core's dispatchers would keep the model, and with it the groups, alive."""
    layout, path = dict(tp=2, sp=True, ep=2), models["qwen3_moe"]
    counts = []
    for _ in range(3):
        workers.run(2, gradient_checks.expert_load, path=path, **layout)
        counts.append(workers.run(2, gradient_checks.threads_without_model_parallel)[0])
    assert counts[0] == counts[1] == counts[2]
