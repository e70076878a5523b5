"""Conversion from GGUF gives the original model, for every family and storage type, or one error sentence."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import conversion_checks as checks
import gguf
import numpy as np
import pytest
import torch
from gguf_files import LLAMA3, make_source, rope_factors, write_gguf
from published_tokenizers import tokenizer_files
from test_convert import in_own_process
from transformers import AutoModelForCausalLM, GenerationConfig

from frpo_nemo.config.overrides import CONFIGS
from frpo_nemo.conversion.convert import convert
from frpo_nemo.conversion.gguf_tokenizer import build_tokenizer
from frpo_nemo.conversion.inputs import ConvertRun
from frpo_nemo.data.tokenizer import SAMPLE, check_read_alike, load_tokenizer
from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.rollout.chat import stop_token_ids


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("gguf") / "llama", "llama", layers=2)


@pytest.fixture(scope="module")
def file(source, tmp_path_factory):
    return write_gguf(source, tmp_path_factory.mktemp("gguf") / "model.gguf")


def converted(file: Path, out: Path, **options) -> Path:
    return convert(ConvertRun(input=str(file), out=str(out), **options))


@torch.no_grad()
def logits(model: str | Path) -> torch.Tensor:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return loaded(torch.arange(200).view(1, -1)).logits


# -- the same model


@pytest.mark.parametrize("kind, dtype", [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
@pytest.mark.parametrize(
    "family, options",
    [
        ("llama", {}),  # Llama 3.1's scaling
        ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0), tied=True)),
        ("mistral", {}),
        ("qwen2", {}),  # biases
        ("qwen3", dict(tied=True)),  # norms of q and k; head_dim is not hidden_size / heads
    ],
)
def test_floats_give_the_very_weights_and_logits(tmp_path, family, options, kind, dtype):
    source = make_source(tmp_path / "source", family, layers=2, dtype=dtype, **options)
    out = converted(
        write_gguf(source, tmp_path / "model.gguf", kind), tmp_path / "out", max_shard_gb=checks.SHARD_BYTES / 1e9
    )
    expected, found = checks.tensors(Path(source)), checks.tensors(out)
    assert expected.keys() == found.keys() and len(list(out.glob("*.safetensors"))) > 1
    for name, tensor in expected.items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor), name
    assert torch.equal(logits(out), logits(source))
    theirs, ours = Architecture.from_hf(source), Architecture.from_hf(out)
    family = "llama" if family == "mistral" else family
    assert replace(ours, source="") == replace(theirs, source="", family=family)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_q8_0_is_within_its_rounding(tmp_path, family):
    source = make_source(tmp_path / "source", family, layers=2)
    out = converted(write_gguf(source, tmp_path / "model.gguf", "Q8_0"), tmp_path / "out")
    for name, tensor in checks.tensors(Path(source)).items():
        found = checks.tensors(out)[name]
        assert found.dtype == torch.float32, "what is quantised has no dtype, and float32 holds it exactly"
        if tensor.dim() == 1:
            assert torch.equal(found, tensor), name
            continue
        blocks = tensor.view(-1, 32)
        step = blocks.abs().amax(1, keepdim=True) / 127  # stored in float16: 11 digits
        assert ((found.view(-1, 32) - blocks).abs() <= step * (0.5 + 127 / 2**11)).all(), name
        assert not torch.equal(found, tensor), "was it quantised?"
    gap = logits(out).log_softmax(-1) - logits(source).log_softmax(-1)
    assert 0 < gap.abs().mean() < 0.03


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_other_quantisations_give_what_the_package_gguf_makes_of_them(tmp_path, source, kind):
    out = converted(write_gguf(source, tmp_path / "model.gguf", kind), tmp_path / "out")
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        as_type = gguf.GGMLQuantizationType[kind]
        stored = gguf.quantize(checks.tensors(Path(source))[name].numpy(), as_type)
        assert np.array_equal(checks.tensors(out)[name].numpy(), gguf.dequantize(stored, as_type)), name


def test_weights_are_written_in_the_dtype_that_is_asked_for(tmp_path, source, file):
    out = converted(file, tmp_path / "out", dtype="bfloat16")
    for name, tensor in checks.tensors(Path(source)).items():
        assert torch.equal(checks.tensors(out)[name], tensor.bfloat16()), name
    assert Architecture.from_hf(out).dtype == "bfloat16"


def test_a_weight_that_float16_cannot_hold_is_named(tmp_path, source):
    large = np.full((290, 128), 1e5, dtype=np.float32)[: Architecture.from_hf(source).vocab_size]
    file = write_gguf(source, tmp_path / "model.gguf", tensors_besides={"output.weight": large})
    with pytest.raises(ConfigError, match="lm_head.weight has a value that float16 cannot hold"):
        converted(file, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_memory_is_a_file_and_a_weight_whatever_the_size_of_the_model(tmp_path):
    sizes = dict(hidden_size=256, intermediate_size=1024, head_dim=64, layers=20)
    file = write_gguf(make_source(tmp_path / "source", "llama", **sizes), tmp_path / "model.gguf", "F16")
    shard, weight, chunk = 4_000_000, 1024 * 256 * 2, 1024 * 256 * 4  # a matrix at once, in float32
    assert file.stat().st_size > 6 * shard
    options = dict(input=str(file), max_shard_gb=shard / 1e9)
    warm, measured = options | {"out": str(tmp_path / "warm")}, options | {"out": str(tmp_path / "out")}
    [peak] = in_own_process(checks.peaks, warm, [measured])
    metadata = 4_000_000  # of which the package gguf makes many small arrays
    assert peak < shard + weight + 3 * chunk + metadata, peak


# -- what goes with it


def test_tokenizer_template_end_of_turn_and_licence_are_the_files(tmp_path, source, file):
    out = converted(file, tmp_path / "out")
    theirs, ours = load_tokenizer(source), load_tokenizer(str(out))
    ids = theirs.encode(SAMPLE + "<|user|> <|use", add_special_tokens=False)
    assert ours.encode(SAMPLE + "<|user|> <|use", add_special_tokens=False) == ids and ours.decode(
        ids
    ) == theirs.decode(ids)
    assert ours.chat_template == theirs.chat_template
    for name in ("bos_token", "eos_token", "pad_token", "all_special_ids"):
        assert getattr(ours, name) == getattr(theirs, name), name
    check_read_alike(str(out))  # by transformers' AutoTokenizer, as vLLM does
    vocabulary = theirs.get_vocab()
    ends = sorted([vocabulary["<|endoftext|>"], vocabulary["<|user|>"]])
    assert GenerationConfig.from_pretrained(out).eos_token_id == ends == stop_token_ids(str(out), ours)
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card and "# Tiny" in card and "21 in F32, all written in float32" in card
    assert str(tmp_path) not in card


def published(name: str) -> tuple[dict, dict]:
    """Return (the published tokenizer.json, the metadata that llama.cpp's converter writes of it)."""
    content = json.loads((tokenizer_files(name) / "tokenizer.json").read_text())
    added = {token["content"]: token for token in content["added_tokens"]}
    vocabulary = content["model"]["vocab"] | {text: token["id"] for text, token in added.items()}
    tokens = [f"[PAD{index}]" for index in range(max(vocabulary.values()) + 1)]
    kinds = [int(gguf.TokenType.UNUSED)] * len(tokens)
    for text, index in vocabulary.items():
        tokens[index], kind = text, gguf.TokenType.NORMAL
        if text in added:
            kind = gguf.TokenType.CONTROL if added[text]["special"] else gguf.TokenType.USER_DEFINED
        kinds[index] = int(kind)
    return content, {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}


MERGES = {"qwen3": "qwen2", "qwen2_5": "qwen2", "llama3_1": "llama-bpe", "mistral_nemo": "tekken"}


@pytest.mark.parametrize("name", [*MERGES, "llama2"])
def test_published_tokenizers_come_back(name):
    """What cuts text into words, and what a file leaves to the reader: NFC, whole words before merges, merges by score."""
    content, fields = published(name)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    if name in MERGES:
        fields |= {
            "model": "gpt2",
            "pre": MERGES[name],
            "merges": merges,
            "bos_token_id": 1 if name == "mistral_nemo" else 128_000,
        }
    else:
        rank: dict[str, int] = {}
        for index, merge in enumerate(merges):
            rank.setdefault(merge.replace(" ", ""), index)
        scores = [-float(rank.get(token, 1e9)) for token in fields["tokenizer.ggml.tokens"]]
        fields |= {"model": "llama", "scores": scores, "unknown_token_id": 0, "bos_token_id": 1}
    ours = build_tokenizer({k if "." in k else f"tokenizer.ggml.{k}": v for k, v in fields.items()})
    theirs = load_tokenizer(str(tokenizer_files(name)))
    texts = [SAMPLE, "  two  spaces 1234567 and WE'LL\n\n\n x", "cafe\u0301 \U0001f600\u200d", "internationalization",
             "a <|im_end|> <|eot_id|> </s> b", " <think>\nsupercalifragilistic"]  # fmt: skip
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == ids, text
        assert ours.decode(ids) == theirs.decode(ids), text
    begins_with_bos = not name.startswith("qwen")
    assert (ours.encode("hi")[0] == fields["bos_token_id"]) == begins_with_bos


# -- verification, and the command line


def test_a_verified_conversion_from_the_command_line(file, tmp_path):
    recipe = CONFIGS.parent / "recipes/convert.py"
    command = [sys.executable, str(recipe), f"input={file}", f"out={tmp_path / 'out'}", "--verify"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "transformers and Megatron differ by" in done.stdout and done.stderr == ""
    assert (tmp_path / "out/config.json").is_file()


def test_what_does_not_pass_verification_gets_no_name(file, tmp_path):
    sentence = in_own_process(checks.unpermuted, str(file), str(tmp_path / "out"))
    assert "fp32: the max may be 0.0001): the conversion is wrong" in sentence
    assert not (tmp_path / "out").exists()


# -- what is given


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(fields={"general.architecture": "phi3"}), "architecture 'phi3'; supported are llama, qwen2, qwen3"),
        (dict(fields={"llama.expert_count": 8}), "is a mixture of experts"),
        (dict(fields={"llama.block_count": None}), "llama.block_count must be one number for all layers, and .* lacks it"),
        (dict(fields={"llama.attention.head_count_kv": [2, 4]}), "head_count_kv must be one number .* has .2, 4."),
        (dict(fields={"llama.rope.dimension_count": 16}), "partial_rotary_factor=0.5"),
        (dict(fields={"llama.feed_forward_length": 64}), r"ffn_gate.weight has shape \[192, 128\]; .* gives \[64, 128\]"),
        (dict(fields={"split.count": 3}), "is one of 3 parts; join them first"),
        (dict(fields={"tokenizer.ggml.pre": "refact"}), "cuts text into words by 'refact' .*; known are gpt-2, smollm"),
        (dict(fields={"tokenizer.ggml.pre": None}), "cuts text into words by None"),
        (dict(fields={"tokenizer.ggml.model": "bert"}), "a tokenizer of kind 'bert'"),
        (dict(fields={"tokenizer.ggml.merges": None}), "has no tokenizer.ggml.merges"),
        (dict(fields={"tokenizer.ggml.eos_token_id": 999}), "has tokenizer.ggml.eos_token_id=999, but only 286 tokens"),
        (dict(fields={"llama.attention.head_count": 0}), "has num_attention_heads=0"),
        (dict(leave_out="blk.1.ffn_up.weight"), "lacks blk.1.ffn_up.weight"),
        (dict(tensors_besides={"blk.0.attn_q.bias": np.ones(128, np.float32)}), "has blk.0.attn_q.bias, which is not supp"),
        (dict(tensors_besides={"rope_freqs.weight": np.linspace(1, 8, 16, dtype=np.float32)}), "scales .* by factors"),
        (dict(leave_out="rope_freqs.weight", fields={"llama.rope.scaling.type": "yarn"}), "scales .* by 'yarn'"),
        (dict(raw={"blk.0.ffn_down.weight": (np.ones((128, 192), np.int8), gguf.GGMLQuantizationType.I8)}),
         "has tensors in I8, which gguf .* cannot dequantise; take another quantisation"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_one_sentence_before_anything_is_written(source, tmp_path, changes, sentence):
    file = write_gguf(source, tmp_path / "model.gguf", **changes)
    with pytest.raises(ConfigError, match=sentence):
        converted(file, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [file]


def test_a_scaling_of_the_rotary_embedding_that_cannot_be_told_from_its_factors_is_refused(tmp_path):
    other = dict(LLAMA3, low_freq_factor=1.5, original_max_position_embeddings=4096)
    source = make_source(tmp_path / "source", "llama", layers=1, rope_parameters=other)
    assert rope_factors(Architecture.from_hf(source)).max() == 8
    file = write_gguf(source, tmp_path / "model.gguf")
    with pytest.raises(
        ConfigError, match="factors .rope_freqs.weight. that Llama 3's scaling with low_freq_factor=1.0"
    ):
        converted(file, tmp_path / "out")


def test_a_quantisation_newer_than_the_package_is_one_sentence(file, tmp_path):
    content, name = bytearray(file.read_bytes()), b"blk.0.attn_q.weight"
    place = content.index(name) + len(name) + 4 + 2 * 8  # the number of dimensions, and two of them
    assert content[place : place + 4] == bytes(4), "F32"
    content[place] = 200
    newer = tmp_path / "newer.gguf"
    newer.write_bytes(content)
    with pytest.raises(ConfigError, match="a quantisation that gguf .* does not know .*200.* is not a valid"):
        converted(newer, tmp_path / "out")


def test_a_file_that_is_cut_anywhere_is_one_sentence(file, tmp_path):
    content, cut = file.read_bytes(), tmp_path / "cut.gguf"
    for part in [*range(0, 64, 5), *range(100, len(content) - 32, len(content) // 40), len(content) - 33]:
        cut.write_bytes(content[:part])
        with pytest.raises(ConfigError, match="cut.gguf is (cut off or damaged|not a GGUF file)"):
            converted(cut, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [cut]


def test_what_is_no_gguf_file_is_said(tmp_path, source):
    weights = next(Path(source).glob("*.safetensors"))
    with pytest.raises(ConfigError, match="is not a GGUF file: it begins with"):
        converted(weights, tmp_path / "out")
    with pytest.raises(ConfigError, match="absent.gguf is neither a checkpoint .*, nor a GGUF file"):
        converted(tmp_path / "absent.gguf", tmp_path / "out")


def test_options_of_runs_do_not_fit_a_file(file, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="adapter=true, but input=.* holds no adapters"):
        converted(file, tmp_path / "out", adapter=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").touch()
    with pytest.raises(ConfigError, match="exists and is not an exported model"):
        converted(file, tmp_path / "notes")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="reading GGUF files needs gguf: pip install gguf"):
        converted(file, tmp_path / "out")
