"""Benchmarks are lm-eval's and evalplus's own, started with the settings that the table says, and their scores come
back as numbers. The model here says `\\boxed{4}` to every question and `f=int` to every programming task."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import fire
import pytest
import torch
from omegaconf import OmegaConf
from tiny_models import make_tiny, tiny_tokenizer

from frpo_nemo.errors import ConfigError
from frpo_nemo.evaluation.benchmarks import (
    BENCHMARKS,
    BOXED,
    EvaluateRun,
    check_benchmarks,
    check_model,
    command_line,
    model_directory,
    run_benchmarks,
)
from frpo_nemo.training.cli import CONFIGS
from frpo_nemo.training.schema import load

RECIPE = Path(__file__).parents[2] / "recipes" / "evaluate.py"
LM_EVAL = Path(importlib.util.find_spec("lm_eval").origin).parent


def config(model, out, *names, **options) -> EvaluateRun:
    return load(EvaluateRun, {"model": {"path": str(model)}, "out": str(out), "benchmarks": list(names), **options})


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Attention and MLP add nothing, and the output layer maps each character to the next one of an answer."""
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("run") / "hf"
    make_tiny(path, "llama", layers=1, max_position_embeddings=2048)
    speaker, tokenizer = AutoModelForCausalLM.from_pretrained(path), tiny_tokenizer()
    with torch.no_grad():
        for name, parameter in speaker.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        embedding = torch.nn.functional.normalize(speaker.model.embed_tokens.weight)
        speaker.model.embed_tokens.weight.copy_(embedding)
        speaker.model.norm.weight.fill_(1)
        speaker.lm_head.weight.zero_()
        for answer in (":\\boxed{4}", "\nf=int"):  # prompts end with "a:" or, in evalplus, with "```python\n"
            tokens = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
            for token, following in zip(tokens, tokens[1:], strict=False):
                speaker.lm_head.weight[following] += embedding[token]
    speaker.save_pretrained(path)
    return path


def lm_eval_reads(command: list[str]):
    """What lm-eval's own parser and configuration make of a command line."""
    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig

    assert command[:3] == [sys.executable, "-m", "lm_eval"]
    return EvaluatorConfig.from_cli(HarnessCLI()._parser.parse_args(command[3:]))


def test_math500_is_asked_as_in_the_paper(model):
    cfg = config(model, "out", "math500", tensor_parallel_size=4)
    read = lm_eval_reads(command_line(cfg, "math500", model))
    assert (read.model, read.tasks, read.num_fewshot) == ("vllm", ["minerva_math500"], 0)
    assert read.apply_chat_template is True and read.system_instruction == BOXED
    assert read.gen_kwargs == {"max_gen_toks": 2048}  # greedy is the task's own
    assert read.model_args == {"pretrained": str(model), "dtype": "bfloat16", "tensor_parallel_size": 4}
    assert read.batch_size == "auto" and read.limit is None


def test_mmlu_and_ifeval_have_their_usual_settings(model):
    cfg = config(model, "out", "mmlu", "ifeval", limit=5, max_model_len=4096, backend="hf", batch_size=8)
    mmlu, ifeval = (lm_eval_reads(command_line(cfg, name, model)) for name in cfg.benchmarks)
    assert (mmlu.num_fewshot, mmlu.apply_chat_template, mmlu.gen_kwargs) == (5, False, {})
    assert (ifeval.num_fewshot, ifeval.apply_chat_template, ifeval.system_instruction) == (0, True, None)
    for read in (mmlu, ifeval):
        assert read.limit == 5 and read.batch_size == "8"
        assert read.model_args == {"pretrained": str(model), "dtype": "bfloat16", "max_length": 4096}


def test_a_longer_answer_can_be_allowed(model):
    cfg = config(model, "out", "math500", "ifeval", max_gen_tokens=4096)
    for name in cfg.benchmarks:
        assert lm_eval_reads(command_line(cfg, name, model)).gen_kwargs == {"max_gen_toks": 4096}


def test_lm_eval_has_the_tasks_and_its_vllm_backend_the_arguments(model):
    from lm_eval.tasks import TaskManager

    tasks = [LM_EVAL / "tasks" / name for name in ("minerva_math", "mmlu/default", "ifeval")]
    manager = TaskManager(include_path=tasks, include_defaults=False)
    names = {benchmark.task for benchmark in BENCHMARKS.values() if benchmark.tool == "lm_eval"}
    assert names <= set(manager.all_tasks)

    tree = ast.parse((LM_EVAL / "models" / "vllm_causallms.py").read_text())
    backend = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "VLLM")
    init = next(node for node in backend.body if getattr(node, "name", "") == "__init__")
    cfg = config(model, "out", "mmlu", max_model_len=100)
    assert set(lm_eval_reads(command_line(cfg, "mmlu", model)).model_args) <= {a.arg for a in init.args.args}


@pytest.mark.parametrize("name, dataset", [("mbpp_plus", "mbpp"), ("humaneval_plus", "humaneval")])
def test_evalplus_understands_its_command_line(name, dataset, model, tmp_path):
    from evalplus.codegen import run_codegen
    from evalplus.evaluate import evaluate

    command = command_line(config(model, tmp_path, name, tensor_parallel_size=2), name, model)
    assert command[:3] == [sys.executable, "-m", "evalplus.evaluate"]
    read = fire.Fire(lambda **flags: flags, command=command[3:])  # as evalplus reads it
    own = {"model": str(model), "dataset": dataset, "root": str(tmp_path / name), "backend": "vllm"}
    assert read == own | {"dtype": "bfloat16", "tp": 2, "greedy": True}
    assert set(read) <= set(inspect.signature(evaluate).parameters) | set(inspect.signature(run_codegen).parameters)


@pytest.fixture(scope="module")
def evaluated(model, tmp_path_factory, request):
    """(finished process, out) of the recipe on local data: two problems of each kind, and one benchmark without data."""
    data = tmp_path_factory.mktemp("data")
    write_lines(data / "math.jsonl", [{"problem": f"{n} + 2?", "solution": f"\\boxed{{{n + 2}}}"} for n in (2, 3)])
    task = {
        "include": str(LM_EVAL / "tasks/minerva_math/minerva_math500.yaml"),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(data / "math.jsonl")}},
    }
    (data / "minerva_math500.yaml").write_text(json.dumps(task))
    solutions = ("int(text)", "int(text) % 3")  # of which f=int passes 2 and 1 tests
    write_lines(data / "code.jsonl", [problem(i, solution) for i, solution in enumerate(solutions)])
    out = tmp_path_factory.mktemp("evaluated")
    environment = os.environ | {
        "HF_DATASETS_CACHE": str(data / "cache"),
        "XDG_CACHE_HOME": str(data / "cache"),
        "HUMANEVAL_OVERRIDE_PATH": str(data / "code.jsonl"),
        "MBPP_OVERRIDE_PATH": str(data / "missing.jsonl"),
    }
    options = ["backend=hf", "dtype=float32", "batch_size=2", "max_gen_tokens=12", f"include_path={data}"]
    arguments = [f"model.path={model.parent}", "benchmarks=[mbpp_plus,math500,humaneval_plus]", f"out={out}", *options]
    command = [sys.executable, str(RECIPE), *arguments]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, env=environment, cwd=RECIPE.parent, **options)
    request.getfixturevalue("study")  # which the next files need, on the other core
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr), out


def problem(index: int, solution: str) -> dict:
    prompt = 'def f(text):\n    """The number."""\n'
    tests = {"base_input": [["1"]], "plus_input": [["4"]], "atol": 0}
    own = {"task_id": f"HumanEval/{index}", "prompt": prompt, "canonical_solution": f"    return {solution}\n"}
    return own | tests | {"entry_point": "f", "contract": ""}


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_scores_come_from_the_tools(evaluated):
    process, out = evaluated
    scores = json.loads((out / "results.json").read_text())
    assert scores["math500/math_verify"] == 0.5, process.stdout
    assert scores["math500/math_verify_stderr"] == pytest.approx(0.5)  # of two: sqrt(0.5 / 2)
    assert scores["math500/exact_match"] == 0
    assert (scores["humaneval_plus/base_pass@1"], scores["humaneval_plus/pass@1"]) == (1.0, 0.5)


def test_the_model_sees_its_chat_template_and_the_instruction(evaluated):
    (samples,) = (evaluated[1] / "math500").glob("samples_*.jsonl")
    first = json.loads(samples.read_text().splitlines()[0])
    question = first["arguments"]["gen_args_0"]["arg_0"]
    assert question == f"s:{BOXED}\nu:Problem:\n2 + 2?\n\nSolution:\na:"
    assert first["resps"] == [["\\boxed{4}"]]


def test_a_benchmark_that_fails_is_told_and_the_others_go_on(evaluated):
    process, out = evaluated
    assert process.returncode == 1
    assert "mbpp_plus failed: exit code 1; the end of" in process.stdout
    assert "missing.jsonl" in process.stdout.split("math500:")[0]
    assert not (out / "mbpp_plus" / "result.json").exists()
    assert not any(key.startswith("mbpp_plus") for key in json.loads((out / "results.json").read_text()))


def again(model, evaluated, **options) -> EvaluateRun:
    own = {"backend": "hf", "dtype": "float32", "max_gen_tokens": 12}
    before = json.loads((evaluated[1] / "math500" / "result.json").read_text())["settings"]
    return config(model, evaluated[1], "math500", **own, include_path=before["include_path"], **options)


def test_what_is_finished_is_not_repeated(model, evaluated, capsys):
    log = evaluated[1] / "math500" / "benchmark.log"
    before = log.stat().st_mtime_ns
    assert run_benchmarks(again(model, evaluated))
    shown = capsys.readouterr().out
    assert "math500: finished before" in shown and "0.500" in shown
    assert log.stat().st_mtime_ns == before


def test_results_of_other_settings_or_weights_are_not_mixed(model, evaluated):
    with pytest.raises(ConfigError, match="math500/result.json is a result with limit=None, not 5; choose another out"):
        check_model(again(model, evaluated, limit=5))
    weights = model / "model.safetensors"
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    os.utime(weights)
    with pytest.raises(ConfigError, match="is a result with other weights"):
        check_model(again(model, evaluated))
    os.utime(weights, ns=times)
    check_model(again(model, evaluated))


@pytest.mark.parametrize(
    "names, options, sentence",
    [
        (["math50"], {}, "there is no math50; the nearest is math500"),
        (["mbpp"], {}, "there is no mbpp; the nearest is mbpp_plus"),
        (["mmlu"], {"backend": "vlm"}, "backend=vlm must be vllm or hf"),
        (["mmlu"], {"tensor_parallel_size": 2}, "tensor_parallel_size=2 is for backend=vllm"),
        (["mmlu"], {"limit": 0}, "limit=0 must be at least 1"),
        (["mmlu", "mbpp_plus"], {"limit": 3}, "mbpp_plus cannot be limited"),
        (["mmlu"], {"include_path": "nowhere"}, "include_path=nowhere is not a directory"),
        (["math500"], {"antlr_path": "nowhere"}, "--target .*nowhere antlr4-python3-runtime==4.11.0"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(names, options, sentence, model, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        check_benchmarks(config(model, tmp_path, *names, **({"backend": "hf"} | options)))


def test_lm_eval_with_vllm_needs_a_package_of_that_name(model, tmp_path):
    cfg = config(model, tmp_path, "mmlu", backend="vllm")
    if list(importlib.metadata.distributions(name="vllm")):
        check_benchmarks(cfg)
    else:
        with pytest.raises(ConfigError, match="finds no package vllm.*use backend=hf"):
            check_benchmarks(cfg)


def test_a_tool_that_is_missing_is_told_with_the_command_that_installs_it(model, tmp_path, monkeypatch):
    monkeypatch.setitem(BENCHMARKS, "mmlu", dataclasses.replace(BENCHMARKS["mmlu"], tool="lm_eval_of_tomorrow"))
    with pytest.raises(ConfigError, match=r"mmlu: lm_eval_of_tomorrow is not installed: pip install frpo-nemo\[eval\]"):
        check_benchmarks(config(model, tmp_path, "mmlu", backend="hf"))


def test_a_model_is_a_directory_or_the_export_of_a_run(model, tmp_path):
    assert model_directory(str(model)) == model_directory(str(model.parent)) == model
    with pytest.raises(ConfigError, match="has no config.json"):
        model_directory(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="is a run directory without hf/"):
        model_directory(str(tmp_path))


def test_questions_in_a_chat_need_a_chat_template(tmp_path):
    make_tiny(tmp_path / "base", "llama", layers=1)
    (tmp_path / "base" / "chat_template.jinja").unlink()
    for name in ("math500", "ifeval"):
        with pytest.raises(ConfigError, match=f"{name}: the questions go through the model's chat template"):
            check_model(config(tmp_path / "base", tmp_path / "out", name, backend="hf"))
    check_model(config(tmp_path / "base", tmp_path / "out", "mmlu", backend="hf"))


def test_a_directory_of_something_else_is_never_emptied(model, tmp_path):
    (tmp_path / "mmlu").mkdir()
    (tmp_path / "mmlu" / "questions.csv").touch()
    with pytest.raises(ConfigError, match="mmlu exists and is not of an earlier start"):
        run_benchmarks(config(model, tmp_path, "mmlu", backend="hf"))
    assert (tmp_path / "mmlu" / "questions.csv").exists()


def test_every_option_is_documented_with_its_default():
    lines = (CONFIGS / "evaluate.yaml").read_text().split("_self_\n")[1].splitlines()
    documented = OmegaConf.create("\n".join(line.removeprefix("# ") for line in lines))
    defaults = OmegaConf.structured(EvaluateRun)
    assert OmegaConf.to_container(documented) == OmegaConf.to_container(defaults)
    assert all(line.endswith(".") for line in lines if "  # " in line)
