"""The optimizer's updates: AdamW's of torch in float64 for every family, whatever the layout, with what is decayed."""

from dataclasses import replace

import pytest
import update_checks as checks
from test_lora import LORA, write_adapter
from tiny_models import make_tiny

from frpo_nemo.megatron import weight_decay

MODELS = {  # with biases of q, k and v: qwen2; with norms of q and k: qwen3
    "llama": dict(family="llama"),
    "llama, tied": dict(family="llama", tied=True),
    "mistral": dict(family="mistral"),
    "qwen2": dict(family="qwen2"),
    "qwen2, tied": dict(family="qwen2", tied=True),
    "qwen3": dict(family="qwen3"),
    "qwen3, tied": dict(family="qwen3", tied=True),
}
LAYOUTS = {
    "one process": dict(world=1),
    "DP2": dict(world=2),
    "TP2": dict(world=2, tp=2),
    "TP2 with sequence parallelism": dict(world=2, tp=2, sp=True),
    "PP2": dict(world=2, pp=2),
}
ALL_AT_ONCE = dict(world=4, tp=2, pp=2, sp=True)
TOLERANCE = 2e-4  # of each weight's update, in its norm


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    return {name: make_tiny(directory / name, layers=2, **options) for name, options in MODELS.items()}


@pytest.fixture(scope="module")
def expected(models):
    return {name: checks.changes_by_adamw(path) for name, path in models.items()}


@pytest.fixture(scope="module")
def adapter(models, tmp_path_factory):
    return write_adapter(models["qwen2, tied"], tmp_path_factory.mktemp("adapter") / "peft")


def run(workers, check, layout: dict, **arguments):
    """Return what `check` returns on rank 0."""
    return workers.run(layout["world"], check, **{k: v for k, v in layout.items() if k != "world"}, **arguments)[0]


def errors(found: dict, wanted: dict) -> dict[str, float]:
    """Return name -> |difference| / |wanted|."""
    assert found.keys() == wanted.keys()
    return {name: ((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_three_updates_are_those_of_adamw_in_every_layout(workers, models, expected, name, layout):
    found = errors(run(workers, checks.changes, LAYOUTS[layout], path=models[name]), expected[name])
    assert max(found.values()) < TOLERANCE, max(found, key=found.get)


@pytest.mark.parametrize("name", ["qwen2, tied", "qwen3"])
def test_three_updates_are_those_of_adamw_in_tensor_and_pipeline_parallel_together(workers, models, expected, name):
    found = errors(run(workers, checks.changes, ALL_AT_ONCE, path=models[name]), expected[name])
    assert max(found.values()) < TOLERANCE, max(found, key=found.get)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_updates_of_adapters_are_those_of_adamw_on_peft(workers, models, adapter, layout):
    path = models["qwen2, tied"]
    changes = run(workers, checks.changes, LAYOUTS[layout], path=path, lora=LORA, adapter=adapter)
    found = errors(changes, checks.changes_by_adamw(path, adapter))
    assert max(found.values()) < TOLERANCE, max(found, key=found.get)


def test_the_comparison_notices_what_should_not_be_decayed(workers, models, expected):
    changes = run(workers, checks.changes, LAYOUTS["one process"], path=models["qwen2"], rule=weight_decay.EVERYTHING)
    found = errors(changes, expected["qwen2"])
    vectors = [name for name in found if name.endswith(("norm.weight", ".bias"))]
    assert vectors and all(found[name] > 10 * TOLERANCE for name in vectors)


# -- what is decayed


def assert_decayed(factors: dict[str, float], *, vectors: bool) -> None:
    kept = 1 - checks.OPTIM.lr * checks.OPTIM.weight_decay
    for name, factor in factors.items():
        is_vector = name.endswith(("norm.weight", ".bias"))
        assert factor == pytest.approx(kept if vectors or not is_vector else 1.0, abs=1e-7), name


def names_of_all_kinds(factors: dict[str, float]) -> bool:
    return all(
        any(kind in name for name in factors) for kind in ("q_norm", "layernorm", "model.norm", "embed", "lm_head")
    )


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), ALL_AT_ONCE], ids=[*LAYOUTS, "all at once"])
def test_weight_decay_shrinks_matrices_and_leaves_norms_and_biases_alone(workers, models, layout):
    factors = run(workers, checks.shrinkage, layout, path=models["qwen3"])
    assert names_of_all_kinds(factors)
    assert_decayed(factors, vectors=False)
    assert_decayed(run(workers, checks.shrinkage, layout, path=models["qwen2, tied"]), vectors=False)


def test_weight_decay_in_bf16_leaves_norms_and_biases_alone(workers, models):
    strong = replace(checks.OPTIM, weight_decay=30.0)  # one that bf16 can show
    factors = run(workers, checks.shrinkage, LAYOUTS["DP2"], path=models["qwen2"], precision="bf16", optim=strong)
    for name, factor in factors.items():
        assert factor == (1.0 if name.endswith(("norm.weight", ".bias")) else pytest.approx(0.7, rel=0.01)), name


@pytest.mark.parametrize("before", [True, False], ids=["begun before", "new"])
def test_a_resumed_run_decays_as_it_began(workers, models, tmp_path, before):
    arguments = dict(path=models["qwen2"], run_dir=str(tmp_path), as_recorded_before=before)
    assert_decayed(run(workers, checks.shrinkage_after_resume, LAYOUTS["TP2"], **arguments), vectors=before)


def test_the_rule_of_a_run_is_said_in_a_sentence():
    def said(rule, adapters=False, weight_decay_=0.1):
        return weight_decay.describe(weight_decay_, rule, adapters=adapters)

    assert said(weight_decay.MATRICES).endswith("to embeddings and linear layers, not to norms and biases")
    assert "norms and biases included, as when this run began" in said(weight_decay.EVERYTHING)
    assert said(weight_decay.EVERYTHING, adapters=True) == said(weight_decay.MATRICES, adapters=True)
    assert said(weight_decay.MATRICES, weight_decay_=0.0) == "optim.weight_decay=0: no weights are decayed"
