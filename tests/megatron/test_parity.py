"""Import and export through real models in real layouts, for every family: logits are transformers', bits are kept."""

import parity_checks
import pytest
import torch
from tiny_models import FAMILIES, make_tiny

LAYOUTS = {
    "TP1 PP1": dict(tp=1, pp=1),
    "TP2": dict(tp=2, pp=1),
    "PP2": dict(tp=1, pp=2),
    "TP2 PP2 with sequence parallelism": dict(tp=2, pp=2, sp=True),
    "PP2, one layer on the first stage": dict(tp=1, pp=2, num_layers_in_first_pipeline_stage=1),
    "TP4, more ranks than key-value heads": dict(tp=4, pp=1),
}

MODELS = {
    **{family: dict(family=family) for family in FAMILIES},
    "llama, tied": dict(family="llama", tied=True),
    "qwen3, tied": dict(family="qwen3", tied=True),
    "qwen2, one key-value head": dict(family="qwen2", num_key_value_heads=1),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("models")
    return {name: make_tiny(base / name, **settings) for name, settings in MODELS.items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_logits_of_the_imported_model_equal_transformers(workers, models, name, layout):
    workers.run(layout["tp"] * layout["pp"], parity_checks.check_logits_parity, path=models[name], **layout)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_export_after_import_is_bitwise_equal(workers, models, name, layout):
    workers.run(layout["tp"] * layout["pp"], parity_checks.check_export_bitwise, path=models[name], **layout)


def test_export_in_bf16_is_bitwise_equal_with_replicas(workers, tmp_path):
    path = make_tiny(tmp_path, "qwen3", dtype=torch.bfloat16)
    workers.run(4, parity_checks.check_export_bitwise, path=path, tp=2, pp=1, precision="bf16")


@pytest.mark.parametrize("layout", [dict(tp=1, pp=1), dict(tp=2, pp=2), dict(tp=2, pp=1)], ids=str)
def test_saved_shards_load_again(workers, models, tmp_path, layout):
    """The last layout has two replicas: one of them writes."""
    world = 1 if layout["tp"] == 1 else 4
    for _ in range(2):  # the second export replaces the first
        workers.run(
            world, parity_checks.check_save_round_trip, path=models["qwen2"], out=str(tmp_path / "out"), **layout
        )
