"""The policy of Transformer Engine's layers against the table of weights: names, shapes, marks and keys of checkpoints. The
layers are Transformer Engine's own; only its compiled part has a stand-in, so nothing is computed."""

import pytest
import te_stand_in
from layouts import EXPERT_LAYOUTS, LAYOUTS
from tiny_models import EXPERT_FAMILIES, FAMILIES

if not te_stand_in.is_possible():
    pytest.skip("Transformer Engine is not installed; make test STACK=gpu has it", allow_module_level=True)
# Split over tensor ranks: columns by rows of the weight, rows by its columns. Everything else is on all of them.
SPLIT = (
    "embedding.word_embeddings.weight",
    "output_layer.weight",
    "linear_qkv.weight",
    "linear_qkv.bias",
    "linear_proj.weight",
    "linear_fc1.weight",
    "linear_fc2.weight",
    "linear_qkv.lora.b",
    "linear_proj.lora.a",
    "linear_fc1.lora.b",
    "linear_fc2.lora.a",
)


@pytest.fixture(params=LAYOUTS)
def layout(request) -> str:
    return request.param


@pytest.fixture(params=(False, True), ids=("", "LoRA"))
def lora(request) -> bool:
    return request.param


@pytest.fixture(params=(False, True), ids=("", "tied"))
def tied(request) -> bool:
    return request.param


@pytest.fixture(params=FAMILIES)
def stages(request, tied, lora, layout, te_facts) -> list[dict]:
    """Return the facts about every pipeline stage of one model."""
    found = te_facts(kind="layers", family=request.param, tied=tied, lora=lora, layout=layout)
    assert len(found) == LAYOUTS[layout].get("pipeline_model_parallel_size", 1)
    return found


def test_every_parameter_is_one_weight_of_the_table(stages):
    for facts in stages:
        assert facts["on_meta"] == facts["parameters"], "made on the meta device and on a real one"
        # The one layer of megatron-core's own puts its weight on CUDA, whatever the default device is.
        assert all(name.endswith(("word_embeddings.weight", "output_layer.weight")) for name in facts["not_on_meta"])
        assert sorted(facts["bound"]) == sorted([name, shape] for name, shape in facts["on_meta"].items())


def test_the_layers_are_those_of_transformer_engine(stages, lora):
    layer = "decoder.layers.0"
    for facts in stages:
        classes = facts["classes"]
        for linear in ("self_attention.linear_qkv", "mlp.linear_fc1"):
            assert classes[f"{layer}.{linear}"] == (
                "TEColumnParallelLinear" if lora else "TELayerNormColumnParallelLinear"
            )
        for linear in ("self_attention.linear_proj", "mlp.linear_fc2"):
            assert classes[f"{layer}.{linear}"] == "TERowParallelLinear"
        assert classes[f"{layer}.self_attention.core_attention"] == "TEDotProductAttention"


def test_marks_say_what_tensor_ranks_share(stages, layout):
    """The gradient norm counts unmarked parameters once; under sequence parallelism their gradients are summed."""
    sequence_parallel = LAYOUTS[layout].get("sequence_parallel", False)
    for facts in stages:
        for name, marks in facts["marks"].items():
            split = name.endswith(SPLIT)
            assert marks == [sequence_parallel and not split, split], name


def test_checkpoints_have_the_keys_that_the_table_reads(stages):
    for facts in stages:
        assert {key for each in stages for key in each["saved"]} == set(facts["read"])
        assert facts["extra_states"] > 0, "Transformer Engine's pickles, which are left out"


@pytest.mark.parametrize("lora", (False, True), ids=("", "LoRA"))
@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_experts_are_weights_of_the_table_that_count_on_every_rank(family, layout, lora, te_facts):
    """Experts are parameters of one grouped layer there. Each rank's are its own, so their gradients' norms are added."""
    stages = te_facts(kind="expert layers", family=family, lora=lora, layout=layout)
    assert len(stages) == EXPERT_LAYOUTS[layout].get("pipeline_model_parallel_size", 1)
    for facts in stages:
        assert facts["on_meta"] == facts["parameters"]
        assert sorted(facts["bound"]) == sorted([name, shape] for name, shape in facts["on_meta"].items())
        experts = {name: marks for name, marks in facts["marks"].items() if ".experts." in name}
        assert experts and all(tensor_parallel for _, tensor_parallel in experts.values())
        routers = [marks for name, marks in facts["marks"].items() if "router" in name]
        assert routers == [[EXPERT_LAYOUTS[layout].get("sequence_parallel", False), False]] * len(routers)
        assert {key for each in stages for key in each["saved"]} <= set(facts["read"])
    assert lora or {key for each in stages for key in each["saved"]} == set(stages[0]["read"])
