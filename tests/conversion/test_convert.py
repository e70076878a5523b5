"""Conversion: the same bits as from the live model; little memory; complete or absent; and never code."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import conversion_checks as checks
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import make_tiny

from frpo_nemo.config.overrides import CONFIGS
from frpo_nemo.conversion import inputs
from frpo_nemo.conversion.convert import convert
from frpo_nemo.conversion.inputs import ConvertRun
from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.checkpoint import files as checkpoint_files
from frpo_nemo.megatron.weights.files import publish_export

SHARD_GB = checks.SHARD_BYTES / 1e9
WEIGHT = "decoder.layers.mlp.linear_fc2.weight"


def in_own_process(function, *arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def weights_files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.glob("model*.safetensors*")}


# -- the same bits


@pytest.mark.parametrize(
    "family, options, world, layout",
    [
        ("qwen2", {}, 4, dict(tp=2, pp=2, train=True)),  # biases of q, k and v
        ("llama", {}, 4, dict(tp=4)),  # fewer key-value heads than ranks
        ("qwen3", dict(tied=True), 2, dict(pp=2, num_layers_in_first_pipeline_stage=1)),  # norms of q and k
        ("llama", dict(tied=True, dtype=torch.bfloat16), 2, dict(pp=2, precision="bf16")),
        ("mistral", {}, 1, {}),
        ("qwen3", dict(vocab=200, num_attention_heads=6, num_key_value_heads=3, layers=2), 3, dict(tp=3)),  # 384 rows
    ],
)
def test_a_checkpoint_of_any_layout_gives_the_files_of_the_live_model(
    workers, tmp_path, family, options, world, layout
):
    path = make_tiny(tmp_path / "base", family, **options)
    workers.run(world, checks.save_both, path=path, run_dir=str(tmp_path / "run"), **layout)
    out = convert(ConvertRun(input=str(tmp_path / "run"), base=path, out=str(tmp_path / "out"), max_shard_gb=SHARD_GB))
    expected, found = weights_files(tmp_path / "run/live"), weights_files(out)
    assert len(expected) > 2 and found == expected
    for file in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (out / file).read_bytes() == (tmp_path / "run/live" / file).read_bytes()


def test_weights_change_their_dtype_when_asked(model, saved, tmp_path):
    half = convert(ConvertRun(input=str(saved), base=model, out=str(tmp_path / "half"), dtype="float16"))
    for name, tensor in checks.tensors(Path(model)).items():
        assert torch.equal(checks.tensors(half)[name], tensor.half())
    assert Architecture.from_hf(half).dtype == "float16"


def test_a_weight_that_float16_cannot_hold_is_named(workers, model, tmp_path):
    large, name = shutil.copytree(model, tmp_path / "large"), "model.layers.2.mlp.down_proj.weight"
    weights = checks.tensors(large)
    weights[name][3, 5] = -1e5
    save_file(weights, large / "model.safetensors")
    sentence = f"{name} has a value that float16 cannot hold .its largest is 65504"
    workers.run(1, checks.save, path=str(large), run_dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=sentence):
        convert(ConvertRun(input=str(tmp_path / "run"), base=str(large), out=str(tmp_path / "half"), dtype="float16"))
    assert not (tmp_path / "half").exists()


# -- adapters


@pytest.mark.parametrize("family, world, layout", [("qwen2", 4, dict(tp=2, pp=2)), ("llama", 4, dict(tp=4))])
def test_adapters_are_merged_or_written_for_peft_bit_for_bit_as_from_the_live_model(
    workers, tmp_path, family, world, layout
):
    base, run = make_tiny(tmp_path / "base", family), tmp_path / "run"
    workers.run(world, checks.save_adapters, path=base, run_dir=str(run), **layout)
    source = dict(input=str(checkpoint_files.newest(run)), base=base)
    merged = convert(ConvertRun(**source, out=str(tmp_path / "merged"), max_shard_gb=SHARD_GB))
    assert weights_files(merged) == weights_files(run / "live")
    alone = convert(ConvertRun(**source, out=str(tmp_path / "alone"), adapter=True))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (alone / name).read_bytes() == (run / "adapter" / name).read_bytes()
    written = sum(tensor.nbytes for tensor in checks.tensors(alone).values())
    alone_again = ConvertRun(**source, out=str(tmp_path / "alone"), adapter=True)
    assert inputs.check_conversion(alone_again).weight_bytes == written, "no more disk is asked for"
    other = make_tiny(tmp_path / "other", family, seed=1)
    with pytest.raises(ConfigError, match="holds adapters of a base whose weights are not those in .*other"):
        convert(ConvertRun(**source | {"base": other}, out=str(tmp_path / "wrong")))


def test_a_checkpoint_without_adapters_gives_none(model, saved, tmp_path):
    with pytest.raises(ConfigError, match="adapter=true, but input=.* holds no adapters"):
        convert(ConvertRun(input=str(saved), base=model, out=str(tmp_path / "out"), adapter=True))


# -- what is seen of it


def test_a_terminal_shows_progress_and_a_log_does_not(model, saved, tmp_path):
    """The bar ends at the size of the weights; in a file there would be a line for each of its moves."""
    recipe = CONFIGS.parent / "recipes/convert.py"
    command = f"{sys.executable} {recipe} input={saved} base={model} out={tmp_path / 'out'}"
    wide = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    in_terminal = subprocess.run(["script", "-qec", command, "/dev/null"], env=wide, capture_output=True, text=True)
    size = sum(tensor.nbytes for tensor in checks.tensors(Path(model)).values()) / 1e6
    assert f" {size:.1f}/{size:.1f} MB" in in_terminal.stdout, in_terminal.stdout[-500:]
    in_log = subprocess.run(command.split(), capture_output=True, text=True)
    assert in_log.returncode == 0 and in_log.stderr == ""


def test_megatron_core_reads_a_checkpoint(workers, model, saved):
    found = workers.run(1, checks.read_by_megatron, directory=str(saved))[0]
    source = checks.tensors(Path(model))
    down = torch.stack([source[f"model.layers.{i}.mlp.down_proj.weight"] for i in range(4)])
    assert torch.equal(found[WEIGHT], down)
    assert torch.equal(found["output_layer.weight"][:131], source["lm_head.weight"])


# -- memory


def test_memory_is_a_file_and_a_weight_as_it_is_stored_whatever_the_size_of_the_model(workers, tmp_path):
    sizes = dict(hidden_size=256, intermediate_size=1024, head_dim=64, layers=10, vocab=8192)
    model, shard = make_tiny(tmp_path / "model", "llama", dtype=torch.bfloat16, **sizes), 8_500_000
    weight = 8192 * 256 * 2  # the vocabulary's, in bfloat16: half a file
    assert sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) > 3 * shard
    workers.run(1, checks.save_trained, path=model, run_dir=str(tmp_path / "run"))
    saved = next((tmp_path / "run/checkpoints").iterdir())
    assert sum(file.stat().st_size for file in saved.iterdir()) > 20 * shard  # fp32, with an optimizer
    options = dict(input=str(saved), base=model, max_shard_gb=shard / 1e9)
    warm, measured = options | {"out": str(tmp_path / "warm")}, options | {"out": str(tmp_path / "out")}
    [peak] = in_own_process(checks.peaks, warm, [measured])
    limit = shard + 2 * weight  # as it is stored a weight is twice as large
    assert peak < limit + 1_500_000, (peak, limit)


# -- what is given


def test_of_a_run_directory_the_newest_or_the_best_is_converted(workers, model, tmp_path):
    for step in (1, 2):  # the score falls with the step
        workers.run(1, checks.save_both, path=model, run_dir=str(tmp_path / "run"), step=step)
        newest = ConvertRun(input=str(tmp_path / "run"), base=model, out=str(tmp_path / f"newest_{step}"))
        convert(newest)
    best = convert(ConvertRun(input=str(tmp_path / "run"), checkpoint="best", base=model, out=str(tmp_path / "best")))
    first, last = (weights_files(tmp_path / f"newest_{step}") for step in (1, 2))
    assert weights_files(best) == first != last


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(input="{tmp}/nothing"), "is neither a checkpoint .state.json., nor a run directory"),
        (dict(input="{tmp}/empty_run"), "is a run directory without a complete checkpoint"),
        (dict(input="{saved}", base="{other}"), r"another model than base=.*: num_layers=4 \(here 2\)"),
        (dict(input="{saved}", base="{tmp}/absent/model"), "base=.*/absent/model isn't a directory"),
        (dict(input="{saved}", checkpoint="last"), "checkpoint=last must be one of newest, best"),
        (dict(input="{saved}", dtype="int8"), "dtype=int8 must be one of null, float32, bfloat16, float16"),
        (dict(input="{saved}", max_shard_gb=0.0), "max_shard_gb=0.0 must be a number above 0"),
        (dict(input="{saved}", base="{model}", out="{tmp}/notes"), "exists and is not an exported model"),
        (dict(input="{saved}", base="{model}", out="{model}"), "would overwrite the model that it came from"),
        (dict(input="{model}"), "is in Hugging Face format already"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_written(model, saved, tmp_path, options, sentence):
    (tmp_path / "empty_run/checkpoints").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine")
    other = make_tiny(tmp_path / "other", "qwen2", layers=2)
    places = dict(tmp=tmp_path, model=model, saved=saved, other=other)
    options = {"out": str(tmp_path / "out")} | {
        key: value.format(**places) if isinstance(value, str) else value for key, value in options.items()
    }
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=sentence):
        convert(ConvertRun(**options))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_of_training_is_not_replaced(workers, model, tmp_path):
    workers.run(1, checks.save_both, path=model, run_dir=str(tmp_path / "run"))
    trained = checkpoint_files.newest(tmp_path / "run")
    with pytest.raises(ConfigError, match="exists and is not an exported model"):
        convert(ConvertRun(input=str(trained), base=model, out=str(trained)))


def test_an_earlier_conversion_is_replaced_also_behind_a_link(model, saved, tmp_path):
    out, link = tmp_path / "out", tmp_path / "link"
    link.symlink_to(out)
    for name in (out, link):
        earlier = out.stat().st_ino if out.exists() else None
        convert(ConvertRun(input=str(saved), base=model, out=str(name)))
        assert out.stat().st_ino != earlier and link.is_symlink()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "other", ["checkpoint-500/model.safetensors", "optimizer.pt", "tokenizer_mine.py", "docs/a.md"]
)
def test_what_no_conversion_writes_is_not_removed_with_an_earlier_one(model, saved, tmp_path, other):
    out = convert(ConvertRun(input=str(saved), base=model, out=str(tmp_path / "out")))
    (out / other).parent.mkdir(exist_ok=True)
    (out / other).touch()
    with pytest.raises(ConfigError, match=f"{Path(other).parts[0]} in it has another origin"):
        inputs.check_conversion(ConvertRun(input=str(saved), base=model, out=str(out)))  # before seconds of imports


def test_an_export_with_everything_that_an_export_may_have_is_replaced(model, saved, tmp_path):
    base = Path(shutil.copytree(model, tmp_path / "base"))
    (base / "additional_chat_templates").mkdir()
    for name in ("additional_chat_templates/tool.jinja", "LICENSE.txt", "NOTICE", "vocab.json", "merges.txt"):
        (base / name).write_text("x")
    (base / "tokenizer_of_mine.py").write_text("raise SystemExit")
    run = ConvertRun(input=str(saved), base=str(base), out=str(tmp_path / "out"), max_shard_gb=SHARD_GB)
    for _ in range(2):
        out = convert(run)
    assert (out / "additional_chat_templates/tool.jinja").is_file() and (out / "README.md").is_file()
    assert not list(out.rglob("*.py"))


def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "here/below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here/below")
    for out in (".", "..", "../../here"):
        with pytest.raises(ConfigError, match="is the working directory or contains it"):
            convert(ConvertRun(input="anything", out=out))


def test_all_is_on_disk_before_the_name_changes_and_the_old_goes_last(tmp_path, monkeypatch):
    out, new = tmp_path / "out", tmp_path / "out.incomplete"
    for directory in (out, new):
        (directory / "additional_chat_templates").mkdir(parents=True)
        (directory / "additional_chat_templates/a.jinja").touch()
        (directory / "model.safetensors").touch()
    events = []

    def spy(module, name, describe):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (events.append(describe(*a)), real(*a, **k))[1])

    spy(os, "fsync", lambda descriptor: ("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
    spy(Path, "rename", lambda source, target: ("rename", str(target)))
    spy(shutil, "rmtree", lambda path, *rest: ("remove", str(path)))
    written = {("sync", str(path)) for path in (new, *new.rglob("*"))}
    publish_export(new, out)
    named, removed = events.index(("rename", str(out))), events.index(("remove", str(tmp_path / "out.tmp-old")), 7)
    assert written <= set(events[:named])
    assert ("sync", str(tmp_path)) in events[named:removed]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_is_too_small_is_refused(model, saved, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(inputs.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"needs .* MiB of disk; .* has 1e\+03 bytes free"):
        convert(ConvertRun(input=str(saved), base=model, out=str(tmp_path / "a/b/out")))
    assert not list(tmp_path.iterdir())


# -- half of it, and worse


def rewrite_index(checkpoint: Path, change) -> None:
    index = checkpoint / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    change(metadata)
    index.write_bytes(pickle.dumps(metadata))


def drop_chunk(metadata) -> None:
    del metadata.state_dict_metadata[WEIGHT].chunks[2]


def elsewhere(metadata) -> None:
    place = next(place for chunk, place in metadata.storage_data.items() if chunk.fqn == WEIGHT)
    place.relative_path = "../" + place.relative_path


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda c: (c / ".metadata").unlink(), "is not a whole checkpoint: it has no .metadata"),
        (lambda c: (c / ".metadata").write_bytes((c / ".metadata").read_bytes()[:-90]), "its .metadata is cut off"),
        (lambda c: (c / "__0_0.distcp").unlink(), "is not a whole checkpoint: __0_0.distcp is missing"),
        (lambda c: (c / "__0_0.distcp").write_bytes(b"x"), "__0_0.distcp has 1 of at least [0-9]+ bytes"),
        (lambda c: rewrite_index(c, lambda m: m.state_dict_metadata.pop(WEIGHT)), f"lacks {WEIGHT}"),
        (lambda c: rewrite_index(c, drop_chunk), f"it holds only a part of {WEIGHT}"),
        (lambda c: rewrite_index(c, elsewhere), r"refers to \.\./__0_0.distcp outside of its folder; do not load it"),
    ],
)
def test_half_a_checkpoint_is_refused_before_anything_is_written(model, saved, tmp_path, damage, sentence):
    half = shutil.copytree(saved, tmp_path / "half")
    damage(half)
    with pytest.raises(ConfigError, match=sentence):
        convert(ConvertRun(input=str(half), base=model, out=str(tmp_path / "out")))
    assert list(tmp_path.iterdir()) == [half]


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_an_index_that_would_run_code_is_refused(model, saved, tmp_path):
    evil = shutil.copytree(saved, tmp_path / "evil")
    (evil / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    with pytest.raises(ConfigError, match="which no checkpoint of frpo-nemo does; do not load it"):
        convert(ConvertRun(input=str(evil), base=model, out=str(tmp_path / "out")))
    assert list(tmp_path.iterdir()) == [evil]


def test_a_chunk_that_would_run_code_is_refused_and_nothing_gets_the_name(model, saved, tmp_path):
    evil = shutil.copytree(saved, tmp_path / "evil")
    torch.save(Touch(tmp_path / "ran"), evil / "evil.distcp")

    def point_to_it(metadata) -> None:
        place = next(place for chunk, place in metadata.storage_data.items() if chunk.fqn == WEIGHT)
        place.relative_path, place.offset, place.length = "evil.distcp", 0, (evil / "evil.distcp").stat().st_size

    rewrite_index(evil, point_to_it)
    run = ConvertRun(input=str(evil), base=model, out=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=f"has a chunk of {WEIGHT} that isn't a plain tensor"):
        convert(run)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
    run.input = str(saved)
    convert(run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil", "out"]  # the remains have gone


def test_a_conversion_that_is_killed_leaves_nothing_under_its_name(model, saved, tmp_path):
    options = dict(input=str(saved), base=model, out=str(tmp_path / "out"))
    process = multiprocessing.get_context("spawn").Process(target=checks.die_before_publishing, args=(options,))
    process.start()
    process.join(900)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["out.incomplete"]
    convert(ConvertRun(**options))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# -- verification, and the command line


def test_a_verified_conversion_from_the_command_line(model, saved, tmp_path):
    recipe = CONFIGS.parent / "recipes/convert.py"
    command = [sys.executable, str(recipe), f"input={saved}", f"base={model}", f"out={tmp_path / 'out'}", "--verify"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "transformers and Megatron differ by" in done.stdout and done.stderr == ""
    assert checks.tensors(tmp_path / "out").keys() == checks.tensors(Path(model)).keys()


def test_what_does_not_pass_verification_gets_no_name(model, saved, tmp_path):
    other = make_tiny(tmp_path / "other", "qwen2", seed=1)
    arguments = (model, other, str(saved), str(tmp_path / "out"))
    of_another, of_conversion = in_own_process(checks.verification_errors, *arguments)
    assert "fp32: the max may be 0.0001): the conversion is wrong" in of_another
    assert "the conversion is wrong" in of_conversion
    assert not (tmp_path / "out").exists()


def test_float16_of_weights_with_more_digits_passes_verification(model, saved, tmp_path):
    in_own_process(checks.verify_in_float16, model, str(saved), str(tmp_path))
    assert {tensor.dtype for tensor in checks.tensors(tmp_path / "hf").values()} == {torch.float16}
