"""The table of weights and the files around it, in one process without groups; parity_checks.py runs the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, make_tiny

from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.weights.export import _plan_shards, check_replaceable
from frpo_nemo.megatron.weights.table import WeightLayout, check_complete, hf_shapes, weights
from frpo_nemo.megatron.weights.tensors import EMBEDDING, HEAD, ROWS, check_checkpoint

LAYOUTS = [
    WeightLayout(**sizes)
    for sizes in ({}, dict(tp=2), dict(tp=4), dict(pp=2), dict(tp=2, pp=2, first=1), dict(tp=2, pp=4))
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, str]:
    """Return family -> directory of a tiny model; "tied" is a llama with tied embeddings."""
    base = tmp_path_factory.mktemp("tiny")
    models = {family: make_tiny(base / family, family) for family in FAMILIES}
    return {**models, "tied": make_tiny(base / "tied", "llama", tied=True)}


def stage_shapes(arch: Architecture, layout: WeightLayout, stage: int, name_of=lambda weight: weight.names[0]) -> dict:
    return {name_of(weight): weight.shard_shape for weight in weights(arch, layout) if weight.stage == stage}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*FAMILIES, "tied"])
def test_table_covers_every_weight_once_with_either_layer_spec(tiny, name, layout):
    arch = Architecture.from_hf(tiny[name])
    for stage in range(layout.pp):
        check_complete(arch, layout, stage, stage_shapes(arch, layout, stage))
        check_complete(arch, layout, stage, stage_shapes(arch, layout, stage, lambda weight: weight.names[-1]))


@pytest.mark.parametrize("name", [*FAMILIES, "tied"])
def test_table_names_and_shapes_are_those_of_the_saved_model(tiny, name):
    saved = {key: tuple(tensor.shape) for key, tensor in load_file(Path(tiny[name]) / "model.safetensors").items()}
    assert hf_shapes(Architecture.from_hf(tiny[name])) == saved


def test_incomplete_models_are_named(tiny):
    arch, layout = Architecture.from_hf(tiny["qwen2"]), WeightLayout(tp=2)
    shapes = stage_shapes(arch, layout, 0)
    bias = "decoder.layers.3.self_attention.linear_qkv.bias"
    with pytest.raises(ValueError, match=f"should have one parameter called {bias}"):
        check_complete(arch, layout, 0, {name: shape for name, shape in shapes.items() if name != bias})
    with pytest.raises(ValueError, match="not in the table of Hugging Face weights: decoder.layers.0.adapter"):
        check_complete(arch, layout, 0, {**shapes, "decoder.layers.0.adapter": (1,)})
    with pytest.raises(ValueError, match=r"has shape \[5\]; .* at tensor_model_parallel_size=2 gives \[128\]"):
        check_complete(arch, layout, 0, {**shapes, bias: (5,)})


def test_query_groups_are_interleaved_and_cut_by_rank(tiny):
    arch = Architecture.from_hf(tiny["llama"])  # 4 heads, 2 groups, head_dim 32
    qkv = next(w for w in weights(arch, WeightLayout(tp=2)) if w.names[0].endswith("linear_qkv.weight"))
    assert qkv.shard_shape == (128, 128)
    second = [(run.offset, run.source, run.start, run.length) for run in qkv.segments if run.rank == 1]
    assert second == [(0, 0, 64, 64), (64, 1, 32, 32), (96, 2, 32, 32)]
    fewer_heads_than_ranks = next(w for w in weights(arch, WeightLayout(tp=4)) if w.names == qkv.names)
    assert [(r.source, r.start, r.length) for r in fewer_heads_than_ranks.segments if r.rank == 1] == [
        (1, 0, 32),
        (2, 0, 32),
    ]


def rewrite(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda t: t.pop("model.layers.2.mlp.up_proj.weight"), "lacks model.layers.2.mlp.up_proj.weight"),
        (lambda t: t.update({"model.layers.4.x": torch.ones(1)}), "model.safetensors has model.layers.4.x"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(7)}),
            r"model.safetensors: model.norm.weight has shape \[7\]; config.json gives \[128\]",
        ),
    ],
)
def test_files_that_do_not_match_the_config_are_refused(tmp_path, change, sentence):
    path = Path(make_tiny(tmp_path, "llama"))
    rewrite(path, change)
    with pytest.raises(ConfigError, match=sentence):
        check_checkpoint(Architecture.from_hf(path), path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_derived_tensors_in_the_files_are_ignored(tmp_path, dtype):
    path = Path(make_tiny(tmp_path, "llama", tied=True, dtype=dtype, vocab=ROWS + 131))
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    rewrite(path, lambda t: t.update({HEAD: t[EMBEDDING].float().clone()} | frequencies))
    arch = Architecture.from_hf(path)
    assert check_checkpoint(arch, path).keys() >= hf_shapes(arch).keys()


OTHER_HEADS = {
    "other values": lambda embedding: 2 * embedding + 1,
    "one other value in the last row": lambda embedding: embedding + torch.eye(ROWS + 131, 128).flip(0),
    "more rows": lambda embedding: torch.cat([embedding, embedding[:1]]),
    "fewer rows": lambda embedding: embedding[:-1].clone(),
}


@pytest.mark.parametrize("change", OTHER_HEADS.values(), ids=OTHER_HEADS)
def test_an_output_layer_of_its_own_in_a_tied_model_is_refused(tmp_path, change):
    """Dropped, it would leave another model than the one in the files."""
    path = Path(make_tiny(tmp_path, "llama", tied=True, vocab=ROWS + 131))
    rewrite(path, lambda t: t.update({HEAD: change(t[EMBEDDING])}))
    sentence = (
        "model.safetensors has an output layer, lm_head.weight, that differs .* tie_word_embeddings in .*config.json"
    )
    with pytest.raises(ConfigError, match=sentence):
        check_checkpoint(Architecture.from_hf(path), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    if change is OTHER_HEADS["other values"]:
        check_checkpoint(Architecture.from_hf(path), path)


def test_an_output_layer_that_the_index_promises_is_there(tmp_path):
    path = Path(make_tiny(tmp_path, "llama", tied=True))
    weight_map = dict.fromkeys([*hf_shapes(Architecture.from_hf(path)), HEAD], "model.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ConfigError, match="model.safetensors does not hold lm_head.weight"):
        check_checkpoint(Architecture.from_hf(path), path)


def test_unreadable_files_are_refused(tmp_path):
    path = Path(make_tiny(tmp_path, "llama"))
    arch, file = Architecture.from_hf(path), path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ConfigError, match="model.safetensors is not a complete safetensors file"):
        check_checkpoint(arch, path)
    file.unlink()
    with pytest.raises(ConfigError, match="holds no weights"):
        check_checkpoint(arch, path)
    (path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="pickled weights .pytorch_model.bin.*convert the model to safetensors"):
        check_checkpoint(arch, path)


def test_an_index_that_promises_too_much_is_refused(tmp_path):
    path = Path(make_tiny(tmp_path, "llama"))
    arch = Architecture.from_hf(path)
    weight_map = dict.fromkeys(hf_shapes(arch), "model.safetensors")
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {**weight_map, "lm_head.weight": "absent.safetensors"}}))
    with pytest.raises(ConfigError, match="absent.safetensors does not exist, although the index names it"):
        check_checkpoint(arch, path)
    rewrite(path, lambda t: t.pop("lm_head.weight"))
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ConfigError, match="model.safetensors does not hold lm_head.weight"):
        check_checkpoint(arch, path)
    index.write_text("{}")
    with pytest.raises(ConfigError, match="is not an index"):
        check_checkpoint(arch, path)


def test_shards_keep_order_and_size():
    assert _plan_shards({"a": 4, "b": 4, "c": 9, "d": 1}, max_bytes=8) == [["a", "b"], ["c"], ["d"]]


def test_an_export_replaces_only_an_export(tmp_path):
    source = Path(make_tiny(tmp_path / "source", "llama"))
    other = tmp_path / "other"
    check_replaceable(source, other)
    other.mkdir()
    check_replaceable(source, other)
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not an exported model"):
        check_replaceable(source, other)
    with pytest.raises(ConfigError, match="would overwrite the model that it came from"):
        check_replaceable(source, source)
